"""What every public function needs of the model and its inputs as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from gainstage.apply.write import one_thread
from gainstage.capture import past_kept
from gainstage.errors import InputError
from gainstage.graph import Graph, Node, parameters_of_regions, real_parameters
from gainstage.propagate import (
    constant_value,
    input_value,
    kurtosis,
    level_profile,
    parameter_moments,
    parameter_value,
    propagate,
    table_value,
)
from gainstage.roles import Roles, is_data
from gainstage.signal import Value


@contextmanager
def on_host() -> Iterator[None]:
    """For numbers that are not the model's: they lie on the host, whatever device the caller made the default.

    One thread computes them: they are many and small, and threads that wait for each other take several times as long where
    other processes run. The numbers do not depend on how many threads there are, either.
    """
    host = torch.device("cpu")  # as a context it is asked at every call of a function
    with past_kept(), one_thread(), nullcontext() if torch.get_default_device() == host else host:
        yield


def check_call(model: object, args: object, kwargs: object) -> None:
    """Tell a model and the arguments of its forward pass from what is neither.

    Raises:
        InputError: for anything else.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"The model is {type(model).__name__}; give a torch.nn.Module.")
    if not isinstance(args, (tuple, list)):
        raise InputError(f"The positional arguments of forward come as a tuple, not as {type(args).__name__}: args=(x,).")
    if not (kwargs is None or isinstance(kwargs, Mapping)):
        raise InputError(
            f"The keyword arguments of forward come as a dict, not as {type(kwargs).__name__}: kwargs={{'mask': mask}}; "
            "what is positional goes into args."
        )


def measured_input(node: Node) -> Value:
    """Statistics of an input as it was given."""
    assert node.meta is not None
    assert not isinstance(node.meta, tuple)
    return input_value(node.name, node.value, node.meta.shape)


def moments_of(model: nn.Module) -> Callable[[str], tuple[float, float] | None]:
    """Mean and variance of a parameter's present values, measured when asked for; None on the meta device."""
    tensors = real_parameters(model)

    def moments(name: str) -> tuple[float, float] | None:
        return None if tensors[name].is_meta else parameter_moments({name: tensors[name]})[name]

    return moments


def present_values(graph: Graph, tensors: Mapping[str, torch.Tensor], roles: Roles) -> dict[str, Any]:
    """Every node at the present parameters: independent entries with their moments, slice by slice where slices differ.

    ``graph``: with its copies, see :func:`gainstage.graph.with_copies`; those of one parameter have one value.
    """
    moments = parameter_moments({name: tensor for name, tensor in tensors.items() if name in graph.parameters})
    index = {name: position for position, name in enumerate(graph.parameters)}
    of_regions = parameters_of_regions(graph)

    @cache
    def present(name: str) -> Value:
        info = graph.parameters[name]
        if info.name in of_regions:
            return replace(constant_value(tensors[info.name]), lineage=1 << index[info.name])
        tensor = tensors[info.name]
        is_table = is_data(graph, info.name, roles.of(info.name))
        table = table_value(tensor, index[info.name]) if is_table else None
        if table is not None:
            return table
        return parameter_value(info, index[info.name], *moments[info.name], level_profile(tensor), kurtosis=kurtosis(tensor))

    return propagate(graph, lambda info: present(graph.copies.get(info.name, info.name)), measured_input)
