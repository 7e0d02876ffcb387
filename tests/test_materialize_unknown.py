"""Buffers that nobody knows: refused by name, and taken where they are given."""

import math

import pytest
import torch
from materialized import assert_same_tensors, on_meta, plan_of, tensors_of
from torch import nn

from gainstage.apply import apply, materialize
from gainstage.errors import InputError, UnknownNameError


class Positions(nn.Module):
    """The usual tutorial's: neither argument is kept."""

    def __init__(self, width, length=50):
        super().__init__()
        place = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * -math.log(10000.0) / width)
        self.register_buffer("table", torch.cat([place.sin(), place.cos()], 1))


class Default(nn.Module):
    """One argument is kept, the other only looks as if it had its default."""

    def __init__(self, size, base=2.0):
        super().__init__()
        self.size = size
        self.register_buffer("powers", base ** torch.arange(size))


class Changed(nn.Module):
    """What is kept is not what was given."""

    def __init__(self, size):
        super().__init__()
        self.size = size // 2
        self.register_buffer("steps", torch.arange(self.size))


class Scaled(nn.Module):
    """The same, where only the number tells: the shape would be right."""

    def __init__(self, base):
        super().__init__()
        self.base = 2 * base
        self.register_buffer("powers", self.base ** torch.arange(3.0))


class Borrowing(nn.Module):
    """Keeps no size; that of the model around it is another one, by chance of the same shape."""

    def __init__(self, base):
        super().__init__()
        self.register_buffer("multiples", base * torch.arange(3.0))


class Lending(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.base = 5.0
        self.inner = Borrowing(7.0)


class Random(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size
        self.register_buffer("projection", torch.randn(size, size))


class Dependent(nn.Module):
    """Its buffer is a copy of what its parameter was drawn as."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.inner = nn.Linear(size, size)
        self.register_buffer("start", self.inner.weight.detach().clone())


class Partial(nn.Module):
    """Resets one entry only."""

    def __init__(self, other):
        super().__init__()
        self.register_buffer("state", torch.ones(4))

    def reset_parameters(self):
        self.state[0] = 1


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: Positions(4), "table (Positions)"),
        (lambda: Default(3, base=3.0), "powers (Default)"),
        (lambda: Changed(8), "steps (Changed)"),
        (lambda: Scaled(3.0), "powers (Scaled)"),
        (lambda: Lending(0), "inner.multiples (Borrowing)"),
        (lambda: Random(3), "projection (Random)"),
        (lambda: Dependent(3), "start (Dependent)"),
        (lambda: Partial(0), "state (Partial)"),
    ],
)
def test_a_buffer_that_cannot_be_known_is_refused_and_can_be_given(build, name):
    model, real = on_meta(lambda: nn.Sequential(build(), nn.BatchNorm1d(2))), nn.Sequential(build(), nn.BatchNorm1d(2))
    with pytest.raises(InputError, match=r"No values are known for the buffers 0\.") as caught:
        materialize(model, plan_of(model))
    assert f"0.{name}" in str(caught.value)
    assert "running_mean" not in str(caught.value)
    assert all(tensor.is_meta for tensor in tensors_of(model).values())
    buffer = f"0.{name.split()[0]}"
    apply(real, plan_of(real), seed=4)
    value = dict(real.named_buffers())[buffer]
    materialize(model, plan_of(model), seed=4, buffers=lambda asked: value if asked == buffer else None)
    assert_same_tensors(model, real)


@pytest.mark.parametrize(
    ("buffers", "error", "message"),
    [
        ({"table": torch.zeros(50, 5)}, InputError, r"table has shape \[50, 4\]; given is \[50, 5\]"),
        ({"table": torch.zeros(50, 4, device="meta")}, InputError, "on meta"),
        ({"table": torch.zeros(50, 4), "tabel": torch.zeros(1)}, UnknownNameError, r"'tabel' is no buffer.*nearest: table"),
    ],
)
def test_given_buffers_are_checked(buffers, error, message):
    model = on_meta(lambda: Positions(4))
    with pytest.raises(error, match=message):
        materialize(model, plan_of(model), buffers=buffers)
    assert model.table.is_meta


def test_global_generators_are_left_alone():
    model = on_meta(lambda: nn.Sequential(Random(3), nn.Linear(3, 3)))
    state = torch.get_rng_state()
    materialize(model, plan_of(model), buffers={"0.projection": torch.zeros(3, 3)})
    assert torch.equal(torch.get_rng_state(), state)
