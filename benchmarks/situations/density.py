"""Trained density estimation on real tables: the likelihood of unseen rows, and how soon it is that of the library's own start.

The same network, batches and steps of Adam from both starts, each at the best of as many rates: one rate for all parameters
from the library's, one relative update of spectral norms from ours, which is planned with a log-determinant of deviation 0.1,
its ActNorm layers set from data, and calibrated. Rows are of three kinds: those trained on; some that choose the rate and the
step; and unseen ones, whose likelihood is reported. Choices and reports are of means over the draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np
import torch
from benchmarks.situations.rows import DRAWS, Measurement, Row, row_over
from numpy.typing import NDArray
from torch import nn

import gainstage as gs

EVERY, BATCH = 10, 128
RATES = (3e-3, 1e-2, 3e-2)
UPDATES = (0.03, 0.1, 0.3)
ASKED = 0.1
HIDDEN = 64

Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # to train on, to choose by, and not seen
Curves = NDArray[np.float64]  # [rate, draw, rows that choose or unseen ones, time]
Start = Callable[[gs.Flow, torch.Tensor, int, float], torch.optim.Optimizer]


def trainings() -> list[Measurement]:
    """Flows of three packages on two tables."""
    return [Measurement(package=case[0], model=case[1], rows=partial(rows_of, *case)) for case in CASES]


def rows_of(package: str, name: str, build: Callable[[int], nn.Module], data: Callable[[], Data], steps: int) -> Iterator[Row]:
    """Both starts at their best, and the steps that ours takes to the library's best over those that the library's takes."""
    seen = data()[0]
    plan = gs.plan(gs.Flow(build(seen.shape[1])), (seen[:512],), logdet_std=ASKED)
    library, ours = (
        np.array([[curves(build, data(), seed, start, rate, steps=steps) for seed in range(DRAWS)] for rate in rates])
        for start, rates in ((from_library, RATES), (partial(from_plan, plan), UPDATES))
    )
    best, taken = chosen(library)
    mine, _ = chosen(ours)
    error = float((mine - best).std(ddof=1)) / DRAWS**0.5
    named = {"situation": "flows", "package": package, "model": name, "asked": (0.0, 1.0)}
    yield row_over(
        [float(np.exp(mine.mean() - best.mean()))], **named,
        quantity=f"likelihood of an unseen row, the library's ({best.mean():.2f} nats) over ours ({mine.mean():.2f}, "
        f"standard error of the difference {error:.2f})",
    )  # fmt: skip
    reached = np.flatnonzero((ours.mean(1)[:, 1] <= best.mean()).any(0))
    yield row_over(
        [(int(reached[0]) if len(reached) else ours.shape[-1]) / max(1, taken)], **named,
        quantity="steps to the library's best likelihood of unseen rows, over its own",
    )  # fmt: skip


def chosen(found: Curves) -> tuple[NDArray[np.float64], int]:
    """Negative log-likelihoods of unseen rows, [draw], at the rate and time at which those that choose have the least mean."""
    rate, time = np.unravel_index(found[:, :, 0].mean(1).argmin(), (len(found), found.shape[-1]))
    return found[rate, :, 1, time], int(time)


def from_library(flow: gs.Flow, seen: torch.Tensor, seed: int, rate: float) -> torch.optim.Optimizer:  # noqa: ARG001  (as of the other)
    """As the library starts it."""
    return torch.optim.Adam(flow.parameters(), lr=rate)


def from_plan(plan: gs.Plan, flow: gs.Flow, seen: torch.Tensor, seed: int, rate: float) -> torch.optim.Optimizer:
    """Planned, set from data, and each parameter at a rate of its own."""
    gs.apply(flow, plan, seed=seed)
    flow.normalize(seen)
    gs.calibrate(flow, plan, (seen[:512],))
    return torch.optim.Adam(gs.param_groups(flow, plan, relative_update=rate, norm="spectral", optimizer="adam"))


def curves(
    build: Callable[[int], nn.Module], data: Data, seed: int, start: Start, rate: float, *, steps: int
) -> NDArray[np.float64]:
    """Negative log-likelihood before every EVERY-th step, nats for each row, [rows that choose or unseen ones, time].

    Infinite from where it diverges.
    """
    seen, *others = data
    torch.manual_seed(seed)
    flow = gs.Flow(build(seen.shape[1]))
    optimizer = start(flow, seen, seed, rate)
    generator = torch.Generator().manual_seed(seed)
    found = np.full((2, steps // EVERY + 1), np.inf)
    for step in range(steps + 1):
        rows = seen[torch.randint(len(seen), (BATCH,), generator=generator)]
        flow.train()
        loss = negative_log_likelihood(flow, rows)
        if step % EVERY == 0:
            flow.eval()
            with torch.no_grad():
                found[:, step // EVERY] = [float(negative_log_likelihood(flow, part)) for part in others]
            if not np.isfinite(found[:, step // EVERY]).all():
                break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return np.nan_to_num(found, nan=np.inf, posinf=np.inf)


def negative_log_likelihood(flow: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Under a standard normal distribution of the noise."""
    z, determinant = flow(x)
    return (0.5 * z.square().sum(1) + 0.5 * z.shape[1] * float(np.log(2.0 * np.pi)) - determinant).mean()


@cache
def cells() -> Data:
    """The 30 measures of 569 cells that scikit-learn ships, standardised; 340 are trained on, 114 choose."""
    from sklearn.datasets import load_breast_cancer

    return _split(torch.tensor(load_breast_cancer().data, dtype=torch.float32), 340, 114)


@cache
def means_of_cells() -> Data:
    """The first ten of these measures."""
    seen, between, unseen = cells()
    return seen[:, :10], between[:, :10], unseen[:, :10]


@cache
def pixels() -> Data:
    """Squares of 2 x 2 pixels of the two photographs that scikit-learn ships, with the noise of rounding: 6,000 rows of 12."""
    from sklearn.datasets import load_sample_images

    random = torch.Generator().manual_seed(0)
    rows = []
    for image in load_sample_images().images:
        whole = torch.from_numpy(image.copy()).float()[: len(image) // 2 * 2]
        rows.append(whole.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 12))
    whole = torch.cat(rows)
    chosen = whole[torch.randperm(len(whole), generator=random)[:6000]]
    return _split(chosen + torch.rand(chosen.shape, generator=random), 4000, 1000)


def _split(rows: torch.Tensor, count: int, choosing: int) -> Data:
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))]
    seen, between, unseen = shuffled.tensor_split([count, count + choosing])
    mean, deviation = seen.mean(0), seen.std(0)
    return (seen - mean) / deviation, (between - mean) / deviation, (unseen - mean) / deviation


def zuko_flow(features: int) -> nn.Module:
    """Five autoregressive layers of zuko."""
    import zuko

    made: nn.Module = zuko.flows.MAF(features, transforms=5, hidden_features=(HIDDEN, HIDDEN))
    return made


def nflows_flow(features: int) -> nn.Module:
    """Six affine couplings of nflows, each behind an ActNorm."""
    from nflows import transforms
    from nflows.nn.nets import ResidualNet

    def network(inputs: int, outputs: int) -> nn.Module:
        made: nn.Module = ResidualNet(inputs, outputs, hidden_features=HIDDEN)
        return made

    layers = []
    for i in range(6):
        mask = (torch.arange(features) + i) % 2
        layers += [transforms.ActNorm(features), transforms.AffineCouplingTransform(mask, network)]
    made: nn.Module = transforms.CompositeTransform(layers)
    return made


def normflows_flow(features: int) -> nn.Module:
    """Six affine couplings of normflows, each behind an ActNorm on the way from data to noise."""
    import normflows

    layers = []
    for _ in range(6):
        network = normflows.nets.MLP([features // 2, HIDDEN, HIDDEN, features], init_zeros=False)
        layers += [normflows.flows.AffineCouplingBlock(network), normflows.flows.Permute(features, mode="swap")]
        layers.append(normflows.flows.ActNorm((features,)))
    made: nn.Module = normflows.NormalizingFlow(normflows.distributions.base.DiagGaussian(features), layers)
    return made


CASES: tuple[tuple[str, str, Callable[[int], nn.Module], Callable[[], Data], int], ...] = (
    ("zuko", "MAF, 5 layers, trained on 30 measures of cells", zuko_flow, cells, 160),
    ("zuko", "MAF, 5 layers, trained on 10 measures of cells", zuko_flow, means_of_cells, 160),
    ("nflows", "RealNVP with ActNorm, trained on 30 measures of cells", nflows_flow, cells, 160),
    ("normflows", "RealNVP with ActNorm, trained on pixels", normflows_flow, pixels, 320),
)
