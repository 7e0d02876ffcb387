"""The stage itself: a model with its plan in, the model with planned levels and a report out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gainstage.apply.memory import check_writable
from gainstage.calibrate.amend import amended
from gainstage.calibrate.repeated import NOTE, PASSES, is_near, repeated, steps, worst
from gainstage.calibrate.result import Calibration, CalibrationRow
from gainstage.calibrate.scaling import Scaling
from gainstage.calibrate.sites import Key, collect_sites
from gainstage.errors import NonFiniteError
from gainstage.graph import Graph, real_parameters
from gainstage.plan import Plan
from gainstage.roles import Roles


def calibrate(graph: Graph, roles: Roles, plan: Plan, planned: Mapping[str, Any], model: nn.Module) -> Calibration:
    """Scale parameters so that the levels that they set are those planned, all of them or none.

    In one pass; in PASSES at most where a parameter is read several times and its first call's scale does not serve all.

    Args:
        graph: of this model at the data to calibrate on.
        roles: what its parameters are for.
        plan: which parameters may be scaled.
        planned: node -> what the plan predicts there.
        model: has the parameters; nothing else of it is touched.

    Raises:
        NonFiniteError: NaN or infinity arises in the pass, or in a parameter that is scaled.
        InputError: the pass fails, or a parameter cannot be written.
    """
    present = {name: tensor for name, tensor in real_parameters(model).items() if name in graph.parameters}
    devices = sorted({tensor.device.index or 0 for tensor in present.values() if tensor.is_cuda})
    sites = collect_sites(graph, roles)

    # With rows scaled apart an orthogonal matrix would not be one.
    whole = {name for name, own in plan.parameters.items() if own.has_matrices}

    def run(given: Mapping[Key, torch.Tensor]) -> tuple[list[CalibrationRow], Scaling]:
        scaling = Scaling(graph, sites, plan, planned, dict(present), given)
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            return scaling.run(), scaling

    passes = [run({})]
    given: dict[Key, torch.Tensor] = {}
    while len(passes) < PASSES and not is_near(passes[-1][0]):
        calls, scaling = repeated(passes[-1][0]), passes[-1][1]
        with torch.random.fork_rng(devices=devices):
            found = steps(graph, scaling.tensors, calls, scaling.scales, whole)
        for key, step in found.items():
            given[key] = step + given.get(key, math.log(calls[key][0].factor))
        passes.append(run(given))
    rows, scaling = min(passes, key=lambda found: worst(found[0]))
    with torch.no_grad():
        _write({name: (old, scaling.tensors[name]) for name, old in present.items() if scaling.tensors[name] is not old})
    rows = [replace(row, note="") if row.note == NOTE and row.is_met else row for row in rows]
    return Calibration(rows=tuple(rows), plan=amended(plan, scaling.scales))


def _write(changed: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """All of them, or none where anything goes wrong."""
    check_writable({name: old for name, (old, _) in changed.items()})
    bad = [name for name, (_, new) in changed.items() if not bool(new.isfinite().all())]
    if bad:
        raise NonFiniteError(f"Scaled as planned, {', '.join(bad[:8])} would not be finite. The model is unchanged.")
    saved = [(old, old.clone()) for old, _ in changed.values()]
    try:
        for old, new in changed.values():
            old.copy_(new)
    except BaseException:
        for old, values in saved:
            old.copy_(values)
        raise
