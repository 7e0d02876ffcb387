"""The demonstration as it is told: look, plan, apply, verify, train."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

import gainstage.api as gs
from gainstage.demo.differences import SINGLE_PRECISION, SMALLEST, measured_differences, predicted_differences
from gainstage.demo.digits import Digits, load_digits
from gainstage.demo.network import DeepConvNet
from gainstage.demo.plot import Differences, Version, check_plot, draw
from gainstage.demo.training import Curve, Setup, final, train_all
from gainstage.plan import Plan
from gainstage.propagate import Trace
from gainstage.report.checks import check_report
from gainstage.report.plans import plan_report
from gainstage.report.traces import trace_report

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
EPOCHS, SEEDS = 10, (0, 1, 2)
QUICK_EPOCHS, QUICK_SEEDS = 8, (0,)
SAMPLES = 128  # that the levels are predicted for and measured on
EXPLAINED = "stages.1.convs.2.weight"
_BLOCKS = "▁▂▃▄▅▆▇█"


def run(console: Console, plot: Path | None, quick: bool) -> None:  # noqa: FBT001  (the command line's flags)
    """Tell the story.

    Args:
        console: where to.
        plot: PNG to write.
        quick: fewer epochs, one seed.

    Raises:
        InputError: scikit-learn or matplotlib is missing, or the PNG has no folder to go to.
    """
    start = time.perf_counter()
    if plot is not None:
        check_plot(plot)
    digits = load_digits()
    torch.manual_seed(0)
    model = DeepConvNet()
    images = digits.images[:SAMPLES]
    before = Differences(predicted_differences(_look(console, model, images)), measured_differences(model, images))
    plan = _plan(console, model, images)
    after = Differences(predicted_differences(_verify(console, model, plan, images)), measured_differences(model, images))
    versions = _train(console, plan, digits, quick=quick)
    if plot is not None:
        draw(plot, (before, after), versions)
        console.print(f"The curves are in {plot}.")
    console.print(f"{time.perf_counter() - start:.0f} seconds in all.", style="dim")


def _chapter(console: Console, title: str, text: str) -> None:
    console.print()
    console.rule(f"[bold]{title}", align="left", style="dim")
    console.print(Padding(Text(text), (0, 0, 1, 0)))


def _look(console: Console, model: DeepConvNet, images: torch.Tensor) -> Trace:
    _chapter(
        console,
        "1  A network as its constructor leaves it",
        "VGG's layout for handwritten digits of 8 x 8: 15 convolutions and 3 linear layers, with GELU and without normalization. "
        "gs.inspect(model, (images,)) predicts what every module puts out; nothing is run.",
    )
    trace = gs.inspect(model, (images,))
    console.print(trace_report(trace))
    shares = list(predicted_differences(trace).values())
    lost = next((layer for layer, share in enumerate(shares, 1) if share < SINGLE_PRECISION), None)
    console.print(
        Text(
            f"\nWhy it will not train: 'cos sample' comes to 1.00, so all images look alike. After the first convolution "
            f"{shares[0]:.0%} of the second moment differs from image to image; at the head {_share(shares[-1])}. "
            + (f"Single precision cannot tell them apart from layer {lost} of {len(shares)} on." if lost else "")
        )
    )
    return trace


def _share(share: float) -> str:
    if share <= SMALLEST:
        return "less than one part in 10^15"
    return f"{share:.1%}" if share > 1e-3 else f"one part in 10^{-math.floor(math.log10(share))}"


def _plan(console: Console, model: DeepConvNet, images: torch.Tensor) -> Plan:
    _chapter(
        console,
        "2  A plan",
        "plan = gs.plan(model, (images,)) chooses a distribution for every parameter; "
        "plan.explain(name) derives it. torch.nn.init.calculate_gain knows no GELU; here no function has to be known.",
    )
    plan = gs.plan(model, (images,))
    console.print(plan_report(plan))
    console.print(Padding(Text(f'plan.explain("{EXPLAINED}")\n\n{plan.explain(EXPLAINED)}'), (1, 0, 0, 2)))
    return plan


def _verify(console: Console, model: DeepConvNet, plan: Plan, images: torch.Tensor) -> Trace:
    _chapter(
        console,
        "3  Applied, and verified on the real network",
        "gs.apply(model, plan, seed=0) writes the parameters. gs.verify(model, (images,), plan=plan) runs the network once "
        "and compares what it measures with what was predicted.",
    )
    gs.apply(model, plan, seed=0)
    console.print(check_report(gs.verify(model, (images,), plan=plan)))
    trace = gs.inspect(model, (images,))
    head = predicted_differences(trace)["head"]
    console.print(Text(f"\nAt the head {_share(head)} of the second moment now differs from image to image."))
    return trace


def _train(console: Console, plan: Plan, digits: Digits, *, quick: bool) -> tuple[Version, ...]:
    epochs, seeds = (QUICK_EPOCHS, QUICK_SEEDS) if quick else (EPOCHS, SEEDS)
    _chapter(
        console,
        "4  Both trained alike",
        f"{len(digits.labels)} images, AdamW, {epochs} epochs, {len(LEARNING_RATES)} learning rates for each, "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}; the means of the last three epochs.",
    )
    setups = [
        Setup(plan=chosen, learning_rate=rate, seed=seed, epochs=epochs)
        for seed in seeds
        for rate in LEARNING_RATES
        for chosen in (None, plan)
    ]
    curves = _with_progress(console, setups)
    groups: dict[tuple[str, float], list[Curve]] = defaultdict(list)
    for curve in curves:
        groups["default" if curve.setup.plan is None else plan.policy, curve.setup.learning_rate].append(curve)
    versions = tuple(_best(name, groups) for name in ("default", plan.policy))
    console.print(_table(groups, versions))
    console.print(Text(f"\nTest accuracy, epochs 1 to {epochs}, each at the learning rate with the least training loss:\n"))
    for version in versions:
        levels = [sum(values) / len(values) for values in zip(*(c.accuracies for c in version.curves), strict=True)]
        console.print(Text(f"  {version.name:8} {_spark(levels)} {levels[-1]:.0%}"))
    console.print()
    return versions


def _with_progress(console: Console, setups: Sequence[Setup]) -> list[Curve]:
    columns = (TextColumn("training runs"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        return list(progress.track(train_all(setups), total=len(setups)))


def _mean(curves: Sequence[Curve], column: str) -> float:
    return sum(final(getattr(curve, column)) for curve in curves) / len(curves)


def _best(name: str, groups: dict[tuple[str, float], list[Curve]]) -> Version:
    """By the training loss: the test set decides nothing."""
    rate = min((rate for group, rate in groups if group == name), key=lambda rate: _mean(groups[name, rate], "losses"))
    return Version(name=name, learning_rate=rate, curves=tuple(groups[name, rate]))


def _table(groups: dict[tuple[str, float], list[Curve]], versions: Sequence[Version]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("version", "learning rate", "training loss", "test accuracy", "of seeds", ""):
        table.add_column(heading, justify="left" if heading in {"version", ""} else "right")
    for version in versions:
        for rate in LEARNING_RATES:
            curves = groups[version.name, rate]
            ends = sorted(final(curve.accuracies) for curve in curves)
            table.add_row(
                version.name,
                f"{rate:g}",
                f"{_mean(curves, 'losses'):.3f}",
                f"{_mean(curves, 'accuracies'):.1%}",
                f"{ends[0]:.0%} to {ends[-1]:.0%}",
                "best" if rate == version.learning_rate else "",
            )
    return table


def _spark(levels: Sequence[float]) -> str:
    return "".join(_BLOCKS[min(int(level * len(_BLOCKS)), len(_BLOCKS) - 1)] * 2 for level in levels)
