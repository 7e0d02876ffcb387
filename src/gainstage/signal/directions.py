"""Directions: what vectors share after each was divided by its own norm, which strays where their entries are alike.

Along the axes of a norm the entries of a Gaussian vector have independent components (:func:`gainstage.signal.pairing.spectrum`),
a few of large variance where all entries have something in common. A vector that has more of that than others has a large norm:
the share of it that is left is smaller than the ratio of averages. With components ``sqrt(l_k) z_k`` and ``s^2 = sum l_k z_k^2``

    E[z_k^2 / s^2] = int_0^inf (1 + 2 u l_k)^-1 D(u) du,                          D(u) = prod over m of (1 + 2 u l_m)^(-1/2),
    E[z_k^2 / s]   = int_0^inf (1 + 2 u l_k)^-1 D(u) (pi u)^(-1/2) du

exactly. The first is about a vector and itself; two vectors of correlation r have ``E[z_k^2 / s]^2 r`` and, of third order in
r, the rest.

A channel over samples and places is such a vector too, which batch norm divides. The averages over places of two samples differ
by one number in each channel: where it is loud, little else is left of the channel, but nothing is more than all. So these
averages are quieter than the ratio of means says: of two samples, with a ratio r of the mean square of the rest to theirs,
``E[z^2 / (z^2 + r)] = 1 - (pi r / 2)^(1/2) e^(r/2) erfc((r/2)^(1/2))``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gainstage.signal.copies import replace
from gainstage.signal.filtered import times
from gainstage.signal.pairing import amplitude_of, spectrum, table_of
from gainstage.signal.quadrature import Array
from gainstage.signal.value import Value

LEAST = 0.02  # relative variance of the squared norm, or what pairs differ by, below which it is as good as none
CENTRED = 1e-3  # of the second moment: the largest square of a mean that is none
_LOGS = np.linspace(-12.0, 30.0, 421)  # of u, in units of one over the squared norm


def divided(x: Value, reduced: Sequence[int]) -> Value:
    """Vectors along the axes at ``reduced``, divided by the average of their squared norms: by the norm of each instead.

    x as it was where norms hardly stray, and where entries are not Gaussian of mean 0 or differ by their place.
    """
    levelled = x.levels is None or all(x.levels.shape[position] == 1 for position in reduced)
    if not levelled or x.near is not None or _has_unlike_pairs(x) or abs(x.marginal.kurtosis - 3.0) > 1.0:
        return x
    if x.second_moment <= 0.0 or x.mean**2 > CENTRED * x.second_moment:
        return x
    found = _by_component(x, reduced)
    return x if found is None else replace(x, table=found[0], rho=None, flatness=found[2])


def divided_by_channel(x: Value, reduced: Sequence[int], alike: float) -> Value:
    """As :func:`divided`, for channels over samples and places, where these may have levels and lags of their own.

    ``alike``: mean over all pairs of entries of a channel of the square of their correlation, which is more than the table tells
    where near places share more: of what lies within samples there are so many fewer components.
    """
    if _has_unlike_pairs(x) or x.second_moment <= 0.0 or (found := _by_component(x, reduced, alike)) is None:
        return x
    table, linear, _ = found
    return replace(x, table=table, rho=None, amplitude=amplitude_of(x) * linear, filtered=times(x, 1.0, table))


def _by_component(x: Value, reduced: Sequence[int], alike: float = 0.0) -> tuple[Array, Array, float] | None:
    """Table after each vector was divided by its own norm; the linear part that is left of each component; and the flatness.

    None where norms hardly stray.
    """
    sizes = [x.axes[position].size for position in reduced]
    front, rest = tuple(range(len(reduced))), x.table.ndim - len(reduced)
    components = spectrum(np.moveaxis(x.covariance, tuple(reduced), front), sizes)
    own = np.maximum(components.reshape(*components.shape[: len(reduced)], -1)[..., -1], 0.0)
    variances, counts = _variances(own, sizes)
    if 2.0 * max(float((counts * variances**2).sum()), alike) < LEAST:
        return None
    variances, counts = _fewer(variances, counts, alike)
    same, apart, flatness = _shares(variances, counts)
    own, same, apart = (part.reshape(*part.shape, *[1] * rest) for part in (own, same, apart))
    rho = np.clip(components / np.maximum(own, 1e-300), -1.0, 1.0)
    kept = own * (apart * rho + (same - apart) * rho**3)
    table = np.moveaxis(table_of(kept, sizes), front, tuple(reduced)) + x.mean**2
    return np.ascontiguousarray(table), np.moveaxis(np.sqrt(apart), front, tuple(reduced)), flatness


def _fewer(variances: Array, counts: Array, alike: float) -> tuple[Array, Array]:
    """So many components of the last kind, the rest of all axes, that pairs of entries have this mean square of a correlation."""
    last = (-1,) * counts.ndim
    told = float((counts * variances**2).sum())
    within = float(counts[last] * variances[last] ** 2)
    if alike <= told or within <= 0.0:
        return variances, counts
    fewer = max(within / (within + alike - told), 1.0 / float(counts[last]))
    variances, counts = variances.copy(), counts.copy()
    counts[last] *= fewer
    variances[last] /= fewer
    return variances, counts


def _has_unlike_pairs(x: Value) -> bool:
    """Whether some pairs of positions are known to share more than others."""
    return x.gram is not None and float(np.abs(x.gram.factors - 1.0).max()) > LEAST


def flatness_of_product(x: Value, y: Value, along_x: Sequence[int], along_y: Sequence[int]) -> float:
    """Kurtosis of ``sum_k x_k y_k`` over many y, x as it is: 3 but for the share of the largest component in its variance."""
    if max(x.flatness, y.flatness) >= 3.0 or not along_x:
        return 3.0
    both = []
    for value, along in ((x, along_x), (y, along_y)):
        sizes = [value.axes[position].size for position in along]
        own = value.covariance[tuple(slice(None) if p in along else 1 for p in range(value.table.ndim))]
        variances, counts = _variances(np.maximum(spectrum(own, sizes), 0.0), sizes)
        both.append(variances)
    shares = both[0] * both[1]
    share = float(shares.max() / (shares * counts).sum()) if counts.ravel()[int(shares.argmax())] == 1.0 else 0.0
    return 3.0 + share**2 * (0.5 * (x.flatness + y.flatness) - 3.0)


def _variances(components: Array, sizes: Sequence[int]) -> tuple[Array, Array]:
    """Variances of the components of each kind, their sum 1, and how many there are."""
    lengths, counts = (_outer([(size, 1.0) for size in sizes]), _outer([(1.0, size - 1.0) for size in sizes]))
    variances = components * lengths
    return variances / max(float((variances * counts).sum()), 1e-300), counts


def _outer(pairs: Sequence[tuple[float, float]]) -> Array:
    """One number for each kind of component: for its mean or the rest along each axis, multiplied."""
    result = np.ones(())
    for pair in pairs:
        result = result[..., None] * np.array(pair)
    return result


def _shares(variances: Array, counts: Array) -> tuple[Array, Array, float]:
    """``E[z^2 / s^2]`` and ``E[z^2 / s]^2`` for components of these variances, each so many times, ``E[s^2] = 1``.

    And the kurtosis ``E[z^4 / s^4] / E[z^2 / s^2]^2`` of the largest.
    """
    u = np.exp(_LOGS)
    damped = 1.0 + 2.0 * u * variances[..., None]
    density = np.exp(-0.5 * np.tensordot(counts, np.log(damped), axes=counts.ndim)) / damped
    same = np.asarray(np.trapezoid(density * u, _LOGS, axis=-1))
    apart = np.asarray(np.trapezoid(density * np.sqrt(u / np.pi), _LOGS, axis=-1)) ** 2
    fourth = np.trapezoid(3.0 * density / damped * u**2, _LOGS, axis=-1)
    largest = np.unravel_index(int(variances.argmax()), variances.shape)
    flatness = float(np.asarray(fourth)[largest] / same[largest] ** 2)
    return same / float((counts * variances * same).sum()), apart, flatness
