"""Depth without norms and skips: weights that keep angles, and activations that keep what tells inputs apart."""

from __future__ import annotations

from gainstage.policies.default import UNIT
from gainstage.policies.model import Policy, Tailoring

ISOMETRIC = Policy(
    name="isometric",
    targets=UNIT.targets,
    distribution="delta_orthogonal",
    tailoring=Tailoring(),
    source=(
        "levels as in unit; orthogonal weights: Saxe et al. 2014 (arXiv:1312.6120), Pennington et al. 2017 (arXiv:1711.04735); "
        "delta-orthogonal kernels: Xiao et al. 2018 (arXiv:1806.05393); activations, where you ask for them: Martens et al. 2021 "
        "(arXiv:2110.01765) and Zhang et al. 2022 (arXiv:2203.08120)"
    ),
)
