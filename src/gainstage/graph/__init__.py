"""The graph of a model as plain data."""

from gainstage.graph.copies import copied_layers, digest, equal_values, is_random, with_copies
from gainstage.graph.fingerprint import fingerprint
from gainstage.graph.flatten import tensor_leaves
from gainstage.graph.model import (
    Graph,
    ModuleCall,
    Node,
    NodeKind,
    ParameterInfo,
    Provenance,
    Ref,
    TensorMeta,
    short_name,
)
from gainstage.graph.real import as_real, dense, held, is_sharded, real_parameters, whole
from gainstage.graph.region import Region, parameters_of_regions
from gainstage.graph.reuse import FOLLOWED, followed_uses
from gainstage.graph.sameness import is_same

__all__ = [
    "FOLLOWED",
    "Graph",
    "ModuleCall",
    "Node",
    "NodeKind",
    "ParameterInfo",
    "Provenance",
    "Ref",
    "Region",
    "TensorMeta",
    "as_real",
    "copied_layers",
    "dense",
    "digest",
    "equal_values",
    "fingerprint",
    "followed_uses",
    "held",
    "is_random",
    "is_same",
    "is_sharded",
    "parameters_of_regions",
    "real_parameters",
    "short_name",
    "tensor_leaves",
    "whole",
    "with_copies",
]
