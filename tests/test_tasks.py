"""Several tasks on one trunk: heads that do not know of loss weights, gradients by task, class priors."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gainstage as gs
from gainstage.errors import InputError, NonFiniteError, UnknownNameError
from gainstage.verify import FindingKind


class Tasks(nn.Module):
    """A trunk and two heads of different width; with weights, the loss is computed inside."""

    def __init__(self, width=256, weights=None):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.depth, self.label = nn.Linear(width, 3), nn.Linear(width, 10)
        self.weights = weights

    def forward(self, x):
        h = self.trunk(x)
        depth, label = self.depth(h), self.label(h)
        if self.weights is None:
            return depth, label
        first, second = self.weights
        return first * F.mse_loss(depth, torch.ones(len(x), 3)) + second * F.cross_entropy(label, torch.arange(len(x)) % 10)


def losses(seed=0, count=64):
    generator = torch.Generator().manual_seed(seed)
    target, labels = torch.randn(count, 3, generator=generator), torch.randint(0, 10, (count,), generator=generator)
    return {"depth": lambda y: F.mse_loss(y[0], target), "label": lambda y: F.cross_entropy(y[1], labels)}


def inputs(count=64, seed=0):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


def test_a_plan_knows_no_loss_weights():
    """Also where the model multiplies its losses itself: distributions, and the values drawn, are the same to the bit."""
    x = inputs()
    plain = gs.plan(Tasks(), (x,))
    for weights in ((1.0, 1.0), (1000.0, 0.001)):
        model = Tasks(weights=weights)
        plan = gs.plan(model, (x,))
        for name, parameter in plan.parameters.items():
            assert parameter.distribution == plain.parameters[name].distribution, name
        gs.apply(model, plan)
        expected = Tasks()
        gs.apply(expected, plain)
        for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(parameter, other), name


def test_gradients_by_task_are_those_predicted():
    """Mean over 16 draws of weights, inputs and targets, within three standard errors of it and 2 % for the theory."""
    ratios = {"depth": [], "label": []}
    for seed in range(16):
        model, x = Tasks(), inputs(seed=seed)
        gs.initialize(model, (x,), seed=seed)
        found = gs.task_gradients(model, (x,), losses=losses(seed))
        assert found.shared == ("trunk.0.weight", "trunk.0.bias", "trunk.2.weight", "trunk.2.bias")
        for row in found.rows:
            ratios[row.task].append(row.measured**2 / row.predicted**2)
    for task, found in ratios.items():
        assert abs(np.mean(found) - 1.0) < 0.02 + 3.0 * np.std(found) / 4.0, task
        assert np.std(found) / 4.0 < 0.06


def test_weights_act_on_the_trunk_alone():
    model, x = Tasks(), inputs()
    gs.initialize(model, (x,))
    plain, weighted = (gs.task_gradients(model, (x,), losses=losses(), weights=w) for w in (None, {"label": 10.0}))
    for before, after in zip(plain.rows, weighted.rows, strict=True):
        factor = 10.0 if after.task == "label" else 1.0
        assert after.measured == pytest.approx(factor * before.measured)
        assert after.predicted == pytest.approx(factor * before.predicted)
    balanced = gs.task_gradients(model, (x,), losses=losses(), weights={row.task: row.balanced for row in weighted.rows})
    assert [row.share for row in balanced.rows] == pytest.approx([0.5, 0.5])
    assert sum(row.balanced for row in weighted.rows) == pytest.approx(11.0)


def test_shares_are_those_of_autograd():
    model, x = Tasks(), inputs()
    found = gs.task_gradients(model, (x,), losses=losses(), weights={"depth": 3.0})
    squares = {}
    for (task, loss), weight in zip(losses().items(), (3.0, 1.0), strict=True):
        model.zero_grad()
        (weight * loss(model(x))).backward()
        squares[task] = sum(float(parameter.grad.square().sum()) for parameter in model.trunk.parameters())
    for row in found.rows:
        assert row.measured**2 == pytest.approx(squares[row.task], rel=1e-5)
        assert row.share == pytest.approx(squares[row.task] / sum(squares.values()), rel=1e-5)


def test_a_task_that_drowns_the_others_is_named():
    model, x = Tasks(), inputs()
    gs.initialize(model, (x,))
    assert gs.task_gradients(model, (x,), losses=losses()).findings == ()
    (finding,) = gs.task_gradients(model, (x,), losses=losses(), weights={"depth": 100.0}).findings
    assert finding.kind is FindingKind.TASK_DROWNS
    assert finding.where == "depth"
    assert "drowns the others: 100% of the trunk's gradient" in finding.evidence
    assert "equal shares at depth" in finding.remedy


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    two = {"one": lambda y: y[:, 0].square().mean(), "other": lambda y: y[:, 1].square().mean()}
    gs.task_gradients(model, (inputs(),), losses=two)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"losses": {"one": lambda y: y[0].mean()}}, InputError, "1 tasks share nothing"),
        ({"losses": {"a": lambda y: y[0], "b": lambda y: y[1].mean()}}, InputError, "task 'a': a loss makes one number"),
        ({"losses": {"a": lambda y: y[0].mean(), "b": lambda y: 1.0}}, InputError, "task 'b': .* this one makes float"),
        ({"losses": {"a": lambda y: y["x"], "b": lambda y: y[1].mean()}}, InputError, "task 'a': the loss failed: TypeError"),
        ({"losses": {"a": lambda y: y[0].mean() / 0, "b": lambda y: y[1].mean()}}, NonFiniteError, "task 'a'"),
        ({"weights": {"deep": 1.0}}, InputError, "no task 'deep'; known are depth, label"),
        ({"weights": {"depth": -1.0}}, InputError, "a weight is a positive number"),
    ],
)
def test_bad_requests(changes, error, message):
    with pytest.raises(error, match=message):
        gs.task_gradients(Tasks(), (inputs(),), **{"losses": losses(), **changes})


def test_tasks_without_a_trunk():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(64, 2), nn.Linear(64, 2)

        def forward(self, x):
            return self.one(x), self.other(x)

    with pytest.raises(InputError, match="no trunk to share"):
        gs.task_gradients(Apart(), (inputs(),), losses={"a": lambda y: y[0].mean(), "b": lambda y: y[1].mean()})


SHARES = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.02, 0.01, 0.01, 0.005, 0.005])


@pytest.mark.parametrize("given", ["probabilities", "labels"])
def test_class_priors(given):
    """The first loss is the entropy of the classes, and the head's weight is as quiet as without."""
    labels = torch.multinomial(SHARES, 20000, replacement=True, generator=torch.Generator().manual_seed(0))
    model, x = Tasks(), inputs(2000)
    plan = gs.initialize(model, (x[:200],), priors={"label.bias": SHARES if given == "probabilities" else labels})
    assert torch.allclose(model.label.bias, SHARES.log(), atol=1e-6 if given == "probabilities" else 0.5)
    loss = F.cross_entropy(model(x)[1], labels[:2000])
    entropy = F.cross_entropy(SHARES.log().expand(2000, 10), labels[:2000])
    assert loss < entropy + 0.05 * math.log(10)  # 1 % of log 10 is what the head's weight may cost
    plain = gs.plan(Tasks(), (x[:200],))
    assert plan.parameters["label.weight"].distribution.std == pytest.approx(
        plain.parameters["label.weight"].distribution.std, rel=1e-3
    )
    assert gs.verify(model, (x,), plan=plan).ok
    assert gs.Plan.from_json(plan.to_json()) == plan
    assert "b_c = log p_c" in plan.explain("label.bias")
    assert "class priors" in plan.explain("label.weight")


def test_priors_of_outputs_that_are_decided_one_by_one():
    """``-log((1 - p) / p)``, as for detectors (T.-Y. Lin et al. 2017, arXiv:1708.02002, section 4.1)."""
    x = inputs()
    plan = gs.plan(Tasks(), (x,), priors={"depth.bias": torch.tensor([0.01, 0.01, 0.5])})
    blocks = plan.parameters["depth.bias"].blocks
    assert [block.distribution.mean for block in blocks] == pytest.approx([-math.log(99.0), 0.0])
    targets = (torch.rand(998, 3, generator=torch.Generator().manual_seed(0)) < 0.1).float()
    plan = gs.plan(Tasks(), (x,), priors={"depth.bias": targets})
    shares = (targets.sum(0) + 1) / 1000
    assert [block.distribution.mean for block in plan.parameters["depth.bias"].blocks] == pytest.approx(
        torch.logit(shares).tolist()
    )
    one = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    plan = gs.plan(one, (x,), priors={"2.bias": torch.tensor([1] * 7 + [0] * 91)})
    assert plan.parameters["2.bias"].distribution.mean == pytest.approx(math.log(8 / 92))


@pytest.mark.parametrize(
    ("priors", "error", "message"),
    [
        ({"labels.bias": SHARES}, UnknownNameError, r"'labels.bias' matches no parameter \(nearest: label.bias"),
        ({"trunk.0.bias": SHARES}, InputError, "trunk.0.bias is no bias of an output head; those are depth.bias, label.bias"),
        ({"label.bias": SHARES[:9]}, InputError, "label.bias has 10 outputs, 9 probabilities"),
        ({"label.bias": SHARES * 3}, InputError, "lie between 0 and 1"),
        ({"label.bias": torch.eye(10)[0]}, InputError, "no finite log-odds"),
        ({"label.bias": torch.tensor([3, 12])}, InputError, "labels for label.bias lie from 0 to 9"),
        ({"label.bias": []}, InputError, "nothing is given"),
    ],
)
def test_bad_priors(priors, error, message):
    with pytest.raises(error, match=message):
        gs.plan(Tasks(), (inputs(),), priors=priors)
