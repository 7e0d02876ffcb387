"""The random bits against published vectors; the families against scipy, quadrature and linear algebra."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats

from gainstage.apply import Stream, draw_range, stream_of
from gainstage.apply.draw import draw_matrix
from gainstage.apply.normal import normal_32, normal_64, portable_log
from gainstage.plan import Distribution, Family

# philox4x64 with 10 rounds, from the known-answer tests of Random123 1.14 (J. Salmon et al.): counter, key, result.
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)),
    (
        (2**64 - 1,) * 4,
        (2**64 - 1,) * 2,
        (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
    ),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
    ),
]


def philox(counter, key):
    """Philox4x64-10 in Python's integers, after Salmon et al. 2011, section 3.3."""
    (c0, c1, c2, c3), (k0, k1), mask = counter, key, 2**64 - 1
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (second >> 64) ^ c1 ^ k0, second & mask, (first >> 64) ^ c3 ^ k1, first & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "result"), PUBLISHED)
def test_the_oracle_gives_the_published_words(counter, key, result):
    assert philox(counter, key) == result


@pytest.mark.parametrize(("counter", "key", "result"), PUBLISHED)
def test_words_are_the_published_ones(counter, key, result):
    stream = Stream(key[0] + (key[1] << 64))
    block = sum(word << (64 * index) for index, word in enumerate(counter))
    if block == 0:
        assert stream.uniform_bits(0, 4, bits=64).tolist() == list(result)
    else:  # far beyond any parameter, where only the counter's arithmetic is of interest
        assert tuple(stream.uniform_bits(4 * block, 4 * block + 4, bits=64).tolist()) == result


@given(st.integers(0, 2**128 - 1), st.integers(0, 2**40), st.integers(0, 9))
def test_any_range_is_that_of_the_oracle(key, start, length):
    halves = (key % 2**64, key >> 64)
    words = [philox((index // 4, 0, 0, 0), halves)[index % 4] for index in range(start, start + length)]
    stream = Stream(key)
    assert stream.uniform_bits(start, start + length, bits=64).tolist() == words
    narrow = stream.uniform_bits(2 * start, 2 * (start + length))
    assert narrow.tolist() == [half for word in words for half in (word % 2**32, word >> 32)]


def test_the_key_is_hashed_from_seed_and_name():
    expected = hashlib.blake2b(b"gainstage 1\x007\x00fc.weight", digest_size=16).digest()
    assert stream_of(7, "fc.weight").key == int.from_bytes(expected, "little")
    keys = {stream_of(seed, name).key for seed in (-1, 0, 1, 10, 2**80) for name in ("", "0", "1", "a.b", "a", "é", "\ud800")}
    assert len(keys) == 5 * 7


_ENTRYWISE = (Family.NORMAL, Family.TRUNCATED_NORMAL, Family.UNIFORM)
_SIZES = st.integers(0, 3000)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("family", _ENTRYWISE)
@given(start=_SIZES, length=_SIZES)
def test_a_slice_is_a_slice_of_the_whole(family, dtype, start, length):
    distribution, stream = Distribution(family=family, mean=0.5, std=0.3), stream_of(0, "weight")
    whole = draw_range(distribution, stream, 0, 6000, np.empty(6000, dtype))
    part = draw_range(distribution, stream, start, start + length, np.empty(length, dtype))
    assert np.array_equal(part, whole[start : start + length])


@pytest.mark.parametrize("family", _ENTRYWISE)
def test_pieces_are_joined_without_a_seam(family):
    """The values around 2^18, where one piece of work ends, do not depend on where the call began."""
    distribution, stream = Distribution(family=family, std=1.0), stream_of(3, "weight")
    whole = draw_range(distribution, stream, 0, 2**18 + 10)
    assert np.array_equal(whole[2**18 - 10 :], draw_range(distribution, stream, 2**18 - 10, 2**18 + 10))


# Values as a function of the random bits

_ENDS_32 = np.array([0, 1, 2, 2**31 - 1, 2**31 - 2, 2**30, -1, -2, -(2**31), -(2**31) + 1], np.int32)


def tail_mass(words, bits):
    """Probability beyond the value of a signed word, from its nearer end; exact in double precision for 32 bits."""
    magnitude = np.where(words >= 0, words, -1 - words).astype(np.float64)
    return (2.0 ** (bits - 1) - magnitude - 0.5) * 2.0**-bits


def test_single_precision_normal_is_the_quantile_of_its_bits():
    words = np.r_[_ENDS_32, np.random.default_rng(0).integers(-(2**31), 2**31, 10**6).astype(np.int32)]
    # The tails as densely as the centre: the last 2^k words at both ends.
    tails = (2**31 - 1 - np.r_[np.arange(2**16), 2 ** np.arange(16.0, 29.0, 0.001)].astype(np.int64)).astype(np.int32)
    words = np.r_[words, tails, -1 - tails]
    out = np.empty(words.size, np.float32)
    normal_32(words, 2.0, out)
    exact = np.where(words >= 0, -1, 1) * special.ndtri(tail_mass(words, 32))
    # "within two millionths of the scale": before the tail, at 2.6 deviations, the quantile is 73 times as steep as its argument.
    # The word is rounded by 2^-26; its square and the difference by 2^-27 each, and r has twice the slope of q.
    assert np.abs(out / 2 - exact).max() < 2e-6
    # Tails: 4 roundings at |z| = 6, each half of 2^-22.
    beyond = np.abs(exact) > 2.7
    assert beyond.sum() > 10**5
    assert np.abs(out / 2 - exact)[beyond].max() < 1e-6
    assert np.abs(exact).max() == pytest.approx(-special.ndtri(2.0**-33))


def test_double_precision_normal_is_the_quantile_of_its_bits():
    words = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 10**5)
    words = np.r_[words, 2**63 - 1 - 2 ** np.arange(11, 63), -(2**63) + 2 ** np.arange(11, 63)]
    leading = words >> 11
    exact = np.where(leading >= 0, -1, 1) * special.ndtri(tail_mass(leading, 53))
    # Both sides are claimed to 1e-15 (AS 241, cephes); the quantile's own conditioning in the centre adds little.
    assert np.abs(normal_64(words) / exact - 1).max() < 1e-14


def test_the_logarithm_is_that_of_the_library():
    x = np.r_[
        np.random.default_rng(2).random(10**5), 2.0 ** np.arange(-60, 1), np.nextafter(1, 0), np.nextafter(math.sqrt(0.5), 0)
    ]
    assert np.allclose(portable_log(x.copy()), np.log(x), rtol=4e-16, atol=1e-16)


def test_the_order_of_the_bits_is_that_of_the_values():
    words = np.sort(np.random.default_rng(3).integers(-(2**31), 2**31, 10**5).astype(np.int32))
    out = np.empty(words.size, np.float32)
    normal_32(words, 1.0, out)
    # Neighbouring pieces of the approximation meet within its error.
    assert (np.diff(out) > -1e-6).all()


# Distributions

_MEAN, _STD = 0.25, 0.5
_CUT_VARIANCE = integrate.quad(lambda z: z * z * stats.norm.pdf(z), -2, 2)[0] / (stats.norm.cdf(2) - stats.norm.cdf(-2))
_PARENT = _STD / math.sqrt(_CUT_VARIANCE)
_BY_SCIPY = {
    Family.NORMAL: stats.norm(_MEAN, _STD),
    Family.TRUNCATED_NORMAL: stats.truncnorm(-2, 2, _MEAN, _PARENT),
    Family.UNIFORM: stats.uniform(_MEAN - math.sqrt(3) * _STD, 2 * math.sqrt(3) * _STD),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("family", _ENTRYWISE)
def test_a_family_is_that_of_scipy(family, dtype):
    """Kolmogorov-Smirnov over 2^20 values, and the first four moments within 5 standard errors."""
    count = 2**20
    values = draw_range(Distribution(family=family, mean=_MEAN, std=_STD), stream_of(11, "w"), 0, count, np.empty(count, dtype))
    law = _BY_SCIPY[family]
    assert (law.mean(), law.std()) == pytest.approx((_MEAN, _STD))
    assert stats.kstest(values, law.cdf).pvalue > 1e-4
    standard = (values.astype(np.float64) - _MEAN) / _STD
    for power in (1, 2, 3, 4):
        exact, square = (
            integrate.quad(lambda z, n=n: z**n * law.pdf(_MEAN + _STD * z) * _STD, -9, 9, points=(-2, 2), limit=200)[0]
            for n in (power, 2 * power)
        )
        error = math.sqrt((square - exact**2) / count)
        assert np.mean(standard**power) == pytest.approx(exact, abs=5 * error)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_lies_beyond_the_cut(dtype):
    values = draw_range(
        Distribution(family=Family.TRUNCATED_NORMAL, std=_STD), stream_of(0, "w"), 0, 2**21, np.empty(2**21, dtype)
    )
    assert np.abs(values).max() <= dtype(2 * _PARENT)
    # The last 1e-5 of the probability on either side is reached by 20 of 2^21 values, and by none once in e^40.
    assert np.abs(values).max() > stats.truncnorm(-2, 2, 0, _PARENT).ppf(1 - 1e-5)


def test_entries_are_independent_of_their_neighbours_and_of_other_parameters():
    count = 2**20
    normal = Distribution(family=Family.NORMAL, std=1.0)
    first, second = (draw_range(normal, stream_of(0, name), 0, count) for name in ("a", "b"))
    other_seed = draw_range(normal, stream_of(1, "a"), 0, count)
    error = 5 / math.sqrt(count)
    for lag in (1, 2, 4, 8, 2**10):
        assert abs(np.mean(first[lag:] * first[:-lag], dtype=np.float64)) < error
    assert abs(np.mean(first * second, dtype=np.float64)) < error
    assert abs(np.mean(first * other_seed, dtype=np.float64)) < error


@pytest.mark.parametrize("value", [0.0, -1.5, 1e30])
def test_a_constant(value):
    assert set(draw_range(Distribution(family=Family.CONSTANT, mean=value), stream_of(0, "b"), 5, 9).tolist()) == {
        float(np.float32(value))
    }


# Matrices


def normals(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("shape", "output_dims"),
    [((7, 3), (0,)), ((3, 7), (0,)), ((5, 5), (0,)), ((6, 2, 3), (0,)), ((3, 8, 2), (1,)), ((2, 9, 3), (0, 2)), ((4, 3), (1,))],
)
def test_an_orthogonal_matrix_is_orthogonal_up_to_scale(shape, output_dims):
    drawn = draw_matrix(Distribution(family=Family.ORTHOGONAL, std=0.3), normals(*shape), output_dims)
    assert drawn.shape == shape
    letters = "abc"[: len(shape)]
    rows = "".join(letters[dim] for dim in output_dims)
    columns = "".join(letter for letter in letters if letter not in rows)
    matrix = torch.einsum(f"{letters}->{rows}{columns}", drawn).reshape(math.prod(shape[d] for d in output_dims), -1)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    # Every entry has mean square 0.09: a vector of the longer side has squared length 0.09 * its length.
    torch.testing.assert_close(gram, 0.09 * max(matrix.shape) * torch.eye(min(matrix.shape), dtype=torch.float64))
    assert drawn.square().mean().item() == pytest.approx(0.09)


@pytest.mark.parametrize("taps", [(3,), (3, 3), (4, 5)])
@pytest.mark.parametrize("channels", [(6, 4), (4, 6)])
def test_a_delta_orthogonal_kernel_preserves_length_through_a_circular_convolution(channels, taps):
    outputs, inputs = channels
    kernel = draw_matrix(Distribution(family=Family.DELTA_ORTHOGONAL, std=0.1), normals(outputs, inputs, *taps), (0,))
    centre = kernel[(..., *(size // 2 for size in taps))]
    assert kernel.square().sum().item() == pytest.approx(centre.square().sum().item())
    gram = centre @ centre.T if outputs <= inputs else centre.T @ centre
    torch.testing.assert_close(gram / gram[0, 0], torch.eye(min(channels), dtype=torch.float64))
    # The mean square over all taps is std^2, so that fan-in * std^2 is what a normal kernel of that std would give.
    assert kernel.square().mean().item() == pytest.approx(0.01)


def test_orthogonal_matrices_are_uniform():
    """Haar: entries of a 3 x 3 rotation or reflection have E[q^2] = 1/3, E[q^4] = 1/5, and the trace has variance 1."""
    family = Distribution(family=Family.ORTHOGONAL, std=1 / math.sqrt(3))
    drawn = torch.stack([draw_matrix(family, normals(3, 3, seed=seed), (0,)) for seed in range(4000)])
    assert drawn.mean((0, 1, 2)).abs() < 5 / math.sqrt(3 * 9 * 4000)
    trace = drawn.diagonal(dim1=1, dim2=2).sum(1)
    # 5 standard errors, with the entry's variance of q^4 (below 1) and the trace's E[t^4] = 3.
    torch.testing.assert_close(drawn.pow(4).mean(0), torch.full((3, 3), 0.2, dtype=torch.float64), rtol=0, atol=5 * 0.27 / 63)
    assert trace.mean().item() == pytest.approx(0, abs=5 / 63)
    assert trace.square().mean().item() == pytest.approx(1, abs=5 * math.sqrt(2) / 63)
