"""Parameters that are read several times: one parameter for several levels, brought to all of them by the factors of its rows.

The scale that meets the plan at the first call need not at the others: a layer that is applied to its own output turns it ever
more towards its own leading directions, and what strays at one call strays by as much again at the next. One factor cannot meet
several levels, but the rows of a random matrix are many, and differ by themselves: the norm of a row of n normal entries strays
by ``1 / sqrt(2 n)`` of itself. Their factors ``exp(u)`` are chosen by Gauss-Newton steps on ``log r(u) = 0``, with r the realised
over the planned levels of all calls of all such parameters,

    du = - J^T (J J^T + lambda I)^-1 log r,    J = d log r / d u,

the least change of rows that meets the goals to first order (Levenberg 1944, Quart. Appl. Math. 2, 164, for the damping). J is
exact: the derivative of the captured graph on these data, through everything that lies between the calls.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch

from gainstage.calibrate.amend import Scale
from gainstage.calibrate.levels import settled, spread_out
from gainstage.calibrate.result import TOLERANCE, CalibrationRow
from gainstage.calibrate.sites import Key, Ranges, channel_dim
from gainstage.graph import Graph
from gainstage.propagate.execution import Execution

PASSES = 8  # at most, the first one included
NOTE = f"the rows of one parameter cannot bring all of its calls to within {TOLERANCE:.0%}"
_DAMPING = 0.02  # of the largest singular value of J: directions that move levels less than that are left
_LONGEST = 0.3  # of a step, for any row: J holds near by
_GOAL = TOLERANCE / 2.0


def repeated(rows: Sequence[CalibrationRow]) -> dict[Key, list[CalibrationRow]]:
    """Of what was scaled at its first call, the levels at all calls, where there are several."""
    found: dict[Key, list[CalibrationRow]] = {}
    for row in rows:
        found.setdefault((row.parameter, row.rows), []).append(row)
    return {
        key: calls
        for key, calls in found.items()
        if len(calls) > 1
        and calls[0].factor != 1.0
        and calls[0].note in ("", NOTE)
        and all(row.planned > 0.0 and row.after > 0.0 for row in calls)
    }


def worst(rows: Sequence[CalibrationRow]) -> float:
    """Largest ``|log r|`` of what is read several times."""
    return max((abs(_log_ratio(row)) for calls in repeated(rows).values() for row in calls), default=0.0)


def is_near(rows: Sequence[CalibrationRow]) -> bool:
    """Whether all calls are well within the tolerance."""
    return worst(rows) <= _GOAL


def steps(
    graph: Graph,
    tensors: Mapping[str, torch.Tensor],
    calls: Mapping[Key, Sequence[CalibrationRow]],
    scales: Mapping[str, Sequence[Scale]],
    whole: Collection[str],
) -> dict[Key, torch.Tensor]:
    """What to add to the logs of the factors of each row, by parameter and block of rows.

    Args:
        graph: the captured model.
        tensors: parameters as they are by now.
        calls: the levels that are to be met; the derivative of each takes a backward pass.
        scales: what was done to the parameters.
        whole: parameters whose rows can only be scaled together.
    """
    logs = {key: torch.zeros(_count(tensors[key[0]], key, scales, whole), requires_grad=True) for key in calls}
    goals = [row for rows in calls.values() for row in rows]
    with torch.enable_grad():
        levels = _levels(graph, _moved(tensors, logs, scales), goals, scales)
        jacobian = torch.stack([_derivative(levels[row.node, row.rows], tuple(logs.values())) for row in goals])
    u, values, v = torch.linalg.svd(jacobian, full_matrices=False)
    ratios = torch.tensor([_log_ratio(row) for row in goals], dtype=torch.float64)
    step = -(v.mT @ (values / (values.square() + (_DAMPING * values.max()) ** 2) * (u.mT @ ratios)))
    step *= _LONGEST / max(float(step.abs().max()), _LONGEST)
    return dict(zip(calls, step.split([log.numel() for log in logs.values()]), strict=True))


def _count(tensor: torch.Tensor, key: Key, scales: Mapping[str, Sequence[Scale]], whole: Collection[str]) -> int:
    """How many factors a block of rows has."""
    if key[0] in whole:
        return 1
    return sum(stop - start for start, stop in key[1]) if key[1] else tensor.shape[scales[key[0]][0].dim]


def _moved(
    tensors: Mapping[str, torch.Tensor], logs: Mapping[Key, torch.Tensor], scales: Mapping[str, Sequence[Scale]]
) -> dict[str, torch.Tensor]:
    """The parameters as functions of the logs of the factors."""
    moved = {name: tensor.detach() for name, tensor in tensors.items()}
    for (name, rows), log in logs.items():
        tensor, scale = moved[name], scales[name][0]
        factors = spread_out(tensor.shape, scale.dim, [(rows, log.exp())], tensor)
        moved[name] = ((tensor + scale.offset) * factors - scale.offset).to(tensor.dtype)
    return moved


def _levels(
    graph: Graph, moved: Mapping[str, torch.Tensor], goals: Sequence[CalibrationRow], scales: Mapping[str, Sequence[Scale]]
) -> dict[tuple[str, Ranges], torch.Tensor]:
    """Logs of second moments at each node, of each block of rows."""
    wanted: dict[str, list[CalibrationRow]] = {}
    for row in goals:
        wanted.setdefault(row.node, []).append(row)
    found: dict[tuple[str, Ranges], torch.Tensor] = {}
    execution = Execution(graph, moved, wanted)
    for node, result in execution.run():
        for row in wanted.get(node.name, ()):
            output = result[0] if isinstance(result, (tuple, list)) else result
            size = moved[row.parameter].shape[scales[row.parameter][0].dim]
            channels = row.rows if output.shape[channel_dim(node, output.dim())] == size else ()
            found[row.node, row.rows] = settled(execution, node, output, channels).double().square().mean().log()
    return found


def _derivative(level: torch.Tensor, logs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Of one log level by the logs of all factors, in one row; zeros where it does not depend on them."""
    if not level.requires_grad:
        return torch.zeros(sum(log.numel() for log in logs), dtype=torch.float64)
    found = torch.autograd.grad(level, logs, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.double().flatten() for gradient in found])


def _log_ratio(row: CalibrationRow) -> float:
    return math.log(row.after / row.planned)
