"""What a value may know beyond its table: how it came about, and what holds for as long as nothing is done to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from gainstage.signal import levels
from gainstage.signal.axes import Axis, descends
from gainstage.signal.marginal import Marginal
from gainstage.signal.neighbours import Neighbours
from gainstage.signal.quadrature import Array, expectation

if TYPE_CHECKING:
    from gainstage.signal.value import Value


@dataclass(frozen=True, slots=True)
class Statistic:
    """Marks a value that averages functions of other values over many entries, so that it hardly fluctuates.

    ``of``: the latents averaged over. ``centre``: the value without its fluctuation, its root mean square where levels differ.
    Dividing a tensor by its own root mean square is exact this way: numerator and denominator are not independent. ``averaged``:
    distributions of one entry and of the average, where it is a function of one average.
    """

    of: frozenset[object]
    centre: float
    averaged: tuple[Marginal, Marginal] | None = None


def statistic_at(
    of: frozenset[object], values: Array, profile: Array | None, averaged: tuple[Marginal, Marginal] | None = None
) -> tuple[Statistic, Array | None]:
    """Statistic with these values along the axes on which they differ, and its levels: ``profile`` where it has no centre."""
    root = float(np.mean(values**2)) ** 0.5
    if root <= 0.0:
        return Statistic(of, 0.0), profile
    return Statistic(of, root if float(np.mean(values)) >= 0.0 else -root, averaged), levels.normalised(np.abs(values))


@dataclass(frozen=True, slots=True, eq=False)
class Lean:
    """``E[x_i mean(x)] / E[mean(x)^2]`` for each coordinate i of a profile of levels; void for a tensor with other levels.

    A convolution sees fewer taps at the border of a map: what all positions have in common is there in part only. ``near``:
    what near places share without that.
    """

    levels: Array
    profile: Array
    near: Neighbours | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Edges:
    """How what all samples share at a place is spread along axes of a map, see :mod:`gainstage.signal.edges`."""

    along: tuple[tuple[Axis, Array], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """Parts of a concatenation along an axis; void for a tensor with another table: it was changed since.

    ``dim``: of the parts, which may have gained or lost dimensions of size 1 since.
    """

    table: Array
    axis: Axis
    parts: tuple[Value, ...]
    dim: int


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """What a softmax along a dimension was taken of; void for a tensor with another table."""

    table: Array
    of: Value
    dim: int


@dataclass(frozen=True, slots=True, eq=False)
class Largest:
    """Maximum of a tensor over windows [outputs, taps] along some dimensions; void for a tensor with another table."""

    table: Array
    of: Value
    windows: tuple[tuple[int, NDArray[np.int64]], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A few draws of a tensor that random weights make of known numbers; void for a tensor with another table."""

    table: Array
    draws: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Added:
    """A known tensor that was added, and the tensor before; void for a tensor with another table.

    ``drawn``: it is one of many, [draws, query, key] by the last two dimensions, that random weights may make.
    """

    table: Array
    of: Value
    known: torch.Tensor
    drawn: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """Terms of a sum, as aligned, with their signs; void for a tensor with another table."""

    table: Array
    terms: tuple[tuple[Value, float], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Summed:
    """Source of a sum: itself, and the terms, as aligned, with their signs, in whose sources or latents it has a part.

    ``amplitude``: of the sum in itself, by its axes. ``of``: all sources that it has a part in.
    """

    axes: tuple[Axis, ...]
    amplitude: Array
    terms: tuple[tuple[Value, float], ...]
    of: frozenset[object]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Origin:
    """How a tensor came about, where weights are used more than once; void for a tensor with another distribution.

    ``call``: equal for like operations. ``inputs``: the values among its arguments. ``run``: the operation on others in their
    place; ``part``: which of its results. ``draws``: whether it draws random numbers. ``reuses``: whether it depends on a weight
    with several uses. ``order``: longest way from a tensor without one. ``met``: covariances, as they are found.
    """

    value: Value
    call: object
    inputs: tuple[Value, ...]
    run: Callable[[Sequence[Value]], object]
    part: int | None
    draws: bool
    reuses: bool
    order: int
    met: dict[object, Array | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """What a gradient knows of its own tensor, which it met in an activation further down: ``g = g0 r``, g0 independent of it.

    ``mean`` and ``square``: ``E[r | z]`` and ``E[r^2 | z]`` on the grid of the tensor's latent z. ``base``: g0, up to a factor.
    ``terms``: independent gradients that the gradient with this ``table`` is the sum of, each with what it knows itself.
    """

    mean: Array
    square: Array
    base: Value | None = None
    terms: tuple[Value, ...] = ()
    table: Array | None = None

    @property
    def is_even(self) -> bool:
        """Whether it knows nothing but where it comes from."""
        return float(np.ptp(self.mean)) == 0.0

    def times(self, factor: float) -> Given:
        """Of the gradient times a number: only its sign counts."""
        return self if factor >= 0.0 else Given(-self.mean, self.square, self.base)

    def scaled(self) -> Given | None:
        """With ``E[r^2] = 1``; None where the gradient vanishes."""
        level = expectation(self.square)
        return Given(self.mean / level**0.5, self.square / level, self.base) if level > 0.0 else None


@dataclass(frozen=True, slots=True, eq=False)
class Uneven:
    """Channels, the rows of the weights along these axes, have variances of their own: their relative variance over rows.

    See :mod:`gainstage.signal.uneven`. ``shape``: that of half the channels, at mean 0 and variance 1, where they are sums of few
    terms; the other half has its mirror image. See :mod:`gainstage.signal.few`. ``stray``: variance over
    draws of the log of the level that comes of this; an average over samples or places has none of it. ``within``: what is added
    for entries that have the same coordinate along an axis: channels of one sample, gated by what was found in it. ``centred``:
    the relative variance over rows of what is left once the mean of each channel is gone, beyond what a table shows. ``of_all``:
    channels with a ``shape`` are sums of the same terms, each with weights of its own. ``ripple``: along axes of a map, variance
    over channels of the correlation of places at each lag, see :mod:`gainstage.signal.ripples`.
    """

    axes: tuple[Axis, ...]
    variance: float
    shape: Array | None = None
    stray: float = 0.0
    within: tuple[tuple[Axis, float], ...] = ()
    centred: float = 0.0
    of_all: bool = False
    ripple: tuple[tuple[Axis, ...], Array] | None = None

    def of_groups(self, axes: Sequence[Axis], reduced: Sequence[Axis], *, centre: bool) -> float:
        """The variance of averages over some of a tensor's axes: over a group of channels it is less, over all there is none."""
        apart = [axis for axis in axes if descends(axis, self.axes) and axis not in reduced]
        together = prod(axis.size for axis in reduced if descends(axis, self.axes))
        return (self.centred if centre else self.variance) / together if apart else 0.0

    def over(self, axes: Sequence[Axis]) -> Array:
        """The variance, by what two entries of one channel share, for a table of these axes."""
        found = np.full((1,) * len(axes), self.variance)
        for position, axis in enumerate(axes):
            extra = sum(variance for along, variance in self.within if along is axis)
            found = found + np.array([0.0, extra]).reshape([2 if p == position else 1 for p in range(len(axes))])
        return found
