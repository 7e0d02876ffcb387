"""Heads that are tied to the embedding: each token's own logit holds the square of its row."""

import importlib
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gainstage as gs

WIDTH = 256


class Tied(nn.Module):
    """A language model of few characters: one residual block, a norm, and the embedding as the head."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(characters, WIDTH), nn.Embedding(32, WIDTH)
        self.norm, self.wide, self.back = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 512), nn.Linear(512, WIDTH)
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        return self.head(self.last(x + self.back(F.gelu(self.wide(self.norm(x))))))


def logits_over_draws(model: nn.Module, tokens: torch.Tensor, plan: gs.Plan) -> list[torch.Tensor]:
    found = []
    for seed in range(8):
        gs.apply(model, plan, seed=seed)
        with torch.no_grad():
            found.append(model(tokens).double())
    return found


@pytest.mark.parametrize("characters", [27, 300])
def test_what_a_tied_head_gives_back_is_predicted_and_counts_in_the_first_loss(characters):
    torch.manual_seed(0)
    model = Tied(characters)
    tokens, targets = torch.randint(characters, (2, 8, 32))
    plan = gs.plan(model, (tokens,))
    found = logits_over_draws(model, tokens, plan)
    level = np.mean([logits.square().mean().item() for logits in found])
    own = np.mean([logits.gather(-1, tokens[..., None]).mean().item() for logits in found])
    assert own**2 / characters > 0.1 * level  # without it the level would be missed by as much
    assert plan.predictions["head@0"][0] == pytest.approx(level, rel=0.03)
    loss = np.mean([F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item() for logits in found])
    assert abs(loss / math.log(characters) - 1.0) < 0.02
    assert "the own logit of each token" in plan.explain("embedding.weight")


def test_a_tied_head_of_an_untrained_model_is_read_as_it_is():
    torch.manual_seed(1)
    model = Tied(27)
    tokens = torch.randint(27, (8, 32))
    for table in (model.embedding, model.position):
        nn.init.normal_(table.weight, std=0.05)
    with torch.no_grad():
        level = model(tokens).square().mean().item()
    assert gs.inspect(model, (tokens,), gradients=False).modules["head"][0].second_moment == pytest.approx(level, rel=0.1)


@pytest.mark.parametrize("characters", [27, 300])
def test_a_tied_head_sends_the_walk_through_the_model_as_seldom_as_can_be(characters, monkeypatch):
    """Once to see how far off it is, and once more with the step that its logits ask for: the norm keeps the signal as it is."""
    walk, passes = importlib.import_module("gainstage.solve.walk"), []

    def counted(node, *args, evaluate=walk.evaluate):
        passes.extend([node.name] if node.short_name == "embedding" and node.provenance.module_path == "embedding" else [])
        return evaluate(node, *args)

    monkeypatch.setattr(walk, "evaluate", counted)
    model = Tied(characters)
    model.norm.eps = model.last.eps = 0.0  # what they add would count for a table as quiet as this one
    gs.plan(model, (torch.randint(characters, (2, 32)),))
    assert len(passes) == 2
