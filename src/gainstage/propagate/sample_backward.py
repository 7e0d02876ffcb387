"""The universal rule backwards: an op's own vector-Jacobian product, on operands and gradients drawn from their tables."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gainstage.errors import UnsupportedOpError
from gainstage.graph import Node
from gainstage.propagate.host import with_conditions
from gainstage.propagate.sample import ENTRIES, FEWEST, MOST, Sampled, filled, operands_of, pooled_value
from gainstage.signal import Value
from gainstage.signal.sampling import draw
from gainstage.signal.stray import Stray


def sample_backward(node: Node, g: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Gradients of an op's arguments: its vector-Jacobian product on draws of its operands and of the gradient."""
    operands = list(operands_of(args)) + list(operands_of(list(kwargs.values())))
    seed = int.from_bytes(hashlib.blake2b(f"{node.name} backward".encode(), digest_size=8).digest(), "big")
    generator = np.random.default_rng(seed)
    cotangents = [part for part in (g if isinstance(g, list) else [g]) if part is not None]
    entries = max(int(np.prod(value.shape)) for value in [*operands, *cotangents])
    found: list[list[torch.Tensor | None]] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**31)
        for _ in range(min(max(ENTRIES // max(entries, 1), FEWEST), MOST)):
            leaves = [_leaf(tensor) for tensor in draw(operands, generator)]
            drawn = iter(leaves)
            actual = with_conditions(node, [filled(argument, drawn) for argument in args])
            named = {name: filled(argument, drawn) for name, argument in kwargs.items()}
            assert node.op is not None
            result = node.op(*actual, **named)
            outputs = list(result) if isinstance(result, (tuple, list)) else [result]
            pairs = [
                (out, part) for out, part in zip(outputs, g if isinstance(g, list) else [g], strict=False) if part is not None
            ]
            weights = [_cotangent(part, generator) for _, part in pairs]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            reached = [(out, weight) for (out, _), weight in zip(pairs, weights, strict=True) if out.requires_grad]
            if not reached or not wanted:
                return ()
            try:
                grads = torch.autograd.grad([o for o, _ in reached], wanted, [w for _, w in reached], allow_unused=True)
            except RuntimeError as error:
                if node.may_draw:
                    return ()  # what is drawn has no derivative
                raise UnsupportedOpError(f"no gradient of {node.op_name} in {node.provenance}: {error}") from error
            by_leaf = iter(grads)
            found.append([next(by_leaf) if leaf.requires_grad else None for leaf in leaves])
    pooled_values = iter([_pooled_gradient(list(draws)) for draws in zip(*found, strict=True)])
    return tuple(_fill_gradients(argument, pooled_values) for argument in args)


def _cotangent(g: Value, generator: np.random.Generator) -> torch.Tensor:
    """A draw of the gradient of a result; of a single number its size, since only its square matters."""
    if not g.axes:
        return torch.full(g.shape, g.second_moment**0.5)
    return draw([g], generator)[0].to(torch.float32)


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32).requires_grad_() if tensor.is_floating_point() else tensor


def _pooled_gradient(draws: list[torch.Tensor | None]) -> Value | None:
    present = [draw for draw in draws if draw is not None]
    return pooled_value(present, 0, Stray(), Sampled()) if present else None


def _fill_gradients(argument: Any, found: Any) -> Any:
    if isinstance(argument, Value):
        return next(found)
    if isinstance(argument, list):
        return tuple(_fill_gradients(item, found) for item in argument)
    return None
