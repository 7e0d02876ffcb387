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
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from gainstage.signal.quadrature import Array

if TYPE_CHECKING:
    from gainstage.signal.value import Value

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


class Units:
    """Units of two samples, followed step by step."""

    def __init__(self, gates: int, start: tuple[Process, Process], count: int, project: float | None = None) -> None:
        """Begin with a hidden and a cell state, [1, 1] each.

        ``count``: of steps, at most. ``project``: second moment of the hidden state over that of a unit's output, where the layer
        projects it.
        """
        self._noise = _normals(2 * (count * gates + 1))
        h, c = (_pair(state, self._noise[:, -2:]) for state in start)
        self._seen = np.empty((len(self._noise), 2 * count + 2))  # outputs so far, the start first; the two samples alternate
        self._seen[:, :2] = h if project is None else 0.0
        self._moments = np.zeros((2 * count + 2, 2 * count + 2))  # of the hidden state, in the same order
        self._moments[:2, :2] = _block(start[0])
        self._roots = [np.zeros((2 * count, 2 * count)) for _ in range(gates)]
        self._states = [(h, c)]
        self._count, self._project = count, project

    @property
    def steps(self) -> int:
        """How many were made."""
        return len(self._states) - 1

    @property
    def is_done(self) -> bool:
        """Whether all steps were made."""
        return self.steps == self._count

    def at(self, steps: int) -> Units:
        """The units as they were after so many steps: themselves, or where more were made since, a copy."""
        if steps == self.steps:
            return self
        found = copy(self)
        found._seen, found._moments = self._seen.copy(), self._moments.copy()
        found._roots, found._states = [root.copy() for root in self._roots], self._states[: steps + 1]
        return found

    def advance(self, gates: Sequence[Gate], step: Step) -> None:
        """Make one step; what drives the gates is known up to it."""
        t = self.steps
        now, after = slice(2 * t, 2 * t + 2), slice(2 * t + 2, 2 * t + 4)
        values = []
        for number, (gate, root) in enumerate(zip(gates, self._roots, strict=True)):
            target = gate.hidden_gain * self._moments[now, : now.stop] + gate.bias_variance
            if gate.driven is not None:
                target = target + _row(gate.driven, t)
            _extend(root, target, t)
            mine = self._noise[:, 2 * self._count * number : 2 * self._count * number + now.stop]
            values.append(gate.bias_mean + mine @ root[now, : now.stop].T)
        self._states.append(step(values, self._states[-1]))
        h = self._seen[:, after] = self._states[-1][0]
        products = (h.T @ self._seen[:, : after.stop]) / len(h)
        self._moments[after, : after.stop] = (1.0 if self._project is None else self._project) * products
        self._moments[: after.stop, after] = self._moments[after, : after.stop].T

    def shared(self, a: int, b: int) -> tuple[float, float]:
        """``E[h h']`` of the states after two numbers of steps, within a sample and between two."""
        block = self._moments[2 * a : 2 * a + 2, 2 * b : 2 * b + 2]
        return float(block.trace()) / 2.0, float(block[0, 1] + block[1, 0]) / 2.0

    def life(self, times: int) -> Life:
        """All steps, as those of a layer of so many."""
        count = self.steps
        mean = float(self._seen[:, 2 : 2 * count + 2].mean()) if self._project is None else 0.0
        hidden = _process(self._moments[2 : 2 * count + 2, 2 : 2 * count + 2], times, mean)
        entries = self._seen[:: max(count // 4, 1), 2 : 2 * count + 2].ravel()
        return Life(hidden=hidden, cell=_of_states(self._states[-1][1]), entries=entries)

    def last(self) -> Life:
        """The last step, as a layer of one."""
        h, c = self._states[-1]
        return Life(hidden=_of_states(h), cell=_of_states(c), entries=h.ravel())


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Unrolled:
    """The steps of a cell with one set of weights that a state came of; void for a tensor with another table.

    ``input``: of the last step. ``is_hidden``: or else it is the cell state.
    """

    table: Array
    units: Units
    steps: int
    params: tuple[Value, ...]
    input: Value
    is_hidden: bool


def simulate(gates: Sequence[Gate], step: Step, start: tuple[Process, Process], times: int, project: float | None = None) -> Life:
    """Follow units of two samples through time; see :class:`Units`."""
    units = Units(len(gates), start, min(times, STEPS), project)
    while not units.is_done:
        units.advance(gates, step)
    return units.life(times)


def _of_states(states: Array) -> Process:
    """Moments of one state of two samples, [unit, sample]."""
    products = states.T @ states / len(states)
    return Process(within=np.array([[products.trace() / 2.0]]), between=np.array([[products[0, 1]]]), mean=float(states.mean()))


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
    """Two more rows of the Cholesky factor of a covariance that grows; where nothing varies they are zero."""
    for i in range(2):
        row = 2 * t + i
        known = np.linalg.solve(root[:row, :row] + np.diag(np.diag(root[:row, :row]) == 0.0), target[i, :row])
        root[row, :row] = known
        own = float(target[i, row])
        root[row, row] = np.sqrt(max(own - float(known @ known), 1e-12 * own))


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
