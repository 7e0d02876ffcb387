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

__all__ = [
    "Graph",
    "ModuleCall",
    "Node",
    "NodeKind",
    "ParameterInfo",
    "Provenance",
    "Ref",
    "TensorMeta",
    "fingerprint",
    "tensor_leaves",
]
