"""Dropout of every kind is compensated where it acts: closed forms, and levels of other people's blocks on real passes."""

import numpy as np
import pytest
import torch
from torch import nn

import gainstage as gs
from gainstage.cli.huggingface import cpu_torchvision_if_installed


class Deep(nn.Module):
    """Twenty layers, and one more that is no head."""

    def __init__(self, noise, width=256):
        super().__init__()
        self.body = nn.Sequential(*(m for _ in range(20) for m in (nn.Linear(width, width), nn.ReLU(), noise())))
        self.last = nn.Linear(width, width)

    def forward(self, x):
        return self.last(self.body(x)).sin()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_the_closed_form_after_relu(p):
    """Var(W) = 2 (1 - p) / n."""
    plan = gs.plan(Deep(lambda: nn.Dropout(p)), (torch.randn(512, 256, generator=torch.Generator().manual_seed(0)),))
    assert plan.parameters["last.weight"].distribution.std ** 2 == pytest.approx(2 * (1 - p) / 256, rel=1e-3)


def test_no_compensation_in_evaluation():
    model = Deep(lambda: nn.Dropout(0.5)).eval()
    plan = gs.plan(model, (torch.randn(512, 256, generator=torch.Generator().manual_seed(0)),))
    assert plan.parameters["last.weight"].distribution.std ** 2 == pytest.approx(2 / 256, rel=1e-3)


def levels(model, x, path, draws):
    """Mean over draws of weights and coins of the second moment of one module, over that planned."""
    plan = gs.plan(model, (x,))
    found = []
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda _m, _a, output: found.append(float(output.square().mean())))
    for seed in range(draws):
        gs.apply(model, plan, seed=seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            model(x)
    handle.remove()
    return np.mean(found) / plan.predictions[f"{path}@0"][0]


def test_stochastic_depth_of_torchvision():
    cpu_torchvision_if_installed()
    convnext = pytest.importorskip("torchvision.models.convnext")
    model = nn.Sequential(*(convnext.CNBlock(32, 1.0, 0.5) for _ in range(5)), nn.Flatten(), nn.Linear(32 * 16, 4)).train()
    x = torch.randn(32, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    # coins of 32 samples in 5 blocks, a fifth of a unit each, over 12 draws: 3 %
    assert levels(model, x, "4", 12) == pytest.approx(1.0, abs=0.1)


def test_all_dropouts_of_a_vision_transformer_of_timm():
    cpu_torchvision_if_installed()
    timm = pytest.importorskip("timm")
    rates = dict.fromkeys(("pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"), 0.5)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, **rates
    ).train()
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert levels(model, x, "blocks.1", 12) == pytest.approx(1.0, abs=0.1)
