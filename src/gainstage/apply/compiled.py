"""Who fills runs of entries: NumPy, or compiled loops where numba is installed. The values are the same, to the bit.

Compiled loops take a third of NumPy's processor time, and threads do not wait for each other. Loading numba takes longer than
drawing a small model; so it is loaded when a process has drawn so much that more is likely to come.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray

from gainstage.apply.law import TYPES, Law
from gainstage.apply.runs import fill_runs
from gainstage.apply.stream import Stream

Fill: TypeAlias = Callable[[Law, Stream, NDArray[np.int64], NDArray[Any]], None]

# Entries of a kind that a process draws with NumPy before it loads the loop for them. Loading takes as long as NumPy would take
# for five times as many; compiling, once on a machine, some seconds.
_PATIENCE = 2**24

# Held by the one thread that loads. Others do not wait for it, but draw with NumPy; so does, for good, a process that is forked
# meanwhile and has no such thread.
_LOADING = threading.Lock()


@final
class _Choice:
    """For one kind of entries."""

    def __init__(self, *, normal: bool, dtype: torch.dtype) -> None:
        self._normal = normal
        self._dtype = dtype
        self._drawn = 0
        self._fill: Fill | None = None

    def take(self, count: int) -> Fill:
        """For so many entries."""
        self._drawn += count
        if self._fill is None and self._drawn >= _PATIENCE and _LOADING.acquire(blocking=False):
            try:
                if self._fill is None:
                    self._fill = fill_runs  # whatever happens now, once is enough
                    self._fill = compiled(normal=self._normal, dtype=self._dtype) or fill_runs
            finally:
                _LOADING.release()
        return self._fill or fill_runs


_CHOICES = {(normal, dtype): _Choice(normal=normal, dtype=dtype) for normal in (True, False) for dtype in TYPES}


def fill_for(law: Law, count: int) -> Fill:
    """What to fill so many entries with."""
    return _CHOICES[law.normal, law.dtype].take(count)


def compiled(*, normal: bool, dtype: torch.dtype) -> Fill | None:
    """The loop for a kind of entries; None where there is no numba, or it cannot do here what NumPy does.

    Args:
        normal: quantiles of the normal, or uniform entries.
        dtype: one of :data:`gainstage.apply.law.TYPES`.
    """
    if find_spec("numba") is None:
        return None
    try:
        fill: Fill = importlib.import_module("gainstage.apply.loops").fill_runs
        trouble = "" if _agrees(fill, normal=normal, dtype=dtype) else "its values differ from NumPy's"
    except Exception as error:  # noqa: BLE001  (whatever it is, there is another way)
        trouble = f"{type(error).__name__}: {error}"
    if trouble:
        warnings.warn(f"Drawing goes on without numba, slower, with the same values: {trouble}", RuntimeWarning, stacklevel=2)
        return None
    return fill


def _agrees(fill: Fill, *, normal: bool, dtype: torch.dtype) -> bool:
    """For some thousand entries, a hundred of them in the tails."""
    starts = np.array([3, 10_001])
    for law in (
        Law(dtype=dtype, normal=normal, scale=0.3, mean=0.1),
        Law(dtype=dtype, normal=normal, scale=0.3, mean=0.0, width=0.95, limit=0.4),
        Law(dtype=dtype, normal=normal, scale=1e-5, mean=0.0),  # denormal in float16
    ):
        number = np.uint16 if law.is_rounded else f"f{law.bits // 8}"
        expected, found = (np.empty((starts.size, 5000), number) for _ in range(2))
        fill_runs(law, Stream(0), starts, expected)
        fill(law, Stream(0), starts, found)
        if found.tobytes() != expected.tobytes():
            return False
    return True
