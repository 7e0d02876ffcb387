"""Example inputs from text: ``2x3x224x224``, ``input_ids=2x32:int:1000``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gainstage.errors import InputError

_SPECIFICATION = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<kind>float|int|bool)(?:(?<=int):(?P<below>\d+))?)?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpecification:
    """One input tensor: standard normal, integers in [0, below), or all True."""

    shape: tuple[int, ...]
    name: str | None = None  # None: positional
    kind: str = "float"
    below: int | None = None

    def draw(self) -> torch.Tensor:
        """The tensor, from torch's generator."""
        if self.kind == "int":
            assert self.below is not None
            return torch.randint(self.below, self.shape)
        if self.kind == "bool":
            return torch.ones(self.shape, dtype=torch.bool)
        return torch.randn(self.shape)


def parse_input(text: str) -> InputSpecification:
    """Read ``[NAME=]SHAPE[:TYPE[:BELOW]]``.

    Raises:
        InputError: for text of another form, a size of 0, or a bound on what are not integers.
    """
    match = _SPECIFICATION.fullmatch(text.strip())
    if match is None:
        raise InputError(
            f"--input {text!r} is not [NAME=]SHAPE[:TYPE]; write 2x3x224x224, or input_ids=2x32:int (float, int and bool exist)"
        )
    shape = tuple(int(size) for size in match["shape"].split("x"))
    below = None if match["below"] is None else int(match["below"])
    if 0 in shape or below == 0:
        raise InputError(f"--input {text!r} has a size of 0: there would be no value to follow; give sizes of 1 and more")
    return InputSpecification(shape=shape, name=match["name"], kind=match["kind"] or "float", below=below)


def smallest_vocabulary(model: nn.Module) -> int:
    """Integers that every embedding of the model accepts; 2 where it has none (a class, a flag)."""
    return min((module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)), default=2)


def draw_inputs(specifications: Sequence[InputSpecification], *, vocabulary: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, drawn in order.

    Args:
        specifications: the inputs.
        vocabulary: integers are drawn below it, where the specification names no bound.

    Raises:
        InputError: if two inputs have the same name.
    """
    args: list[torch.Tensor] = []
    kwargs: dict[str, torch.Tensor] = {}
    for each in specifications:
        bounded = InputSpecification(shape=each.shape, name=each.name, kind=each.kind, below=each.below or vocabulary)
        if each.name is None:
            args.append(bounded.draw())
        elif each.name in kwargs:
            raise InputError(f"--input {each.name}= is given twice; give each input once")
        else:
            kwargs[each.name] = bounded.draw()
    return tuple(args), kwargs
