"""Compiled loops give NumPy's bits; and where they cannot be had, NumPy draws."""

import subprocess
import sys
import threading
import warnings

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.test_draw import PUBLISHED

from gainstage.apply import loops
from gainstage.apply.compiled import _PATIENCE, _Choice, compiled
from gainstage.apply.draw import draw_runs
from gainstage.apply.law import Law, law_of
from gainstage.apply.normal import normal_32, normal_64
from gainstage.apply.runs import fill_runs
from gainstage.apply.stream import Stream, stream_of
from gainstage.plan import Distribution, Family

SEAM = sys.modules["gainstage.apply.compiled"]
FAMILIES = (Family.NORMAL, Family.TRUNCATED_NORMAL, Family.UNIFORM)
LENGTHS = (0, 1, 2, 7, 8, 9, 511, 512, 513, 1023, 1024, 1025, 3001)


@numba.njit
def philox(key, state):
    loops.philox(key, state, state.shape[1])


@numba.njit(error_model="numpy")
def values(law, words, out):
    loops.fill_centred(law, words, out)


@pytest.mark.parametrize(("counter", "key", "result"), PUBLISHED)
def test_words_are_the_published_ones(counter, key, result):
    state = np.array([counter, (0, 0, 0, 0), counter], np.uint64).T.copy()
    philox(tuple(np.uint64(half) for half in key), state)
    assert [tuple(map(int, state[:, lane])) for lane in (0, 2)] == [result, result]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("family", FAMILIES)
@given(
    key=st.integers(0, 2**128 - 1),
    runs=st.tuples(st.lists(st.integers(0, 2**50), min_size=1, max_size=4), st.sampled_from(LENGTHS)),
    moments=st.tuples(st.sampled_from([0.0, -0.1]), st.floats(1e-20, 1e20)),
)
def test_runs_are_those_of_numpy(family, dtype, key, runs, moments):
    """Wherever a run begins and ends: in the middle of a counter's words, of the lanes, far out in the stream."""
    law = law_of(Distribution(family=family, mean=moments[0], std=moments[1]), 8 * np.dtype(dtype).itemsize)
    gaps, length = runs
    starts = np.cumsum([gap + length for gap in gaps])
    expected, found = (np.full((starts.size, length), np.nan, dtype) for _ in range(2))
    fill_runs(law, Stream(key), starts, expected)
    loops.fill_runs(law, Stream(key), starts, found)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("width", [1.0, 0.9544997361036416])
def test_the_rarest_words_too(bits, width):
    """Ends, middle, and words on both sides of every change of formula, which a stream shows too seldom."""
    top = 2 ** (bits - 1)
    ends = [top - 1 - int(2.0**power) for power in np.arange(0, bits - 1, 0.01)]
    at = [int(top * 2 * share) + step for share in (0.425, 0.4953, 0.425 / width) for step in range(-200, 200) if share < 0.499]
    positive = sorted({0, 1, top - 1, *ends, *at})
    words = np.array([*positive, *(-1 - word for word in positive)], f"i{bits // 8}")
    law, out = Law(normal=True, scale=0.7, mean=0.0, width=width), np.empty(words.size, f"f{bits // 8}")
    expected = np.empty_like(out)
    if bits == 32:
        normal_32(words, 0.7, expected, width)
    else:
        expected = normal_64(words, width) * 0.7
    for start in range(0, words.size, 500):  # as many as the loop's room for marks
        piece = slice(start, start + 500)
        values(loops.constants_of(law, out.dtype.type), words[piece], out[piece])
    assert np.isfinite(out).all()
    assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("normal", [True, False])
def test_loops_are_taken_once_a_process_has_drawn_enough(normal, bits):
    choice = _Choice(normal=normal, bits=bits)
    assert choice.take(_PATIENCE - 1) is fill_runs
    assert choice.take(1) is loops.fill_runs
    assert choice.take(1) is loops.fill_runs


def test_nobody_waits_for_the_thread_that_loads(monkeypatch):
    inside, done = threading.Event(), threading.Event()

    def slowly(normal, bits):
        inside.set()
        assert done.wait(60)
        return loops.fill_runs

    monkeypatch.setattr(SEAM, "compiled", slowly)
    choice = _Choice(normal=True, bits=32)
    loading = threading.Thread(target=choice.take, args=(_PATIENCE,))
    loading.start()
    assert inside.wait(60)
    assert choice.take(_PATIENCE) is fill_runs
    done.set()
    loading.join()
    assert choice.take(1) is loops.fill_runs


def test_without_numba_nothing_is_said(monkeypatch):
    monkeypatch.setattr(SEAM, "find_spec", {"numba": None}.get)
    with warnings.catch_warnings(action="error"):
        assert compiled(normal=True, bits=32) is None


def test_a_numba_that_cannot_be_imported_is_said_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(SEAM, "find_spec", lambda name: name)
    monkeypatch.delitem(sys.modules, "gainstage.apply.loops")
    choice, out = _Choice(normal=True, bits=32), np.empty((1, 10), np.float32)
    with pytest.warns(RuntimeWarning, match="without numba, slower, with the same values: .*numba") as caught:
        assert choice.take(_PATIENCE) is choice.take(_PATIENCE) is fill_runs
    assert len(caught) == 1
    choice.take(1)(Law(normal=True, scale=1.0, mean=0.0), Stream(0), np.array([0]), out)
    assert np.isfinite(out).all()


def test_loops_that_give_other_values_are_not_taken(monkeypatch):
    def off(law, stream, starts, out):
        fill_runs(law, stream, starts, out)
        out[-1, -1] = np.nextafter(out[-1, -1], 1)

    monkeypatch.setattr(loops, "fill_runs", off)
    with pytest.warns(RuntimeWarning, match="its values differ"):
        assert compiled(normal=False, bits=32) is None


def test_a_loop_that_cannot_be_kept_is_compiled_all_the_same():
    """A function without a file has no folder to be kept in."""
    names = {}
    exec("def twice(x): return 2 * x", names)  # noqa: S102
    assert loops._whole(names["twice"])(21) == 42


def test_little_is_drawn_without_loading_numba():
    code = (
        "import sys; from gainstage.apply import draw_range, stream_of; from gainstage.plan import Distribution, Family\n"
        "draw_range(Distribution(family=Family.NORMAL, std=1.0), stream_of(0, 'w'), 0, 10**5)\n"
        "assert not {'numba', 'llvmlite'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_draw_runs_takes_what_the_seam_gives(monkeypatch):
    taken = []
    monkeypatch.setattr(
        sys.modules["gainstage.apply.draw"], "fill_for", lambda law, out: taken.append((law, out.shape)) or loops.fill_runs
    )
    law, out = Distribution(family=Family.NORMAL, std=0.5), np.empty((2, 50), np.float32)
    draw_runs(law, stream_of(0, "w"), np.array([3, 100]), out)
    assert taken == [(law_of(law, 32), (2, 50))]
    assert np.isfinite(out).all()
