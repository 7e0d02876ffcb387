"""Look-ups: rows of a tensor picked by known integers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gainstage.signal import levels
from gainstage.signal.axes import Axis, Dim, axes_of, new_dims
from gainstage.signal.copies import replace
from gainstage.signal.marginal import Marginal
from gainstage.signal.movement import expand, map_tables, merge_dim, reshape
from gainstage.signal.overlap import independent
from gainstage.signal.patterns import spread_pairs
from gainstage.signal.quadrature import Array, cumulative
from gainstage.signal.slicing import scaled
from gainstage.signal.value import Value


def same_index_table(index: torch.Tensor) -> tuple[Array, tuple[tuple[Axis, ...], ...]]:
    """Probability that two entries of an integer tensor are equal, by the coordinates that they share."""
    dims = new_dims(tuple(index.shape))
    axes = axes_of(dims)
    flat = index.reshape([axis.size for axis in axes]).cpu().numpy()
    _, flat_ids = np.unique(flat, return_inverse=True)
    ids = flat_ids.reshape(flat.shape)
    count = int(ids.max()) + 1 if ids.size else 1
    averaged = np.empty((2,) * len(axes))
    for subset in np.ndindex(*averaged.shape):
        kept = [p for p, same in enumerate(subset) if same]
        others = [p for p, same in enumerate(subset) if not same]
        rows = np.transpose(ids, kept + others).reshape(int(np.prod([flat.shape[p] for p in kept])), -1)
        keys = rows + count * np.arange(rows.shape[0])[:, None]
        _, frequency = np.unique(keys, return_counts=True)
        averaged[subset] = float((frequency.astype(float) ** 2).sum()) / (rows.shape[0] * rows.shape[1] ** 2)
    return spread_pairs(averaged, tuple(axis.size for axis in axes)), dims


def one_hot(index: torch.Tensor, size: int) -> Value:
    """A one where an integer stands, among so many zeros, for every entry of an integer tensor."""
    equal, dims = same_index_table(index)
    share = 1.0 / size
    table = np.stack([(1.0 - equal) * share / max(size - 1, 1), equal * share], axis=-1)
    marginal = Marginal(object(), lambda: np.asarray(cumulative() > 1.0 - share, dtype=np.float64))
    return Value(dims=(*dims, (Axis(size),)), mean=share, table=table, marginal=marginal, source=object())


def arrangement(dim: Dim) -> NDArray[np.int64] | None:
    """Order in which a dimension holds the coordinates of its axes, where it is not the natural one."""
    for axis in dim:
        for key, made in axis.parent.steps.items() if axis.parent else ():
            if key[0] == "arranged" and made[0] is axis:
                return np.frombuffer(key[1], dtype=np.int64)  # type: ignore[call-overload, no-any-return]
    return None


def arrange(x: Value, dim: int, order: NDArray[np.int64]) -> Value:
    """``x[order]`` along a dimension for a permutation: the axes stay, in another order; the inverse brings them back.

    Within the innermost axis (the experts of one token) the order does not matter.
    """
    before = arrangement(x.dims[dim])
    axes = x.dims[dim]
    if before is not None:
        order = before[order]
        axes = tuple(axis.parent for axis in axes if axis.parent is not None)
    inner = axes[-1].size if len(axes) > 1 else 1
    if not np.array_equal(order // inner, np.arange(len(order)) // inner):
        key = ("arranged", np.ascontiguousarray(order, dtype=np.int64).tobytes())
        axes = tuple(axis.steps.setdefault(key, (Axis(axis.size, parent=axis),))[0] for axis in axes)
    dims = tuple(axes if d == dim else kept for d, kept in enumerate(x.dims))
    moved = map_tables(x, dims, lambda table: table, None)
    return replace(moved, source=object(), amplitude=None)


def _copies(index: torch.Tensor, size: int) -> int:
    """How often every row is picked, 0 if not all equally often."""
    if index.dim() != 1 or index.numel() % size or index.numel() < 2:
        return 0
    counts = torch.bincount(index.reshape(-1).long(), minlength=size)
    return int(counts[0]) if bool((counts == counts[0]).all()) else 0


def _repetition(equal: Array) -> float:
    """Variance of the cosine between two places of one sample, 1 where they hold the same row: ``pi (1 - pi)``."""
    if equal.ndim == 0:
        return 0.0
    repeated = float(equal[(1,) * (equal.ndim - 1) + (0,)])
    return max(repeated * (1.0 - repeated), 0.0)


def _squares(profile: Array, position: int, index: torch.Tensor, *, has_rows: bool) -> Array:
    """Mean squares of the rows that are looked up, over that of the whole."""
    sizes = [size for size in index.shape if size > 1]
    if has_rows and profile.shape[position] > 1:
        return np.asarray((profile**2).take(index.reshape(sizes).cpu().numpy(), axis=position))
    kept = profile**2 if not has_rows else (profile**2).take(0, axis=position)
    return np.expand_dims(kept, tuple(range(position, position + len(sizes))))


def levelled(rows: Value, whole: Value, squares: Array) -> Value:
    """What is looked up of a tensor of many levels, with its own: mean squares along each of its axes, over that of the whole."""
    profile = levels.normalised(np.sqrt(squares))
    even, values = (lambda: whole.marginal.even), (lambda: whole.marginal.values)
    marginal = Marginal(rows.marginal.latent, even if profile is None else values, even)
    return scaled(replace(rows, marginal=marginal, levels=profile), float(squares.mean()) ** 0.5)


def lookup(weight: Value, dim: int, index: torch.Tensor) -> Value:
    """``weight`` with one dimension replaced by those of ``index``: entries with the same index share the row.

    Where every row is picked equally often the dimension keeps its axes, with one more for the copies of a row.
    """
    copies = _copies(index, weight.shape[dim])
    if copies and weight.dims[dim]:
        flat = index.long().numpy()
        if copies > 1:
            shape = weight.shape
            wide = reshape(weight, (*shape[: dim + 1], 1, *shape[dim + 1 :]))
            wide = expand(wide, (*shape[: dim + 1], copies, *shape[dim + 1 :]))
            weight = reshape(wide, (*shape[:dim], shape[dim] * copies, *shape[dim + 1 :]))
            turn = np.empty(len(flat), dtype=np.int64)
            turn[np.argsort(flat, kind="stable")] = np.tile(np.arange(copies), shape[dim])
            flat = flat * copies + turn
        return arrange(weight, dim, flat)
    equal, index_dims = same_index_table(index)
    position = sum(len(d) for d in weight.dims[:dim])
    weight = merge_dim(weight, dim)
    has_rows = bool(weight.dims[dim])

    def picked(table: Array) -> Array:
        """Average over pairs of look-ups: of one row, or of two."""
        other, same = np.moveaxis(table, position, 0) if has_rows else (table, table)
        shaped = equal.reshape((1,) * position + equal.shape + (1,) * (same.ndim - position))
        at = tuple(range(position, position + equal.ndim))
        return np.asarray(shaped * np.expand_dims(same, at) + (1.0 - shaped) * np.expand_dims(other, at))

    dims = (*weight.dims[:dim], *index_dims, *weight.dims[dim + 1 :])
    rows = Value(
        dims=dims,
        mean=weight.mean,
        table=picked(weight.table),
        marginal=Marginal(object(), lambda: weight.marginal.values),
        source=object(),
        lineage=weight.lineage,
        stray=weight.stray.hidden(),
        overlap=independent(_repetition(equal)),
    )
    if weight.levels is not None:
        rows = levelled(rows, weight, _squares(weight.levels, position, index, has_rows=has_rows))
    # Two look-ups of one row are equal, of two rows are not: on average over pairs that is more than a correlation shows.
    stray = rows.average(picked(weight.square_covariance())) - rows.fluctuation()
    return replace(rows, stray=rows.stray.with_cause(stray))
