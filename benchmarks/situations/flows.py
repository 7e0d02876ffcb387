"""Normalizing flows: mean and deviation of the log-determinant, over draws and inputs, where a deviation of 0.1 was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from benchmarks.situations.density import trainings
from benchmarks.situations.rows import DRAWS, Measurement, Row, row_over
from torch import nn

import gainstage as gs

ASKED = 0.1
FEATURES, HIDDEN = 6, 64
MANY = 4 * DRAWS  # a continuous flow is one network: each draw gives one mean, and eight tell its deviation to a fourth


def measurements() -> list[Measurement]:
    """Flows of three packages at the start, and trained ones."""
    return [*(Measurement(package=flow[0], model=flow[1], rows=partial(rows_of, *flow)) for flow in FLOWS), *trainings()]


def rows_of(package: str, name: str, build: Callable[[], nn.Module]) -> Iterator[Row]:
    """As drawn, and after one calibrating pass."""
    torch.manual_seed(0)
    model = gs.Flow(build()).eval()
    plan = gs.plan(model, (torch.randn(256, FEATURES),), logdet_std=ASKED)
    left = max(0.0, plan.predictions["@0"][1] - ASKED**2) ** 0.5
    bound = f"; the library's scales leave {left:.2f}" if left > ASKED else ""
    for how in ("drawn", "calibrated"):
        found = []
        for seed in range(DRAWS if how == "calibrated" and build is not zuko_continuous else MANY):
            gs.apply(model, plan, seed=seed)
            if how == "calibrated":
                gs.calibrate(model, plan, (torch.randn(256, FEATURES),))
            with torch.no_grad():
                found.append(model(torch.randn(512, FEATURES))[1])
        determinants = torch.stack(found)
        for quantity, asked, value in (
            (f"deviation of log det, {how}", (0.8 * ASKED, 1.2 * ASKED), determinants.std()),
            (f"distance of its mean from 0, {how}{bound}", (0.0, ASKED), determinants.mean().abs()),
        ):
            yield row_over([float(value)], situation="flows", package=package, model=name, quantity=quantity, asked=asked)


def zuko_flow(kind: str, layers: int) -> Callable[[], nn.Module]:
    """A flow of zuko."""

    def build() -> nn.Module:
        import zuko

        made: nn.Module = getattr(zuko.flows, kind)(FEATURES, transforms=layers, hidden_features=(HIDDEN, HIDDEN))
        return made

    return build


def zuko_continuous() -> nn.Module:
    """A continuous flow of zuko."""
    import zuko

    made: nn.Module = zuko.flows.CNF(FEATURES, hidden_features=(HIDDEN, HIDDEN))
    return made


def nflows_flow(kind: str, layers: int) -> Callable[[], nn.Module]:
    """A flow of nflows, with residual networks."""

    def build() -> nn.Module:
        from nflows import flows

        made: nn.Module = getattr(flows, kind)(FEATURES, HIDDEN, layers, 2)
        return made

    return build


def nflows_spline() -> nn.Module:
    """Couplings of nflows by rational quadratic splines."""
    from nflows import transforms
    from nflows.nn.nets import ResidualNet

    def network(inputs: int, outputs: int) -> nn.Module:
        made: nn.Module = ResidualNet(inputs, outputs, hidden_features=HIDDEN)
        return made

    masks = [(torch.arange(FEATURES) + i) % 2 for i in range(3)]
    made: nn.Module = transforms.CompositeTransform(
        [
            transforms.PiecewiseRationalQuadraticCouplingTransform(mask, network, num_bins=8, tails="linear", tail_bound=3.0)
            for mask in masks
        ]
    )
    return made


def normflows_spline(kind: str, **options: Any) -> Callable[[], nn.Module]:
    """Splines of normflows, as couplings or autoregressive."""

    def build() -> nn.Module:
        import normflows

        layers = [
            getattr(normflows.flows, kind)(FEATURES, 2, HIDDEN, **{name: every(i) for name, every in options.items()})
            for i in range(3)
        ]
        made: nn.Module = normflows.NormalizingFlow(normflows.distributions.base.DiagGaussian(FEATURES), layers)
        return made

    return build


def normflows_flow() -> nn.Module:
    """Affine couplings of normflows, scales by the exponential."""
    import normflows

    layers = []
    for _ in range(4):
        network = normflows.nets.MLP([FEATURES // 2, HIDDEN, HIDDEN, FEATURES], init_zeros=False)
        layers += [normflows.flows.AffineCouplingBlock(network), normflows.flows.Permute(FEATURES, mode="swap")]
    made: nn.Module = normflows.NormalizingFlow(normflows.distributions.base.DiagGaussian(FEATURES), layers)
    return made


FLOWS: tuple[tuple[str, str, Callable[[], nn.Module]], ...] = (
    ("zuko", "MAF, 3 layers", zuko_flow("MAF", 3)),
    ("zuko", "RealNVP, 4 layers", zuko_flow("RealNVP", 4)),
    ("zuko", "NSF, 3 layers", zuko_flow("NSF", 3)),
    ("zuko", "CNF, to first order", zuko_continuous),
    ("nflows", "RealNVP, 4 layers", nflows_flow("SimpleRealNVP", 4)),
    ("nflows", "MAF, 3 layers", nflows_flow("MaskedAutoregressiveFlow", 3)),
    ("nflows", "spline couplings, 3 layers", nflows_spline),
    ("normflows", "RealNVP, 4 layers", normflows_flow),
    (
        "normflows",
        "spline couplings, 3 layers",
        normflows_spline("CoupledRationalQuadraticSpline", reverse_mask=lambda i: i % 2 == 1),
    ),
    ("normflows", "autoregressive splines, 3 layers", normflows_spline("AutoregressiveRationalQuadraticSpline")),
)
