"""The demonstration as a picture: what tells images apart, layer by layer, and the training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gainstage.demo.differences import SINGLE_PRECISION, SMALLEST
from gainstage.demo.training import Curve
from gainstage.errors import InputError

_COLOURS = ("#b2182b", "#2166ac")  # told apart by everybody


@dataclass(frozen=True, slots=True)
class Differences:
    """Share of the second moment that differs between images, at each layer by its path."""

    predicted: Mapping[str, float]
    measured: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """The runs of one initialization at the learning rate that served it best."""

    name: str
    learning_rate: float
    curves: tuple[Curve, ...]


def check_plot(path: Path) -> None:
    """Whether :func:`draw` will be able to write there: better known before the training than after it.

    Raises:
        InputError: matplotlib is not installed, or there is no such folder.
    """
    if find_spec("matplotlib") is None:
        raise InputError("Plots are drawn with matplotlib: pip install 'gainstage[plots]'.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}.")


def draw(path: Path, differences: Sequence[Differences], versions: Sequence[Version]) -> None:
    """Write the PNG.

    Args:
        path: where to; see :func:`check_plot`.
        differences: of both versions.
        versions: their runs, in the same order.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    _draw_differences(left, differences, versions)
    _draw_curves(right, versions)
    figure.savefig(path, format="png")


def _draw_differences(axes: Any, differences: Sequence[Differences], versions: Sequence[Version]) -> None:
    for difference, version, colour in zip(differences, versions, _COLOURS, strict=True):
        predicted, measured = (_visible(shares) for shares in (difference.predicted, difference.measured))
        axes.semilogy(*predicted, color=colour, label=f"{version.name}, predicted")
        axes.semilogy(*measured, color=colour, marker="o", markersize=4, linestyle="", label="measured, one draw")
    axes.axhline(SINGLE_PRECISION, color="grey", linestyle=":", linewidth=1)
    beside = axes.get_yaxis_transform()  # x in fractions of the width
    axes.text(0.98, 1.5 * SINGLE_PRECISION, "single precision ends here", transform=beside, ha="right", fontsize="small")
    axes.set(xlabel="layer", ylabel="share of the second moment", title="What differs from image to image", xlim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")


def _visible(shares: Mapping[str, float]) -> tuple[list[int], list[float]]:
    """Layers, counted from 1, and their shares, as far as double precision tells them from zero."""
    points = [(layer, share) for layer, share in enumerate(shares.values(), 1) if share > SMALLEST]
    return [layer for layer, _ in points], [share for _, share in points]


def _draw_curves(axes: Any, versions: Sequence[Version]) -> None:
    for version, colour in zip(versions, _COLOURS, strict=True):
        epochs = range(1, len(version.curves[0].accuracies) + 1)
        columns = list(zip(*(curve.accuracies for curve in version.curves), strict=True))
        label = f"{version.name}, learning rate {version.learning_rate:g}"
        axes.plot(epochs, [sum(column) / len(column) for column in columns], color=colour, label=label)
        axes.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1), title="Trained alike, each at its best learning rate")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small", loc="center right")
