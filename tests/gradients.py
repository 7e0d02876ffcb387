"""Second moments of parameters' gradients: by autograd over draws of weights and inputs, and predicted."""

import math

import numpy as np
import torch

import gainstage as gs


def measured_gradients(build, shape, draws, loss=None):
    """Second moment of every parameter's gradient: mean over draws, and its standard error."""
    found = {}
    for seed in range(draws):
        torch.manual_seed(1000 + seed)
        model = build()
        y = model(torch.randn(shape))
        (y.backward(torch.randn_like(y)) if loss is None else loss(y).backward())
        for name, parameter in model.named_parameters():
            found.setdefault(name, []).append(float(parameter.grad.double().square().mean()))
    return {name: (np.mean(v), np.std(v, ddof=1) / len(v) ** 0.5) for name, v in found.items()}


def predicted_gradients(build, shape, loss=None, draws=6):
    """Mean over a few present draws: the moments of small parameters stray."""
    found = {}
    for seed in range(draws):
        torch.manual_seed(seed)
        trace = gs.inspect(build(), (torch.randn(shape),), loss=loss)
        for name, statistics in trace.parameters.items():
            found.setdefault(name, []).append(statistics.gradient_second_moment)
    return {name: float(np.mean(values)) for name, values in found.items()}


def assert_gradients_agree(predicted, measured, tolerance):
    worst = []
    for name, (mean, error) in measured.items():
        if mean > 1e-14:
            worst.append((abs(math.log(predicted[name] / mean)) - 3.5 * error / mean, name, predicted[name], mean, error))
        else:  # a gradient of nothing, such as that of a key's bias
            assert predicted[name] < 1e-10, (name, predicted[name])
    assert max(worst)[0] < tolerance, sorted(worst)[-4:]
