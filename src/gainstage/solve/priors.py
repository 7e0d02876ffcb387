"""Biases of output heads from how often each class occurs, so that training does not begin by learning that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

import numpy as np
import torch

from gainstage.errors import InputError, UnknownNameError, nearest
from gainstage.plan import Block, Distribution, Family, ParameterPlan
from gainstage.propagate import constant_value
from gainstage.roles import Role, Roles
from gainstage.signal import Value, levels
from gainstage.signal.quadrature import Array
from gainstage.solve.setting import Setting

IGNORED = -100  # torch's label of what no loss counts
_SUM = 1e-3  # by which shares of classes may miss 1: they were rounded


def with_priors(settings: Mapping[str, Setting], roles: Roles, priors: Mapping[str, Any]) -> dict[str, Setting]:
    """Settings in which the biases that the patterns name hold the log-odds of their classes.

    Args:
        settings: of all parameters.
        roles: of the parameters.
        priors: pattern of parameter names -> probabilities, or the labels to count.

    Raises:
        UnknownNameError: a pattern that no parameter matches.
        InputError: a parameter that is no bias of an output head, or numbers that are no probabilities of its classes.
    """
    changed = dict(settings)
    outputs = {head.output for head in roles.heads}
    biases = [
        name
        for name, uses in roles.uses.items()
        if roles.of(name) is Role.BIAS and len(settings[name].info.shape) == 1 and any(use.node in outputs for use in uses)
    ]
    for pattern, given in priors.items():
        matching = [name for name in settings if fnmatchcase(name, pattern)]
        if not matching:
            raise UnknownNameError(f"priors: {pattern!r} matches no parameter{nearest(pattern, biases)}")
        for name in matching:
            if name not in biases:
                raise InputError(f"priors: {name} is no bias of an output head; those are {', '.join(biases) or 'none'}")
            logits, line = log_odds(name, given, settings[name].info.shape[0])
            setting = settings[name].with_all(mean=float(logits.mean()), variance=float(logits.var()))
            changed[name] = replace(setting, is_fixed=True, given=None, prior=tuple(logits.tolist()), lines=(line,))
    return changed


def log_odds(name: str, given: Any, count: int) -> tuple[Array, str]:
    """``log p_c`` for the classes of one softmax, ``-log((1 - p) / p)`` for outputs that are decided one by one.

    Labels are counted, each class once more than it occurs (P. Laplace's rule), so that no class is impossible.

    Args:
        name: of the bias.
        given: integer labels; targets between 0 and 1 [samples, outputs]; or a probability for each output, of one softmax where
            they sum to 1.
        count: outputs.

    Returns:
        the biases, and how they came about.

    Raises:
        InputError: none of these, or not of that many outputs.
    """
    numbers = torch.as_tensor(given).detach().cpu()
    if numbers.numel() == 0:
        raise InputError(f"priors: nothing is given for {name}")
    if not numbers.is_floating_point():
        shares, is_softmax = _counted(name, numbers, count)
    else:
        shares = np.asarray(numbers, np.float64)
        if not (np.isfinite(shares).all() and shares.min() >= 0.0 and shares.max() <= 1.0):
            raise InputError(f"priors: probabilities for {name} lie between 0 and 1")
        if shares.ndim > 1:
            rows = shares.reshape(-1, shares.shape[-1])
            shares, is_softmax = (rows.sum(0) + 1.0) / (len(rows) + 2.0), False
        else:
            shares = shares.reshape(-1)
            is_softmax = count > 1 and abs(float(shares.sum()) - 1.0) < _SUM
    if shares.size != count:
        raise InputError(f"priors: {name} has {count} outputs, {shares.size} probabilities are given")
    if shares.min() <= 0.0 or shares.max() >= 1.0:
        raise InputError(f"priors: a probability of 0 or 1 for {name} has no finite log-odds; give labels to count")
    if is_softmax:
        entropy = -float((shares * np.log(shares)).sum() / shares.sum())
        text = f"the first loss is their entropy, {entropy:.4g}, not log {count} = {math.log(count):.4g}"
        return np.log(shares), f"b_c = log p_c, p the shares of {count} classes, {shares.min():.3g} to {shares.max():.3g}: {text}"
    entropy = -float((shares * np.log(shares) + (1.0 - shares) * np.log1p(-shares)).mean())
    text = f"the first loss is {entropy:.4g}, not log 2 = {math.log(2.0):.4g}"
    return -np.log((1.0 - shares) / shares), f"b = -log((1 - p) / p), p from {shares.min():.3g} to {shares.max():.3g}: {text}"


def _counted(name: str, labels: torch.Tensor, count: int) -> tuple[Array, bool]:
    """Shares of the classes among labels, and whether these are classes of one softmax."""
    used = labels[labels != IGNORED].reshape(-1).long()
    classes = max(count, 2)  # a single output says yes or no
    if not used.numel() or int(used.min()) < 0 or int(used.max()) >= classes:
        raise InputError(f"priors: labels for {name} lie from 0 to {classes - 1}")
    shares = (np.bincount(used.numpy(), minlength=classes) + 1.0) / (used.numel() + classes)
    return (shares, True) if count > 1 else (shares[1:], False)


def constants_of(planned: ParameterPlan) -> tuple[float, ...]:
    """The constant for each output that a bias is planned to hold; none where it is drawn, or the same everywhere."""
    parts = (planned.distribution, *(block.distribution for block in planned.blocks))
    if len(planned.shape) != 1 or not planned.blocks or any(part.family is not Family.CONSTANT for part in parts):
        return ()
    numbers = [planned.distribution.mean] * planned.shape[0]
    for block in planned.blocks:
        numbers[block.start : block.stop] = [block.distribution.mean] * (block.stop - block.start)
    return tuple(numbers)


def constants_value(numbers: Sequence[float]) -> Value:
    """Known numbers, and the levels of their coordinates."""
    known = torch.tensor(numbers, dtype=torch.float64)
    return replace(constant_value(known), levels=levels.normalised(np.abs(known.numpy())))


def prior_blocks(prior: tuple[float, ...]) -> tuple[Distribution, tuple[Block, ...]]:
    """A constant for each output; neighbours that are alike become one block."""
    blocks, start = [], 0
    for value, run in groupby(prior):
        stop = start + len(list(run))
        blocks.append(Block(0, start, stop, Distribution(family=Family.CONSTANT, mean=value)))
        start = stop
    return blocks[0].distribution, () if len(blocks) == 1 else tuple(blocks)
