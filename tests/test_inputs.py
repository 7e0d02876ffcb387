"""gs.measure_inputs, and first layers that are whitened by what it found: against NumPy, real data, and the layer itself."""

import io
import time

import numpy as np
import pytest
import torch
from benchmarks.situations.inputs import Correlations
from rich.console import Console
from torch import nn

import gainstage as gs
from gainstage.errors import InputError, NonFiniteError, PlanFormatError, UnknownNameError
from gainstage.inputs import output_value, whitening_of
from gainstage.inputs.moments import Moments
from gainstage.inputs.shrinkage import Added, Moved
from gainstage.inputs.tails import Tails
from gainstage.report.progress import progress_bar
from gainstage.signal.sampling import pooled


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def made(condition=1e6, columns=32, copies=0, samples=4000, seed=0):
    """Gaussian rows with that condition, a mean, and copies of some columns."""
    random = np.random.default_rng(seed)
    turn = np.linalg.qr(random.standard_normal((columns, columns)))[0]
    spread = np.logspace(0.0, -0.5 * np.log10(condition), columns)
    rows = random.standard_normal((samples, columns)) * spread @ turn.T + random.standard_normal(columns)
    return torch.tensor(np.concatenate([rows, rows[:, :copies], -3.0 * rows[:, :copies]], 1), dtype=torch.float32)


def correlation(y):
    found = np.corrcoef(y.detach().double().numpy().T)
    return float(np.abs(found[~np.eye(len(found), dtype=bool)]).mean())


def network(columns, hidden=32, **options):
    return nn.Sequential(nn.Flatten(), nn.Linear(columns, hidden, **options), nn.ReLU(), nn.Linear(hidden, 4))


def test_moments_of_parts_are_those_of_the_whole():
    """A mean of 1e6 deviations: sums of squares would keep 4 digits of the covariance."""
    rows = np.random.default_rng(0).standard_normal((1000, 5)) + 1e6
    found = Moments.none(5)
    for part in np.array_split(rows, [1, 2, 400]):
        found = found.merged(Moments.of(part))
    exact = rows - rows.mean(0)
    np.testing.assert_allclose(found.scatter, exact.T @ exact, rtol=1e-8, atol=1e-5)
    assert found.count == 1000


def test_tails_of_parts_are_those_of_the_whole():
    """Third and fourth powers about the common mean, at a mean of 1,000 deviations."""
    rows = np.random.default_rng(0).standard_exponential((1000, 3)) + np.array([0.0, 1e3, -5.0])
    found = Tails.none(3)
    for part in np.array_split(rows, [1, 2, 400]):
        found = found.merged(Tails.of(part))
    centred = rows - rows.mean(0)
    for power, sums in ((2, found.squares), (3, found.cubes), (4, found.fourths)):
        np.testing.assert_allclose(sums, (centred**power).sum(0), rtol=1e-9)


def test_the_rows_that_a_variance_rests_on():
    """k of n rows that are not zero: kurtosis n/k, so m = k; n Gaussian rows: m = n/2. A constant has no error."""
    n = 10000
    rows = np.random.default_rng(0).standard_normal((n, 5))
    rows[:, 0] = 3.0
    for column, k in enumerate((1, 5, 40), 1):
        rows[:, column] = np.arange(n) < k
    found = Tails.of(rows)
    assert found.support[0] == np.inf
    np.testing.assert_allclose(found.support[1:], [1, 5, 40, n / 2], rtol=0.05)  # the kurtosis of Gaussians strays by sqrt(24/n)


def test_columns_that_vary_in_a_few_rows_are_read_less():
    """Eight columns of which 1,000 rows have one event each, of unknown size; another thousand rows have others."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for seed in range(3):
        data = made(1e2, columns=24, samples=2000, seed=seed)
        events = torch.zeros(2000, 8)
        for half in (0, 1000):
            rows = half + torch.randperm(1000, generator=generator)[:8]
            events[rows, torch.arange(8)] = torch.randint(1, 17, (8,), generator=generator).float()
        data = torch.cat([data, events], 1)
        model = network(32)
        plan = gs.initialize(model, (data[:8],), inputs=gs.measure_inputs([data[:1000]], progress=False), seed=seed)
        found.append(float(model[1](data[1000:]).var(0).mean()))
        assert "8 columns owe their variance to a few rows, " in plan.explain("1.weight")
    assert 0.9 < np.mean(found) < 1.1


def test_a_column_of_rare_events_is_read_in_its_own_units():
    """Its variance is doubled, not drowned by columns a million times as large: about half of a direction is left of it."""
    data = torch.cat([1e3 * made(1e2, columns=7, samples=2000), torch.zeros(2000, 1)], 1)
    data[::499, 7] = torch.tensor([1e-3, 2e-3, -1e-3, 3e-3, -2e-3])
    found = whitening_of(gs.measure_inputs([data], progress=False), is_centred=True)
    z = (data - data.mean(0)).double().numpy() @ found.matrix.T
    own = np.square(found.matrix[:, 7]).sum() * float(data[:, 7].double().var())
    assert found.rare == 1
    assert 0.4 < own / z.var(0).mean() < 0.6


def test_eigenvalues_are_moved_to_those_of_the_population():
    """Of 300 Gaussian rows of 90 columns with variances 1, 3 and 10: against ``v^T Sigma v`` itself, mean over draws."""
    random = np.random.default_rng(0)
    variances = np.repeat([1.0, 3.0, 10.0], [18, 36, 36])
    left, moved = [], []
    for _ in range(10):
        rows = random.standard_normal((300, 90)) * np.sqrt(variances)
        values, vectors = np.linalg.eigh(rows.T @ rows / 300)
        exact = np.square(vectors).T @ variances
        left.append(np.square(np.log(values / exact)).mean())
        moved.append(np.square(np.log(Moved().applied(values, 300) / exact)).mean())
    assert np.mean(left) > 0.1
    assert np.mean(moved) < 0.1 * np.mean(left)


def test_rows_that_are_added_weigh_as_much_as_others():
    rows = np.random.default_rng(0).standard_normal((40, 6)) * np.arange(1.0, 7.0)
    more = np.concatenate([rows, np.sqrt(6.0) * np.eye(6), np.sqrt(6.0) * np.eye(6)])  # twelve rows of second moment 1
    values, exact = (np.linalg.eigvalsh(part.T @ part / len(part)) for part in (rows, more))
    np.testing.assert_allclose(Added(12.0).applied(values, 40), exact)


def test_the_input_has_the_table_of_the_data():
    """Samples, places and channels that share something: the table of the streamed data is that of all of it at once."""
    random = torch.Generator().manual_seed(0)
    data = (
        torch.randn(60, 1, 5, 4, generator=random)
        + torch.randn(60, 3, 1, 1, generator=random)
        + torch.randn(3, 5, 1, generator=random)
    )
    stats = gs.measure_inputs(data.split(7), progress=False)
    mean, table = pooled([data])
    value = stats.value((60, 3, 5, 4))
    assert value.mean == pytest.approx(mean, rel=1e-6)
    np.testing.assert_allclose(value.table, table, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("condition", "copies"), [(1e2, 0), (1e6, 0), (1e6, 6)])
def test_a_whitened_layer_on_rows_it_has_not_seen(condition, copies):
    """Variance in [.9, 1.1], correlations a tenth of those with independent weights; also with copies of columns."""
    data = made(condition, copies=copies, samples=20000)
    seen, unseen = data[:10000], data[10000:]
    model = network(data.shape[1])
    plan = gs.initialize(model, (seen[:32],), inputs=gs.measure_inputs(seen.split(1000), progress=False), seed=1)
    y = model[1](unseen)
    plain = gs.plan(model, (seen[:512],))
    gs.apply(model, plain, seed=1)
    assert 0.9 < y.var(0).mean() < 1.1
    assert 0.9 < y.var(0).min() < y.var(0).max() < 1.1
    assert y.mean(0).square().mean() < 0.01
    assert correlation(y) < 0.1 * correlation(model[1](unseen))
    if copies:
        assert "rank 32 of 44: 0 columns do not vary, 12 directions are sums of others" in plan.explain("1.weight")


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "wine", "diabetes"])
def test_real_tables(name):
    """Mean over ten splits; 125 to 1,260 rows, units a thousandfold apart, constant and nearly constant columns."""
    from sklearn import datasets

    data = torch.tensor(getattr(datasets, f"load_{name}")().data, dtype=torch.float32)
    variances, ours, plain = [], [], []
    for seed in range(10):
        shuffled = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))]
        seen, unseen = shuffled.tensor_split([int(0.7 * len(data))])
        model = network(data.shape[1], min(32, data.shape[1]))
        plain.append(correlation(model[1](unseen)))
        gs.initialize(model, (seen[:16],), inputs=gs.measure_inputs([seen], progress=False), seed=seed)
        y = model[1](unseen)
        variances.append(float(y.var(0).mean()))
        ours.append(correlation(y))
    assert 0.9 < np.mean(variances) < 1.1
    assert np.mean(ours) < 0.55 * np.mean(plain)  # of 50 to 500 rows, uncorrelated columns show .04 to .13


def test_correlations_of_the_population_are_told_from_a_few_rows():
    """300 samples with heavy tails, each at two places: what they show of uncorrelated outputs is as large as what there is."""
    random = np.random.default_rng(0)
    mixed = np.eye(48) + 0.025 * random.standard_normal((48, 48))
    covariance = mixed @ mixed.T
    exact = covariance / np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    sizes = np.abs(exact[~np.eye(48, dtype=bool)])
    draws = [torch.from_numpy(random.laplace(size=(300, 48)) @ mixed.T) for _ in range(8)]
    found = Correlations.mean([Correlations.of(torch.stack([draw, draw], 2)) for draw in draws])
    assert found.sizes > 1.5 * sizes.mean()
    # Errors of 1/sqrt(300) average over 1128 pairs and 8 draws; pairs with an output in common stray together, by a few percent.
    assert found.absolute == pytest.approx(sizes.mean(), rel=0.1)
    assert found.root_mean_square == pytest.approx(float(np.sqrt(np.mean(sizes**2))), rel=0.1)


def test_what_rows_leave_of_a_correlation_however_they_are_whitened():
    """400 rows whiten themselves exactly; in the population, known here, outputs correlate by what 2,000 others foretell."""
    random = np.random.default_rng(0)
    mixed = random.standard_normal((10, 10))
    found, exact = [], []
    for _ in range(12):
        seen, unseen = (random.laplace(size=(rows, 10)) @ mixed.T for rows in (400, 2000))
        whitening = np.linalg.inv(np.linalg.cholesky(np.cov(seen.T)))
        population = whitening @ mixed @ mixed.T @ whitening.T
        scale = np.sqrt(np.diag(population))
        exact.append((population / np.outer(scale, scale))[~np.eye(10, dtype=bool)])
        found.append(Correlations.of(torch.from_numpy(unseen @ whitening.T)))
    # 540 pairs, alike within a draw: 4 %; to second order 10 columns of 400 rows make it 2 % more.
    assert Correlations.mean(found).left_by(400 / 2000) == pytest.approx(float(np.sqrt(np.mean(np.square(exact)))), rel=0.15)


@pytest.mark.parametrize("samples", [12, 40, 128])
def test_short_data_are_shrunk_and_still_give_unit_variance(samples):
    """Fewer rows than columns, hardly more, or four times as many. Mean over draws of the data."""
    found, shares = [], []
    for seed in range(12):
        data = made(1e3, samples=samples + 500, seed=seed)
        model = network(32)
        plan = gs.initialize(model, (data[:8],), inputs=gs.measure_inputs([data[:samples]], progress=False))
        shares.append("each part of the data" in plan.explain("1.weight"))
        found.append(float(model[1](data[samples:]).var(0).mean()))
    assert all(shares)
    # What three quarters do to the rest says what all rows will do to others, the better the more there are.
    off = 1.4 if samples < 32 else 1.1
    assert 1.0 / off < np.exp(np.mean(np.log(found))) < off


def test_without_a_bias_the_mean_is_one_more_direction():
    data = made(1e3) + 3.0
    model = network(32, bias=False)
    plan = gs.initialize(model, (data[:16],), inputs=gs.measure_inputs([data], progress=False))
    y = model[1](data)
    assert y.square().mean() == pytest.approx(1.0, abs=0.02)
    assert y.var(0).mean() == pytest.approx(1.0, abs=0.05)
    assert "there is no bias" in plan.explain("1.weight")


def images(count=200, size=16):
    """Smooth ones: neighbours alike, colours alike, a mean that changes from the left to the right."""
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(coarse + coarse.mean(1, keepdim=True), (size, size), mode="bicubic")
    return 0.5 + smooth + 0.1 * torch.randn(count, 3, size, size) + torch.linspace(0, 1, size)


@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": "same", "dilation": 2}, {"stride": 2, "bias": False}])
def test_a_convolution_is_predicted_as_it_is(options):
    """The table of its output, by what two entries share, against draws of the layer."""
    data = images()
    conv = nn.Conv2d(3, 24, 3, **options)
    model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(24, 2, 3))
    stats = gs.measure_inputs(data.split(64), first=conv, progress=False)
    plan = gs.plan(model, (data[:20],), inputs=stats)
    draws = []
    for seed in range(12):
        gs.apply(model, plan, seed=seed)
        draws.append(conv(data))
    _, measured = pooled(draws)
    std = plan.parameters["0.weight"].distribution.std
    whitening = whitening_of(stats, is_centred=conv.bias is not None)
    predicted = output_value(stats, whitening, std**2, 200, 24, is_map=True)
    assert plan.predictions["0@0"][0] == pytest.approx(predicted.second_moment)
    np.testing.assert_allclose(predicted.table[:, 1], measured[:, 1], atol=0.03)
    np.testing.assert_allclose(measured[:, 0], 0.0, atol=0.03)
    assert gs.verify(model, (data[:20],), plan=plan).ok
    row = next(row for row in gs.calibrate(model, plan, (data[:20],)).rows if row.parameter == "0.weight")
    assert row.factor == 1.0
    assert "whitened" in row.note


def test_sequences_of_features():
    data = made(1e4, columns=12, samples=1200).view(100, 12, 12)
    model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
    plan = gs.initialize(model, (data[:8],), inputs=gs.measure_inputs([data], first=model[0], progress=False))
    assert model[0](data).var((0, 1)).mean() == pytest.approx(1.0, abs=0.05)
    assert plan.predictions["0@0"][0] == pytest.approx(1.0, abs=1e-3)


def test_tokens_stand_for_the_example():
    """Frequent tokens: two places hold the same one with probability sum p^2, and the stream knows."""
    shares = 1.0 / torch.arange(1, 51)
    generator = torch.Generator().manual_seed(0)
    data = torch.multinomial(shares, 8000, replacement=True, generator=generator).view(400, 20)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16))
    stats = gs.measure_inputs(({"ids": part, "label": 0} for part in data.split(30)), key="ids", first=model[0], progress=False)
    assert stats.collision == pytest.approx(float((shares / shares.sum()).square().sum()), rel=0.05)
    drawn = stats.drawn(torch.empty(200, 50, dtype=torch.int64))
    assert torch.bincount(drawn.flatten(), minlength=50)[0] / 10000 == pytest.approx(float(shares[0] / shares.sum()), rel=0.05)

    class Average(nn.Module):
        def forward(self, x):
            return x.mean(1)

    model = nn.Sequential(nn.Embedding(50, 16), Average(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    for inputs, alike in ((stats, stats.collision), (None, 0.0)):
        plan = gs.plan(model, (torch.arange(50).repeat(64, 1),), inputs=inputs)
        level = 1 / 50 + (1 - 1 / 50) * alike
        assert 16 * plan.parameters["2.weight"].distribution.std ** 2 == pytest.approx(1 / level, rel=0.1)


def test_several_inputs_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(6, 8), nn.Linear(5, 8)

        def forward(self, x, y):
            return self.left(x) * torch.relu(self.right(y))

    x, y = made(1e3, columns=6), made(1e5, columns=5)
    model = Two()
    given = {"y": gs.measure_inputs([y], progress=False), "x": gs.measure_inputs([x], progress=False)}
    gs.initialize(model, (x[:20],), {"y": y[:20]}, inputs=given)
    for layer, data in ((model.left, x), (model.right, y)):
        assert correlation(layer(data)) < 0.35
        assert layer(data).var(0).mean() == pytest.approx(float(layer(data).square().mean()), rel=0.02)
    with pytest.raises(UnknownNameError, match=r"no floating-point input 'z'.* it has x, y"):
        gs.plan(model, (x[:20], y[:20]), inputs={"z": given["x"]})


def test_a_known_covariance():
    stats = gs.InputStatistics.from_covariance(torch.tensor([[4.0, 0.0], [0.0, 0.25]]), torch.tensor([1.0, 2.0]))
    plan = gs.plan(nn.Sequential(nn.Linear(2, 500), nn.ReLU(), nn.Linear(500, 1)), (torch.zeros(3, 2),), inputs=stats)
    mixing = plan.parameters["0.weight"].distribution
    inverse = mixing.std**2 * mixing.mixing.matrix.T @ mixing.mixing.matrix
    np.testing.assert_allclose(inverse, np.diag([1 / 8, 2.0]), atol=1e-12)  # Sigma^-1 / 2
    assert gs.Plan.from_json(plan.to_json()) == plan


def test_what_is_not_read_directly_is_left_alone():
    data = made(1e3)
    stats = gs.measure_inputs([data], progress=False)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 8))
    plan = gs.plan(model, (data[:8],), inputs=stats)
    assert "no weight multiplies it directly" in plan.notes[-1]
    plan = gs.plan(network(32), (data[:8],), inputs=stats, policy="he")
    assert plan.parameters["1.weight"].distribution.mixing is None
    plan = gs.plan(
        nn.Sequential(nn.Linear(4, 8)), (data[:8].view(8, 8, 4),), inputs=gs.measure_inputs([data.view(-1, 8, 4)], progress=False)
    )
    assert "name the layer with first=" in plan.notes[-1]


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], InputError, "the loader yields nothing"),
        ([torch.zeros(3, 4), torch.zeros(3, 5)], InputError, r"batch 1 has samples of shape \[5\], those before it \[4\]"),
        ([torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.int64)], InputError, "batch 1 holds tokens"),
        ([torch.randn(3, 4), torch.full((3, 4), torch.nan)], NonFiniteError, "batch 1: NaN or infinity"),
        ([torch.randn(3, 4)], InputError, "3 samples are too few"),
        ([(1, torch.randn(3, 4))], InputError, "found int; say with key="),
        ([{}], InputError, "has no entry 0"),
        ([torch.randn(3, 5, 200, 200)], InputError, "first=model.conv1"),
    ],
)
def test_bad_data(batches, error, message):
    with pytest.raises(error, match=message):
        gs.measure_inputs(batches, progress=False)


def test_layers_that_do_not_fit():
    for layer, message in (
        (nn.Conv2d(4, 4, 3, groups=2), "in several groups"),
        (nn.ReLU(), "a linear layer, a convolution or an embedding"),
        (nn.Linear(7, 2), "no last dimensions with 7 entries"),
        (nn.Conv2d(5, 2, 3), "no maps of 5 channels"),
    ):
        with pytest.raises(InputError, match=message):
            gs.measure_inputs([torch.zeros(4, 3, 8, 8)], first=layer, progress=False)
    with pytest.raises(InputError, match="counted from 0 to 9"):
        gs.measure_inputs([torch.full((4, 3), 10)], first=nn.Embedding(10, 3), progress=False)


@pytest.mark.parametrize(
    ("covariance", "error", "message"),
    [
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), InputError, "no negative eigenvalue; this matrix has -1"),
        (torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), NonFiniteError, "NaN or infinity in a covariance"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), InputError, "is symmetric"),
        (torch.ones(3, 2), InputError, "square matrix"),
    ],
)
def test_bad_covariances(covariance, error, message):
    with pytest.raises(error, match=message):
        gs.InputStatistics.from_covariance(covariance)


def test_bad_requests_leave_the_model_alone():
    model, data = network(32), made(1e2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stats = gs.measure_inputs([data], progress=False)
    for inputs, message in ((stats, "was|were measured, the example given has"), ("x", "what gainstage.measure_inputs returns")):
        with pytest.raises(InputError, match=message):
            gs.initialize(model, (torch.zeros(4, 2, 16),), inputs=inputs)
    nothing = gs.InputStatistics.from_covariance(torch.zeros(32, 32))
    with pytest.raises(InputError, match="nothing varies"):
        gs.initialize(model, (data[:4],), inputs=nothing)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_damaged_matrix_is_refused():
    plan = gs.plan(network(2), (torch.zeros(3, 2),), inputs=gs.InputStatistics.from_covariance(torch.eye(2)))
    text = plan.to_json()
    for old, new, message in (
        ('"rank": 2', '"rank": 3', "are not those of a matrix"),
        ('"matrix": "', '"matrix": "*', "no base64"),
    ):
        with pytest.raises(PlanFormatError, match=message):
            gs.Plan.from_json(text.replace(old, new))


def test_a_bar_appears_after_a_second_only(capsys):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True)
    with progress_bar("measuring", console) as advance:
        advance(1, 2)
        assert screen.getvalue() == ""
        time.sleep(1.05)
        advance(2, 2)
    assert "measuring" in screen.getvalue()
    gs.measure_inputs([torch.randn(8, 3)])
    assert capsys.readouterr() == ("", "")  # no terminal, no bar
