"""What attentions do at step zero: the variance of their logits over the keys, and the entropy of their probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gainstage.graph import Graph, Node, Ref
from gainstage.propagate import AttentionSignal
from gainstage.roles import Roles
from gainstage.rules.attention import attention_logits
from gainstage.signal import Value
from gainstage.signal.attention import apart, relative_entropy
from gainstage.solve.constraint import Quantity, is_attention, key_variance, measure
from gainstage.solve.initial import readers_of


def attention_signals(graph: Graph, roles: Roles, values: Mapping[str, Any]) -> tuple[AttentionSignal, ...]:
    """One for each product of queries and keys that feeds a softmax, in execution order."""
    return tuple(_signals(graph, roles, values))


def _signals(graph: Graph, roles: Roles, values: Mapping[str, Any]) -> Iterator[AttentionSignal]:
    readers = readers_of(graph)
    for found in roles.logits:
        node = graph.by_name[found.node]
        logits = _fused(node, values) if is_attention(node) else _written_out(node, values, readers)
        if logits is None:
            continue
        yield AttentionSignal(
            node=found.node,
            path=node.provenance.module_path,
            keys=logits.shape[-1],
            logit_variance=measure(Quantity.KEY_VARIANCE, graph, found.node, values),
            entropy=relative_entropy(apart(logits), key_variance(logits)),
        )


def _fused(node: Node, values: Mapping[str, Any]) -> Value | None:
    operands = [values[argument.name] if isinstance(argument, Ref) else argument for argument in node.args]
    if not all(isinstance(operand, Value) for operand in operands[:2]):
        return None
    mask = operands[3] if len(operands) > 3 else values.get(getattr(node.kwargs.get("attn_mask"), "name", ""))
    return attention_logits(
        operands[0],
        operands[1],
        mask,
        is_causal=bool(operands[5] if len(operands) > 5 else node.kwargs.get("is_causal", False)),
        scale=node.kwargs.get("scale"),
        enable_gqa=bool(node.kwargs.get("enable_gqa", False)),
    )


def _written_out(node: Node, values: Mapping[str, Any], readers: Mapping[str, Sequence[Node]]) -> Value | None:
    """The logits, with their mask, that the first softmax after a product was taken of; None where it is over others."""
    seen, stack = {node.name}, [node]
    while stack:
        for reader in readers.get(stack.pop(0).name, ()):
            value = values.get(reader.name)
            if isinstance(value, Value) and value.logits is not None and value.logits.table is value.table:
                return value.logits.of if value.logits.dim == len(value.dims) - 1 else None
            if reader.name not in seen and len(seen) < 64:
                seen.add(reader.name)
                stack.append(reader)
    return None
