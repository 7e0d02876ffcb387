"""Who fills runs of entries: NumPy, or compiled loops where numba is installed. The values are the same, to the bit.

Compiled loops take a third of NumPy's processor time, and threads do not wait for each other. Loading numba takes longer than
drawing a small model; so it is loaded when a process has drawn so much that more is likely to come.
"""

from __future__ import annotations

import importlib
import itertools
import threading
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from gainstage.apply.law import Law
from gainstage.apply.runs import fill_runs
from gainstage.apply.stream import Stream

Fill: TypeAlias = Callable[[Law, Stream, NDArray[np.int64], NDArray[Any]], None]

# Entries of a kind that a process draws with NumPy before it loads the loop for them. Loading costs as much as drawing ten
# times as many; compiling, once on a machine, some seconds.
_PATIENCE = 2**24


@final
class _Choice:
    """For quantiles of the normal or for uniform entries, in one precision."""

    def __init__(self, *, normal: bool, bits: int) -> None:
        self._normal = normal
        self._bits = bits
        self._fill: Fill = fill_runs
        self._drawn = 0
        self._loading = threading.Lock()

    def take(self, count: int) -> Fill:
        """For so many entries."""
        if self._drawn < _PATIENCE:
            self._drawn += count
            # One thread loads, once, and others go on with NumPy; so does, for good, a process that is forked meanwhile.
            if self._drawn >= _PATIENCE and self._loading.acquire(blocking=False):
                self._fill = compiled(normal=self._normal, bits=self._bits) or fill_runs
        return self._fill


_CHOICES = {kind: _Choice(normal=kind[0], bits=kind[1]) for kind in itertools.product((True, False), (32, 64))}


def fill_for(law: Law, out: NDArray[Any]) -> Fill:
    """What to fill ``out`` with."""
    return _CHOICES[law.normal, 8 * out.itemsize].take(out.size)


def compiled(*, normal: bool, bits: int) -> Fill | None:
    """The loop for a kind of entries; None where there is no numba, or it cannot do here what NumPy does.

    Args:
        normal: quantiles of the normal, or uniform entries.
        bits: 32 or 64, of a word and of a value.
    """
    if find_spec("numba") is None:
        return None
    try:
        fill: Fill = importlib.import_module("gainstage.apply.loops").fill_runs
        trouble = "" if _agrees(fill, normal=normal, bits=bits) else "its values differ from NumPy's"
    except Exception as error:  # noqa: BLE001  (whatever it is, there is another way)
        trouble = f"{type(error).__name__}: {error}"
    if trouble:
        warnings.warn(f"Drawing goes on without numba, slower, with the same values: {trouble}", RuntimeWarning, stacklevel=2)
        return None
    return fill


def _agrees(fill: Fill, *, normal: bool, bits: int) -> bool:
    """For some thousand entries, a hundred of them in the tails."""
    starts = np.array([3, 10_001])
    for law in (
        Law(normal=normal, scale=0.3, mean=0.1),
        Law(normal=normal, scale=0.3, mean=0.0, width=0.95, limit=0.4),
    ):
        expected, found = (np.empty((starts.size, 5000), f"f{bits // 8}") for _ in range(2))
        fill_runs(law, Stream(0), starts, expected)
        fill(law, Stream(0), starts, found)
        if not np.array_equal(found.view(np.uint8), expected.view(np.uint8)):
            return False
    return True
