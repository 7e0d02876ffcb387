"""How the samples of a data set become the rows that a first layer multiplies: features, or patches of a map."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gainstage.errors import InputError


@dataclass(frozen=True, slots=True)
class Features:
    """The last entries of a sample, in their order, ``size`` of them to a row; what stands before them are places."""

    size: int

    @property
    def columns(self) -> int:
        """Entries of a row."""
        return self.size

    def of(self, samples: torch.Tensor) -> torch.Tensor:
        """[samples, places..., columns].

        Raises:
            InputError: no last dimensions have this many entries.
        """
        shape = tuple(samples.shape)
        for dim in range(len(shape) - 1, 0, -1):
            if math.prod(shape[dim:]) == self.size:
                return samples.reshape(*shape[:dim], self.size)
        raise InputError(f"samples of shape {list(shape[1:])} have no last dimensions with {self.size} entries to a row")

    def __str__(self) -> str:
        """In words."""
        return f"{self.size} features"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """What a convolution multiplies at each place: channels first, then the taps, zeros from the padding included."""

    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]  # zeros before and after, for each spatial dimension
    dilation: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Entries of a row."""
        return self.channels * math.prod(self.kernel)

    def of(self, samples: torch.Tensor) -> torch.Tensor:
        """[samples, places..., columns].

        Raises:
            InputError: the samples are no maps of that many channels.
        """
        rank = len(self.kernel)
        if samples.dim() != rank + 2 or samples.shape[1] != self.channels:
            raise InputError(
                f"samples of shape {list(samples.shape[1:])} are no maps of {self.channels} channels "
                f"and {rank} spatial dimensions"
            )
        padded = F.pad(samples, [edge for pair in reversed(self.padding) for edge in pair])
        for dim, (size, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            padded = padded.unfold(2 + dim, gap * (size - 1) + 1, step)[..., ::gap]
        order = (0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank))
        return padded.permute(order).flatten(1 + rank)

    def __str__(self) -> str:
        """In words."""
        return f"patches of {self.channels} x {' x '.join(map(str, self.kernel))}"


Rows = Features | Patches


def padding_of(padding: str | tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each spatial dimension, as torch places them; of an odd number the larger part comes after."""
    if padding == "same":
        totals = [gap * (size - 1) for size, gap in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if isinstance(padding, str):
        return ((0, 0),) * len(kernel)
    return tuple((edge, edge) for edge in (padding if len(padding) == len(kernel) else padding * len(kernel)))


def rows_of_layer(layer: Any) -> Rows:
    """What a first layer multiplies.

    Raises:
        InputError: not a linear layer or a convolution with zeros for padding and one group.
    """
    if isinstance(layer, nn.Linear):
        return Features(layer.in_features)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise InputError("first: a convolution in several groups, or padded with other than zeros, cannot be whitened")
        return Patches(
            channels=layer.in_channels,
            kernel=layer.kernel_size,
            stride=layer.stride,
            padding=padding_of(layer.padding, layer.kernel_size, layer.dilation),
            dilation=layer.dilation,
        )
    raise InputError(f"first: a linear layer, a convolution or an embedding of the model is expected, not {type(layer).__name__}")


def subsets(count: int) -> Iterator[tuple[bool, ...]]:
    """Every choice of places to keep apart, the others being averaged over."""
    for code in range(2**count):
        yield tuple(bool(code >> position & 1) for position in range(count))
