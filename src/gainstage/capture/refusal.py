"""Why torch.export refused a model, said in a user's terms."""

from __future__ import annotations

from gainstage.capture.provenance import user_line_of
from gainstage.errors import CaptureError

# What torch's exceptions say (class name or a part of the message) -> the reason and the way out.
_EXPLANATIONS = (
    (
        ("GuardOnDataDependentSymNode", "data-dependent", "DataDependentOutputException"),
        "the code branches on the value of a tensor, which a graph cannot follow. Move the decision out of forward "
        "(a Python argument, torch.where, or .eval() if only training branches)",
    ),
    (
        (".numpy()", "numpy", "Can't call numpy"),
        "the code leaves torch for NumPy, and the graph would end there. Use torch operations instead",
    ),
    (
        ("pack_padded", "PackedSequence", "_pack_padded_sequence"),
        "packed sequences have lengths that depend on values. Pass the padded tensor to the recurrent module",
    ),
    (
        ("does not require grad and does not have a grad_fn", "autograd.grad"),
        "the code differentiates inside forward, which cannot be traced. Capture the inner network on its own",
    ),
    (
        ("FakeTensorDeviceMismatch", "different devices", "two devices"),
        "tensors of two devices meet. Create tensors on the device of the inputs (device=x.device)",
    ),
)


def refusal(error: BaseException) -> CaptureError:
    """The exception to raise for one of torch.export's: the user's line, the reason, what to do."""
    text = f"{type(error).__name__}: {error}"
    line = user_line_of(error.__traceback__)
    where = f" at {line}" if line else ""
    for signs, explanation in _EXPLANATIONS:
        if any(sign in text for sign in signs):
            return CaptureError(f"The model cannot be captured{where}: {explanation}.")
    first_line = str(error).strip().partition("\n")[0]
    return CaptureError(
        f"The model cannot be captured{where}: {type(error).__name__}: {first_line}. "
        "Check that the model runs on these inputs; if it does, capture the submodule that matters."
    )
