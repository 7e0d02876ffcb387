"""The universal rule: run an op for real on operands drawn from their tables, and measure the table of its result.

Integers that depend on data (which experts a token goes to, an order, a count) are one realisation of themselves: the first
draw. What is computed from realisations and constants alone is computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gainstage.errors import UnsupportedOpError
from gainstage.graph import Node, dense
from gainstage.propagate.host import run_on_host
from gainstage.rules import Call
from gainstage.signal import Value, known
from gainstage.signal.axes import axes_of, new_dims
from gainstage.signal.copies import replace
from gainstage.signal.known import LARGE
from gainstage.signal.marginal import Marginal
from gainstage.signal.quadrature import sample_quantiles
from gainstage.signal.sampling import common_profile, draw_often, pooled
from gainstage.signal.stray import Stray

ENTRIES = 2**20  # stop when the draws have this many entries together, of operands or results
MOST, FEWEST = 32, 4


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a rule was not followed: it does not cover the call and says so, or it raised, which is a mistake of the rule."""

    text: str
    is_fault: bool = False

    def sentence(self, op: str, first: Node, more: int) -> str:
        """What is to be told of an op that was run on samples, at a node and at some more."""
        rest = f", and {more} more." if more else "."
        place = f"{first.name} in {first.provenance}{rest}"
        if self.is_fault:
            return f"Run on samples, as the rule of {op} failed, which is a mistake of the rule ({self.text}): {place}"
        return f"Run on samples, as the rule of {op} does not cover the call ({self.text}): {place}"


def fault_of(rule: Any, error: Exception) -> Reason:
    """The mistake of a rule that raised."""
    return Reason(f"{rule.__module__}.{rule.__qualname__}: {type(error).__name__}: {error}", is_fault=True)


def sample_node(node: Node, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any], reason: Reason | None = None) -> Any:
    """Result of an op from draws of its operands; the same for the same node name. ``reason``: why its rule was not followed."""
    operands = list(operands_of(args)) + list(operands_of(list(kwargs.values())))
    lineage = 0
    for value in operands:
        lineage |= value.lineage
    seed = int.from_bytes(hashlib.blake2b(node.name.encode(), digest_size=8).digest(), "big")
    generator = np.random.default_rng(seed)
    outputs: list[list[torch.Tensor]] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed % 2**31)
        for tensors in draw_often(operands, generator, _count(call, operands)):
            drawn = iter(tensors)
            actual = [filled(argument, drawn) for argument in args]
            named = {name: filled(argument, drawn) for name, argument in kwargs.items()}
            try:
                result = run_on_host(node, actual, named)
            except Exception as error:
                raise UnsupportedOpError(
                    f"no rule for {node.op_name}, and it cannot be run on samples, in {node.provenance}: {error}; "
                    f"add a rule: @gainstage.rules.rule(torch.ops.{node.op_name})"
                ) from error
            outputs.append(list(result) if isinstance(result, (tuple, list)) else [result])
    stray = max((value.stray for value in operands), key=lambda stray: stray.variance, default=Stray()).hidden()
    origin = Sampled(reason)
    found = [pooled_value(list(draws), lineage, stray, origin) for draws in zip(*outputs, strict=True)]
    return tuple(found) if isinstance(node.meta, tuple) else found[0]


def constant_value(tensor: torch.Tensor) -> Value:
    """Value of a known tensor; integers are carried, not measured. A sparse one is as good as what it stands for."""
    tensor = dense(tensor)
    if tensor.is_floating_point():
        return known(tensor)
    dims = new_dims(tuple(tensor.shape))
    table = np.zeros((2,) * sum(len(dim) for dim in dims))
    return Value(dims=dims, mean=0.0, table=table, marginal=Marginal(object(), lambda: np.zeros(1025)), constant=tensor)


def as_numbers(argument: Any) -> Any:
    """Known integers among arguments as the numbers that arithmetic takes them for."""
    if isinstance(argument, list):
        return [as_numbers(item) for item in argument]
    if isinstance(argument, Value) and argument.constant is not None and not argument.constant.is_floating_point():
        return constant_value(argument.constant.float())
    return argument


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """Where a value comes from that was measured on samples; ``reason``: why not by the rule that there is."""

    reason: Reason | None = None


def samplings(result: Any) -> set[Sampled]:
    """Where a result, or several, come from that were measured on samples: views of them come from there as well."""
    parts = result if isinstance(result, tuple) else (result,)
    return {part.source for part in parts if isinstance(part, Value) and isinstance(part.source, Sampled)}


def is_known(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether an op sees constants, realisations and numbers only, and draws nothing itself."""
    operands = operands_of([*args, *kwargs.values()])
    if not operands:
        return not isinstance(node.op, torch._ops.OpOverload)  # arithmetic of sizes; an op without operands may be random
    return not node.may_draw and all(value.constant is not None for value in operands)


def run_known(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Result of an op on constants."""
    drawn = iter([value.constant for value in operands_of([*args, *kwargs.values()])])
    with torch.no_grad():
        result = run_on_host(node, [filled(a, drawn) for a in args], {name: filled(a, drawn) for name, a in kwargs.items()})
    if isinstance(result, torch.Tensor):
        return constant_value(result)
    return tuple(constant_value(part) for part in result) if isinstance(result, (tuple, list)) else result  # or a number


def _count(call: Call, operands: Sequence[Value]) -> int:
    shapes = [*(shape for shape in call.shapes if shape is not None), *(value.shape for value in operands)]
    entries = max((int(np.prod(shape)) for shape in shapes), default=1)
    return min(max(ENTRIES // max(entries, 1), FEWEST), MOST)


def operands_of(arguments: Sequence[Any]) -> list[Value]:
    """All Values among arguments, in order, those inside lists too."""
    found: list[Value] = []
    for argument in arguments:
        if isinstance(argument, Value):
            found.append(argument)
        elif isinstance(argument, list):
            found += operands_of(argument)
    return found


def filled(argument: Any, drawn: Any) -> Any:
    """An argument with the next drawn tensors in the place of its Values."""
    if isinstance(argument, Value):
        tensor = next(drawn)
        return tensor.to(torch.float32) if tensor.is_floating_point() else tensor
    if isinstance(argument, list):
        return [filled(item, drawn) for item in argument]
    return argument


def pooled_value(draws: list[Any], lineage: int, stray: Stray, origin: Sampled) -> Value | None:
    """Value of a tensor from draws of it; what the mean over the draws strays by is added to ``stray``."""
    if not isinstance(draws[0], torch.Tensor):
        return None
    if not draws[0].is_floating_point():
        return replace(constant_value(draws[0]), source=origin)
    draws = [sample.clamp(-LARGE, LARGE) for sample in draws]
    mean, table = pooled(draws)
    dims = new_dims(tuple(draws[0].shape))
    assert len(axes_of(dims)) == table.ndim
    moments = np.array([float(sample.double().square().mean()) for sample in draws])
    if len(draws) > 1 and moments.mean() > 0.0:
        stray = stray.with_cause(float(moments.var(ddof=1)) / len(draws) / float(moments.mean()) ** 2)
    profile = common_profile(draws)
    step = max(draws[0].numel() // 8192, 1)
    entries = torch.cat([sample.reshape(-1)[::step] for sample in draws]).double().numpy()
    marginal = Marginal(object(), lambda: sample_quantiles(entries))
    if profile is not None:
        along = np.tile(np.broadcast_to(profile, [axis.size for axis in axes_of(dims)]).reshape(-1)[::step], len(draws))
        alike = entries[along > 0.0] / along[along > 0.0]
        marginal = Marginal(marginal.latent, lambda: sample_quantiles(entries), lambda: sample_quantiles(alike))
    return Value(
        dims=dims, mean=mean, table=table, marginal=marginal, source=origin, lineage=lineage, stray=stray,
        levels=profile,
    )  # fmt: skip
