"""The solver against closed forms, and against real draws of the models it planned."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from plain_roles import REL, as_role, nodes_of, solved, variance
from torch import nn

from gainstage.apply import apply
from gainstage.plan import Family
from gainstage.roles import Head, Logits, Role, Setter
from gainstage.solve.constraint import chance_level

KINK = 1e-4  # a kink between two points of the grid (see signal.quadrature)


ATOM = 4e-3  # the zeros that dropout leaves, on a grid of quantiles


DIGITS = 2e-3  # gains published with three digits, squared


def mlp(activation, width=64):
    return nn.Sequential(nn.Linear(width, 2 * width), activation, nn.Linear(2 * width, width)), (torch.randn(8, width),)


@pytest.mark.parametrize(
    ("activation", "gain", "rel"),
    [
        (nn.Identity(), 1.0, REL),
        (nn.ReLU(), 2.0, KINK),  # He et al. 2015
        (nn.PReLU(), 2.0 / (1.0 + 0.25**2), KINK),  # He et al. 2015, eq. 15
        (nn.LeakyReLU(0.1), 2.0 / (1.0 + 0.1**2), KINK),
        (nn.Sequential(nn.ReLU(), nn.Dropout(0.4)), 2.0 * (1.0 - 0.4), KINK),
        (nn.Sequential(nn.Dropout(0.4), nn.ReLU()), 2.0 * (1.0 - 0.4), ATOM),
        (nn.GELU(), 1.534**2, DIGITS),
        (nn.SiLU(), 1.677**2, DIGITS),
        (nn.Tanh(), 1.593**2, DIGITS),
        (nn.ELU(), 1.245**2, DIGITS),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_activation_has_its_own_gain(activation, gain, rel):
    model, args = mlp(activation)
    plan = solved(model, args)
    assert variance(plan, "0.weight") == pytest.approx(1 / 64, rel=REL)
    assert variance(plan, "2.weight") == pytest.approx(gain / 128, rel=rel)
    assert plan.predictions["2@0"] == pytest.approx((1.0,), rel=1e-3)


def test_the_second_moment_of_the_input_counts_not_its_variance():
    torch.manual_seed(0)
    x = torch.rand(64, 256) + 2.0
    plan = solved(nn.Linear(256, 32), (x,))
    assert variance(plan, "weight") == pytest.approx(1 / (256 * float(x.square().mean())), rel=1e-5)


def test_explain_reads_like_a_textbook():
    model, args = mlp(nn.ReLU(), width=50)
    text = solved(model, args).explain("2.weight")
    assert "Var(w) = E[y^2] / (n E[x^2]), so that the output starts with E[y^2] = 1" in text
    assert "n = 100; E[x^2] = 0.5 predicted at 1 (relu)" in text
    assert "Var(w) = 1 / (100 x 0.5) = 0.02, std 0.1414" in text


def test_biases_are_zero_norms_one_slopes_kept():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU())
    plan = solved(model, (torch.randn(4, 3, 9, 9),), moments=lambda name: (0.3, 0.0))
    told = {name: (p.distribution.family, p.distribution.mean) for name, p in plan.parameters.items()}
    assert told.pop("0.weight")[0] is Family.NORMAL
    constant = Family.CONSTANT
    assert told == {
        "0.bias": (constant, 0.0), "1.weight": (constant, 1.0), "1.bias": (constant, 0.0), "2.weight": (Family.KEEP, 0.0),
    }  # fmt: skip
    assert "kept as they are: 2.weight" in plan.notes


class OnePlus(nn.Module):
    """A norm that multiplies by 1 + w, as Gemma's does."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight.float())


def test_a_norm_that_adds_one_starts_from_zero():
    def add(graph, uses):
        (use,) = uses["1.weight"]
        uses["1.weight"] = (replace(use, role=Role.NORM_SCALE, node=nodes_of(graph, "mul")[-1].name),)
        return {}

    plan = solved(nn.Sequential(nn.Linear(16, 16), OnePlus(16)), (torch.randn(4, 16),), add=add)
    assert plan.parameters["1.weight"].distribution.family is Family.CONSTANT
    assert plan.parameters["1.weight"].distribution.mean == 0.0


class Attention(nn.Module):
    def __init__(self, width=64, heads=4, *, is_fused=True):
        super().__init__()
        self.heads = heads
        if is_fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x_BTD):
        q, k, v = self.qkv(x_BTD).chunk(3, -1) if hasattr(self, "qkv") else (self.q(x_BTD), self.k(x_BTD), self.v(x_BTD))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attention_roles(graph, uses):
    (node,) = nodes_of(graph, "scaled_dot_product_attention")
    if "qkv.weight" in uses:
        (use,) = uses["qkv.weight"]
        third = graph.parameters["qkv.weight"].shape[0] // 3
        q, k, v = (
            replace(use, role=role, rows=((i * third, (i + 1) * third),))
            for i, role in enumerate((Role.QUERY, Role.KEY, Role.VALUE))
        )
        uses["qkv.weight"] = (q, k, v)
    else:
        q, k = as_role(uses, "q.weight", Role.QUERY), as_role(uses, "k.weight", Role.KEY)
        as_role(uses, "v.weight", Role.VALUE)
    return {"logits": (Logits(node=node.name, queries=(Setter(q),), keys=(Setter(k),)),)}


@pytest.mark.parametrize("level", [1.0, 3.0])
def test_queries_and_keys_give_logits_of_unit_variance(level):
    """``v = 1 / (d sigma^2)`` for independent tokens: also where the input's level is not one."""
    torch.manual_seed(0)
    x = level**0.5 * torch.randn(16, 32, 64)
    plan = solved(Attention(is_fused=False), (x,), add=attention_roles)
    measured = float(x.square().mean())
    # The tokens of this very sample correlate by 1 / sqrt(16 * 32 * 64) = 0.006 at most.
    assert variance(plan, "q.weight") == pytest.approx(1 / (64 * measured), rel=0.01)
    assert variance(plan, "k.weight") == pytest.approx(variance(plan, "q.weight"), rel=REL)
    assert "scale^2 d_h (n v E[x^2])^2 (1 - r) = 1" in plan.explain("q.weight")


def realised_logits(model, x):
    """Variance of the logits over the keys, of one draw."""
    q, k, _ = model.qkv(x).chunk(3, -1)
    q, k = (y.unflatten(-1, (model.heads, -1)).transpose(1, 2) for y in (q, k))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return float(logits.var(-1, correction=0).mean()) * x.shape[1] / (x.shape[1] - 1)


def test_a_fused_projection_gets_blocks_and_correlated_tokens_louder_queries():
    torch.manual_seed(0)
    shared = torch.randn(16, 1, 64)
    x = 0.8**0.5 * shared + 0.2**0.5 * torch.randn(16, 32, 64)  # tokens correlate by 0.8
    model = Attention()
    plan = solved(model, (x,), add=attention_roles)
    blocks = plan.parameters["qkv.weight"].blocks
    assert [(block.start, block.stop) for block in blocks] == [(0, 128), (128, 192)]
    measured = float(x.square().mean())
    assert blocks[1].distribution.std ** 2 == pytest.approx(1 / (64 * measured), rel=1e-3)
    assert blocks[0].distribution.std ** 2 == pytest.approx(1 / (64 * measured * (1 - 0.8) ** 0.5), rel=0.03)
    found = []
    with torch.no_grad():
        for seed in range(32):
            apply(model, plan, seed=seed)
            found.append(realised_logits(model, x))
    found = torch.tensor(found)
    assert float(found.mean()) == pytest.approx(1.0, abs=4 * float(found.std()) / 32**0.5)


class Pooling(nn.Module):
    """One learned query, which is kept: the keys alone would have to make the logits loud."""

    def __init__(self, width=64):
        super().__init__()
        self.query = nn.Parameter(1e-4 * torch.ones(1, 1, width))
        self.k, self.v = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x_BTD):
        query = self.query.expand(x_BTD.shape[0], -1, -1)
        return F.scaled_dot_product_attention(query, self.k(x_BTD), self.v(x_BTD))


def test_keys_do_not_shout_for_a_query_that_hardly_says_anything():
    def add(graph, uses):
        (node,) = nodes_of(graph, "scaled_dot_product_attention")
        return {"logits": (Logits(node=node.name, queries=(), keys=(Setter(as_role(uses, "k.weight", Role.KEY)),)),)}

    plan = solved(Pooling(), (torch.randn(4, 16, 64),), add=add, moments=lambda name: (0.0, 1e-8))
    assert plan.predictions["k@0"] == pytest.approx((100.0,), rel=1e-3)
    assert "out of reach" in plan.explain("k.weight")


@pytest.mark.parametrize("width", [1, 2, 10, 1000])
def test_a_head_starts_within_two_percent_of_chance(width):
    """The level of :func:`chance_level`, put into the real loss: E[CE] over logits and labels, by sampling."""
    generator = torch.Generator().manual_seed(0)
    level = chance_level(width, 0.01)
    logits = level**0.5 * torch.randn(200_000 // width + 2000, width, generator=generator, dtype=torch.float64)
    if width == 1:
        chance, losses = math.log(2), F.softplus(logits[:, 0])
    else:
        chance, losses = math.log(width), logits.logsumexp(-1) - logits[:, 0]
    excess = float(losses.mean()) / chance - 1
    assert excess == pytest.approx(0.01, abs=0.002 + 4 * float(losses.std()) / len(losses) ** 0.5 / chance)


def head_roles(graph, uses):
    head = as_role(uses, "2.weight", Role.OUTPUT_HEAD)
    return {"heads": (Head(output=graph.outputs[0], setters=(Setter(head),), width=10),)}


def test_a_head_meets_its_level_and_says_why():
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    plan = solved(model, (torch.randn(4, 64),), add=head_roles)
    assert plan.predictions["2@0"] == pytest.approx((chance_level(10, 0.01),), rel=1e-3)
    assert "C = 10 logits" in plan.explain("2.weight")


class Tied(nn.Module):
    def __init__(self, words=500, width=64):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, index):
        return self.head(self.norm(self.embedding(index)))


def tied_roles(graph, uses):
    lookup, head = uses["embedding.weight"]
    head = replace(head, role=Role.TIED_HEAD)
    uses["embedding.weight"] = (lookup, head)
    return {"heads": (Head(output=graph.outputs[0], setters=(Setter(head),), width=500),)}


@pytest.mark.parametrize("policy", ["unit", "he"])
def test_a_tied_head_decides_for_the_embedding(policy):
    plan = solved(Tied(), (torch.randint(0, 500, (4, 16)),), policy, add=tied_roles)
    found = variance(plan, "embedding.weight")
    if policy == "he":
        assert found == pytest.approx(2 / 64, rel=1e-3)
        return
    # The norm leaves of the stream, the embedding, what its eps does not take; each token's own logit is that of its row.
    level = found**2 / (found + 1e-5)
    own = 64 * level**0.5
    cost = 64 * level + 2 * (math.log1p(math.expm1(own) / 500) - own / 500)
    assert cost == pytest.approx(chance_level(500, 0.01), rel=0.02)
    assert plan.predictions["embedding@0"] == pytest.approx((found,), rel=1e-3)
    assert "the head's demand wins" in plan.explain("embedding.weight")


def test_the_row_of_the_padding_stays_zero():
    model, index = nn.Embedding(20, 16, padding_idx=3), torch.randint(0, 20, (4, 8))
    plan = solved(model, (index,))
    assert [(b.start, b.stop, b.distribution.std) for b in plan.parameters["weight"].blocks] == [(0, 3, 1), (3, 4, 0), (4, 20, 1)]
    apply(model, plan, seed=0)
    assert not model.weight[3].any()
    assert model.weight[4].all()


class Typed(nn.Module):
    """Tokens of one type, whose row is that of padding."""

    def __init__(self):
        super().__init__()
        self.tokens, self.types, self.head = nn.Embedding(20, 16), nn.Embedding(2, 16, padding_idx=0), nn.Linear(16, 4)

    def forward(self, index):
        return self.head(self.tokens(index) + self.types(torch.zeros_like(index)))


def test_rows_of_padding_alone_are_zero():
    model, index = Typed(), torch.randint(0, 20, (4, 8))
    plan = solved(model, (index,))
    apply(model, plan, seed=0)
    assert not model.types(torch.zeros_like(index)).any()
    assert plan.predictions["types@0"] == (0.0,)
    assert plan.predictions["@0"][0] > 0.0


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / self.weight.square().mean((1, 2, 3), keepdim=True).sqrt()
        return F.conv2d(x, weight / 6.0, None)


def test_a_scale_that_cancels_is_said_to_cancel():
    def add(graph, uses):
        (conv,) = nodes_of(graph, "conv2d")
        use = replace(uses["weight"][0], role=Role.HIDDEN, node=conv.name)
        uses["weight"] = (use,)
        return {}

    plan = solved(Standardised(16, 16, 3, bias=False), (torch.randn(2, 16, 8, 8),), add=add)
    assert variance(plan, "weight") == pytest.approx(1 / 144, rel=REL)
    assert "its scale cancels" in plan.explain("weight")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_gates_start_with_unit_pre_activations(kind):
    """Half from the input, half from the hidden state: measured in the real module, step by step."""
    torch.manual_seed(0)
    model, x = kind(96, 128, batch_first=True), 2.0 * torch.randn(16, 24, 96)
    plan = solved(model, (x,))
    assert variance(plan, "weight_ih_l0") == pytest.approx(0.5 / (96 * float(x.square().mean())), rel=1e-4)
    assert plan.parameters["bias_ih_l0"].distribution.mean == 0.0
    levels = []
    for seed in range(8):
        apply(model, plan, seed=seed)
        with torch.no_grad():
            hidden = model(x)[0]
            levels.append(float((hidden[:, :-1] @ model.weight_hh_l0.T).square().mean()))
    # Width 128 instead of infinite, and 1 % of sampling error in either level.
    assert sum(levels) / len(levels) == pytest.approx(0.5, rel=0.05)


class TiedRecurrent(nn.Module):
    """The input of the recurrent module is quiet because a tied head decides so, further down."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(500, 64)
        self.recurrent = nn.GRU(64, 64, batch_first=True)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 500, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, index):
        return self.head(2.0 * self.norm(self.recurrent(self.embedding(index))[0]))


def test_gates_follow_an_input_that_is_decided_later():
    plan = solved(TiedRecurrent(), (torch.randint(0, 500, (4, 16)),), add=tied_roles)
    embedded = variance(plan, "embedding.weight")
    assert embedded == pytest.approx(chance_level(500, 0.01) / 64 / 4.0, rel=2e-3)
    assert variance(plan, "recurrent.weight_ih_l0") == pytest.approx(0.5 / (64 * embedded), rel=2e-3)


@pytest.mark.parametrize("family", ["normal", "truncated_normal", "uniform", "orthogonal"])
def test_every_family_has_the_level_that_was_planned(family):
    model, args = mlp(nn.ReLU(), width=128)
    plan = solved(model, args, family=family)
    assert plan.parameters["0.weight"].distribution.family.value == family
    apply(model, plan, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            spread = math.sqrt(2 / parameter.numel())
            assert float(parameter.detach().square().mean()) == pytest.approx(variance(plan, name), rel=5 * spread), name


def test_a_family_that_does_not_fit_falls_back_and_says_so():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 16, 4))
    plan = solved(model, (torch.randn(2, 4, 8, 8),), family="delta_orthogonal")
    families = [plan.parameters[f"{i}.weight"].distribution.family for i in (0, 1, 3)]
    assert families == [Family.DELTA_ORTHOGONAL, Family.ORTHOGONAL, Family.ORTHOGONAL]
    assert "not delta-orthogonal" in plan.explain("1.weight")


def test_a_delta_orthogonal_kernel_meets_its_level_at_the_border_too():
    """Its only tap never falls into the padding: exactly 16 products for each output."""
    torch.manual_seed(0)
    model, x = nn.Conv2d(16, 16, 3, padding=1, bias=False), torch.randn(64, 16, 6, 6)
    apply(model, solved(model, (x,), family="delta_orthogonal"), seed=0)
    with torch.no_grad():
        level = float(model(x).square().mean())
    assert level == pytest.approx(1.0, rel=0.02)  # 64 * 36 * 16 entries: 0.7 %


def test_levels_of_real_draws_are_those_of_the_plan():
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 64, 3, stride=2), nn.SiLU(), nn.AvgPool2d(2),
        nn.Conv2d(64, 64, 3), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64 * 25, 48),
    )  # fmt: skip
    x = torch.randn(8, 3, 32, 32)
    plan = solved(model, (x,))
    levels = {i: [] for i in (0, 2, 5, 8)}
    hooks = [model[i].register_forward_hook(lambda m, a, y, i=i: levels[i].append(float(y.square().mean()))) for i in levels]
    with torch.no_grad():
        for seed in range(16):
            apply(model, plan, seed=seed)
            model(torch.randn_like(x))
    for hook in hooks:
        hook.remove()
    for i, draws in levels.items():
        found = torch.tensor(draws)
        assert plan.predictions[f"{i}@0"] == pytest.approx((1.0,), rel=1e-3)
        assert float(found.mean()) == pytest.approx(1.0, abs=4 * float(found.std()) / 4 + 0.02), i  # + 2 %: the pool's positions
