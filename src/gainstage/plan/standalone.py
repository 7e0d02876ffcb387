"""The body of the scripts that ``Plan.to_python`` writes: it imports torch, NumPy for the exact values, and nothing of Gainstage.

A script has this text with the rules of one plan in the place of the empty ones. So the exact values are computed here a second
time, from docs/stream.md; version 1 of the stream does not change.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn


class Part(NamedTuple):
    """Entries ``start <= index < stop`` along ``dim`` (all where stop is None), and what they are drawn from.

    ``std`` is that of the values as written. Families: keep, constant, normal, truncated_normal (at two deviations of its
    parent), uniform, orthogonal, delta_orthogonal, mixed: orthogonal rows from the random numbers of the parameter that
    ``mixing`` names, times its matrix [rank, columns] (base64 of doubles).
    """

    family: str
    mean: float = 0.0
    std: float = 0.0
    dim: int = 0
    start: int = 0
    stop: int | None = None
    mixing: tuple[str, int, str] | None = None


class Rule(NamedTuple):
    """Parts of every parameter whose name matches the pattern as a whole."""

    pattern: str
    parts: tuple[Part, ...]
    output_dims: tuple[int, ...] = (0,)


# What the plan says.
RULES: tuple[Rule, ...] = ()
ALIASES: dict[str, str] = {}  # further names of tied parameters
# End of what the plan says.

CUT_WIDTH = 0.9544997361036416  # probability of a normal within two deviations
CUT_VARIANCE = 0.7737413035499232  # variance of a normal cut there


# The distributions, with torch's generator


def initialize(model: nn.Module) -> None:
    """Draw every parameter."""
    for name, parameter in model.named_parameters():
        fill(parameter, rule_of(name))


def set_param_init(model: nn.Module) -> None:
    """For torchtitan: what ``init_states`` calls for each parameter of each module."""
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        rules = {name: rule_of(f"{path}.{name}" if path else name) for name in names}
        module._param_init = {name: partial(fill, rule=rule) for name, rule in rules.items()}


def set_init_weights(model_class: Any) -> None:
    """For Transformers: the class from which a family's models inherit, as LlamaPreTrainedModel, draws what was planned.

    Its own ``_init_weights`` runs first, as it also computes buffers.
    """
    before = model_class._init_weights

    def _init_weights(self: Any, module: nn.Module) -> None:
        before(self, module)
        path = next(path for path, candidate in self.named_modules() if candidate is module)
        for name, parameter in module.named_parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                inside = f"{path}.{name}" if path else name
                fill(parameter, find_rule(inside) or rule_of(f"{self.base_model_prefix}.{inside}"))

    model_class._init_weights = _init_weights


def rule_of(name: str) -> Rule:
    """The rule for a parameter."""
    rule = find_rule(name)
    if rule is None:
        raise KeyError(f"no rule for {name}")
    return rule


def find_rule(name: str) -> Rule | None:
    """The rule for a parameter, if there is one."""
    return next((rule for rule in RULES if re.fullmatch(rule.pattern, ALIASES.get(name, name))), None)


@torch.no_grad()
def fill(tensor: torch.Tensor, rule: Rule) -> None:
    """Draw one parameter."""
    for part in rule.parts:
        if hasattr(tensor, "to_local") and (part.stop is not None or part.mixing or "orthogonal" in part.family):
            raise NotImplementedError("parts and matrices of a sharded parameter need gainstage.materialize")
        if part.mixing is not None:
            _cut(tensor, part).copy_(_cut(_mixed(tensor, part, rule.output_dims, _drawn_normals), part))
        else:
            _fill_part(_cut(tensor, part), part, rule.output_dims)


def _cut(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    return tensor if part.stop is None else tensor.narrow(part.dim, part.start, part.stop - part.start)


def _fill_part(tensor: torch.Tensor, part: Part, output_dims: tuple[int, ...]) -> None:
    mean, std = part.mean, part.std
    if part.family == "constant":
        nn.init.constant_(tensor, mean)
    elif part.family == "normal":
        nn.init.normal_(tensor, mean, std)
    elif part.family == "truncated_normal":
        parent = std / math.sqrt(CUT_VARIANCE)
        nn.init.trunc_normal_(tensor, mean, parent, mean - 2 * parent, mean + 2 * parent)
    elif part.family == "uniform":
        nn.init.uniform_(tensor, mean - math.sqrt(3) * std, mean + math.sqrt(3) * std)
    elif part.family != "keep":
        tensor.copy_(_matrix(torch.randn(tensor.shape, dtype=torch.float64), part, output_dims))


def _matrix(normals: torch.Tensor, part: Part, output_dims: tuple[int, ...]) -> torch.Tensor:
    """Orthonormal rows or columns, scaled to a mean square of ``std**2``; in the centre tap for delta_orthogonal."""
    taps = normals.shape[2:] if part.family == "delta_orthogonal" else ()
    centre: tuple[Any, ...] = (..., *(size // 2 for size in taps))
    gaussian = normals.double()[centre]
    order = [*output_dims, *(dim for dim in range(gaussian.dim()) if dim not in output_dims)]
    permuted = gaussian.permute(order)
    matrix = permuted.reshape(math.prod(permuted.shape[: len(output_dims)]), -1)
    rows, columns = matrix.shape
    q, r = torch.linalg.qr(matrix if rows >= columns else matrix.T)
    q *= torch.where(r.diagonal() < 0, -1.0, 1.0)
    q *= part.std * math.sqrt(max(rows, columns))
    drawn = (q if rows >= columns else q.T).reshape(permuted.shape).permute(*(order.index(dim) for dim in range(len(order))))
    out = torch.zeros(normals.shape, dtype=torch.float64)
    out[centre] = drawn * math.sqrt(math.prod(taps))
    return out


def _mixed(tensor: torch.Tensor, part: Part, output_dims: tuple[int, ...], normals: Any) -> torch.Tensor:
    """Orthogonal rows, in blocks of as many as they have entries, times a matrix; in the shape of the whole parameter."""
    assert part.mixing is not None
    stream, rank, data = part.mixing
    matrix = torch.from_numpy(np.frombuffer(base64.b64decode(data), "<f8").reshape(rank, -1).copy())
    (output,) = output_dims
    outputs = tensor.shape[output]
    entries = normals(stream, outputs * rank, tensor.dtype).view(outputs, rank)
    blocks = [_matrix(entries[at : at + rank], Part("orthogonal", std=1.0), (0,)) @ matrix for at in range(0, outputs, rank)]
    others = [size for dim, size in enumerate(tensor.shape) if dim != output]
    return (part.std * torch.cat(blocks)).view(outputs, *others).movedim(0, output)


def _drawn_normals(stream: str, count: int, _: torch.dtype) -> torch.Tensor:
    """The same for one stream, however often they are asked for: a bias needs those of its weight."""
    key = hashlib.blake2b(f"{torch.initial_seed()}\0{stream}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
    return torch.randn(count, generator=generator, dtype=torch.float64)


# The very values that Gainstage writes: its stream, version 1


@torch.no_grad()
def initialize_exactly(model: nn.Module, seed: int = 0) -> None:
    """Write what ``gainstage.apply(model, plan, seed=seed)`` writes, bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a factorisation rounds differently on another number of threads
    for name, parameter in model.named_parameters():
        rule = rule_of(name)
        for part in rule.parts:
            if part.family != "keep":
                target = _cut(parameter, part)
                target.copy_(_exact(ALIASES.get(name, name), parameter, part, rule.output_dims, seed))
    torch.set_num_threads(threads)


def _exact(name: str, parameter: torch.Tensor, part: Part, output_dims: tuple[int, ...], seed: int) -> torch.Tensor:
    if part.mixing is not None:

        def exact_normals(stream: str, count: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(_values(_words(stream, seed, count, double=dtype == torch.float64), Part("normal", std=1.0)))

        return _cut(_mixed(parameter, part, output_dims, exact_normals), part)
    words = _words(name, seed, parameter.numel(), double=parameter.dtype == torch.float64)
    if "orthogonal" in part.family:
        normals = torch.from_numpy(_values(words, Part("normal", 0.0, 1.0))).view(parameter.shape)
        return _matrix(_cut(normals, part), part, output_dims)
    return _cut(torch.from_numpy(_values(words, part)).view(parameter.shape), part)


def _words(name: str, seed: int, count: int, *, double: bool) -> Any:
    """Signed random integers, one for each element: Philox4x64-10 from counter 0 under a key of seed and name."""
    key = hashlib.blake2b(f"gainstage 1\0{seed}\0{name}".encode(), digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(key, "little"), counter=2**256 - 1)  # the next is 0
    words = generator.random_raw(-(-count // (4 if double else 8)) * 4).astype("<u8")
    return words.view("<i8" if double else "<i4")[:count].astype("i8" if double else "i4")


def _values(words: Any, part: Part) -> Any:
    double = words.dtype == np.int64
    number: Any = np.float64 if double else np.float32
    std = part.std
    if part.family == "constant":
        return np.full(words.shape, part.mean, number)
    if part.family == "uniform":
        out = words.astype(number) * number(math.sqrt(12) * std * 2.0 ** (-64 if double else -32))
    elif part.family == "normal":
        out = _normal_64(words, 1.0) * std if double else _normal_32(words, std)
    else:
        std /= math.sqrt(CUT_VARIANCE)
        out = _normal_64(words, CUT_WIDTH) * std if double else _central_32(words, 2.0**-32 * CUT_WIDTH, std)[0]
        out = np.clip(out, number(-2 * std), number(2 * std))
    return out + number(part.mean) if part.mean else out


# Coefficients as in docs/stream.md of Gainstage.
_CENTRE, _K = 0.4953, 0.9149077585
_FRACTION = (
    (1.251319763, 0.6682493903),
    (-0.05638516481, 0.2058821597),
    (-0.002638466391, 0.05798779833),
    (-0.0002153894687, 0.01999918152),
    (-1.445245134e-05, 0.007982639467),
)


def _central_32(words: Any, unit: float, scale: float) -> tuple[Any, Any]:
    """``scale`` times the normal quantile at 1/2 + unit * word, and r, negative where this formula does not hold."""
    single = np.float32
    per = 1 / (unit * unit)
    n = words.astype(single)
    r = single(_CENTRE * _CENTRE * per) - n * n
    (a, b), *outer = reversed(_FRACTION)
    fraction = r + single(b * per)
    for next_a, next_b in outer:
        fraction = single(a * per * per) / fraction + r + single(next_b * per)
        a = next_a
    return n * (single(a * per * unit * scale) / fraction + single(_K * unit * scale)), r


def _normal_32(words: Any, scale: float) -> Any:
    """Parabolas in the tail mass where the central formula does not hold."""
    out, r = _central_32(words, 2.0**-32, scale)
    mass = (2**31 - 1 - (words ^ (words >> 31))).astype(np.float32) + np.float32(0.5)
    bits = mass.view(np.int32)
    segments, where = np.unique(bits[r < 0] >> 17, return_inverse=True)
    low = (segments << 17).astype(np.int32).view(np.float32).astype(np.float64)
    width = ((segments + 1) << 17).astype(np.int32).view(np.float32) - low
    x0, x1, x2 = ((1 - root) / 2 for root in (math.sqrt(0.75), 0.0, -math.sqrt(0.75)))
    z0, z1, z2 = (_tail((low + width * x) * 2.0**-32) for x in (x0, x1, x2))
    d1 = (z1 - z0) / (x1 - x0)
    d2 = ((z2 - z1) / (x2 - x1) - d1) / (x2 - x0)
    constant = (z0 - d1 * x0 + d2 * x0 * x1).astype(np.float32)[where]
    linear = ((d1 - d2 * (x0 + x1)) * 2.0**-17).astype(np.float32)[where]
    square = (d2 * 2.0**-17 * 2.0**-17).astype(np.float32)[where]
    place = (bits[r < 0] & (2**17 - 1)).astype(np.float32)
    tails = (square * place + linear) * place + constant
    out[r < 0] = np.copysign(tails, out[r < 0]) * np.float32(scale)
    return out


def _normal_64(words: Any, width: float) -> Any:
    """AS 241 (Wichura 1988)."""
    q = ((words >> 11) + 0.5) * 2.0**-53 * width
    mass = 0.5 - np.abs(q)
    out = np.copysign(_tail(mass), q)
    near = np.abs(q) <= 0.425
    r = 0.180625 - q[near] * q[near]
    out[near] = q[near] * _polynomial(_A, r) / _polynomial(_B, r)
    return out


def _tail(mass: Any) -> Any:
    """The deviation beyond which a normal has this probability."""
    m, e = np.frexp(mass)
    low = m < 0.7071067811865476
    m, e = np.where(low, 2 * m, m), e - low
    s = (m - 1) / (m + 1)
    log = e * 0.6931471805599453 + 2 * s * _polynomial([1 / (2 * n + 1) for n in range(11)], s * s)
    r = np.sqrt(-log)
    near = _polynomial(_C, r - 1.6) / _polynomial(_D, r - 1.6)
    return np.where(r > 5, _polynomial(_E, r - 5) / _polynomial(_F, r - 5), near)


def _polynomial(coefficients: Any, x: Any) -> Any:
    *lower, value = coefficients
    for coefficient in reversed(lower):
        value = value * x + coefficient
    return value


_A = (
    3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
    4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3,
)  # fmt: skip
_B = (
    1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
    2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3,
)  # fmt: skip
_C = (
    1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
    1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4,
)  # fmt: skip
_D = (
    1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
    1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9,
)  # fmt: skip
_E = (
    6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
    2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7,
)  # fmt: skip
_F = (
    1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
    7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15,
)  # fmt: skip
