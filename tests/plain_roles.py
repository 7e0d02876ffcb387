"""Roles written down for a test: what a contraction, a norm, a look-up is, and what the test adds. Nothing is inferred."""

from dataclasses import replace

import torch

from gainstage.capture import capture
from gainstage.graph import NodeKind
from gainstage.policies import find_policy
from gainstage.propagate import input_value
from gainstage.roles import Role, Roles, Use
from gainstage.solve import Present, find_family, solve
from gainstage.solve.constraint import is_contraction, is_lookup
from gainstage.solve.recurrent import is_recurrent

aten = torch.ops.aten
REL = 1e-6  # where the closed form is exact
MOVEMENTS = (aten.t.default, aten.view.default, aten.transpose.int, aten.permute.default, aten.reshape.default)


def uses_of(graph):
    """Every parameter's uses, by the class of the operation that reads it."""
    origin = {node.name: node.parameter for node in graph.nodes if node.kind is NodeKind.PARAMETER}
    found = {name: [] for name in graph.parameters}
    for node in graph.nodes:
        read = [origin[name] for name in node.operands() if name in origin]
        if read and node.op in MOVEMENTS:
            origin[node.name] = read[0]
            continue
        for name in read:
            role, output_dims = _role(node, name, len(graph.parameters[name].shape))
            found[name].append(Use(parameter=name, node=node.name, role=role, output_dims=output_dims))
    return {name: tuple(uses) for name, uses in found.items()}


def _role(node, name, rank):
    if is_recurrent(node):
        return (Role.RECURRENT if rank > 1 else Role.BIAS), (0,)
    if is_lookup(node):
        return Role.EMBEDDING, (0, 1)
    if is_contraction(node):
        transposed = node.op_name.startswith(("aten.conv_transpose", "aten.addmm", "aten.mm", "aten.matmul"))
        return (Role.HIDDEN if rank > 1 else Role.BIAS), (1,) if transposed else (0,)
    if "norm" in node.op_name:
        return (Role.NORM_SCALE if name.endswith("weight") else Role.NORM_SHIFT), (0,)
    return (Role.SLOPE if "prelu" in node.op_name else Role.KEPT), (0,)


def as_role(uses, name, role, **changes):
    """Give the only use of a parameter another role; returns that use."""
    (use,) = uses[name]
    uses[name] = (replace(use, role=role, **changes),)
    return uses[name][0]


def solved(model, args, policy="unit", *, add=None, family="normal", moments=None, kept=None):
    """Plan of a model, with roles by operation and what ``add(graph, uses)`` says: streams, merges, logits, heads."""
    graph = capture(model, args)
    uses = uses_of(graph)
    further = {} if add is None else add(graph, uses)
    return solve(
        graph,
        Roles(uses=uses, **further),
        find_policy(policy),
        present=Present(moments=moments or (lambda name: None), kept=kept or {}),
        source=lambda node: input_value(node.name, node.value, node.meta.shape),
        family=find_family(family),
    )


def variance(plan, name):
    return plan.parameters[name].distribution.std ** 2


def nodes_of(graph, op):
    return [node for node in graph.nodes if node.op_name.startswith(f"aten.{op}")]
