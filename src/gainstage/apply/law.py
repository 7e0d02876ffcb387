"""What becomes of a random word: the constants of a distribution, for whoever does the arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gainstage.plan import Distribution, Family

# Written out, as a library's erf and exp may differ in the last bit from one machine to another.
_CUT = 2.0  # deviations of the parent normal
_WIDTH = 0.9544997361036416  # probability between the cuts: erf(sqrt(2))
_CUT_VARIANCE = 0.7737413035499232  # of a normal cut at +-c, over its parent's: 1 - 2 c phi(c) / (Phi(c) - Phi(-c))


# Types that values are drawn in.
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """``scale * f(word) + mean``, where f is the quantile function of the normal, or the identity.

    Args:
        dtype: of the values, one of ``TYPES``. The two of 16 bits are computed in single precision and rounded once.
        normal: f is the quantile function.
        scale: of the quantile, or of the word as a signed integer.
        mean: is added.
        width: probability between the quantiles at which the normal is cut; 1 for the whole.
        limit: largest value before the mean is added, and the negative of the least: rounding must not step over the cut.
    """

    dtype: torch.dtype
    normal: bool
    scale: float
    mean: float
    width: float = 1.0
    limit: float = math.inf

    @property
    def bits(self) -> int:
        """Of a word, and of a value as it is computed."""
        return _bits(self.dtype)

    @property
    def is_rounded(self) -> bool:
        """Values become shorter at the end."""
        return self.dtype.itemsize == 2


def law_of(distribution: Distribution, dtype: torch.dtype) -> Law:
    """The law of a family with independent entries.

    Args:
        distribution: normal, truncated normal or uniform.
        dtype: one of ``TYPES``.
    """
    std, mean = distribution.std, distribution.mean
    if distribution.family is Family.NORMAL:
        return Law(dtype=dtype, normal=True, scale=std, mean=mean)
    if distribution.family is Family.TRUNCATED_NORMAL:
        parent = std / math.sqrt(_CUT_VARIANCE)
        return Law(dtype=dtype, normal=True, scale=parent, mean=mean, width=_WIDTH, limit=_CUT * parent)
    assert distribution.family is Family.UNIFORM
    return Law(dtype=dtype, normal=False, scale=math.sqrt(12) * std * 2.0 ** -_bits(dtype), mean=mean)


def _bits(dtype: torch.dtype) -> int:
    return 64 if dtype == torch.float64 else 32
