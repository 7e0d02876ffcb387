"""Padding below all entries in front of a maximum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from captured import run_graph
from torch import nn

import gainstage as gs
from gainstage.capture import capture


class Padded(nn.Module):
    """Maxima over windows of 3, of a map that is padded on two sides, as those of TensorFlow's "same"."""

    def __init__(self, value: float, sides: tuple[int, ...] = (0, 1, 0, 1)) -> None:
        super().__init__()
        self.features, self.head = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 1)
        self.value, self.sides = value, sides

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right, top, bottom = self.sides  # by one pad or, where both sides have some, by two
        padded = F.pad(self.features(x), (0, right, top, bottom), value=self.value)
        padded = F.pad(padded, (left, 0), value=self.value) if left else padded
        return self.head(F.max_pool2d(padded, 3, 2))


@pytest.mark.parametrize("value", [float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("sides", [(0, 1, 0, 1), (1, 1, 1, 1), (1, 0, 1, 0), (1, 0, 0, 1), (0, 1, 1, 1)])
def test_padding_below_all_entries_is_never_the_largest(value: float, sides: tuple[int, ...]) -> None:
    model, x = Padded(value, sides), torch.randn(4, 3, 12, 12)
    graph = capture(model, (x,), {})
    assert all(node.short_name != "pad" for node in graph.nodes)
    torch.testing.assert_close(run_graph(graph, model, (x,))[graph.outputs[0]], model(x))
    trace = gs.inspect(model, (x,))
    assert not trace.sampled
    plan = gs.plan(model, (x,))
    levels = []
    for seed in range(40):
        gs.apply(model, plan, seed=seed)
        with torch.no_grad():
            levels.append(float(model(torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(seed))).square().mean()))
    assert plan.predictions["@0"][0] == pytest.approx(sum(levels) / len(levels), rel=0.1)


def test_padding_that_may_be_the_largest_stays() -> None:
    graph = capture(Padded(0.0), (torch.randn(4, 3, 12, 12),), {})
    assert any(node.short_name == "pad" for node in graph.nodes)
