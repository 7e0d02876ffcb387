"""The model that processes share in on_ranks.py, and what it must be drawn as."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from plans import plan_that_fits
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

import gainstage as gs
from gainstage.apply import apply
from gainstage.plan import Block, Distribution, Family, Mixing

SEED = 3


NORMAL = Distribution(family=Family.NORMAL, std=0.5, mean=0.1)


UNIFORM = Distribution(family=Family.UNIFORM, std=1.0)


TRUNCATED = Distribution(family=Family.TRUNCATED_NORMAL, std=0.1)


ORTHOGONAL = Distribution(family=Family.ORTHOGONAL, std=0.3)


DELTA = Distribution(family=Family.DELTA_ORTHOGONAL, std=0.3)


ZERO = Distribution(family=Family.CONSTANT)


MATRIX = np.array([[1.0, 2.0, 0.0], [0.5, -1.0, 3.0]])


def mixed(matrix):
    mixing, std = Mixing.by("first.weight", matrix)
    return Distribution(family=Family.MIXED, std=std, mixing=mixing)


MIXED, TAKEN_OFF = mixed(MATRIX), mixed(-MATRIX @ np.ones((3, 1)))


class Model(nn.Module):
    """Sizes that no number of processes divides, a tie, a fused projection, a kernel, statistics, a table of positions."""

    def __init__(self, width=10):
        super().__init__()
        self.width = width
        self.embedding = nn.Embedding(11, width)
        self.register_buffer("positions", torch.arange(7.0)[:, None] / width, persistent=False)
        self.first = nn.Linear(3, width)
        self.fused = nn.Linear(width, 3 * width)
        self.mixer = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions + self.first(self.positions.expand(-1, 3))
        query, key, value = self.fused(x).chunk(3, dim=-1)
        x = torch.softmax(query @ key.mT, -1) @ value
        return self.head(self.norm(self.mixer(x.mT)).mT)


def plan_for(model, **changes):
    """Every family, blocks along both dimensions, an element type of two bytes."""
    chosen = {
        "embedding.weight": {"distribution": NORMAL, "blocks": (Block(1, 2, 5, UNIFORM),)},
        "first.weight": {"distribution": ZERO, "blocks": (Block(0, 1, 9, MIXED),)},  # a part, of blocks that nothing divides
        "first.bias": {"distribution": TAKEN_OFF},
        "fused.weight": {"distribution": UNIFORM, "blocks": tuple(Block(0, 10 * i, 10 * i + 10, ORTHOGONAL) for i in (0, 2))},
        "fused.bias": {"distribution": ZERO},
        "mixer.weight": {"distribution": DELTA},
        "mixer.bias": {"distribution": TRUNCATED},
        **changes,
    }
    return plan_that_fits(model, lambda name, _: chosen.get(name, {"distribution": NORMAL}))


def on_meta(dtype=torch.float32):
    with torch.device("meta"):
        return Model().to(dtype)


def reference(dtype=torch.float32):
    """The same model in one process."""
    model = Model().to(dtype)
    apply(model, plan_for(model), seed=SEED)
    return model


def assert_same_as_reference(model, dtype=torch.float32):
    expected = reference(dtype)
    names = dict(expected.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(names)
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        assert torch.equal(whole, names[name]), name
    assert model.head.weight is model.embedding.weight
    for (name, buffer), (_, other) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name


def distributed(model, mesh, placements):
    """Every parameter as a DTensor; dimensions that it does not have are replicated."""
    made = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                fitting = [p if p.is_replicate() or p.dim < parameter.dim() else Replicate() for p in placements]
                made[id(parameter)] = nn.Parameter(distribute_tensor(parameter.detach(), mesh, fitting))
            if parameter is not None:
                module._parameters[name] = made[id(parameter)]
    return model


def train_one_step(model):
    """Forward, backward, step; returns the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.arange(14).view(2, 7) % 11
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    optimizer.step()
    return loss.item()


def in_one_process(model, *args, **kwargs):
    """What gs.verify finds where no other process is about."""
    with patch.object(dist, "is_initialized", return_value=False):
        return gs.verify(model, *args, **kwargs)


def assert_same_check(found, expected):
    """Up to the order of sums, and the same on every rank."""
    names = ("path", "call", "output", "module_type", "shape")
    assert [[getattr(row, name) for name in names] for row in found.rows] == [
        [getattr(row, name) for name in names] for row in expected.rows
    ]
    for row, other in zip(found.rows, expected.rows, strict=True):
        for name in ("predicted", "measured", "sampling_error", "spread"):
            assert getattr(row, name) == pytest.approx(getattr(other, name), rel=1e-4, abs=1e-7), (row.path, name)
    assert [(one.kind, one.where) for one in found.findings] == [(one.kind, one.where) for one in expected.findings]
    checks = [None] * dist.get_world_size()
    dist.all_gather_object(checks, found.to_dict())
    assert all(check == checks[0] for check in checks)
