"""What the modules of torch.nn draw by themselves, in ``reset_parameters`` (torch 2.13)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gainstage.graph import ParameterInfo
from gainstage.plan import Distribution, Family

_ONES = Distribution(family=Family.CONSTANT, mean=1.0)
_ZEROS = Distribution(family=Family.CONSTANT)
_NORMAL = Distribution(family=Family.NORMAL, std=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Owned:
    """A parameter as its module sees it."""

    kind: str  # class of the module
    name: str  # of the parameter inside of the module
    shape: tuple[int, ...]
    weight: tuple[int, ...]  # shape of the module's weight, which the range of a bias is computed from


def module_default(info: ParameterInfo, weight: tuple[int, ...] | None) -> Distribution | None:
    """Distribution that the owning module draws a parameter from.

    Args:
        info: the parameter.
        weight: shape of the module's ``weight``; None where it has none.

    Returns:
        None where the module's class is not one of torch.nn's, or draws nothing by itself.
    """
    family, _, kind = info.module_type.rpartition(".")
    drawn = _DEFAULTS.get(kind) if family.startswith("torch.nn.") else None
    if drawn is None:
        return None
    return drawn(_Owned(kind=kind, name=info.name.rpartition(".")[2], shape=info.shape, weight=weight or info.shape))


def _uniform(bound: float) -> Distribution:
    return Distribution(family=Family.UNIFORM, std=bound / math.sqrt(3.0))


def _kaiming(owned: _Owned) -> Distribution:
    """``U(-1/sqrt(n), 1/sqrt(n))``, weight and bias alike: what kaiming_uniform_ with a = sqrt(5) comes to."""
    return _uniform(1.0 / math.sqrt(math.prod(owned.weight[1:])))


def _attention_output(owned: _Owned) -> Distribution:
    """The output projection of nn.MultiheadAttention, which sets this bias to zero."""
    return _ZEROS if owned.name == "bias" else _kaiming(owned)


def _attention(owned: _Owned) -> Distribution:
    """``xavier_uniform_`` by the shape of the packed weight; ``xavier_normal_`` for the learned key and value."""
    if len(owned.shape) == 2:
        return _uniform(math.sqrt(6.0 / sum(owned.shape)))
    return _ZEROS if len(owned.shape) == 1 else Distribution(family=Family.NORMAL, std=owned.shape[-1] ** -0.5)


def _norm(owned: _Owned) -> Distribution:
    return _ONES if owned.name == "weight" else _ZEROS


def _recurrent(owned: _Owned) -> Distribution:
    """``U(-1/sqrt(h), 1/sqrt(h))``, h the size of the hidden state; its gates are packed along the first dimension."""
    if owned.name.startswith("weight_hr"):
        return _uniform(1.0 / math.sqrt(owned.shape[1]))
    gates = {"LSTM": 4, "GRU": 3}.get(owned.kind.removesuffix("Cell"), 1)
    return _uniform(1.0 / math.sqrt(owned.shape[0] / gates))


def _bilinear(owned: _Owned) -> Distribution:
    return _uniform(1.0 / math.sqrt(owned.weight[1]))


_DEFAULTS: dict[str, Callable[[_Owned], Distribution]] = {
    **{f"{kind}{rank}d": _kaiming for kind in ("Conv", "ConvTranspose") for rank in (1, 2, 3)},
    **{f"{kind}{rank}d": _norm for kind in ("BatchNorm", "InstanceNorm") for rank in (1, 2, 3)},
    **dict.fromkeys(("LayerNorm", "GroupNorm", "RMSNorm", "SyncBatchNorm"), _norm),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"), _recurrent),
    **dict.fromkeys(("Embedding", "EmbeddingBag"), lambda _: _NORMAL),
    "Linear": _kaiming,
    "NonDynamicallyQuantizableLinear": _attention_output,
    "MultiheadAttention": _attention,
    "Bilinear": _bilinear,
    "PReLU": lambda _: Distribution(family=Family.CONSTANT, mean=0.25),
}
