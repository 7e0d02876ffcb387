"""Tables at infinite width against the package neural-tangents (Novak et al. 2020, arXiv:1912.02803), on what both can express.

    pip install -r benchmarks/neural_tangents.txt    # in an environment of its own: it needs an older JAX and an older NumPy
    python -m benchmarks.neural_tangents --kernels   # there: computes theirs, and writes them
    python -m benchmarks.neural_tangents             # in the environment of the project: compares ours, prints the table

The file between the two is benchmarks/results/neural_tangents.json. Two inputs of second moment 1 and cosine 0.3 go
through each network. Ours has 65,536 features or channels a layer, whose terms in 1/n are below 1e-4, and no memory behind them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "neural_tangents.json"
WIDTH = 2**16
COSINE = 0.3
SIDE = 10  # of the maps; convolutions have no padding, so that all places are alike, as tables have it

Layer = tuple[Any, ...]
ROOT_2 = 2.0**0.5


def repeated(count: int, *layers: Layer) -> tuple[Layer, ...]:
    """The same layers again and again."""
    return layers * count


# Layers by name with their numbers: dense and conv have deviations of weights (times the root of the fan-in) and of biases.
DENSE: dict[str, tuple[Layer, ...]] = {
    "relu, 3 layers": repeated(3, ("dense", ROOT_2, 0.0), ("relu",)),
    "relu, 30 layers": repeated(30, ("dense", ROOT_2, 0.1), ("relu",)),
    "erf, 3 layers": repeated(3, ("dense", 1.3, 0.2), ("erf",)),
    "erf, 20 layers, chaotic": repeated(20, ("dense", 3.0, 0.1), ("erf",)),
    "gelu, 3 layers": repeated(3, ("dense", 1.5, 0.1), ("gelu",)),
    "gelu, 10 layers": repeated(10, ("dense", 1.5335, 0.0), ("gelu",)),
    "relu, residual": (
        ("dense", 1.0, 0.0),
        *repeated(5, ("residual", (("relu",), ("dense", 1.0, 0.1), ("relu",), ("dense", 1.0, 0.0)))),
    ),
    "relu, layer norm": repeated(4, ("dense", 1.2, 0.1), ("norm",), ("relu",)),
    "gelu, residual, layer norm": (
        ("dense", 1.0, 0.0),
        *repeated(4, ("residual", (("norm",), ("dense", 1.4, 0.0), ("gelu",), ("dense", 1.0, 0.1)))),
    ),
}
MAPS: dict[str, tuple[Layer, ...]] = {
    "conv relu": repeated(4, ("conv", ROOT_2, 0.1, 3), ("relu",)),
    "conv erf": repeated(4, ("conv", 1.5, 0.1, 3), ("erf",)),
    "conv relu, average pool": (
        *repeated(2, ("conv", ROOT_2, 0.0, 3), ("relu",)), ("pool",), ("conv", ROOT_2, 0.0, 3), ("relu",),
    ),
    "conv relu, global average": (*repeated(3, ("conv", ROOT_2, 0.1, 3), ("relu",)), ("global",), ("dense", 1.0, 0.0)),
    "conv gelu, residual, global average": (
        ("conv", 1.0, 0.0, 3),
        *repeated(3, ("residual", (("gelu",), ("conv", 1.5, 0.1, 1)))),
        ("global",),
        ("dense", 1.0, 0.0),
    ),
}  # fmt: skip


def inputs(*, is_map: bool) -> list[Any]:
    """Two inputs of second moment 1 and cosine 0.3 as nested lists; of maps, places share nothing: each has features of its own.

    Features come in many copies: a sum of few terms would not be Gaussian over inputs.
    """
    places, copies = (SIDE**2, 8) if is_map else (1, 2048)
    sine = (1.0 - COSINE**2) ** 0.5
    rows = []
    for first, second in ((1.0, 0.0), (COSINE, sine)):
        row = []
        for place in range(places):
            features = [0.0] * (2 * places)
            features[2 * place], features[2 * place + 1] = first, second
            row.append([(2.0 * places) ** 0.5 * number for number in features for _ in range(copies)])
        rows.append([row[i * SIDE : (i + 1) * SIDE] for i in range(SIDE)] if is_map else row[0])
    return rows


def kernels() -> dict[str, dict[str, float]]:
    """Theirs: second moment and cosine of each network."""
    import numpy as np
    from neural_tangents import stax

    simple = {
        "relu": stax.Relu, "erf": stax.Erf, "gelu": stax.Gelu, "norm": stax.LayerNorm,
        "pool": lambda: stax.AvgPool((2, 2), strides=(2, 2), padding="VALID"), "global": stax.GlobalAvgPool,
    }  # fmt: skip

    def build(layers: Sequence[Layer]) -> Any:
        found = []
        for kind, *numbers in layers:
            if kind == "dense":
                found.append(stax.Dense(1, W_std=numbers[0], b_std=numbers[1]))
            elif kind == "conv":
                found.append(stax.Conv(1, (numbers[2],) * 2, W_std=numbers[0], b_std=numbers[1], padding="VALID"))
            elif kind == "residual":
                branch = stax.parallel(stax.Identity(), build(numbers[0]))
                found.append(stax.serial(stax.FanOut(2), branch, stax.FanInSum()))
            else:
                found.append(simple[kind]())
        return stax.serial(*found)

    results = {}
    for networks, is_map in ((DENSE, False), (MAPS, True)):
        x = np.asarray(inputs(is_map=is_map))
        for name, layers in networks.items():
            ends_flat = not is_map or layers[-1][0] == "dense"
            _, _, kernel = build(layers)
            found = np.asarray(kernel(x, None, ("nngp",)).nngp, dtype=float)
            if not ends_flat:  # [sample, sample, place, place', ...]: the same place in both, which all are alike
                found = np.einsum("abiijj->ab", found) / (found.shape[2] * found.shape[4])
            results[name] = {
                "second_moment": float(found[0, 0]),
                "cosine": float(found[0, 1] / (found[0, 0] * found[1, 1]) ** 0.5),
            }
    return results


def compared() -> list[dict[str, Any]]:
    """Both, side by side."""
    from benchmarks.infinite_width import predicted

    theirs = json.loads(RESULTS.read_text(encoding="utf-8"))["kernels"]
    rows = []
    for networks, is_map in ((DENSE, False), (MAPS, True)):
        for name, layers in networks.items():
            second_moment, cosine = predicted(layers, is_map=is_map)
            rows.append({"network": name, "second_moment": second_moment, "cosine": cosine, "theirs": theirs[name]})
    return rows


def main() -> None:
    """Compute or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", action="store_true", help="compute those of neural-tangents, and write them")
    if parser.parse_args().kernels:
        RESULTS.write_text(json.dumps({"kernels": kernels()}, indent=1) + "\n", encoding="utf-8")
        return
    rows = compared()
    RESULTS.write_text(
        json.dumps({"kernels": {r["network"]: r["theirs"] for r in rows}, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    headings, lines = table(rows)
    for line in (headings, *lines):
        print("  ".join([f"{line[0]:36}", *(f"{cell:>14}" for cell in line[1:])]))


def table(rows: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and cells."""
    headings = ("network", "E[x^2]", "theirs", "cosine", "theirs", "off by")
    return headings, [
        (
            row["network"],
            f"{row['second_moment']:.5f}",
            f"{row['theirs']['second_moment']:.5f}",
            f"{row['cosine']:.5f}",
            f"{row['theirs']['cosine']:.5f}",
            f"{abs(row['cosine'] - row['theirs']['cosine']):.0e}",
        )
        for row in rows
    ]


if __name__ == "__main__":
    main()
