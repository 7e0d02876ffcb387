"""Plans and models on meta, and whether two models have the same values everywhere."""

import torch
from plans import plan_that_fits

from gainstage.apply import apply, materialize
from gainstage.plan import Distribution, Family

NORMAL = Distribution(family=Family.NORMAL, std=0.5)
KEEP = Distribution(family=Family.KEEP)


def plan_of(model, keep=()):
    return plan_that_fits(model, lambda name, _: {"distribution": KEEP if name in keep else NORMAL})


def on_meta(build):
    with torch.device("meta"):
        return build()


def assert_as_if_built_in_memory(build, **options):
    """Every parameter, buffer and tensor attribute; and the same output."""
    real, model = build(), on_meta(build)
    apply(real, plan_of(real), seed=4)
    materialize(model, plan_of(model), seed=4, **options)
    assert_same_tensors(model, real)
    return model


def tensors_of(model):
    found = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for path, module in model.named_modules():
        found |= {f"{path}.{name}": value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
    return found


def assert_same_tensors(model, real):
    found, expected = tensors_of(model), tensors_of(real)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name].nan_to_num(7), value.nan_to_num(7)), name
