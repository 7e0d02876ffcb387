"""Statistics of what the graph starts from: present parameters and the inputs that the user gave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from gainstage.errors import NonFiniteError, UnsupportedParameterError
from gainstage.graph import ParameterInfo
from gainstage.signal import Value, independent, known, levels, measured
from gainstage.signal.copies import replace
from gainstage.signal.quadrature import Array

Slice = tuple[int, int, int, float]  # dimension, start, stop, standard deviation
KURTOSIS_ENTRIES = 65536  # enough for a standard error of 2 %
KURTOSES = {3.0: 24.0, 1.8: 9.0 - 4.0 * 1.8 * 27.0 / 7.0 + 4.0 * 1.8**3 - 1.8**2}  # normal, uniform; n times the variance


def parameter_moments(parameters: Mapping[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Mean and variance of the entries of each parameter, in float64.

    A mean within four standard errors of zero is taken as zero: it is what a zero-mean draw of that size shows.

    Raises:
        NonFiniteError: NaN or infinity in a parameter; names them all.
        UnsupportedParameterError: lazy parameters, and those on the meta device, which have no values yet.
    """
    check_initialised(parameters)
    unreal = [name for name, tensor in parameters.items() if tensor.is_meta]
    if unreal:
        raise UnsupportedParameterError(
            f"on the meta device, without values to look at: {', '.join(unreal[:8])}; gainstage.plan needs none, and "
            "gainstage.materialize gives the model its values"
        )
    found: dict[str, tuple[float, float]] = {}
    bad: list[str] = []
    for name, tensor in parameters.items():
        data = tensor.detach()
        if data.numel() == 0:
            found[name] = (0.0, 0.0)
            continue
        variance, mean = (float(v) for v in torch.var_mean(data.to(torch.float32), correction=0))
        if not (abs(mean) < float("inf") and variance < float("inf")):
            bad.append(name)
            continue
        if mean**2 * data.numel() < 16.0 * variance:
            variance, mean = variance + mean**2, 0.0
        elif variance < 1e-12 * mean**2:
            variance = 0.0
        found[name] = (mean, variance)
    if bad:
        raise NonFiniteError(f"NaN or infinity in parameter(s) {', '.join(bad[:8])}: initialise them before inspecting the model")
    return found


def check_initialised(parameters: Mapping[str, torch.Tensor]) -> None:
    """Refuse parameters without values.

    Raises:
        UnsupportedParameterError: lazy parameters; names them all.
    """
    lazy = [name for name, tensor in parameters.items() if bool(is_lazy(tensor))]
    if lazy:
        raise UnsupportedParameterError(
            f"{', '.join(lazy[:8])}: lazy and not yet initialised, so that there are no values to look at. Run the model once."
        )


def level_profile(tensor: torch.Tensor) -> tuple[Slice, ...]:
    """Slices of a matrix that were drawn with different deviations, as those of a fused projection may be.

    The mean squares of the rows (or columns) are split in two where the two parts differ most, and so on, as long as that
    difference is more than seven standard errors: of a log mean square of n normal entries it is ``sqrt(2 / n)``.

    Returns:
        (dimension, start, stop, standard deviation) for each slice; nothing for a parameter that is of one piece.
    """
    if tensor.dim() < 2:
        return ()
    data = tensor.detach().to(torch.float32)
    for dim in (0, 1):
        others = [d for d in range(data.dim()) if d != dim]
        squares = data.square().mean(dim=others).double().cpu().numpy()
        cuts = _cuts(squares, data.numel() // data.shape[dim])
        if cuts:
            edges = [0, *cuts, len(squares)]
            return tuple((dim, start, stop, float(squares[start:stop].mean()) ** 0.5) for start, stop in pairwise(edges))
    return ()


def _cuts(squares: Array, entries: int, offset: int = 0) -> list[int]:
    """Places where the mean of the squares changes, each between two runs of at least four rows."""
    count = len(squares)
    if count < 8:
        return []
    first = np.arange(4, count - 3)
    left = np.cumsum(squares)[first - 1] / first
    right = (squares.sum() - np.cumsum(squares)[first - 1]) / (count - first)
    floor = 1e-12 * float(squares.mean()) + 1e-300
    error = np.sqrt(2.0 / entries * (1.0 / first + 1.0 / (count - first)))
    difference = np.abs(np.log((left + floor) / (right + floor))) / error
    best = int(np.argmax(difference))
    if difference[best] < 7.0:
        return []
    cut = int(first[best])
    return [*_cuts(squares[:cut], entries, offset), offset + cut, *_cuts(squares[cut:], entries, offset + cut)]


def kurtosis(tensor: torch.Tensor) -> float:
    """``E[(w - m)^4] / Var(w)^2`` of the entries; a Gaussian's or a uniform's, whichever it is within four standard errors of.

    Of n entries with the standardised moments m_k the sample's has the variance ``(m_8 - 4 m_4 m_6 + 4 m_4^3 - m_4^2) / n``, if
    they are symmetric. Of both, the one that makes the sample's likelier. At most KURTOSIS_ENTRIES are looked at.
    """
    flat = tensor.detach().reshape(-1)
    flat = flat[:: max(flat.numel() // KURTOSIS_ENTRIES, 1)].to(torch.float64)
    squares = (flat - flat.mean()).square()
    level = float(squares.mean())
    found = float(squares.square().mean()) / level**2 if level > 0.0 else 3.0
    off = {exact: abs(found - exact) * (flat.numel() / variance) ** 0.5 for exact, variance in KURTOSES.items()}
    likeliest = min(off, key=lambda exact: off[exact] ** 2 + math.log(KURTOSES[exact]))
    return likeliest if off[likeliest] <= 4.0 else found


def parameter_value(
    info: ParameterInfo, index: int, mean: float, variance: float, profile: Sequence[Slice] = (), *, kurtosis: float = 3.0
) -> Value:
    """Independent entries with these moments, on average over the whole parameter.

    ``profile``: slices (dimension, start, stop, standard deviation) that differ, all along one dimension; entries outside of
    them are taken to share what is left of the variance. ``kurtosis``: of a parameter of one piece.
    """
    value = independent(info.shape, mean, variance**0.5, kurtosis=kurtosis, lineage=1 << index, is_weight=True)
    if not profile or value.second_moment <= 0.0:
        return value
    dim = profile[0][0]
    position = sum(len(axes) for axes in value.dims[:dim])
    squares = np.full(info.shape[dim], np.nan)
    for _, start, stop, std in profile:
        squares[start:stop] = std**2
    outside = np.isnan(squares)
    if outside.any():
        squares[outside] = max(variance * squares.size - float(np.nansum(squares)), 0.0) / int(outside.sum())
    shape = [1] * len(value.axes)
    shape[position] = squares.size
    return replace(value, levels=levels.normalised(np.sqrt(squares).reshape(shape)))


def table_value(tensor: torch.Tensor, index: int) -> Value | None:
    """A table that stays as it is, entry by entry; None where its entries look independent of each other, or are not at hand.

    A table of sines says the same in all its slow channels: what positions share in it is not that of independent entries.
    """
    if tensor.is_meta or sum(size > 1 for size in tensor.shape) < 2 or not tensor.is_floating_point():
        return None
    found = known(tensor.detach())
    shared = np.abs(found.covariance)
    shared[(1,) * shared.ndim] = 0.0
    tolerance = max(0.05, 5.0 / tensor.numel() ** 0.5)
    return replace(found, lineage=1 << index) if float(shared.max()) > tolerance * found.variance else None


def input_value(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> Value:
    """Measured statistics of an input; standard normal where there is no data, or data that looks just like it.

    Raises:
        NonFiniteError: NaN or infinity in the input.
    """
    if tensor is None or tensor.is_meta:
        return independent(shape, 0.0, 1.0)
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"NaN or infinity in input {name!r}: give example inputs that are finite")
    value, expected = measured(tensor), independent(shape, 0.0, 1.0)
    pairs_agree = bool((abs(value.table - expected.table) < 10.0 / max(tensor.numel(), 1) ** 0.5).all())
    return expected if pairs_agree and _is_like_normal(value, tensor.numel()) else value


def _is_like_normal(value: Value, entries: int) -> bool:
    """2 log(likelihood of m, s^2 / likelihood of 0, 1) = n (E[x^2] - 1 - log s^2) < 25, five deviations (Wilks 1938).

    Of ``n`` independent entries it is chi-squared with two degrees of freedom. It tells few coordinates in [-1, 1], with
    ``E[x^2] = 1/3``, from normal numbers, where the symmetric error of a mean square does not.
    """
    variance = value.second_moment - value.mean**2
    return variance > 0.0 and entries * (value.second_moment - 1.0 - math.log(variance)) < 25.0
