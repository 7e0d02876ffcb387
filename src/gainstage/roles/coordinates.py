"""Which entries arrive where: coordinates are moved through the real operations, without copying what is constant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from gainstage.graph import Node, Ref, TensorMeta
from gainstage.graph.families import JOINING, MOVEMENT, NORMS, SELECTING
from gainstage.roles.wiring import Wiring

# A tensor of coordinates at every entry, several where entries were combined; a flat set where the layout is lost.
Numbers = list[torch.Tensor]


def numbered(shape: Sequence[int], dim: int) -> torch.Tensor:
    """The coordinate along one dimension, at every entry of a tensor of this shape; takes the memory of that dimension alone."""
    view = [1] * len(shape)
    view[dim] = shape[dim]
    return torch.arange(shape[dim]).reshape(view).expand(tuple(shape))


def thin(numbers: torch.Tensor) -> torch.Tensor:
    """The same values without the dimensions along which they are constant by construction."""
    for dim in range(numbers.dim() - 1, -1, -1):
        if numbers.stride(dim) == 0 and numbers.shape[dim] > 0:
            numbers = numbers.select(dim, 0)
    return numbers


def values_of(numbers: Iterable[torch.Tensor]) -> torch.Tensor:
    """All coordinates that occur, ascending."""
    parts = [distinct(thin(tensor).reshape(-1)) for tensor in numbers]
    return distinct(torch.cat(parts)) if parts else torch.empty(0, dtype=torch.int64)


def distinct(numbers: torch.Tensor) -> torch.Tensor:
    """Coordinates without repetitions, ascending: marked one by one, which takes a tenth of sorting them."""
    if not numbers.numel():
        return numbers
    marked = torch.zeros(int(numbers.max()) + 1, dtype=torch.bool, device=numbers.device)
    marked[numbers] = True
    return marked.nonzero().flatten()


def arriving(wiring: Wiring, source: int, start: torch.Tensor, targets: Iterable[int], between: Iterable[int]) -> Numbers:
    """Coordinates of a source's entries as they arrive at some targets.

    Args:
        wiring: the graph.
        source: number of the node where ``start`` gives the coordinate of every entry.
        start: integer tensor of the shape of the source.
        targets: nodes further down.
        between: nodes that lie between, the targets among them (order does not matter).

    Returns:
        Tensors of the targets' shapes, or flat ones where an operation mixed entries.
    """
    held: dict[int, Any] = {source: [start]}
    for i in sorted(between):
        if i > source and any(j in held for j in wiring.operands[i]):
            held[i] = _step(wiring, i, held)
    return [tensor for target in targets for tensor in held.get(target, ()) if isinstance(tensor, torch.Tensor)]


def last_selections(wiring: Wiring, target: int, between: set[int]) -> set[int]:
    """The nodes nearest to the target that select entries, or the sources: after them no entry gets lost."""
    found, seen, stack = set(), {target}, [target]
    while stack:
        i = stack.pop()
        below = [j for j in wiring.operands[i] if j in between]
        if wiring.names[i] in SELECTING or not below:
            found.add(i)
            continue
        for j in below:
            if j not in seen:
                seen.add(j)
                stack.append(j)
    return found


def pattern(wiring: Wiring, source: int, target: int, between: Iterable[int]) -> object:
    """All that the coordinates of a source at a target depend on, equal for equal operations on other nodes.

    Args:
        wiring: the graph.
        source: where the coordinates begin.
        target: where they are asked for.
        between: nodes from the source to the target, both included.
    """
    order = sorted(between)
    place = {i: k for k, i in enumerate(order)}

    def of(argument: Any) -> object:
        if isinstance(argument, Ref):
            j = wiring.number[argument.name]
            node = wiring.nodes[j]
            return ("node", place[j]) if j in place else ("other", node.meta, None if node.value is None else _memory(node.value))
        if isinstance(argument, (list, tuple)):
            return tuple(of(item) for item in argument)
        return type(argument), repr(argument)

    steps = [(id(node.op), node.meta, of(node.args), of([*node.kwargs.items()])) for node in (wiring.nodes[i] for i in order[1:])]
    return wiring.nodes[source].meta, place[target], tuple(steps)


def _memory(tensor: torch.Tensor) -> object:
    """Where the entries of a known tensor lie: equal for views of one tensor that each block makes for itself."""
    return (tensor.data_ptr(), tensor.stride()) if tensor.device.type == "cpu" and tensor.numel() else id(tensor)


def _step(wiring: Wiring, i: int, held: Mapping[int, Any]) -> Any:
    node, name = wiring.nodes[i], wiring.names[i]
    read = [j for j in wiring.operands[i] if j in held]
    if name == "getitem":
        pieces = held[read[0]]
        if isinstance(pieces, dict):
            return pieces.get(node.args[1], pieces.get("all", []))
        return pieces
    if name in MOVEMENT:
        if isinstance(node.args[0], (list, tuple)):
            return _moved_together(wiring, node, read, held)
        return _moved(wiring, node, read[0], held[read[0]])
    if name in JOINING:
        return _joined(wiring, i, held)
    shape = wiring.shape(i)
    together: Numbers = []
    for j in read:
        together += _spread(held[j], shape, wiring, i, j) if isinstance(held[j], list) else held[j].get("all", [])
    return together[:8]


def _spread(tensors: Numbers, shape: tuple[int, ...], wiring: Wiring, i: int, j: int) -> Numbers:
    """Through an operation entry by entry; where shapes do not fit, the set of coordinates alone."""
    spread = []
    for tensor in tensors:
        if wiring.names[i] in NORMS and tensor.dim() == 1 and wiring.at(i, 0) != j:
            tensor = tensor.reshape([-1 if d == 1 else 1 for d in range(len(shape))])  # noqa: PLW2901 - a scale along the channels
        try:
            spread.append(tensor.expand(shape))
        except RuntimeError:
            spread.append(thin(tensor).reshape(-1))
    return spread


def _moved(wiring: Wiring, node: Node, source: int, tensors: Any) -> Any:
    """Run the movement itself on the coordinates."""
    results = []
    meta = wiring.nodes[source].meta
    shape = meta.shape if isinstance(meta, TensorMeta) else None
    for tensor in tensors if isinstance(tensors, list) else ():
        if tuple(tensor.shape) != shape:
            results.append(tensor)  # a flat set stays what it is
            continue
        result = _run(wiring, node, source, tensor)
        if isinstance(result, (list, tuple)):
            pieces: dict[Any, Any] = {k: [piece] for k, piece in enumerate(result)}
            return {**pieces, "all": [tensor]}
        results.append(result)
    return results


def _moved_together(wiring: Wiring, node: Node, sources: Sequence[int], held: Mapping[int, Any]) -> dict[Any, Any]:
    """As :func:`_moved` for a movement of several tensors: to each result come the coordinates of its own operand."""
    pieces: dict[Any, Any] = {"all": []}
    for k, operand in enumerate(node.args[0]):
        j = wiring.number[operand.name] if isinstance(operand, Ref) else -1
        moved = _moved(wiring, node, j, held[j]) if j in sources else []
        pieces[k] = moved[k] if isinstance(moved, dict) else moved
        pieces["all"] += moved["all"] if isinstance(moved, dict) else moved
    return pieces


_IDENTITIES = frozenset({
    "contiguous", "clone", "alias", "detach", "to", "_to_copy", "type_as", "float", "half", "bfloat16", "lift_fresh",
    "lift_fresh_copy", "real",
})  # fmt: skip


def _run(wiring: Wiring, node: Node, source: int, tensor: torch.Tensor) -> Any:
    if node.short_name in _IDENTITIES:
        return tensor
    try:
        assert node.op is not None
        return node.op(*_filled(wiring, node.args, source, tensor), **_filled(wiring, dict(node.kwargs), source, tensor))
    except (RuntimeError, TypeError, NotImplementedError, IndexError):
        return thin(tensor).reshape(-1)  # an operation that does not move integers: the set of coordinates remains


def _filled(wiring: Wiring, argument: Any, source: int, tensor: torch.Tensor) -> Any:
    if isinstance(argument, Ref):
        other = wiring.number[argument.name]
        if other == source:
            return tensor
        node = wiring.nodes[other]
        if node.value is not None:
            return node.value
        assert isinstance(node.meta, TensorMeta)
        return torch.zeros(node.meta.shape, dtype=node.meta.dtype)  # the shape is all that matters of it
    if isinstance(argument, dict):
        return {key: _filled(wiring, item, source, tensor) for key, item in argument.items()}
    if isinstance(argument, (list, tuple)):
        return type(argument)(_filled(wiring, item, source, tensor) for item in argument)
    return argument


def _joined(wiring: Wiring, i: int, held: Mapping[int, Any]) -> Numbers:
    """A concatenation keeps its layout where every piece has one; anything else keeps the set."""
    node = wiring.nodes[i]
    tensors = {j: held[j] for j in wiring.operands[i] if j in held and isinstance(held[j], list)}
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if wiring.names[i] in ("cat", "concat") and isinstance(dim, int) and len(tensors) > 0:
        pieces = [wiring.number[ref.name] for ref in node.args[0]]
        if all(j in tensors and all(tuple(t.shape) == wiring.shape(j) for t in tensors[j]) for j in pieces):
            depth = max(len(tensors[j]) for j in pieces)
            return [_side_by_side([tensors[j][k % len(tensors[j])] for j in pieces], dim) for k in range(depth) if tensors]
    return [thin(tensor).reshape(-1) for found in tensors.values() for tensor in found]


def _side_by_side(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """A concatenation that copies nothing along dimensions in which all of them are constant by construction."""
    shape = list(tensors[0].shape)
    dim %= len(shape)
    constant = [d for d in range(len(shape)) if d != dim and all(tensor.stride(d) == 0 for tensor in tensors)]
    for d in constant:
        tensors = [tensor.narrow(d, 0, 1) for tensor in tensors]
    shape[dim] = -1
    return torch.cat(list(tensors), dim).expand(shape)
