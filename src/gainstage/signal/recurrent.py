"""Recurrent layers: the life of one unit, simulated.

At large width the pre-activations of a unit are Gaussian processes over time, independent between units and gates (the weights
of different rows are), whatever is shared over time: for samples b, b' and times t, t',

    Cov(u_bt, u_b't') = v_ih n K_x[bt, b't'] + v_hh H K_h[b t-1, b' t'-1] + v_bias

(Chen, Pennington & Schoenholz, 2018, arXiv:1806.05394, without its assumption that weights are drawn anew at each step). K_h of
a step follows from the equations of the unit, run on many units of two samples at once. The normals behind are rotated to have
exactly unit covariance, so that only what is not linear carries sampling noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gainstage.signal.quadrature import Array

UNITS = 8192  # simulated units: 1 % of a second moment for the part that is not linear
STEPS = 40  # after so many steps the process is taken as stationary
State = tuple[Array, Array]  # h and c, [unit, sample]
Step = Callable[[Sequence[Array], State], State]


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """Raw second moments of something over time, [T, T]: within one sample and between two. And its mean."""

    within: Array
    between: Array
    mean: float = 0.0

    def scaled(self, factor: float) -> Process:
        """Second moments of a sum over many entries with independent weights of mean zero."""
        return Process(within=self.within * factor, between=self.between * factor)

    def reversed(self) -> Process:
        """The same, read from the last step to the first."""
        return Process(within=self.within[::-1, ::-1], between=self.between[::-1, ::-1], mean=self.mean)

    def dropped(self, keep: float) -> Process:
        """After inverted dropout."""
        return Process(
            within=self.within + np.diag(np.diag(self.within)) * (1.0 / keep - 1.0), between=self.between, mean=self.mean
        )


def average(parts: Sequence[Process]) -> Process:
    """Mean over channels of several parts of equal width."""
    return Process(
        within=np.asarray(np.mean([part.within for part in parts], axis=0)),
        between=np.asarray(np.mean([part.between for part in parts], axis=0)),
        mean=float(np.mean([part.mean for part in parts])),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One pre-activation: what the input makes of it, fan-in times variance of the hidden weights, moments of its biases."""

    driven: Process | None
    hidden_gain: float
    bias_mean: float = 0.0
    bias_variance: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """Hidden state over time, the cell state after the last step, and entries of the hidden state."""

    hidden: Process
    cell: Process
    entries: Array


@lru_cache(maxsize=8)
def _normals(columns: int) -> Array:
    """Standard normals [unit, column] whose sample means are 0 and sample covariance is 1 exactly."""
    half = np.random.default_rng(20_180_605).standard_normal((max(UNITS, 4 * columns) // 2, columns))
    both = np.concatenate([half, -half])
    factor = np.linalg.cholesky(both.T @ both / len(both))
    return np.asarray(np.linalg.solve(factor, both.T).T)


def simulate(gates: Sequence[Gate], step: Step, start: tuple[Process, Process], times: int, project: float | None = None) -> Life:
    """Follow units of two samples through time.

    ``start``: hidden and cell state before the first step, [1, 1] each. ``project``: second moment of the hidden state over that
    of a unit's output, where the layer projects it.
    """
    count = min(times, STEPS)
    noise = _normals(2 * (count * len(gates) + 1))
    h, c = (_pair(state, noise[:, -2:]) for state in start)
    seen = np.empty((len(noise), 2 * count + 2))  # outputs so far, the start first; the two samples alternate
    seen[:, :2] = h if project is None else 0.0
    moments = np.zeros((2 * count + 2, 2 * count + 2))  # of the hidden state, in the same order
    moments[:2, :2] = _block(start[0])
    roots = [np.zeros((2 * count, 2 * count)) for _ in gates]
    for t in range(count):
        now, after = slice(2 * t, 2 * t + 2), slice(2 * t + 2, 2 * t + 4)
        values = []
        for number, (gate, root) in enumerate(zip(gates, roots, strict=True)):
            target = gate.hidden_gain * moments[now, : now.stop] + gate.bias_variance
            if gate.driven is not None:
                target = target + _row(gate.driven, t)
            _extend(root, target, t)
            mine = noise[:, 2 * count * number : 2 * count * number + now.stop]
            values.append(gate.bias_mean + mine @ root[now, : now.stop].T)
        h, c = step(values, (h, c))
        seen[:, after] = h
        moments[after, : after.stop] = (1.0 if project is None else project) * (h.T @ seen[:, : after.stop]) / len(h)
        moments[: after.stop, after] = moments[after, : after.stop].T
    mean = float(seen[:, 2:].mean()) if project is None else 0.0
    last = c.T @ c / len(c)
    cell = Process(within=np.array([[last.trace() / 2.0]]), between=np.array([[last[0, 1]]]), mean=float(c.mean()))
    return Life(hidden=_process(moments[2:, 2:], times, mean), cell=cell, entries=seen[:: max(count // 4, 1), 2:].ravel())


def _block(process: Process) -> Array:
    a, b = float(process.within[0, 0]), float(process.between[0, 0])
    return np.array([[a, b], [b, a]])


def _pair(process: Process, noise: Array) -> Array:
    """Two samples of a state, Gaussian."""
    variance = float(process.within[0, 0]) - process.mean**2
    if variance <= 0.0:
        return np.full_like(noise, process.mean)
    rho = min(max((float(process.between[0, 0]) - process.mean**2) / variance, -1.0), 1.0)
    second = rho * noise[:, 0] + np.sqrt(1.0 - rho**2) * noise[:, 1]
    return np.asarray(process.mean + np.sqrt(variance) * np.stack([noise[:, 0], second], axis=1))


def _row(process: Process, t: int) -> Array:
    """Covariances of step t with all up to it, for two samples side by side."""
    within, between = process.within[t, : t + 1], process.between[t, : t + 1]
    return np.stack([np.stack([within, between], axis=1).ravel(), np.stack([between, within], axis=1).ravel()])


def _extend(root: Array, target: Array, t: int) -> None:
    """Two more rows of the Cholesky factor of a covariance that grows."""
    for i in range(2):
        row = 2 * t + i
        known = np.linalg.solve(root[:row, :row], target[i, :row])
        root[row, :row] = known
        root[row, row] = np.sqrt(max(float(target[i, row]) - float(known @ known), 1e-12))


def _process(moments: Array, times: int, mean: float) -> Process:
    within = 0.5 * (moments[::2, ::2] + moments[1::2, 1::2])
    between = 0.5 * (moments[::2, 1::2] + moments[1::2, ::2])
    return Process(within=_prolonged(within, times), between=_prolonged(between, times), mean=mean)


def _prolonged(matrix: Array, times: int) -> Array:
    """Covariances beyond the steps that were followed: those of the last step, at the same lag."""
    count = len(matrix)
    if times <= count:
        return matrix
    later, earlier = np.meshgrid(np.arange(times), np.arange(times), indexing="ij")
    later, earlier = np.maximum(later, earlier), np.minimum(later, earlier)
    shift = np.maximum(later - (count - 1), 0)
    return np.asarray(matrix[later - shift, np.maximum(earlier - shift, 0)])


def lstm_step(values: Sequence[Array], state: State) -> State:
    """``c' = sigma(f) c + sigma(i) tanh(g); h' = sigma(o) tanh(c')``; order of the gates: input, forget, cell, output."""
    i, f, g, o = values
    cell = _sigmoid(f) * state[1] + _sigmoid(i) * np.tanh(g)
    return _sigmoid(o) * np.tanh(cell), cell


def gru_step(values: Sequence[Array], state: State) -> State:
    """``n = tanh(x_n + sigma(r) h_n); h' = (1 - sigma(z)) n + sigma(z) h``; order: reset, update, new of x, new of h."""
    r, z, new_x, new_h = values
    new, keep = np.tanh(new_x + _sigmoid(r) * new_h), _sigmoid(z)
    hidden = (1.0 - keep) * new + keep * state[0]
    return hidden, hidden


def tanh_step(values: Sequence[Array], _: State) -> State:
    """``h' = tanh(u)``."""
    hidden = np.tanh(values[0])
    return hidden, hidden


def relu_step(values: Sequence[Array], _: State) -> State:
    """``h' = max(u, 0)``."""
    hidden = np.maximum(values[0], 0.0)
    return hidden, hidden


def _sigmoid(x: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))
