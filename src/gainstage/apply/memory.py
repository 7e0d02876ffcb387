"""Whether every parameter has memory of its own: what is drawn into one must not reach another, nor itself twice."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gainstage.errors import InputError


def check_writable(parameters: Mapping[str, torch.Tensor]) -> None:
    """Refuse parameters that cannot be written without changing something else.

    Args:
        parameters: canonical name -> parameter, each tensor once.

    Raises:
        InputError: on the meta device, made in inference mode, expanded, or overlapping.
    """
    for name, tensor in parameters.items():
        if tensor.is_meta:
            raise InputError(
                f"{name} lies on the meta device and has no memory to write to. "
                "gainstage.materialize(model, plan) gives the model its memory, its parameters and its buffers."
            )
        if tensor.is_inference():
            raise InputError(f"{name} was made in inference mode and cannot be written; build the model outside of it.")
        if _meets_itself(tensor):
            raise InputError(f"Entries of {name} share memory (an expanded tensor); give it memory of its own with clone().")
    _check_separate(parameters)


def _meets_itself(tensor: torch.Tensor) -> bool:
    """Sorted by stride, each dimension steps over all that the smaller ones reach; anything else is taken to overlap."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _check_separate(parameters: Mapping[str, torch.Tensor]) -> None:
    for device in {tensor.device for tensor in parameters.values()}:
        by_address = sorted(
            (*_span(tensor), name) for name, tensor in parameters.items() if tensor.device == device and tensor.numel()
        )
        open_spans: list[tuple[int, int, str]] = []
        for start, stop, name in by_address:
            open_spans = [span for span in open_spans if span[1] > start]
            for _, _, other in open_spans:
                if _meet(parameters[other], parameters[name]):
                    first, second = sorted((other, name), key=list(parameters).index)
                    raise InputError(
                        f"{first} and {second} are different parameters in the same memory; tie them: assign one to the other."
                    )
            open_spans.append((start, stop, name))


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First address, and one past the last."""
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    start = tensor.data_ptr()
    return start, start + (reach + 1) * tensor.element_size()


def _meet(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors with overlapping spans, say columns of one matrix, have a byte in common: both are marked on a map."""
    spans = [_span(tensor) for tensor in (first, second)]
    origin = min(start for start, _ in spans)
    marked = torch.zeros(max(stop for _, stop in spans) - origin, dtype=torch.bool)
    views = []
    for tensor, (start, _) in zip((first, second), spans, strict=True):
        size = tensor.element_size()
        views.append(marked.as_strided((*tensor.shape, size), (*(size * step for step in tensor.stride()), 1), start - origin))
    views[0].fill_(value=True)
    return bool(views[1].any())
