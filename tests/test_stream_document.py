"""docs/stream.md, followed to the letter in Python's integers and doubles, gives the bits that are written.

Nothing here comes from gainstage.apply but what is compared; the numbers are read from the document.
"""

import hashlib
import math
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from gainstage.apply import draw_range, stream_of
from gainstage.plan import Distribution, Family

DOCUMENT = (Path(__file__).parents[1] / "docs" / "stream.md").read_text(encoding="utf-8")
NUMBERS = {name: float(value) for name, value in re.findall(r"^ {4}(\w+) = (-?[\d.]+(?:e-?\d+)?)$", DOCUMENT, re.MULTILINE)}


def coefficients(letter):
    return [NUMBERS[f"{letter}{index}"] for index in range(8)]


def f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


# The result of +, -, * and / on two singles in double precision, rounded once more, is the correctly rounded single: a double
# has more than twice as many bits (Figueroa 1995).


def bits_of(single):
    return struct.unpack("<i", struct.pack("<f", single))[0]


def from_bits(bits):
    return struct.unpack("<f", struct.pack("<i", bits))[0]


def philox(counter, key):
    (c0, c1, c2, c3), (k0, k1), mask = counter, key, 2**64 - 1
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (second >> 64) ^ c1 ^ k0, second & mask, (first >> 64) ^ c3 ^ k1, first & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c0, c1, c2, c3


def key_of(seed, name):
    digest = hashlib.blake2b(b"gainstage 1\0" + str(seed).encode() + b"\0" + name.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def signed_word(key, k, double):
    word = k if double else k // 2
    bits = philox((word // 4, 0, 0, 0), key)[word % 4]
    if double:
        return bits - 2**64 if bits >= 2**63 else bits
    half = bits >> 32 if k % 2 else bits % 2**32
    return half - 2**32 if half >= 2**31 else half


def horner(letters, x):
    *lower, value = letters
    for coefficient in reversed(lower):
        value = value * x + coefficient
    return value


def logarithm(x):
    m, e = math.frexp(x)
    if m < NUMBERS["halfroot"]:
        m, e = 2 * m, e - 1
    s = (m - 1) / (m + 1)
    return e * NUMBERS["log2"] + 2 * s * horner([1 / (2 * n + 1) for n in range(11)], s * s)


def tail_quantile(mass):
    r = math.sqrt(-logarithm(mass))
    if r <= 5:
        return horner(coefficients("C"), r - 1.6) / horner(coefficients("D"), r - 1.6)
    return horner(coefficients("E"), r - 5) / horner(coefficients("F"), r - 5)


def central(w, scale, h=2.0**-32):
    """Value and r."""
    c = NUMBERS
    g = 1 / (h * h)
    n = f32(w)
    r = f32(f32(c["c"] * c["c"] * g) - f32(n * n))
    t = f32(r + f32(c["b5"] * g))
    for a, b in (("a5", "b4"), ("a4", "b3"), ("a3", "b2"), ("a2", "b1")):
        t = f32(f32(f32(f32(c[a] * g * g) / t) + r) + f32(c[b] * g))
    return f32(n * f32(f32(f32(c["a1"] * g * h * scale) / t) + f32(c["K"] * h * scale))), r


def normal_single(w, std):
    value, r = central(w, std)
    if r >= 0:
        return value
    m = f32(f32(2**31 - 1 - (w if w >= 0 else -1 - w)) + f32(0.5))
    i, p = bits_of(m) >> 17, f32(bits_of(m) % 2**17)
    constant, linear, square = parabola(i)
    z = f32(f32(f32(f32(f32(square * p) + linear) * p)) + constant)
    return f32(math.copysign(z, w) * f32(std))


def parabola(i):
    low = from_bits(i << 17)
    width = from_bits((i + 1) << 17) - low
    u = math.sqrt(0.75)
    x0, x1, x2 = (1 - u) / 2, (1 - 0) / 2, (1 - -u) / 2
    z0, z1, z2 = (tail_quantile((low + width * x) * 2.0**-32) for x in (x0, x1, x2))
    d1 = (z1 - z0) / (x1 - x0)
    d2 = ((z2 - z1) / (x2 - x1) - d1) / (x2 - x0)
    return f32(z0 - d1 * x0 + d2 * x0 * x1), f32((d1 - d2 * (x0 + x1)) * 2.0**-17), f32(d2 * 2.0**-17 * 2.0**-17)


def normal_double(w, std, width=1.0):
    q = ((w >> 11) + 0.5) * 2.0**-53
    tail = 0.5 - abs(q)
    if width < 1:
        q *= width
        tail = 0.5 - abs(q)
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        return std * (q * horner(coefficients("A"), r) / horner(coefficients("B"), r))
    return std * math.copysign(tail_quantile(tail), q)


def value(family, seed, name, k, *, mean, std, double):
    """Section 3 of the document."""
    w = signed_word(key_of(seed, name), k, double)
    rounded = float if double else f32
    if family is Family.UNIFORM:
        drawn = rounded(rounded(w) * rounded(math.sqrt(12) * std * 2.0 ** -(64 if double else 32)))
    elif family is Family.NORMAL:
        drawn = normal_double(w, std) if double else normal_single(w, std)
    else:
        parent, width = std / math.sqrt(NUMBERS["variance"]), NUMBERS["width"]
        drawn = normal_double(w, parent, width) if double else central(w, parent, 2.0**-32 * width)[0]
        drawn = min(max(drawn, rounded(-2 * parent)), rounded(2 * parent))
    return rounded(drawn + rounded(mean)) if mean else drawn


FAMILIES = (Family.NORMAL, Family.TRUNCATED_NORMAL, Family.UNIFORM)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", [(0, "a", 0.0, 1.0), (-3, "blöcke.0.weight", 0.1, 0.0417)])
def test_an_implementation_from_the_document_gives_the_same_bits(family, double, case):
    """2,000 elements in a row, and 500 beyond; 1 % of all are in the tails."""
    seed, name, mean, std = case
    law, stream = Distribution(family=family, mean=mean, std=std), stream_of(seed, name)
    for start, count in ((0, 2000), (2**33 + 5, 500)):
        written = draw_range(law, stream, start, start + count, np.empty(count, np.float64 if double else np.float32))
        expected = [value(family, seed, name, k, mean=mean, std=std, double=double) for k in range(start, start + count)]
        assert written.tolist() == expected


def extreme_elements(double):
    """Elements whose words are extreme, found by looking at many."""
    words = stream_of(0, "a").uniform_bits(0, 2**20, 64 if double else 32)
    order = np.argsort(words)
    middle = np.searchsorted(words[order], 2 ** (63 if double else 31))
    return [*order[:3], *order[-3:], *order[middle - 6 : middle + 6]]  # nearest to 0 from both sides, and to both ends


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rarest_values_too(family, double):
    law, stream, dtype = Distribution(family=family, std=1.0), stream_of(0, "a"), np.float64 if double else np.float32
    for k in map(int, extreme_elements(double)):
        written = draw_range(law, stream, k, k + 1, np.empty(1, dtype))
        assert written.tolist() == [value(family, 0, "a", k, mean=0.0, std=1.0, double=double)]


def test_the_values_in_the_document():
    key = tuple(int(found, 16) for found in re.findall(r"key[01] = (0x\w{16})", DOCUMENT))
    assert key == key_of(7, "fc.weight")
    rows = re.findall(r"^ {4}(\w+) (float32|float64): (.+)$", DOCUMENT, re.MULTILINE)
    assert len(rows) == 2 * len(FAMILIES)
    for family, dtype, listed in rows:
        for k, printed in zip((0, 1, 2, 3, 1_000_003), listed.split(", "), strict=True):
            expected = value(Family(family), 7, "fc.weight", k, mean=0.0, std=1.0, double=dtype == "float64")
            assert float.fromhex(printed) == expected
