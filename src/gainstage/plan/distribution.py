"""What one parameter is drawn from: families, distributions, and the blocks of a parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum

import torch

from gainstage.errors import InputError
from gainstage.plan.mixing import Mixing

# Element types of parameters, by the names that plans use.
_TYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
    )
}

# A normal value strays beyond 7 deviations once in 4e11 draws; a finite number of the parameter's type must hold that much.
_LARGEST_DEVIATION = 7.0


class Family(Enum):
    """Distributions of a parameter's entries."""

    KEEP = "keep"  # leave the present values
    CONSTANT = "constant"  # every entry equals mean
    NORMAL = "normal"
    TRUNCATED_NORMAL = "truncated_normal"  # cut at 2 deviations of the parent normal; std is that of the result
    UNIFORM = "uniform"
    ORTHOGONAL = "orthogonal"
    DELTA_ORTHOGONAL = "delta_orthogonal"
    MIXED = "mixed"  # orthogonal rows times a known matrix

    @property
    def is_matrix(self) -> bool:
        """The entries are drawn together, as a matrix, and not one by one."""
        return self in (Family.ORTHOGONAL, Family.DELTA_ORTHOGONAL)

    @property
    def kurtosis(self) -> float:
        """``E[(w - m)^4] / Var(w)^2`` of an entry: 9/5 of a uniform one; cut at 2: ``(3 - 28 r) / (1 - 4 r)^2``, r = phi(2)/P."""
        if self is Family.UNIFORM:
            return 1.8
        if self is Family.TRUNCATED_NORMAL:
            ratio = math.exp(-2.0) / math.sqrt(2.0 * math.pi) / math.erf(math.sqrt(2.0))
            return (3.0 - 28.0 * ratio) / (1.0 - 4.0 * ratio) ** 2
        return 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """How the entries of one parameter are drawn: a family with the mean and standard deviation of an entry.

    ``std`` is that of the values as written: a truncated normal's parent is wider, and an orthogonal matrix is scaled so
    that the mean of its squared entries is ``std**2``. That matrix has the parameter's output dimensions as rows and all
    others as columns; the smaller side is orthonormal up to scale. A delta-orthogonal kernel of shape [channels, channels,
    taps...] is such a matrix in its centre tap and zero in the others, and ``std**2`` is the mean over all taps, so that
    fan-in times ``std**2`` means the same for every family. ``mixing`` is for the mixed family, and says what is mixed.

    Raises:
        InputError: numbers that are not finite, a negative ``std``, a constant that varies, an orthogonal or mixed mean.
    """

    family: Family
    mean: float = 0.0
    std: float = 0.0
    mixing: Mixing | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        if (self.family is Family.MIXED) is (self.mixing is None):
            raise InputError(
                f"a distribution of the family {self.family.value} {'needs' if self.mixing is None else 'has no'} mixing"
            )
        for name, number in (("mean", self.mean), ("std", self.std)):
            if not math.isfinite(number):
                raise InputError(f"{name} of a distribution is {number}; it must be finite")
        if self.std < 0:
            raise InputError(f"std of a distribution is {self.std}; it cannot be negative")
        if self.family is Family.CONSTANT and self.std:
            raise InputError(f"a constant has std 0, not {self.std}; choose normal or uniform for values that differ")
        if (self.family.is_matrix or self.mixing is not None) and self.mean:
            raise InputError(f"the entries of an {self.family.value} matrix have mean 0, not {self.mean}")

    def __str__(self) -> str:
        """In words: ``normal, mean 0, std 0.0417``."""
        if self.family is Family.KEEP:
            return "kept as it is"
        if self.family is Family.CONSTANT:
            return f"constant {self.mean:.4g}"
        if self.mixing is not None:
            return f"orthogonal rows times a matrix [{self.mixing.rank}, {self.mixing.columns}], std {self.std:.4g}"
        name = self.family.value.replace("_", " ")
        return f"{name}, std {self.std:.4g}" if self.family.is_matrix else f"{name}, mean {self.mean:.4g}, std {self.std:.4g}"


@dataclass(frozen=True, slots=True)
class Block:
    """A slice of a parameter with a distribution of its own: ``parameter[start:stop]`` along dimension ``dim``.

    A fused projection has one block for each of query, key and value; those that are drawn alike are one. ``role``: what these
    rows are for, several roles after commas; "" where it is the parameter's.
    """

    dim: int
    start: int
    stop: int
    distribution: Distribution
    role: str = ""

    def __str__(self) -> str:
        """As one would index: ``[0:64]`` along dimension 0, ``[:, 0:64]`` along dimension 1."""
        return f"[{':, ' * self.dim}{self.start}:{self.stop}]"


def joined(parts: Iterable[Block]) -> tuple[Block, ...]:
    """Neighbours that are drawn alike as one block, which is for all that they are for."""
    found: list[Block] = []
    for part in parts:
        if found and found[-1].distribution == part.distribution:
            roles = dict.fromkeys(filter(None, (*found[-1].role.split(", "), *part.role.split(", "))))
            found[-1] = replace(found[-1], stop=part.stop, role=", ".join(roles))
        else:
            found.append(part)
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """What a weight does to levels: from the place where its input's signal arises to its output, and back.

    ``origin``: that place, in words. ``forward``: ``E[y^2] / E[origin^2]``. ``backward``: second moment of the gradient that
    arrives there over that of the output's gradient, of what comes through this weight alone.

    Raises:
        InputError: a factor that is negative or not finite.
    """

    origin: str
    forward: float
    backward: float

    def __post_init__(self) -> None:
        """Refuse what no second moment can be multiplied by."""
        for name, factor in (("forward", self.forward), ("backward", self.backward)):
            if not (math.isfinite(factor) and factor >= 0.0):
                raise InputError(f"a passage multiplies by {factor} {name}; it must be finite and not negative")

    def __str__(self) -> str:
        """In words."""
        return (
            f"from {self.origin} to here E[x^2] is multiplied by {self.forward:.4g}, "
            f"and E[g^2] by {self.backward:.4g} on the way back"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterPlan:
    """What is written into one parameter. ``blocks`` is empty for a parameter with one distribution.

    Blocks lie along one dimension, in order, without overlap; entries outside of them follow ``distribution``.
    ``output_dims``: the dimensions of the parameter that index outputs; the others are summed over (fan-in).

    Raises:
        InputError: blocks outside of the shape, a family that the shape does not allow, values beyond the element type.
    """

    name: str
    aliases: tuple[str, ...] = ()
    shape: tuple[int, ...]
    dtype: str  # "float32"
    role: str
    distribution: Distribution
    blocks: tuple[Block, ...] = ()
    output_dims: tuple[int, ...] = (0,)
    derivation: tuple[str, ...] = ()  # lines of text, formula first, numbers filled in
    passage: Passage | None = None  # of a weight that passes on a gradient
    branches: int = 1  # of the residual stream that it is in a branch of; 1 outside of branches

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn into this shape and element type."""
        dtype = _TYPES.get(self.dtype)
        if dtype is None:
            raise InputError(f"{self.name}: {self.dtype!r} is not a floating-point type; known are {', '.join(_TYPES)}")
        if self.branches < 1:
            raise InputError(f"{self.name}: a stream with {self.branches} branches; one that is in none has 1")
        if any(size < 0 for size in self.shape):
            raise InputError(f"{self.name}: a dimension of shape {list(self.shape)} is negative")
        if len(set(self.output_dims)) < len(self.output_dims) or any(dim < 0 for dim in self.output_dims):
            raise InputError(f"{self.name}: output_dims {list(self.output_dims)} are not different dimensions counted from 0")
        end = 0
        for block in self.blocks:
            if block.dim != self.blocks[0].dim or not 0 <= block.dim < len(self.shape):
                raise InputError(f"{self.name}: block {block} is not along the dimension of the first block, or there is none")
            if not end <= block.start < block.stop <= self.shape[block.dim]:
                raise InputError(f"{self.name}: block {block} overlaps another, or lies outside of shape {list(self.shape)}")
            end = block.stop
        for distribution in self.distributions:
            if abs(distribution.mean) + _LARGEST_DEVIATION * distribution.std > torch.finfo(dtype).max:
                raise InputError(f"{self.name}: {distribution} does not fit into {self.dtype}")
            if distribution.family.is_matrix:
                self._check_matrix(distribution.family)
            if distribution.mixing is not None:
                self._check_mixing(distribution.mixing)

    @property
    def distributions(self) -> tuple[Distribution, ...]:
        """All that its entries are drawn from: that of the entries outside of blocks first."""
        return (self.distribution, *(block.distribution for block in self.blocks))

    @property
    def has_matrices(self) -> bool:
        """Some of its rows are drawn together, as an orthogonal matrix."""
        return any(distribution.family.is_matrix for distribution in self.distributions)

    def _check_matrix(self, family: Family) -> None:
        if len(self.shape) < 2 or not self.output_dims or any(dim >= len(self.shape) for dim in self.output_dims):
            raise InputError(f"{self.name}: shape {list(self.shape)} with output_dims {list(self.output_dims)} is no matrix")
        if family is Family.DELTA_ORTHOGONAL and (
            self.output_dims not in ((0,), (1,)) or any(block.dim > 1 for block in self.blocks)
        ):
            raise InputError(f"{self.name}: a delta-orthogonal kernel has the shape [channels, channels, taps...]")

    def _check_mixing(self, mixing: Mixing) -> None:
        is_one = len(self.output_dims) == 1 and self.output_dims[0] < len(self.shape)
        if not is_one or mixing.columns * self.shape[self.output_dims[0]] != math.prod(self.shape):
            raise InputError(f"{self.name}: shape {list(self.shape)} has no {mixing.columns} entries for each output")
        if self.blocks and self.blocks[0].dim != self.output_dims[0]:
            raise InputError(f"{self.name}: blocks of a mixed parameter are blocks of outputs")

    def __str__(self) -> str:
        """Header and derivation, as :meth:`Plan.explain` shows them."""
        lines = [f"{self.name}  {list(self.shape)} {self.dtype}, {self.role}"]
        if self.aliases:
            lines.append(f"tied to {', '.join(self.aliases)}: one tensor, drawn once")
        if self.blocks:
            lines += ["  ".join(filter(None, (str(block), str(block.distribution), block.role))) for block in self.blocks]
            covered = sum(block.stop - block.start for block in self.blocks)
            lines += [f"elsewhere  {self.distribution}"] if covered < self.shape[self.blocks[0].dim] else []
        else:
            lines.append(str(self.distribution))
        passage = [] if self.passage is None else [str(self.passage)]
        return "\n".join([*lines, *(f"  {line}" for line in (*self.derivation, *passage))])
