"""Output heads and routers: contractions whose results leave the model, or choose experts, with next to nothing after them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gainstage.graph.families import CONTRACTIONS, LOSSES, MOVEMENT, NOISE, PICKING, POOLING, PROBABILITY, SOFTMAX
from gainstage.roles.sites import Site
from gainstage.roles.wiring import Wiring

_AFTER = MOVEMENT | NOISE | POOLING | PROBABILITY | LOSSES | {"add", "sub", "mul", "div", "neg", "where", "masked_fill", "clamp"}


@dataclass(frozen=True, slots=True)
class Output:
    """One output of the model and the contraction that it ends in."""

    output: int
    contraction: int


def ends_above(wiring: Wiring, sites: Mapping[int, tuple[Site, ...]], start: int) -> tuple[list[int], set[int]]:
    """Contractions with a weight that reach a node through movement, biases, caps and probabilities, and the nodes on the way.

    Sums of two signals are passed only where they are numbers: a loss that is a sum of losses.
    """
    ends, seen, stack = [], {start}, [start]
    while stack:
        i = stack.pop()
        if any(site.is_contraction for site in sites.get(i, ())):
            ends.append(i)
            continue
        name = wiring.names[i]
        is_number = all(size == 1 for size in wiring.shape(i))
        if name not in _AFTER or any(not site.role.value.startswith(("bias", "kept")) for site in sites.get(i, ())):
            continue
        if wiring.is_normalised[i] or (len(wiring.signals[i]) > 1 and not is_number):
            continue
        for j in wiring.signals[i]:
            if j not in seen:
                seen.add(j)
                stack.append(j)
    return ends, seen


def find_outputs(wiring: Wiring, sites: Mapping[int, tuple[Site, ...]]) -> tuple[Output, ...]:
    """Outputs that end in a contraction whose result goes nowhere else in the model."""
    found, region = [], set()
    for name in wiring.graph.outputs:
        i = wiring.number[name]
        if not wiring.is_signal[i]:
            continue
        ends, seen = ends_above(wiring, sites, i)
        region |= seen
        found += [Output(i, end) for end in ends]
    live = _reaching_outputs(wiring)
    return tuple(
        output for k, output in enumerate(found)
        if _stays_inside(wiring, output.contraction, region, live)
        and output.contraction not in {other.contraction for other in found[:k]}
    )  # fmt: skip


def _reaching_outputs(wiring: Wiring) -> set[int]:
    live: set[int] = {wiring.number[name] for name in wiring.graph.outputs}
    for i in range(len(wiring.nodes) - 1, -1, -1):
        if i in live:
            live.update(wiring.operands[i])
    return live


def _stays_inside(wiring: Wiring, start: int, region: set[int], live: set[int]) -> bool:
    seen, stack = {start}, [start]
    while stack:
        for reader in wiring.readers[stack.pop()]:
            if reader not in live or reader in seen:
                continue
            if reader not in region:
                return False
            seen.add(reader)
            stack.append(reader)
    return True


def find_routers(wiring: Wiring, sites: Mapping[int, tuple[Site, ...]], attention: set[int]) -> dict[int, int]:
    """Contraction -> the node that chooses among its outputs, or whose softmax weighs something by them."""
    found: dict[int, int] = {}
    for i, name in enumerate(wiring.names):
        chooses = name in PICKING and name != "max" and bool(wiring.signals[i])
        weighs = name in SOFTMAX and i not in attention and bool(wiring.signals[i]) and _weighs(wiring, i)
        if chooses or weighs:
            for end in ends_above(wiring, sites, wiring.signals[i][0])[0]:
                found.setdefault(end, i)
    return found


def _weighs(wiring: Wiring, softmax: int) -> bool:
    """Tell whether a softmax multiplies or contracts another signal."""
    seen, stack = {softmax}, [softmax]
    while stack:
        i = stack.pop()
        for reader in wiring.readers[i]:
            name = wiring.names[reader]
            if (name == "mul" and len(wiring.signals[reader]) == 2) or (
                name in CONTRACTIONS and wiring.is_product_of_signals(reader)
            ):
                return True
            if name in MOVEMENT | NOISE and reader not in seen:
                seen.add(reader)
                stack.append(reader)
    return False
