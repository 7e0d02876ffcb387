"""The graph of a model as plain data."""

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
)
from gainstage.graph.real import as_real, held, is_sharded, real_parameters, whole
from gainstage.graph.region import Region, parameters_of_regions
from gainstage.graph.reuse import FOLLOWED, LOOKUPS, repeated_uses, used_on_own

__all__ = [
    "FOLLOWED",
    "LOOKUPS",
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
    "fingerprint",
    "held",
    "is_sharded",
    "parameters_of_regions",
    "real_parameters",
    "repeated_uses",
    "tensor_leaves",
    "used_on_own",
    "whole",
]
