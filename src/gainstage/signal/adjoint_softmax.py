"""Gradients through a softmax: ``a_s = p_s (d_s - sum p d)``, for d of mean 0 that is independent of the weights p.

For independent d of variance 1, with the sums over the keys of one row and of two,

    E sum_s a_s^2    = E[sum p^2 - 2 sum p^3 + (sum p^2)^2]
    E sum_s a_s a'_s = E[sum p p' - sum p^2 p' - sum p p'^2 + (sum p p')^2]

which is 1/n for n equal weights, and less than ``sum p^2`` where a few keys have it all.

In attention nothing of this is independent from key to key: logits, values and so d are made of the same tensor, and two places
at the cosine c have c in common in all of them. To first order in the variance of c, over n keys,

    queries:            sum over s != s' of  E[a_s a_s'] k_s . k_s',    E[a_s a_s'] = c  (da_s/dd_s da_s'/dd_s' + ...)
    weights of keys:    the same with x_s . x_s' in the place of k_s . k_s'
    weights of values:  sum over s != s' of  E[p_s p_s'] x_s . x_s',    E[p_s p_s'] = c s^2 d^2 (p_s p_s') / dl_s dl_s'

with s^2 the variance of the logits: n times as many terms as are in ``E sum a_s^2``, each a part 1/m of it for m channels. Of c
counts what is left without what each place has in common with all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gainstage.signal import levels
from gainstage.signal.attention import Powers, apart, known_shares, powers_of
from gainstage.signal.axes import descends
from gainstage.signal.between import differing, over_pairs, with_pairs_of
from gainstage.signal.copies import replace
from gainstage.signal.movement import merge_dim, together
from gainstage.signal.overlap import NONE, PAIRS, Overlap
from gainstage.signal.quadrature import Array
from gainstage.signal.traits import Logits
from gainstage.signal.value import Value, gaussian

ROWS = 64  # of a mask, at most, of which all pairs are looked at


def softmax_gradient(g: Value, p: Value, x: Value, dim: int) -> Value:
    """``p (g - sum p g)`` along a dimension, p the softmax of x: what g has in common along it goes, and the sum over it is zero.

    ``K[S] = (K_g[same] - K_g[other]) F(S) / n`` for keys that are the same. F as above for rows whose logits have nothing in
    common, and for a row with itself; between the two a power law in their correlation.
    """
    g, p = together(g, p)
    d = g
    g, p, x = merge_dim(g, dim), merge_dim(p, dim), merge_dim(apart(x), dim)
    if not g.dims[dim]:
        return gaussian(g.dims, 0.0, np.zeros_like(g.table))
    position = sum(len(d) for d in g.dims[:dim])
    size = g.shape[dim]
    keys = differing(g, position)
    slopes = _slopes(x, dim, keys)
    rho = np.zeros_like(np.take(p.table, 1, axis=position))
    if p.tilt is not None and slopes.variance > 0.0:
        rho = np.clip(np.take(p.tilt.table, 1, axis=position) / slopes.variance, 0.0, 1.0)
    rho[(1,) * rho.ndim] = 1.0
    overlap = np.clip(size * np.take(p.table, 1, axis=position), 0.0, 1.0)
    passed = overlap * (1.0 - overlap) * slopes.apart ** (1.0 - rho) * slopes.own**rho
    same = (np.take(g.table, 1, axis=position) - np.take(g.table, 0, axis=position)) * passed / size
    profile, together_ = _profile(g, position, dim, slopes.pattern)
    same[(1,) * same.ndim] *= together_
    table = np.stack([-same / (size - 1.0), same], axis=position)
    found = gaussian(g.dims, 0.0, table, profile, lineage=g.lineage | p.lineage, stray=g.stray.hidden())
    return _agreeing(found, d, slopes, dim, 0.0 if keys is None else _of_known_pairs(x, g, dim, keys))


def _agreeing(a: Value, d: Value, slopes: _Slopes, dim: int, known: float) -> Value:
    """``a = p (d - sum p d)`` along a dimension, with what two keys have in common of a because they have it of d.

    ``known``: see :func:`_of_known_pairs`.
    """
    n, names = float(a.shape[dim]), [name for name, axes in d.read if axes <= frozenset(d.dims[dim])]
    if not names or n <= 1.0 or a.second_moment <= 0.0:
        return a
    pair = 1.0 / (n * (n - 1.0) * a.second_moment)
    overlap = d.overlap.centred().times((pair * d.second_moment * slopes.between) ** 2)
    if known > 0.0:
        uniform = powers_of(0.0, 1.0 / slopes.square).between()
        share = pair * known * slopes.between / uniform if uniform > 0.0 else 0.0
        overlap = overlap.with_causes({PAIRS: share**2})
    return _read_along(a, dim, names, overlap)


def _of_known_pairs(x: Value, d: Value, dim: int, keys: Array) -> float:
    """``sum over s != s' of E[a_s a_s'] D_ss'`` over the deviation of D: what two keys share of d beyond the average pair.

    Logits are of what values are of, so that ``k_s . k_s'`` has the same D. For weights that are known beforehand.
    """
    apart, deviation = keys * (1.0 - np.eye(len(keys))), over_pairs(keys)
    if deviation <= 0.0:
        return 0.0
    rows = np.full((1, len(keys)), 1.0 / len(keys))
    if x.prior is not None or x.fields is not None:
        rows = known_shares(x, dim).movedim(dim - len(x.dims), -1).double().numpy()
    rows = rows.reshape(-1, len(keys))
    met, own = rows @ keys, rows @ apart
    found = ((rows @ (keys * apart)) * rows).sum(1) - 2.0 * (rows * met * own).sum(1) + (met * rows).sum(1) * (own * rows).sum(1)
    position = sum(len(axes) for axes in d.dims[:dim])
    common = float(np.take(d.table, 0, axis=position)[(-1,) * (d.table.ndim - 1)])
    loud = _loud_rows(d, dim, len(found))
    return (d.second_moment - common) * float((found * loud).mean()) / deviation


def _loud_rows(d: Value, dim: int, rows: int) -> Array:
    """Mean square of each row of d over that of all, for the rows of weights that are known."""
    if d.levels is None or dim == 0 or len(d.dims[dim - 1]) != 1:
        return np.ones(rows)
    axis = d.dims[dim - 1][0]
    each = levels.over(d.levels, d.axes.index(axis), axis.size) ** 2
    return np.tile(each, rows // axis.size) if rows % axis.size == 0 else np.ones(rows)


def of_product(found: Value, g: Value, a: Value, b: Value, labels: tuple[str, str, str]) -> Value:
    """Gradient of a in a product of activations a and b, with what its places have in common for those of b, or of g.

    Logits and values at two places agree as what they were made of does, and the gradients ``g . v_s`` of the weights of keys as
    the values; the gradient ``p^T g`` of values as weights that lean, where b is a softmax. ``labels``: of ``found``, g and b.
    """
    own, from_g, from_b = labels
    for dim, label in enumerate(own):
        axes = found.dims[dim]
        known = b.read or (frozenset() if b.tilt is None else a.read)
        names = [name for name, read in known if axes and all(descends(axis, read) for axis in axes)]
        if label in from_b and label not in from_g and names:
            overlap = b.overlap if b.tilt is None else _leaning(a, b.tilt.of)
            return _read_along(with_pairs_of(found, dim, b, from_b.index(label)), dim, names, overlap)
    for dim, label in enumerate(own):
        names = [name for name, read in g.read if read == frozenset(found.dims[dim])]
        if label in from_g and label not in from_b and names:
            return _read_along(found, dim, names, g.overlap)
    return found


def _leaning(values: Value, logits: Logits) -> Overlap:
    """How the gradients of values agree because the logits do, which agree as the values: both read one tensor."""
    rows, n = _slopes(merge_dim(logits.of, logits.dim), logits.dim), float(logits.of.shape[logits.dim])
    if n <= 1.0 or rows.square <= 0.0:
        return NONE
    factor = logits.of.variance * rows.lean / ((n - 1.0) * rows.square)
    return values.overlap.centred().times(factor**2)


def _read_along(x: Value, dim: int, names: Sequence[object], overlap: Overlap) -> Value:
    return replace(x, overlap=overlap, read=frozenset((name, frozenset(x.dims[dim])) for name in names))


@dataclass(frozen=True, slots=True)
class _Slopes:
    """F over ``U (1 - U)``, U the overlap of two rows: of a row with itself, and of rows whose logits have nothing in common.

    ``variance``: of the logits over keys. ``square``, ``between``, ``lean``: of the powers of p, on average over rows.
    ``pattern`` [query, key]: mean square of a, where it differs by what is known of the logits.
    """

    variance: float
    own: float
    apart: float
    square: float
    between: float
    lean: float
    pattern: Array | None = None


def _slopes(x: Value, dim: int, keys: Array | None = None) -> _Slopes:
    position = sum(len(d) for d in x.dims[:dim])
    within = np.take(x.covariance, 1, axis=position) - np.take(x.covariance, 0, axis=position)
    variance = round(max(float(within[(1,) * within.ndim]), 0.0), 9)
    size = float(x.shape[dim])
    if x.prior is None and x.fields is None:
        powers = powers_of(variance, size, x.flatness)
        own, pairs = _over(powers.slope(), powers.square), _over(_of_two_rows(powers, size), 1.0 / size)
        return _Slopes(variance, own, pairs, powers.square, powers.between(), powers.lean())
    share = known_shares(x, dim).movedim(dim - len(x.dims), -1)
    rows = share.reshape(-1, share.shape[-1]).double()
    squares = rows.square().sum(1).numpy()
    counts = np.round(1.0 / np.maximum(squares, 1e-300), 3)
    counts = counts[squares > 0.0]
    picked = np.unique(counts)
    picked = picked if len(picked) <= 24 else np.geomspace(picked[0], picked[-1], 24)
    found = [powers_of(variance, float(n), x.flatness) for n in picked]

    def mean(part: Sequence[float]) -> float:
        return float(np.interp(counts, picked, part).sum()) / len(squares)

    slope = [powers.slope() for powers in found]
    square = mean([powers.square for powers in found])
    between, lean = mean([powers.between() for powers in found]), mean([powers.lean() for powers in found])
    size = 1.0 / max(float(squares.mean()), 1e-300)
    pairs = _of_known_rows(rows, keys) * _over(_of_two_rows(powers_of(variance, size, x.flatness), size), 1.0 / size)
    pattern, louder = _pattern(share, dim, (picked, np.array(slope)), keys)
    return _Slopes(variance, louder * _over(mean(slope), square), pairs, square, between, lean, pattern)


def _over(slope: float, overlap: float) -> float:
    """``F / (U (1 - U))`` of means over rows."""
    return slope / (overlap * (1.0 - overlap)) if 0.0 < overlap < 1.0 else 1.0


def _of_two_rows(powers: Powers, size: float) -> float:
    """F of rows whose logits are independent: their weights meet by chance, 1/n for each key."""
    if size <= 1.0:
        return 0.0
    square = powers.square
    return (1.0 - 2.0 * square + square**2) / size + (1.0 - square) ** 2 / (size * (size - 1.0))


def _of_known_rows(rows: torch.Tensor, keys: Array | None) -> float:
    """``F / (U (1 - U))`` of different rows of weights that are known, on average over pairs; of many rows, of some."""
    rows = rows[:: max(len(rows) // ROWS, 1)]
    if len(rows) < 2:
        return 1.0
    own, met = _meeting(rows, keys)
    cubes = (rows * met) @ rows.T
    overlap = rows @ rows.T
    slope = (rows * own) @ rows.T - cubes - cubes.T + overlap * (met @ rows.T)
    count = len(rows) * (len(rows) - 1.0)
    means = [float(part.sum() - part.diagonal().sum()) / count for part in (slope, overlap)]
    return _over(*means)


def _meeting(rows: torch.Tensor, keys: Array | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``K_d[s, s]`` and ``sum over u of p_u K_d[u, s]``, for each key s; 1 and p_s where no two keys differ from others."""
    if keys is None:
        return torch.ones(rows.shape[-1], dtype=torch.float64), rows
    known = torch.from_numpy(keys)
    return known.diagonal(), rows @ known


def _pattern(share: torch.Tensor, dim: int, slopes: tuple[Array, Array], keys: Array | None) -> tuple[Array | None, float]:
    """Mean square of a for each query and key, by the weights that are known beforehand, and how much more it is by the keys.

    ``p_s^2 (K_d[s, s] - 2 sum p_u K_d[u, s] + sum p_u p_u' K_d[u, u'])``: a query near the start has its first few keys only.
    """
    if dim == 0 or share.dim() < 2 or share.shape[-2] == 1:
        return None, 1.0
    flat = share.reshape(-1, *share.shape[-2:]).double()
    square = flat.square().sum(-1, keepdim=True)
    plain, found = (
        flat.square() * (own - 2.0 * met + (met * flat).sum(-1, keepdim=True))
        for own, met in (_meeting(flat, None), _meeting(flat, keys))
    )
    sums = plain.sum(-1, keepdim=True).numpy()
    counts = 1.0 / square.clamp_min(1e-300).numpy()
    gain = np.where(sums > 0.0, np.interp(counts, *slopes) / np.maximum(sums, 1e-300), 0.0)
    before, pattern = (np.asarray((part.numpy() * gain).mean(0)) for part in (plain, found))
    return pattern, float(pattern.sum() / before.sum()) if before.any() else 1.0


def _profile(g: Value, position: int, dim: int, pattern: Array | None) -> tuple[Array | None, float]:
    """Levels of a, and how much louder it is on average for that loud gradients meet loud rows."""
    own = np.ones((1,) * g.table.ndim) if g.levels is None else np.mean(g.levels**2, axis=position, keepdims=True)
    if pattern is None or not g.dims[dim - 1]:
        return levels.normalised(np.sqrt(own)), 1.0
    shape = [n for d, axes in enumerate(g.dims) for n in ([a.size for a in axes] if d in (dim - 1, dim) else [1] * len(axes))]
    if int(np.prod(shape)) != pattern.size:
        return levels.normalised(np.sqrt(own)), 1.0
    weight = pattern.reshape(shape)
    both = own * weight
    return levels.normalised(np.sqrt(both)), float(both.mean() / (own.mean() * weight.mean())) if weight.any() else 1.0
