"""Findings on the parameters themselves: drawn as planned, tied as planned, different from each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from gainstage.findings import Finding, FindingKind
from gainstage.graph import ParameterInfo, equal_values, is_random
from gainstage.plan import Distribution, Family, ParameterPlan, Plan

FALSE_ALARMS = 1e-3  # probability that any parameter of a model that was drawn as planned is called wrong
_LONG = 8  # entries that two independent slices never have in common, even in bfloat16
_FEW_ENTRIES = 16  # below this a sample deviation is no evidence, the range of the values still is


@dataclass(frozen=True, slots=True)
class Facts:
    """A parameter as it is found, in the form that a plan is compared with."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    aliases: tuple[str, ...]


def lost_ties(plan: Plan, parameters: Mapping[str, ParameterInfo]) -> tuple[list[Finding], dict[str, Facts]]:
    """Findings for tensors that the plan has as one and the model as several, and the parameters as if they were tied."""
    facts = {name: Facts(info.shape, info.dtype, info.aliases) for name, info in parameters.items()}
    findings = []
    for name, planned in plan.parameters.items():
        for alias in planned.aliases:
            own, copy = facts.get(name), facts.get(alias)
            if own is not None and copy is not None and own.shape == copy.shape:
                findings.append(
                    Finding(
                        kind=FindingKind.TIE_LOST,
                        where=alias,
                        evidence=f"The plan has {name} and {alias} as one tensor; the model holds two.",
                        remedy="Tie them again after to_empty() or loading: assign one parameter to the other's name.",
                    )
                )
                del facts[alias]
                facts[name] = Facts(own.shape, own.dtype, (*own.aliases, alias, *copy.aliases))
    return findings, facts


def not_as_planned(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> list[Finding]:
    """Parameters whose mean, deviation or largest entry cannot come from the planned distribution."""
    parts = [(planned, *part) for planned in plan.parameters.values() for part in _parts(planned)]
    bound = NormalDist().inv_cdf(1.0 - FALSE_ALARMS / (6.0 * max(len(parts), 1)))  # two-sided, of three
    findings: list[Finding] = []
    for planned, dim, start, stop, distribution in parts:
        tensor = tensors[planned.name].detach()
        values = tensor if dim is None else tensor.narrow(dim, start, stop - start)
        objection = _objection(distribution, values, bound)
        if objection:
            label = "" if dim is None else f" (rows {start} to {stop})" if dim == 0 else f" (from {start} to {stop} along {dim})"
            findings.append(
                Finding(
                    kind=FindingKind.NOT_AS_PLANNED,
                    where=planned.name,
                    evidence=f"Planned{label}: {distribution}. Found: {objection}{_looks_like(tensor)}",
                    remedy=_remedy(values),
                )
            )
    return findings


def _parts(planned: ParameterPlan) -> Iterator[tuple[int | None, int, int, Distribution]]:
    """Blocks, and what lies between them: dimension (None: all of it), start, stop, distribution."""
    if not planned.blocks:
        yield None, 0, 0, planned.distribution
        return
    dim, end = planned.blocks[0].dim, 0
    for block in planned.blocks:
        if end < block.start:
            yield dim, end, block.start, planned.distribution
        yield dim, block.start, block.stop, block.distribution
        end = block.stop
    if end < planned.shape[dim]:
        yield dim, end, planned.shape[dim], planned.distribution


def _objection(distribution: Distribution, values: torch.Tensor, bound: float) -> str:
    """What is wrong with the values, or nothing. The bound is in standard errors."""
    if distribution.family is Family.KEEP:
        return ""
    wide = values if values.dtype == torch.float64 else values.to(torch.float32)
    rounding = 4.0 * torch.finfo(values.dtype).eps
    planned, count = distribution.std, values.numel()
    if distribution.family is Family.CONSTANT:
        off = float((wide - distribution.mean).abs().max())
        within = off <= rounding * max(abs(distribution.mean), torch.finfo(values.dtype).tiny)
        return "" if within else f"values from {float(wide.min()):.4g} to {float(wide.max()):.4g}."
    variance, mean = (float(moment) for moment in torch.var_mean(wide, correction=0))
    std = (variance + (mean - distribution.mean) ** 2) ** 0.5  # about the planned mean
    found = f"mean {mean:.4g}, std {variance**0.5:.4g}, {_factor(std, planned)} the plan's."
    if distribution.family.is_matrix:
        return "" if abs(std - planned) <= 1e-3 * planned + rounding * planned else found
    if (mixing := distribution.mixing) is not None:
        # The mean square of a row is a form in its q, whose variance is at most 2 |MM'|^2 / |M|^4.
        square = mixing.matrix @ mixing.matrix.T
        error = float((np.square(square).sum() / np.trace(square) ** 2 / 2.0 / (count / mixing.columns)) ** 0.5)
        return "" if abs(std / planned - 1.0) <= bound * error * (1.0 + bound * error) + rounding else found
    if count < _FEW_ENTRIES:
        far = float((wide - distribution.mean).abs().max())
        return "" if far <= (bound + 3.0) * planned else found
    if abs(mean - distribution.mean) > bound * planned / count**0.5 + rounding * abs(distribution.mean):
        return found
    if alike := _dependence(wide, planned, bound) if not distribution.mean else "":
        return alike
    # A normal's kurtosis of 3 gives the sample deviation the error 1 / sqrt(2 n); uniform and truncated have less. Few
    # entries: the log of a chi-square is skewed, the t-like widening covers its lower tail.
    error = (2.0 * count) ** -0.5
    ratio = std / planned if planned > 0.0 else math.inf
    if abs(math.log(max(ratio, 1e-30))) > bound * error * (1.0 + bound * error) + rounding:
        return found
    return _stray_entry(wide, distribution, bound)


def _stray_entry(values: torch.Tensor, distribution: Distribution, bound: float) -> str:
    """One entry where no normal entry would lie; other families have shorter tails.

    The largest of n exceeds t deviations with a probability of at most n times that of one.
    """
    limit = -NormalDist().inv_cdf(NormalDist().cdf(-bound) / values.numel())
    off = (values - distribution.mean).abs()
    far = float(off.max())
    if far <= limit * distribution.std:
        return ""
    place = [int(index) for index in np.unravel_index(int(off.argmax()), tuple(values.shape))]
    return f"{values[tuple(place)]:.4g} at {place}, {_factor(far, distribution.std)} the deviation away."


def _dependence(values: torch.Tensor, std: float, bound: float) -> str:
    """Rows or columns whose sums show that their entries were not drawn independently.

    ``sum over n entries`` has variance ``n std^2``; over R of them the mean square is a chi-square, whose cube root is normal to
    a good approximation (Wilson & Hilferty 1931).
    """
    for dim in range(min(values.dim(), 2)):
        pair = _equal_slices(values, dim)
        if pair is not None:
            return f"slices {pair[0]} and {pair[1]} along dimension {dim} are equal: two shards drew the same numbers."
        sums = values.sum(dim=[d for d in range(values.dim()) if d != dim], dtype=torch.float64) if values.dim() > 1 else None
        if sums is None or std <= 0.0:
            return ""
        ratio = float(sums.square().mean()) / (values.numel() / len(sums) * std**2)
        width = 2.0 / (9.0 * len(sums))
        if abs(ratio ** (1.0 / 3.0) - 1.0 + width) > bound * width**0.5:
            return f"the sums along dimension {dim} have {ratio:.3g} times the variance that independent entries give."
    return ""


def _equal_slices(values: torch.Tensor, dim: int) -> tuple[int, int] | None:
    """The first two slices along a dimension with the same entries, at least _LONG of them."""
    rows = values.movedim(dim, 0).reshape(values.shape[dim], -1)
    if rows.shape[1] < _LONG:
        return None
    sums, order = rows.sum(dim=1, dtype=torch.float64).sort(stable=True)
    for first in (sums[1:] == sums[:-1]).nonzero()[:, 0].tolist():
        one, other = sorted((int(order[first]), int(order[first + 1])))
        if torch.equal(rows[one], rows[other]):
            return one, other
    return None


def _factor(found: float, planned: float) -> str:
    return f"{found / planned:.3g} times" if planned > 0.0 else "not"


def _looks_like(tensor: torch.Tensor) -> str:
    """Recognise torch's own default, ``uniform(-1 / sqrt(fan_in), 1 / sqrt(fan_in))``, of linear layers and convolutions."""
    if tensor.dim() < 2 or tensor.numel() < 64:
        return ""
    fan_in = tensor.numel() / tensor.shape[0]
    largest, std = float(tensor.abs().max()), float(tensor.float().std())
    limit = fan_in**-0.5
    is_default = 0.9 * limit < largest <= limit * 1.001 and abs(std / limit * 3.0**0.5 - 1.0) < 0.1
    return " These are torch's default values for such a layer: no initialization was applied here." if is_default else ""


def _remedy(values: torch.Tensor) -> str:
    if not bool(values.any()):
        return "It is all zeros: materialised but never drawn, or zeroed afterwards. Apply the plan last: gs.apply(model, plan)."
    return "Apply the plan after everything else that writes parameters, and once: gs.apply(model, plan)."


def clones(tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, ParameterInfo]) -> list[Finding]:
    """Different parameters with the same random values: clones that start identical, or a tie that was lost.

    Only trained parameters of at least two dimensions: constants, tables and repeated rows are equal by design.
    """
    trained = [name for name, info in parameters.items() if info.requires_grad and len(info.shape) >= 2]
    return [_equal_finding(names, parameters) for names in equal_values(tensors, trained) if is_random(tensors[names[0]])]


def _equal_finding(names: Sequence[str], parameters: Mapping[str, ParameterInfo]) -> Finding:
    first, second = names[0], names[1]
    more = f", as {len(names) - 2} more ({', '.join(names[2:6])}{', ...' if len(names) > 6 else ''}) do" if names[2:] else ""
    types = {parameters[name].module_type.rpartition(".")[2] for name in names}
    if "Embedding" in types and len(types) > 1:
        return Finding(
            kind=FindingKind.TIE_LOST,
            where=second,
            evidence=f"It holds the same values as {first} but is another tensor{more}.",
            remedy="Tie them again (assign one parameter to the other's name), or draw them separately.",
        )
    return Finding(
        kind=FindingKind.IDENTICAL,
        where=second,
        evidence=f"It starts with the same values as {first}{more}.",
        remedy="Draw each copy on its own: gs.initialize(model, ...), or reset the parameters after copy.deepcopy.",
    )
