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
from gainstage.graph.real import as_real, real_parameters

__all__ = [
    "Graph",
    "ModuleCall",
    "Node",
    "NodeKind",
    "ParameterInfo",
    "Provenance",
    "Ref",
    "TensorMeta",
    "as_real",
    "fingerprint",
    "real_parameters",
    "tensor_leaves",
]
