"""The size that a parameter's updates are compared with."""

from __future__ import annotations

import math
from typing import Any

import torch

from gainstage.apply.parts import Holding
from gainstage.errors import InputError
from gainstage.graph import as_real
from gainstage.plan import Distribution, Family, ParameterPlan, Plan
from gainstage.roles import CONTRACTED, Role


def is_matrix(planned: ParameterPlan) -> bool:
    """A weight that something is contracted with: neither bias nor norm, table, slope or vector, and no tied head."""
    return Role(planned.role) in CONTRACTED | {Role.RECURRENT} and len(planned.shape) > 1


def is_hidden_matrix(planned: ParameterPlan) -> bool:
    """A matrix of two dimensions that is not the output head."""
    return is_matrix(planned) and len(planned.shape) == 2 and Role(planned.role) is not Role.OUTPUT_HEAD


def spectral_share(planned: ParameterPlan, *, is_orthogonal: bool) -> float:
    """``(sqrt A + sqrt B) / sqrt(A B)``: rms of an update of rank one over that of A x B weights, at equal spectral norms.

    Independent entries of deviation s have spectral norm ``s (sqrt A + sqrt B)`` (Bai & Yin 1993). An update whose entries have
    rms u has ``u sqrt(A B)`` where its rank is one, and ``u sqrt(max(A, B))`` where it is orthogonal (Yang, Simon & Bernstein
    2023, arXiv:2310.17813, condition 1); those of adaptive optimizers reach about half of the first, at any width. 1 for vectors,
    and for tables, whose rows stand for themselves.
    """
    if not is_matrix(planned):
        return 1.0
    outputs = math.prod(planned.shape[dim] for dim in planned.output_dims)
    inputs = math.prod(planned.shape) / outputs
    update = max(outputs, inputs) if is_orthogonal else outputs * inputs
    return (math.sqrt(outputs) + math.sqrt(inputs)) / math.sqrt(update)


def output_share(planned: ParameterPlan, *, is_orthogonal: bool) -> float:
    """``spectral share / sqrt(N)``: as much as the model's output moves by, of N branches that are added to one stream.

    Each branch has 1/N of the stream's second moment. Updates that follow one gradient add up coherently, N times 1/sqrt(N) of
    what a branch moves by (G. Yang et al. 2023, arXiv:2310.02244, section 3; B. Bordelon et al. 2023, arXiv:2309.16620, table 1).
    """
    return spectral_share(planned, is_orthogonal=is_orthogonal) / math.sqrt(planned.branches)


def starting_rms(planned: ParameterPlan, holding: Holding) -> float:
    """sqrt(E[p^2]) over draws and entries, blocks of different distributions in proportion; of the values where they are kept.

    Raises:
        InputError: a parameter that is kept has no values yet, or is not finite.
    """
    if any(distribution.family is Family.KEEP for distribution in planned.distributions):
        return _present_rms(planned.name, holding)
    if not planned.blocks:
        return math.sqrt(_second_moment(planned.distribution))
    size = planned.shape[planned.blocks[0].dim]
    shares = [((block.stop - block.start) / size, block.distribution) for block in planned.blocks]
    elsewhere = max(0.0, 1.0 - sum(share for share, _ in shares))
    shares.append((elsewhere, planned.distribution))
    return math.sqrt(sum(share * _second_moment(distribution) for share, distribution in shares))


def _second_moment(distribution: Distribution) -> float:
    return distribution.mean**2 + distribution.std**2


def _present_rms(name: str, holding: Holding) -> float:
    if holding.parameter.is_meta:
        raise InputError(f"{name} is kept as it is, and has no values on the meta device to compare its updates with")
    norm: Any = torch.linalg.vector_norm(as_real(holding.parameter.detach()), dtype=torch.float64)
    if holding.ranks:  # a DTensor: the sum over its shards
        norm = norm.full_tensor()
    rms = float(norm) / math.sqrt(math.prod(holding.shape))
    if not math.isfinite(rms):
        raise InputError(f"{name} is kept as it is, but has values that are not finite")
    return rms


def compared_with(planned: ParameterPlan, plan: Plan, rms: float) -> float:
    """The size that a parameter's updates are shares of: its rms at the start, or the one that it is meant to reach.

    The last weights of a flow's scales and shifts start from zeros or from as little as makes the flow quiet, and are to grow by
    orders of magnitude: shares of what they start from would hardly move them, nor the biases beside them. What N layers add,
    log-scales and shifts, is to reach unit level together, so that a weight of each reaches ``1 / sqrt(N fan-in)``, its
    bias ``1 / sqrt(N)``. A log-scale that moves by rho moves its scale by that share, whatever its own value is: its size is 1.
    """
    if Role(planned.role) is Role.LOG_SCALE:
        return 1.0
    if _is_quiet(planned):
        return reached_scale(planned, plan) / math.sqrt(planned.branches)
    if Role(planned.role) is Role.BIAS and any(_is_quiet(other) for other in _beside(planned, plan)):
        return 1.0 / math.sqrt(planned.branches)
    return reached_scale(planned, plan) if rms == 0.0 else rms


def _is_quiet(planned: ParameterPlan) -> bool:
    """The last weight of a flow's scales or shifts."""
    return is_matrix(planned) and Role(planned.role) in (Role.COUPLING_SCALE, Role.COUPLING_SHIFT)


def _beside(planned: ParameterPlan, plan: Plan) -> list[ParameterPlan]:
    """Parameters of the same module, itself included."""
    path = planned.name.rpartition(".")[0]
    return [other for name, other in plan.parameters.items() if name.rpartition(".")[0] == path]


def reached_scale(planned: ParameterPlan, plan: Plan) -> float:
    """The rms that a parameter which starts from zeros, or nearly so on purpose, is meant to reach.

    1 / sqrt(fan-in) for a weight that is contracted: it then passes a unit level on. For the bias or shift of a module that has
    one other parameter and no children: the planned rms of that module's output, since the bias is added there. 1 for all else:
    norm scales and slopes multiply, biases inside a larger module and learned tokens are added to, what is planned at unit level.
    """
    if is_matrix(planned):
        outputs = math.prod(planned.shape[dim] for dim in planned.output_dims)
        return math.sqrt(outputs / math.prod(planned.shape))
    if Role(planned.role) in (Role.BIAS, Role.NORM_SHIFT):
        path = planned.name.rpartition(".")[0]
        inside = [name for name in plan.parameters if name.startswith(f"{path}.")] if path else list(plan.parameters)
        outputs_at = plan.predictions.get(f"{path}@0", ())
        if len(inside) == 2 and len(outputs_at) == 1 and outputs_at[0] > 0.0:
            return math.sqrt(outputs_at[0])
    return 1.0
