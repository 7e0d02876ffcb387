"""Compiled loops give NumPy's bits; and where they cannot be had, NumPy draws."""

import subprocess
import sys
import threading
import warnings

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.test_draw import PUBLISHED

from gainstage.apply import loops
from gainstage.apply.box import whole_box
from gainstage.apply.compiled import _PATIENCE, _Choice, compiled
from gainstage.apply.law import TYPES, Law, law_of
from gainstage.apply.normal import normal_32, normal_64
from gainstage.apply.runs import fill_runs
from gainstage.apply.stage import drawing_tasks
from gainstage.apply.stream import Stream
from gainstage.plan import Block, Distribution, Family, ParameterPlan

SEAM = sys.modules["gainstage.apply.compiled"]
FAMILIES = (Family.NORMAL, Family.TRUNCATED_NORMAL, Family.UNIFORM)
LENGTHS = (0, 1, 2, 7, 8, 9, 511, 512, 513, 1023, 1024, 1025, 3001)


def memory(rows, columns, law):
    """Not what is to be drawn, and in the form in which it is."""
    return np.full((rows, columns), 77, np.uint16 if law.is_rounded else f"f{law.bits // 8}")


@numba.njit
def philox(key, state):
    loops.philox(key, state, state.shape[1])


@numba.njit
def rounded(brain, singles, out):
    loops.round_half(brain, singles, out)


@numba.njit(error_model="numpy")
def values(law, words, out):
    loops.fill_centred(law, words, out)


@pytest.mark.parametrize(("counter", "key", "result"), PUBLISHED)
def test_words_are_the_published_ones(counter, key, result):
    state = np.array([counter, (0, 0, 0, 0), counter], np.uint64).T.copy()
    philox(tuple(np.uint64(half) for half in key), state)
    assert [tuple(map(int, state[:, lane])) for lane in (0, 2)] == [result, result]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
@given(
    key=st.integers(0, 2**128 - 1),
    runs=st.tuples(st.lists(st.integers(0, 2**50), min_size=1, max_size=4), st.sampled_from(LENGTHS)),
    moments=st.tuples(st.sampled_from([0.0, -0.1]), st.sampled_from([1e-20, 1e-7, 1e-4, 0.03, 1.0, 3e4, 1e20])),
)
def test_runs_are_those_of_numpy(family, dtype, key, runs, moments):
    """Wherever a run begins and ends: in the middle of a counter's words, of the lanes, far out in the stream."""
    law, (gaps, length) = law_of(Distribution(family=family, mean=moments[0], std=moments[1]), dtype), runs
    starts = np.cumsum([gap + length for gap in gaps])
    expected, found = memory(starts.size, length, law), memory(starts.size, length, law)
    fill_runs(law, Stream(key), starts, expected)
    loops.fill_runs(law, Stream(key), starts, found)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_single_is_rounded_as_torch_rounds_it(dtype):
    """All exponents, and of fractions the ties, their neighbours, and what carries over; up to infinity and down to zero."""
    fractions = [
        (high << shift) + low
        for shift in (13, 16)
        for high in (0, 1, 2, 63, 127)
        for low in (0, 1, 2 ** (shift - 1) - 1, 2 ** (shift - 1), 2 ** (shift - 1) + 1, 2**shift - 1)
    ]
    patterns = np.array(
        [sign << 31 | exponent << 23 | low % 2**23 for sign in (0, 1) for exponent in range(255) for low in fractions], np.uint32
    )
    singles = np.r_[patterns, np.uint32(0x7F800000), np.uint32(0xFF800000)].view(np.float32)
    out = np.empty(singles.size, np.uint16)
    rounded(dtype == torch.bfloat16, singles, out)
    assert np.array_equal(out, torch.from_numpy(singles).to(dtype).view(torch.uint16).numpy())


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("width", [1.0, 0.9544997361036416])
def test_the_rarest_words_too(bits, width):
    """Ends, middle, and words on both sides of every change of formula, which a stream shows too seldom."""
    top = 2 ** (bits - 1)
    ends = [top - 1 - int(2.0**power) for power in np.arange(0, bits - 1, 0.01)]
    at = [int(top * 2 * share) + step for share in (0.425, 0.4953, 0.425 / width) for step in range(-200, 200) if share < 0.499]
    positive = sorted({0, 1, top - 1, *ends, *at})
    words = np.array([*positive, *(-1 - word for word in positive)], f"i{bits // 8}")
    law = Law(dtype=torch.float32 if bits == 32 else torch.float64, normal=True, scale=0.7, mean=0.0, width=width)
    out = memory(1, words.size, law)[0]
    expected = np.empty_like(out)
    if bits == 32:
        normal_32(words, 0.7, expected, width)
    else:
        expected = normal_64(words, width) * 0.7
    for start in range(0, words.size, 500):  # as many as the loop's room for marks
        piece = slice(start, start + 500)
        values(loops.constants_of(law), words[piece], out[piece])
    assert np.isfinite(out).all()
    assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("normal", [True, False])
def test_loops_are_taken_once_a_process_has_drawn_enough(normal, dtype):
    choice = _Choice(normal=normal, dtype=dtype)
    assert choice.take(_PATIENCE - 1) is fill_runs
    assert choice.take(1) is loops.fill_runs
    assert choice.take(1) is loops.fill_runs


def test_nobody_waits_for_the_thread_that_loads(monkeypatch):
    inside, done = threading.Event(), threading.Event()

    def slowly(normal, dtype):
        inside.set()
        assert done.wait(60)
        return loops.fill_runs

    monkeypatch.setattr(SEAM, "compiled", slowly)
    choice = _Choice(normal=True, dtype=torch.float32)
    loading = threading.Thread(target=choice.take, args=(_PATIENCE,))
    loading.start()
    assert inside.wait(60)
    assert choice.take(_PATIENCE) is fill_runs
    assert _Choice(normal=False, dtype=torch.float32).take(_PATIENCE) is fill_runs
    done.set()
    loading.join()
    assert choice.take(1) is loops.fill_runs


def test_without_numba_nothing_is_said(monkeypatch):
    monkeypatch.setattr(SEAM, "find_spec", {"numba": None}.get)
    with warnings.catch_warnings(action="error"):
        assert compiled(normal=True, dtype=torch.float32) is None


def test_a_numba_that_cannot_be_imported_is_said_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(SEAM, "find_spec", lambda name: name)
    monkeypatch.delitem(sys.modules, "gainstage.apply.loops")
    choice = _Choice(normal=True, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="without numba, slower, with the same values: .*numba") as caught:
        assert choice.take(_PATIENCE) is choice.take(_PATIENCE) is fill_runs
    assert len(caught) == 1


def test_loops_that_give_other_values_are_not_taken(monkeypatch):
    def off(law, stream, starts, out):
        fill_runs(law, stream, starts, out)
        out[-1, -1] = np.nextafter(out[-1, -1], 1)

    monkeypatch.setattr(loops, "fill_runs", off)
    with pytest.warns(RuntimeWarning, match="its values differ"):
        assert compiled(normal=False, dtype=torch.float32) is None


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


@pytest.mark.parametrize("dtype", [*TYPES, torch.float8_e5m2])
def test_a_parameter_is_the_same_with_and_without_loops(monkeypatch, dtype):
    """Through everything above the seam, with memory that is not contiguous."""
    planned = ParameterPlan(
        name="w",
        shape=(30, 50),
        dtype=str(dtype)[6:],
        role="weight",
        distribution=Distribution(family=Family.NORMAL, std=0.5),
        blocks=(Block(1, 10, 20, Distribution(family=Family.UNIFORM, std=0.1)),),
    )
    drawn = []
    for fill in (fill_runs, loops.fill_runs):
        monkeypatch.setattr(sys.modules["gainstage.apply.draw"], "fill_for", lambda law, count, fill=fill: fill)
        drawn.append(torch.full(planned.shape, 77.0).to(dtype))
        for task in drawing_tasks(planned, 7, [whole_box(planned.shape)], drawn[-1])[1]:
            task.draw()
    first, second = (tensor.view(torch.uint8) for tensor in drawn)
    assert torch.equal(first, second)
    assert drawn[0].float().std() == pytest.approx(0.45, abs=0.03)
