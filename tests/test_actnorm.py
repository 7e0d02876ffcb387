"""ActNorm layers of other libraries: what they are taken for before their first batch, and that batch given on purpose."""

import pytest
import torch

import gainstage as gs
from gainstage.errors import InputError
from gainstage.integrations.actnorm import find_act_norms

FEATURES = 6
SCALES = torch.tensor([1.0, 10.0, 0.1, 5.0, 1.0, 2.0])


def nflows_couplings():
    transforms = pytest.importorskip("nflows.transforms")
    residual = pytest.importorskip("nflows.nn.nets").ResidualNet
    layers = []
    for i in range(3):
        mask = (torch.arange(FEATURES) + i) % 2
        layers.append(transforms.ActNorm(FEATURES))
        layers.append(transforms.AffineCouplingTransform(mask, lambda n, m: residual(n, m, 64, num_blocks=1)))
    return transforms.CompositeTransform(layers)


def normflows_couplings():
    normflows = pytest.importorskip("normflows")
    layers = []
    for _ in range(3):
        network = normflows.nets.MLP([FEATURES // 2, 64, FEATURES], init_zeros=False)
        layers += [normflows.flows.AffineCouplingBlock(network), normflows.flows.Permute(FEATURES, mode="swap")]
        layers.append(normflows.flows.ActNorm((FEATURES,)))  # the first that data come to: it goes from noise to data
    return normflows.NormalizingFlow(normflows.distributions.base.DiagGaussian(FEATURES), layers)


BUILDS = pytest.mark.parametrize("build", [nflows_couplings, normflows_couplings])


def data(count=1000, seed=0):
    return 3.0 + SCALES * torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(seed))


@BUILDS
def test_waiting_layers_do_what_they_will_do_with_that_batch(build):
    torch.manual_seed(0)
    flow, x = gs.Flow(build()).eval(), data()
    with torch.no_grad():
        z, determinant = flow(x)
        assert flow.normalize(x) == 3
        after, known = flow(x)
    torch.testing.assert_close(after, z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(known, determinant, rtol=1e-4, atol=1e-4)


@BUILDS
def test_channels_are_normalised_and_a_constant_one_keeps_its_scale(build):
    torch.manual_seed(0)
    flow, x = gs.Flow(build()), data()
    x[:, 1] = 7.0
    flow.normalize(x)
    first = flow.flow._transforms[0] if build is nflows_couplings else flow.flow.flows[-1]
    with torch.no_grad():
        normal = (first if build is nflows_couplings else first.inverse)(x)[0]
    torch.testing.assert_close(normal.mean(0), torch.zeros(FEATURES), rtol=0.0, atol=1e-4)
    still = torch.arange(FEATURES) == 1
    torch.testing.assert_close(normal.std(0)[~still], torch.ones(FEATURES - 1), rtol=1e-4, atol=0.0)
    scale = first.log_scale if build is nflows_couplings else first.s.flatten()
    assert scale[still] == 0.0
    before = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    flow.train()(data(seed=1))  # the first batch came already
    assert all(torch.equal(tensor, before[name]) for name, tensor in flow.state_dict().items())


@BUILDS
def test_couplings_are_planned_for_what_the_layers_put_out(build):
    """Columns from 0.1 to 10, about 3: as if they passed through, scale networks would get five times their level."""
    found = []
    torch.manual_seed(0)
    flow, x = gs.Flow(build()).eval(), data()
    plan = gs.plan(flow, (x,), logdet_std=0.1)
    for seed in range(8):
        flow = gs.Flow(build()).eval()
        gs.apply(flow, plan, seed=seed)
        with torch.no_grad():
            flow.normalize(x)
            found.append(flow(x)[1].var())
    # What all samples of a draw have in common is taken off by the layers: that much of the deviation is theirs.
    assert 0.06 < float(torch.stack(found).mean().sqrt()) < 0.13


@BUILDS
def test_in_training_the_first_batch_is_the_layers_own(build):
    torch.manual_seed(0)
    flow = gs.Flow(build()).train()
    flow(data())
    assert [layer.is_waiting for layer in find_act_norms(flow)] == [False] * 3


def test_bad_batches():
    flow = gs.Flow(nflows_couplings())
    before = {name: tensor.clone() for name, tensor in flow.state_dict().items()}
    for x in (data(1), torch.full((4, FEATURES), torch.nan)):
        with pytest.raises(InputError, match="two samples or more are needed, all of them finite"):
            flow.normalize(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in flow.state_dict().items())
