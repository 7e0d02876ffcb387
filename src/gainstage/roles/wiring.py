"""A graph with what every walk over it needs, from a few sweeps: what is a signal, what is a weight, who reads whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from gainstage.graph import Graph, Node, NodeKind, TensorMeta
from gainstage.graph.families import (
    ATTENTION,
    BOUNDED,
    CONTRACTIONS,
    JOINING,
    LOOKUP,
    MODELS_ONLY,
    MOVEMENT,
    NOISE,
    NORMS,
    PLACED,
    POOLING,
    RECURRENT,
    operand,
    places,
)
from gainstage.roles.degrees import Degrees, degrees_of

LINEAR, NONLINEAR, SATURATING = 0, 1, 2  # how a tensor comes from the last contraction before it


@dataclass(frozen=True, slots=True)
class Wiring:
    """Nodes by number, in execution order.

    ``signals``: operands that carry a signal, each once, in order; empty for what carries none. A weight is a value that
    depends on parameters and constants only and is not data: ``weights`` has its degree in the scale of each parameter.
    ``main``: the operand that a one-operand step (movement, dropout, pooling, activation, norm, scaling) goes back to, or -1.
    ``shape_of_gain``: LINEAR, NONLINEAR or SATURATING since the last contraction or norm.
    ``is_normalised``: output of a norm, movement after it included, before its scale. ``marks``: one bit for each node that
    several nodes read; ``sources``: the bits of all such nodes that a node is computed from, itself included.
    ``roots``: the node that a node is a function of entry by entry, and of no other; itself where it is not such a function.
    """

    graph: Graph
    nodes: tuple[Node, ...]
    names: tuple[str, ...]  # short names of the operations
    number: Mapping[str, int]
    operands: tuple[tuple[int, ...], ...]
    readers: tuple[tuple[int, ...], ...]
    is_signal: tuple[bool, ...]
    signals: tuple[tuple[int, ...], ...]
    weights: Mapping[int, Degrees]
    main: tuple[int, ...]
    shape_of_gain: tuple[int, ...]
    is_normalised: tuple[bool, ...]
    sources: tuple[int, ...]
    marks: tuple[int, ...]
    roots: tuple[int, ...]
    arrived: dict[object, torch.Tensor | None] = field(default_factory=dict, repr=False)  # rows found, by what was walked through

    def is_computed_from(self, i: int, source: int) -> bool:
        """Tell whether a node is, or is computed from, a source that several nodes read; False for other sources."""
        return bool(self.sources[i] & self.marks[source])

    def shape(self, i: int) -> tuple[int, ...]:
        """Shape of a node with one output; () otherwise."""
        meta = self.nodes[i].meta
        return meta.shape if isinstance(meta, TensorMeta) else ()

    def at(self, i: int, place: int | None) -> int:
        """Number of the node at this place of a node's arguments, or -1."""
        name = operand(self.nodes[i], place)
        return -1 if name is None else self.number[name]

    def factors(self, i: int) -> tuple[int, int, int]:
        """Data, weight and bias of a contraction (-1: none); where neither is a weight, the two operands in order."""
        found = places(self.nodes[i])
        if found is None:
            return -1, -1, -1
        first, second = self.number[found.first], self.number[found.second]
        bias = -1 if found.bias is None else self.number[found.bias]
        if not self.is_signal[first] and self.is_signal[second] and self.names[i] not in PLACED:
            return second, first, bias
        return first, second, bias

    def is_norm_by_hand(self, i: int) -> bool:
        """Tell whether a product or quotient normalises: ``x * rsqrt(mean(x^2))``."""
        return self.is_normalised[i] and self.names[i] in ("mul", "div")

    def gates_itself(self, i: int) -> bool:
        """Tell whether a product is an activation written out: ``x sigmoid(x)``."""
        return len({self.roots[j] for j in self.signals[i]}) == 1

    def is_product_of_signals(self, i: int) -> bool:
        """Tell whether a contraction's both operands are signals: attention logits, attention averages."""
        first, second, _ = self.factors(i)
        return first >= 0 and self.is_signal[first] and self.is_signal[second]


def wire(graph: Graph) -> Wiring:
    """Number the nodes of a graph and sweep over them."""
    nodes = graph.nodes
    number = {node.name: i for i, node in enumerate(nodes)}
    names = tuple(node.short_name for node in nodes)
    operands = tuple(
        tuple(dict.fromkeys(number[read] for read in node.operands()))[: MODELS_ONLY.get(name)]
        for node, name in zip(nodes, names, strict=True)
    )
    readers: list[list[int]] = [[] for _ in nodes]
    for i, read in enumerate(operands):
        for j in read:
            readers[j].append(i)
    weights, is_signal = _split(nodes, names, operands, number)
    signals = tuple(
        tuple(j for j in operands[i] if is_signal[j]) if is_signal[i] and node.kind is NodeKind.OP else ()
        for i, node in enumerate(nodes)
    )
    marks, sources = _ancestry(operands, readers, is_signal)
    roots = _roots(names, signals)
    main, gain, normalised = _sweep(names, operands, signals, is_signal, roots)
    return Wiring(
        graph=graph,
        nodes=nodes,
        names=names,
        number=number,
        operands=operands,
        readers=tuple(map(tuple, readers)),
        is_signal=tuple(is_signal),
        signals=signals,
        weights=weights,
        main=main,
        shape_of_gain=gain,
        is_normalised=normalised,
        sources=sources,
        marks=marks,
        roots=roots,
    )


def _ancestry(
    operands: tuple[tuple[int, ...], ...], readers: list[list[int]], is_signal: list[bool]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    marks, sources, count = [0] * len(operands), [0] * len(operands), 0
    for i, read in enumerate(operands):
        if not is_signal[i]:
            continue
        for j in read:
            sources[i] |= sources[j]
        if len(readers[i]) > 1:
            marks[i] = 1 << count
            sources[i] |= marks[i]
            count += 1
    return tuple(marks), tuple(sources)


def _has_zero(nodes: tuple[Node, ...], read: tuple[int, ...]) -> bool:
    """Tell whether a factor is zero throughout: the state before the first step of a scan."""
    return any((value := nodes[j].value) is not None and not value.is_meta and not bool(value.any()) for j in read)


_MIXING = (
    (MOVEMENT - {"to", "_to_copy", "contiguous", "clone", "alias", "type_as", "float"})
    | NOISE | POOLING | JOINING | CONTRACTIONS | ATTENTION | RECURRENT | LOOKUP | NORMS.keys()
    | {"softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "glu"}
)  # fmt: skip


def _roots(names: tuple[str, ...], signals: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    roots = list(range(len(names)))
    for i, read in enumerate(signals):
        if names[i] not in _MIXING and len({roots[j] for j in read}) == 1:
            roots[i] = roots[read[0]]
    return tuple(roots)


def _is_floating(node: Node) -> bool:
    metas = node.meta if isinstance(node.meta, tuple) else (node.meta,)
    return any(meta is not None and (meta.dtype.is_floating_point or meta.dtype.is_complex) for meta in metas)


def _split(
    nodes: tuple[Node, ...], names: tuple[str, ...], operands: tuple[tuple[int, ...], ...], number: Mapping[str, int]
) -> tuple[dict[int, Degrees], list[bool]]:
    """What is a weight and what is a signal.

    A norm or a look-up of parameters makes data, unless it goes on to be the weight of a contraction.
    """
    makes_weight = [False] * len(nodes)
    for i in range(len(nodes) - 1, -1, -1):
        if names[i] in PLACED and (found := places(nodes[i])) is not None:
            makes_weight[number[found.second]] = True
        if makes_weight[i]:
            for j in operands[i]:
                makes_weight[j] = True
    weights: dict[int, Degrees] = {}
    is_signal = [False] * len(nodes)
    for i, node in enumerate(nodes):
        if node.kind is NodeKind.INPUT:
            is_signal[i] = True
        elif node.kind is NodeKind.PARAMETER:
            assert node.parameter is not None
            weights[i] = {node.parameter: 1.0}
        elif node.kind is NodeKind.OP and _is_floating(node) and not (names[i] == "mul" and _has_zero(nodes, operands[i])):
            has_weight = any(j in weights for j in operands[i])
            makes_data = names[i] in PLACED or names[i] in RECURRENT or names[i] in ATTENTION
            makes_data |= not makes_weight[i] and (names[i] in LOOKUP or names[i] in NORMS)
            if any(is_signal[j] for j in operands[i]) or (has_weight and makes_data):
                is_signal[i] = True
            elif has_weight:
                weights[i] = degrees_of(node, names[i], {nodes[j].name: weights[j] for j in operands[i] if j in weights})
    return weights, is_signal


def _sweep(
    names: tuple[str, ...], operands: tuple[tuple[int, ...], ...], signals: tuple[tuple[int, ...], ...],
    is_signal: list[bool], roots: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:  # fmt: skip
    main = [-1] * len(names)
    gain = [LINEAR] * len(names)
    normalised = [False] * len(names)
    for i, name in enumerate(names):
        read = signals[i]
        if not read:
            continue
        heavy = name in CONTRACTIONS or name in ATTENTION or name in RECURRENT or name in LOOKUP
        if heavy:
            continue
        if (len(read) == 1 and name not in JOINING) or (name == "sub" and _is_centred(read, names, main)):
            main[i] = read[0]
        elif name in ("mul", "div") and len(read) == 2:
            whole = _normalised_by_hand(read, names, operands, main, is_signal)
            if whole >= 0:
                main[i], normalised[i] = whole, True
                continue
        if name in NORMS:
            normalised[i] = True
            continue
        normalised[i] = main[i] >= 0 and (name in MOVEMENT or name in NOISE) and normalised[main[i]]
        below = max(gain[j] for j in read)
        if name in BOUNDED:
            gain[i] = SATURATING
        elif name == "div" and len(read) == 2:
            gain[i] = gain[read[0]]
        elif name == "mul" and len(read) == 2:
            gain[i] = NONLINEAR if roots[read[0]] == roots[read[1]] else min(gain[j] for j in read)
        elif name in _LINEAR:
            gain[i] = below
        else:
            gain[i] = max(NONLINEAR, below)
    return tuple(main), tuple(gain), tuple(normalised)


def _is_centred(read: tuple[int, ...], names: tuple[str, ...], main: list[int]) -> bool:
    """Tell whether a difference is ``x - mean(x)``."""
    i, met_mean = read[-1], False
    while i >= 0 and i != read[0] and (names[i] in MOVEMENT or names[i] == "mean"):
        met_mean |= names[i] == "mean"
        i = main[i]
    return met_mean and i >= 0 and _moved(i, names, main) == _moved(read[0], names, main)


_LINEAR = MOVEMENT | NOISE | POOLING | JOINING | {"add", "sub", "rsub", "mul", "div", "neg"}
_STATISTICS = frozenset({
    "rsqrt", "sqrt", "pow", "square", "reciprocal", "clamp", "clamp_min", "add", "mul", "div", "sub", "abs", "maximum", "max",
    "mean", "sum", "var", "std", "var_mean", "linalg_vector_norm", "norm", "frobenius_norm",
}) | MOVEMENT  # fmt: skip
_POWERS = frozenset({"rsqrt", "sqrt", "std", "linalg_vector_norm", "norm", "frobenius_norm", "pow"})
_REDUCTIONS = frozenset({"mean", "sum", "var", "std", "var_mean", "linalg_vector_norm", "norm", "frobenius_norm"})


def _normalised_by_hand(
    read: tuple[int, ...], names: tuple[str, ...], operands: tuple[tuple[int, ...], ...], main: list[int], is_signal: list[bool]
) -> int:
    """The operand that is multiplied by, or divided by, the root of a mean or sum of its own powers; -1: neither."""
    for whole, factor in (read, read[::-1]):
        roots = {_moved(whole, names, main)}
        root = next(iter(roots))
        if names[root] == "sub":
            roots |= {_moved(j, names, main) for j in operands[root]}
        if _is_statistic(factor, roots, names, operands, is_signal):
            return whole
    return -1


def _moved(i: int, names: tuple[str, ...], main: list[int]) -> int:
    while names[i] in MOVEMENT and names[i] not in ("slice", "select", "getitem") and main[i] >= 0:
        i = main[i]
    return i


def _is_statistic(
    i: int, roots: set[int], names: tuple[str, ...], operands: tuple[tuple[int, ...], ...], is_signal: list[bool]
) -> bool:
    seen, stack, met = {i}, [i], set()
    while stack:
        j = stack.pop()
        if j in roots:
            continue
        if names[j] not in _STATISTICS or len(seen) > 40:
            return False
        met.add(names[j])
        for k in operands[j]:
            if is_signal[k] and k not in seen:
                seen.add(k)
                stack.append(k)
    return bool(met & _POWERS) and bool(met & _REDUCTIONS) and bool(seen & roots)
