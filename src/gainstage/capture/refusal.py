"""Why torch.export refused a model, said in a user's terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gainstage.capture.provenance import user_line_of
from gainstage.errors import CaptureError


@dataclass(frozen=True, slots=True)
class _Known:
    """A refusal that users meet: what torch's exception says (class name or part of the message), why, the way out."""

    signs: tuple[str, ...]
    explanation: str


BRANCHES = (
    "the code branches on the value of a tensor, which a graph cannot follow. Move the decision out of forward "
    "(a Python argument, torch.where, or model.eval() if only training takes the branch)"
)
_KNOWN = (
    _Known(
        ("packed_sequence", "pack_padded", "PackedSequence"),
        "packed sequences have lengths that depend on values. Pass the padded tensor to the recurrent module",
    ),
    _Known(
        ("GuardOnDataDependentSymNode", "DataDependentOutputException"),
        BRANCHES,
    ),
    _Known(
        ("PackedParams",),
        "a quantized module keeps packed integers, for which no level can be set. Build the model without quantization",
    ),
    _Known(
        ("numpy",),
        "the code leaves torch for NumPy, and the graph would end there. Use torch operations instead",
    ),
    _Known(
        ("does not require grad and does not have a grad_fn", "autograd.grad", "fake tensor in the exported program constant"),
        "the code differentiates inside forward, or keeps tensors where a trace loses them. Capture the inner network on its own",
    ),
    _Known(
        ("FakeTensorDeviceMismatch", "different devices", "two devices"),
        "tensors of two devices meet. Create tensors on the device of the inputs (device=x.device)",
    ),
)


def refusal(error: BaseException) -> CaptureError:
    """The exception to raise for one of torch's: the reason and what to do, and the user's line."""
    text = f"{type(error).__name__}: {error}"
    line = user_line_of(error.__traceback__)
    context = f"{text} {line}"
    for known in _KNOWN:
        if any(sign in context for sign in known.signs):
            return CaptureError(known.explanation, line)
    first_line = str(error).strip().partition("\n")[0].rstrip(".")
    return CaptureError(f"{type(error).__name__}: {first_line}", line)


def unknown_size(op: str, place: object) -> CaptureError:
    """The exception to raise where values decide the shape of what an operation returns."""
    return CaptureError(
        f"The shape of {op} in {place} depends on values, so that its size is not known before the model runs. "
        "Use an operation of fixed shape (torch.where instead of boolean indexing)."
    )


def all_refused(reasons: Mapping[str, CaptureError]) -> CaptureError:
    """The exception to raise where no rung holds: the reason of each, and the user's line."""
    told = " ".join(f"By {rung}: {error.reason}." for rung, error in reasons.items())
    line = next((error.line for error in reversed(list(reasons.values())) if error.line), "")
    where = f" The line: {line}" if line else ""
    return CaptureError(
        f"The model cannot be captured. {told} Check that the model runs on these inputs; if it does, capture the submodule "
        f"that matters.{where}"
    )
