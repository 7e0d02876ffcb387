"""Trained density estimation on real tables: how soon unseen rows have the likelihood that the library's own start comes to.

The same network, batches and rate of Adam from both starts; ours is planned with a log-determinant of deviation 0.1, its ActNorm
layers set from data, and calibrated. Mean over the draws of the negative log-likelihood of unseen rows, every few steps.
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

STEPS, EVERY, BATCH, RATE = 80, 5, 128, 1e-3
ASKED = 0.1
HIDDEN = 64

Data = tuple[torch.Tensor, torch.Tensor]  # to train on, and not seen


def trainings() -> list[Measurement]:
    """Flows of three packages on two tables."""
    return [Measurement(package=case[0], model=case[1], rows=partial(rows_of, *case)) for case in CASES]


def rows_of(package: str, name: str, build: Callable[[int], nn.Module], data: Callable[[], Data]) -> Iterator[Row]:
    """Steps to the least that the library's start comes to, over the steps that this takes; all of them and one more if never."""
    library, ours = (np.mean([curve(build, data(), seed, is_planned=planned) for seed in range(DRAWS)], 0) for planned in (0, 1))
    best = int(library.argmin())
    reached = np.flatnonzero(ours <= library[best])
    steps = int(reached[0]) if len(reached) else len(ours)
    yield row_over(
        [steps / best], situation="flows", package=package, model=name, asked=(0.0, 1.0),
        quantity="steps to the library's best held-out likelihood, over its own",
    )  # fmt: skip


def curve(build: Callable[[int], nn.Module], data: Data, seed: int, *, is_planned: int) -> NDArray[np.float64]:
    """Negative log-likelihood of unseen rows before every EVERY-th step, nats for each row."""
    seen, unseen = data
    torch.manual_seed(seed)
    flow = gs.Flow(build(seen.shape[1]))
    if is_planned:
        plan = gs.initialize(flow, (seen[:512],), logdet_std=ASKED, seed=seed)
        flow.normalize(seen)
        gs.calibrate(flow, plan, (seen[:512],))
    optimizer = torch.optim.Adam(flow.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for step in range(STEPS + 1):
        rows = seen[torch.randint(len(seen), (BATCH,), generator=generator)]
        flow.train()
        loss = negative_log_likelihood(flow, rows)
        if step % EVERY == 0:
            flow.eval()
            with torch.no_grad():
                found.append(float(negative_log_likelihood(flow, unseen)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return np.array(found)


def negative_log_likelihood(flow: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Under a standard normal distribution of the noise."""
    z, determinant = flow(x)
    return (0.5 * z.square().sum(1) + 0.5 * z.shape[1] * float(np.log(2.0 * np.pi)) - determinant).mean()


@cache
def cells() -> Data:
    """The 30 measures of 569 cells that scikit-learn ships, standardised; 400 are seen."""
    from sklearn.datasets import load_breast_cancer

    return _split(torch.tensor(load_breast_cancer().data, dtype=torch.float32), 400)


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
    return _split(chosen + torch.rand(chosen.shape, generator=random), 4000)


def _split(rows: torch.Tensor, count: int) -> Data:
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))]
    seen, unseen = shuffled.tensor_split([count])
    return (seen - seen.mean(0)) / seen.std(0), (unseen - seen.mean(0)) / seen.std(0)


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


CASES: tuple[tuple[str, str, Callable[[int], nn.Module], Callable[[], Data]], ...] = (
    ("zuko", "MAF, 5 layers, trained on 30 measures of cells", zuko_flow, cells),
    ("nflows", "RealNVP with ActNorm, trained on 30 measures of cells", nflows_flow, cells),
    ("normflows", "RealNVP with ActNorm, trained on pixels", normflows_flow, pixels),
)
