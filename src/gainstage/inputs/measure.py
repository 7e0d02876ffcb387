"""One pass over a data set, on one process or on many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from gainstage.errors import GainstageError, InputError, NonFiniteError, RankError
from gainstage.inputs.moments import Gathered
from gainstage.inputs.rows import Features, rows_of_layer
from gainstage.inputs.statistics import InputStatistics, TokenStatistics

_MOST_COLUMNS = 16384  # a covariance of 2 GB

Progress = Callable[[int, int | None], object]


def measure_inputs(
    loader: Iterable[Any], *, first: nn.Module | None = None, key: str | int = 0, progress: Progress | None = None
) -> InputStatistics | TokenStatistics:
    """Statistics of a data set in one pass; see :func:`gainstage.api.measure_inputs`.

    Raises:
        InputError: nothing to measure, something else than tensors of one shape, or too few of them.
        NonFiniteError: NaN or infinity in a batch.
        RankError: another process failed.
    """
    failure: GainstageError | None = None
    gathered: _Tokens | Gathered | None = None
    try:
        gathered = _gather(loader, first, key, progress)
    except GainstageError as error:
        failure = error
    gathered = _reduced(gathered, failure)
    return TokenStatistics(torch.from_numpy(gathered.counts)) if isinstance(gathered, _Tokens) else InputStatistics.of(gathered)


class _Tokens:
    """How often each token was seen."""

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.counts = np.zeros(size or 0, np.int64)

    def add(self, tokens: torch.Tensor, place: str) -> None:
        """Take in one batch."""
        if tokens.numel() and (int(tokens.min()) < 0 or (self.size is not None and int(tokens.max()) >= self.size)):
            end = "" if self.size is None else f" to {self.size - 1}"
            raise InputError(f"{place} has tokens from {int(tokens.min())} to {int(tokens.max())}; they are counted from 0{end}")
        self._join(np.bincount(tokens.reshape(-1).cpu().numpy(), minlength=len(self.counts)))

    def merge(self, other: _Tokens) -> None:
        """Take in what another process counted."""
        self._join(other.counts)

    def _join(self, found: Any) -> None:
        longer, shorter = (self.counts, found) if len(self.counts) > len(found) else (found, self.counts)
        self.counts = longer.copy()
        self.counts[: len(shorter)] += shorter


def _gather(loader: Iterable[Any], first: nn.Module | None, key: str | int, progress: Progress | None) -> _Tokens | Gathered:
    gathered: _Tokens | Gathered | None = None
    length = getattr(loader, "__len__", None)
    total = None if length is None else int(length())
    for number, batch in enumerate(loader):
        place = f"inputs: batch {number}"
        samples = _samples(batch, key, place)
        if samples.is_floating_point():
            gathered = gathered or _empty(samples, first, place)
            if isinstance(gathered, _Tokens):
                raise InputError(f"{place} holds numbers, those before it tokens")
            _add(gathered, samples, place)
        else:
            gathered = gathered or _Tokens(_vocabulary(first))
            if isinstance(gathered, Gathered):
                raise InputError(f"{place} holds tokens, those before it numbers")
            gathered.add(samples, place)
        if progress is not None:
            progress(number + 1, total)
    if gathered is None:
        raise InputError("inputs: the loader yields nothing")
    return gathered


def _samples(batch: Any, key: str | int, place: str) -> torch.Tensor:
    """The model's input of what a loader yields: itself, or one entry of a tuple or a mapping."""
    found: Any = batch
    if isinstance(batch, (tuple, list, Mapping)):
        held: Any = batch
        try:
            found = next(iter(held.values())) if isinstance(batch, Mapping) and key == 0 and key not in batch else held[key]
        except (IndexError, KeyError, TypeError, StopIteration) as error:
            raise InputError(f"{place} has no entry {key!r}; say with key= which entry is the input") from error
    if not isinstance(found, torch.Tensor) or found.dim() < 1 or found.is_meta or found.is_complex():
        raise InputError(
            f"{place}: expected a tensor [samples, ...], found {type(found).__name__}; say with key= which entry it is"
        )
    return found.detach()


def _vocabulary(first: nn.Module | None) -> int | None:
    if first is not None and not isinstance(first, nn.Embedding):
        raise InputError(
            f"inputs: integers are counted for an embedding, not for {type(first).__name__}; give floating-point inputs"
        )
    return None if first is None else first.num_embeddings


def _empty(samples: torch.Tensor, first: nn.Module | None, place: str) -> Gathered:
    shape = tuple(samples.shape[1:])
    if not shape or 0 in shape:
        raise InputError(f"{place} has the shape {list(samples.shape)}; expected [samples, features...]")
    rows = Features(int(np.prod(shape))) if first is None else rows_of_layer(first)
    if rows.columns > _MOST_COLUMNS:
        raise InputError(
            f"inputs: a covariance of {rows.columns} columns takes {8e-9 * rows.columns**2:.0f} GB; name the layer that reads "
            "the data (first=model.conv1), or measure fewer features"
        )
    rows.of(torch.zeros(1, *shape))  # says what does not fit
    return Gathered(shape, rows)


def _add(gathered: Gathered, samples: torch.Tensor, place: str) -> None:
    if tuple(samples.shape[1:]) != gathered.shape:
        raise InputError(f"{place} has samples of shape {list(samples.shape[1:])}, those before it {list(gathered.shape)}")
    if not bool(torch.isfinite(samples).all()):
        raise NonFiniteError(f"{place}: NaN or infinity in the data")
    if len(samples):
        gathered.add(samples.to("cpu", torch.float64).numpy())


def _reduced(gathered: _Tokens | Gathered | None, failure: GainstageError | None) -> Any:
    """The same on all ranks, merged in their order; where one fails, all do."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        if failure is not None:
            raise failure
        return gathered
    count, own = distributed.get_world_size(), distributed.get_rank()
    said: list[str | None] = [None] * count
    distributed.all_gather_object(said, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, text in enumerate(said):
        if text is not None:
            raise RankError(f"Rank {rank} failed: {text}")
    merged: Any = None
    for rank in range(count):
        held = [gathered if rank == own else None]
        distributed.broadcast_object_list(held, src=rank)
        theirs: Any = held[0]
        if merged is None:
            merged = theirs
        elif type(merged) is not type(theirs) or getattr(merged, "shape", None) != getattr(theirs, "shape", None):
            raise RankError(f"Rank {rank} was given other data than rank 0: tokens or numbers, or samples of another shape.")
        else:
            merged.merge(theirs)
    return merged
