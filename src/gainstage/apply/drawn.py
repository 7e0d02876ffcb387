"""A plan's parameters as they would be drawn: each when it is asked for, and only the last ones kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import final

import torch

from gainstage.apply.box import whole_box
from gainstage.apply.buffers import listed
from gainstage.apply.parts import Holding
from gainstage.apply.write import Writer, integer_seed
from gainstage.errors import InputError
from gainstage.plan import Family, Plan

# Bytes that are kept: enough for what one operation reads, and for cells that read their weights step by step.
_KEPT = 2**30


@final
class DrawnParameters(Mapping[str, torch.Tensor]):
    """What :func:`apply` would write with this seed, parameter by parameter, on the CPU.

    Args:
        plan: what to draw.
        seed: any integer.

    Raises:
        InputError: the plan keeps a parameter at a value that it does not know; a seed that is no integer.
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        kept = [name for name, planned in plan.parameters.items() if any(d.family is Family.KEEP for d in planned.distributions)]
        if kept:
            raise InputError(
                f"The plan keeps {listed(kept)} as they are, and on the meta device they have no values. "
                "Materialise the model with them, or plan them."
            )
        self._plan = plan
        self._seed = integer_seed(seed)
        self._recent: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __getitem__(self, name: str) -> torch.Tensor:
        """Values of one parameter, drawn now or just before."""
        if name not in self._recent:
            self._recent[name] = self._draw(name)
        self._recent.move_to_end(name)
        while len(self._recent) > 1 and sum(tensor.nbytes for tensor in self._recent.values()) > _KEPT:
            self._recent.popitem(last=False)
        return self._recent[name]

    def __iter__(self) -> Iterator[str]:
        """Names, in the model's order."""
        return iter(self._plan.parameters)

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self._plan.parameters)

    def _draw(self, name: str) -> torch.Tensor:
        planned = self._plan.parameters[name]
        values = torch.empty(planned.shape, dtype=getattr(torch, planned.dtype))
        holding = Holding(
            shape=planned.shape,
            dtype=values.dtype,
            aliases=planned.aliases,
            parameter=values,
            memory=values,
            boxes=(whole_box(planned.shape),),
        )
        Writer(self._seed, None, fresh=(name,)).write([(planned, holding)], lambda work: (work(), None)[1])
        return values
