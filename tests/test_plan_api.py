"""``gs.plan``, ``gs.apply`` and ``gs.initialize`` as a user meets them: real models, bad input, a model left as it was."""

import copy

import pytest
import torch
from torch import nn

import gainstage as gs
from gainstage.api.present import on_host
from gainstage.plan import Family


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def test_planning_changes_nothing():
    model = network().train()
    model[0].weight.grad = torch.ones(32, 16)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    gs.plan(model, (X,))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert torch.equal(model[0].weight.grad, torch.ones(32, 16))


def test_initialize_is_plan_and_apply():
    model, other = network(), network()
    plan = gs.initialize(model, (X,), seed=5)
    gs.apply(other, gs.plan(other, (X,)), seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert plan == gs.plan(model, (X,))
    assert gs.Plan.from_json(plan.to_json()) == plan
    assert gs.verify(model, (X,), plan=plan).ok


def test_keyword_inputs_and_options_pass_through():
    plan = gs.initialize(network(), kwargs={"input": X}, policy="he", distribution="truncated_normal", keep=["3.*"])
    assert plan.policy == "he"
    assert plan.parameters["0.weight"].distribution.family is Family.TRUNCATED_NORMAL
    assert plan.parameters["3.weight"].distribution.family is Family.KEEP


def test_kept_and_frozen_parameters_keep_their_values_and_count_with_them():
    model = network()
    with torch.no_grad():
        model[3].weight.mul_(3.0)
    model[3].weight.requires_grad_(requires_grad=False)
    before = model[3].weight.clone()
    plan = gs.initialize(model, (X,), keep="5.bias")
    assert torch.equal(model[3].weight, before)
    assert "frozen" in plan.explain("3.weight")
    assert "kept on request (5.bias)" in plan.explain("5.bias")
    level = 32 * float(before.square().mean()) * plan.predictions["2@0"][0]
    assert plan.predictions["3@0"][0] == pytest.approx(level, rel=1e-6)
    assert gs.plan(model, (X,), include_frozen=True).parameters["3.weight"].distribution.family is Family.NORMAL


def test_a_policy_of_ones_own():
    from gainstage.policies import POLICIES, Level
    from gainstage.roles import Role

    unit = POLICIES["unit"]
    louder = gs.Policy(name="louder", targets={**unit.targets, Role.HIDDEN: Level(4.0)}, source="this test")
    plan = gs.plan(network(), (X,), policy=louder)
    assert plan.policy == "louder"
    assert plan.predictions["3@0"] == pytest.approx((4.0,), rel=1e-3)


class Waves(nn.Module):
    """A buffer that nobody could guess, which the constructor computes from an argument that the module remembers."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.linear = nn.Linear(width, width)
        self.register_buffer("table", torch.linspace(0.0, 3.0, width).sin() * 2.0, persistent=False)

    def forward(self, x):
        return self.linear(x * self.table)


def test_buffers_on_meta_have_the_values_that_their_modules_give_them():
    with torch.device("meta"):
        model = Waves(16)
    on_meta, real = gs.plan(model, (torch.empty(8, 16, device="meta"),)), gs.plan(Waves(16), (torch.randn(8, 16),))
    assert on_meta.parameters["linear.weight"].distribution.std != pytest.approx(0.25)
    assert on_meta.to_json() == real.to_json()


def test_a_model_on_meta_is_planned_like_a_real_one():
    with torch.device("meta"):
        model = network()
    on_meta, real = gs.plan(model, (torch.empty(8, 16, device="meta"),)), gs.plan(network(), (torch.randn(8, 16),))
    for name, planned in on_meta.parameters.items():
        assert planned.distribution.std == pytest.approx(real.parameters[name].distribution.std, rel=0.1), name
    assert on_meta.fingerprint == real.fingerprint


class Partly(nn.Module):
    """One module that is never called, one table that is added as it is."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(16, 16), nn.Linear(16, 16)
        self.table = nn.Parameter(0.02 * torch.randn(8, 16))

    def forward(self, x):
        return self.used(x) + self.table


def test_the_callers_default_device_is_of_no_account():
    with torch.device("meta"):
        model = network()
        on_meta = gs.plan(model, (torch.randn(8, 16),))
        real = network().to_empty(device="cpu")
        gs.initialize(real, (X,))
        signal = gs.inspect(real, (X,)).modules[""][0].second_moment
        assert gs.verify(real, (X,)).ok
        gain = gs.gain(torch.relu)
    assert on_meta.to_json() == gs.plan(model, (torch.empty(8, 16, device="meta"),)).to_json()
    assert signal == gs.inspect(real, (X,)).modules[""][0].second_moment
    assert gain == gs.gain(torch.relu)


def test_what_is_never_called_and_what_nothing_contracts_is_kept_and_said():
    model = Partly()
    before = copy.deepcopy(model.state_dict())
    plan = gs.initialize(model, (X,))
    assert {plan.parameters[name].role for name in ("spare.weight", "spare.bias")} == {"unused"}
    assert plan.parameters["table"].role == "kept"
    for name in ("spare.weight", "spare.bias", "table"):
        assert torch.equal(model.state_dict()[name], before[name])
    assert "kept as they are: table" in plan.notes
    assert any("no output depends on them: spare.weight, spare.bias." in note for note in plan.notes)
    assert "reaches no output" in plan.explain("spare.weight")


class Integers(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, index):
        return index + 1


class Idle(nn.Module):
    """Has parameters, and uses none."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        return x.relu()


BAD = {
    "policy": (network, {"policy": "unti"}, gs.UnknownNameError, "nearest: unit"),
    "distribution": (network, {"distribution": "gaussian"}, gs.UnknownNameError, "known are normal, truncated_normal"),
    "kept name": (network, {"keep": ["0.wieght"]}, gs.UnknownNameError, "nearest: 0.weight"),
}


@pytest.mark.parametrize("case", BAD)
def test_unknown_names_are_told_the_nearest(case):
    make, options, error, words = BAD[case]
    with pytest.raises(error, match=words):
        gs.plan(make(), (X,), **options)


def spoiled(value):
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value):
    with pytest.raises(gs.NonFiniteError, match=r"0\.weight"):
        gs.plan(spoiled(value), (X,), keep=["0.weight"])
    gs.initialize(model := spoiled(value), (X,))  # what is drawn anew may hold anything before
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    with pytest.raises(gs.NonFiniteError, match="input"):
        gs.plan(network(), (X * value,))


class Shared(nn.Module):
    """One matrix is both the queries' and the end of a residual branch; another ends two branches."""

    def __init__(self):
        super().__init__()
        self.both, self.key, self.value, self.end, self.head = (nn.Linear(16, 16, bias=False) for _ in range(5))

    def forward(self, x):
        x = x + self.both(nn.functional.scaled_dot_product_attention(self.both(x), self.key(x), self.value(x)))
        for _ in range(2):
            x = x + self.end(x.relu())
        return self.head(x)


def test_one_parameter_in_two_roles_is_refused_until_one_of_them_is_chosen():
    model, x = Shared(), torch.randn(2, 5, 16)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gs.RoleConflictError, match=r"both.weight is asked to be two things.*query in .* and residual_end in"):
        gs.initialize(model, (x,))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    plans = [gs.plan(model, (x,), roles={"both.weight": role}) for role in ("query", "residual_end")]
    assert [plan.parameters["both.weight"].role for plan in plans] == ["query", "residual_end"]
    assert len({plan.parameters["both.weight"].distribution.std for plan in plans}) == 2
    assert gs.plan(model, (x,), keep=["both.weight"]).parameters["both.weight"].role == "query"


def test_a_buffer_that_is_not_a_number_is_named():
    """Also where only a running average is taken of it: it would never become a number again."""
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
    model[1].running_var[3] = float("nan")
    for call in (gs.inspect, gs.plan):
        for training in (True, False):
            with pytest.raises(gs.NonFiniteError, match=r"NaN in buffer.*1\.running_var"):
                call(model.train(training), (X,))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: gs.plan("resnet", (X,)), "model is str; give a torch.nn.Module"),
        (lambda model: gs.inspect(model, X), r"as a tuple, not as Tensor: args=\(x,\)"),
        (lambda model: gs.inspect(model, (X,), X), r"as a dict, not as Tensor: kwargs=\{'mask': mask\}"),
        (lambda model: gs.plan(model, (X,), roles=["0.weight"]), "roles is list; give a dict"),
        (lambda model: gs.plan(model, (X,), keep=3), "keep is 3; give glob patterns"),
        (lambda model: gs.tailor(model, (X,)), "tailor takes a model and a plan, not Sequential and tuple"),
        (lambda model: gs.apply(model, None), "takes a model and a plan, not Sequential and NoneType"),
        (lambda model: gs.apply(gs.plan(model, (X,)), model), "takes a model and a plan, not Plan and Sequential"),
    ],
)
def test_arguments_of_another_kind(call, words):
    with pytest.raises(gs.InputError, match=words):
        call(network())


def test_a_model_that_uses_none_of_its_parameters_is_refused():
    with pytest.raises(gs.NoSignalError, match=r"any of its 2 parameters \(layer.weight, layer.bias\)"):
        gs.plan(Idle(), (X,))


def test_nothing_to_follow():
    with pytest.raises(gs.NoSignalError):
        gs.plan(Integers(), (torch.arange(3),))


@pytest.mark.parametrize(
    ("parameter", "words"),
    [
        (torch.zeros(4, 16).to_sparse(), "not dense"),
        (torch.zeros(4, 16, dtype=torch.long), "not floating-point"),
    ],
)
def test_parameters_without_a_level(parameter, words):
    model = network()
    model.register_parameter("extra", nn.Parameter(parameter, requires_grad=False))
    with pytest.raises(gs.UnsupportedParameterError, match=words):
        gs.plan(model, (X,))


def test_lazy_modules_are_planned_and_ask_for_a_forward_pass_where_values_are_needed():
    model = nn.Sequential(nn.LazyLinear(4))
    plan = gs.plan(model, (X,))
    for refused in (gs.inspect, gs.verify, lambda model, args: gs.plan(model, args, keep="0.weight")):
        with pytest.raises(gs.UnsupportedParameterError, match=r"0\.weight.*lazy.*Run the model once"):
            refused(model, (X,))
    with pytest.raises(gs.PlanMismatchError, match="run one forward pass"):
        gs.apply(model, plan)
    model(X)
    gs.apply(model, plan)
    assert gs.verify(model, (X,), plan=plan).ok


def test_a_failing_apply_leaves_the_model_unchanged():
    model, other = network(), nn.Linear(16, 4)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(gs.PlanMismatchError):
        gs.apply(other, gs.plan(model, (X,)))
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_one_thread_predicts_and_the_others_are_there_again_even_after_an_error():
    threads, seen = torch.get_num_threads(), []

    def fail():
        with on_host():
            seen.append(torch.get_num_threads())
            raise ZeroDivisionError

    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError):
            fail()
        seen.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(threads)
    assert seen == [1, 2]


def test_each_part_of_a_fused_projection_says_what_it_is_for():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    x = torch.randn(64, 1, 16) + 0.5 * torch.randn(64, 12, 16)  # tokens are alike: queries and keys are louder than values
    plan = gs.initialize(model, (x,), seed=0)
    calibrated = gs.calibrate(model, plan, (x,)).plan
    name = "self_attn.in_proj_weight"
    for planned, parts in (
        (plan, [("[0:32]", "query, key"), ("[32:48]", "value")]),
        (calibrated, [("[0:16]", "query, key"), ("[16:32]", "query, key"), ("[32:48]", "value")]),
    ):
        fused = planned.parameters[name]
        assert [(str(block), block.role) for block in fused.blocks] == parts
        assert all(f"{block}  {block.distribution}  {block.role}" in planned.explain(name) for block in fused.blocks)
        assert fused == gs.Plan.from_json(planned.to_json()).parameters[name]
