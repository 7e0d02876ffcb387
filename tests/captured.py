"""Models for captures, and an interpreter of what was captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gainstage.graph import Graph, NodeKind, Ref, tensor_leaves


def run_graph(graph: Graph, model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Values of all nodes, computed one by one from the model's parameters and the inputs."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    fed = iter(tensor for tensor in tensor_leaves(inputs) if tensor.is_floating_point())
    values: dict[str, Any] = {}

    def real(argument: Any) -> Any:
        if isinstance(argument, Ref):
            return values[argument.name]
        return type(argument)(map(real, argument)) if isinstance(argument, (list, tuple)) else argument

    with torch.no_grad():
        for node in graph.nodes:
            if node.kind is NodeKind.OP:
                values[node.name] = node.op(*real(node.args), **{key: real(item) for key, item in node.kwargs.items()})
            elif node.kind is NodeKind.PARAMETER:
                values[node.name] = parameters[node.parameter]
            else:
                values[node.name] = next(fed) if node.kind is NodeKind.INPUT else node.value
            if isinstance(values[node.name], torch.Tensor):
                assert tuple(values[node.name].shape) == node.meta.shape, node.name
                assert values[node.name].dtype == node.meta.dtype, node.name
    return values


def record_calls(model: nn.Module, args: tuple, kwargs: dict) -> dict[tuple[str, int], list[torch.Tensor]]:
    """What each call of each module returns, as a forward hook sees it at that moment."""
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}

    def hook_for(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            call = sum(known == path for known, _ in seen)
            seen[path, call] = [tensor.detach().clone() for tensor in tensor_leaves(output)]

        return hook

    handles = [module.register_forward_hook(hook_for(path)) for path, module in model.named_modules()]
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


def assert_reproduces(graph: Graph, model: nn.Module, args: tuple, kwargs: dict) -> None:
    values = run_graph(graph, model, (args, kwargs))
    seen = record_calls(model, args, kwargs)
    assert graph.calls[-1].path == ""
    assert graph.calls[-1].outputs == graph.outputs
    for call in graph.calls:
        for name, position in zip(call.outputs, call.positions, strict=True):
            torch.testing.assert_close(values[name], seen[call.path, call.call][position], rtol=1e-5, atol=1e-5)


def assert_reaches_parameters(graph: Graph, model: nn.Module, args: tuple, kwargs: dict) -> None:
    """The parameters that get gradients are exactly those that the outputs depend on."""
    outputs = tensor_leaves(model(*args, **kwargs))
    torch.stack([tensor.square().sum() for tensor in outputs if tensor.requires_grad]).sum().backward()
    canonical = {alias: info.name for info in graph.parameters.values() for alias in (info.name, *info.aliases)}
    real = {canonical[name] for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    reached = set(graph.outputs)
    for node in reversed(graph.nodes):
        if node.name in reached and node.op is not torch.ops.aten.detach.default:
            reached.update(node.operands())
    assert {graph.by_name[name].parameter for name in reached} - {None} == real


class Scripted(nn.Module):
    """A module whose forward is a function of itself and the inputs."""

    def __init__(self, forward: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self.m = nn.ModuleList(modules)
        self.function = forward

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


@dataclass
class Batch:
    tokens: torch.Tensor
    extra: dict


@dataclass
class Result:
    value: torch.Tensor
    count: int
    rest: tuple


def square(width: int = 8) -> nn.Linear:
    return nn.Linear(width, width)


def write_into_slices(s, x):
    h = s.m[0](x)
    h[..., :4].mul_(s.m[1](x)[..., :4])
    h[:, 0] = s.m[2](x)[:, 1]
    flat = h.view(-1, 8)
    flat.add_(1)
    h.pow_(2)  # by pow.Tensor_Scalar: pow.Scalar raises a number
    h.relu_()
    return flat, h.transpose(0, 1)


def write_into_views(s, x):
    h = s.m[0](x)
    diagonal = h.diagonal(dim1=1, dim2=2)
    diagonal.copy_(torch.ones_like(diagonal))
    permuted = h.permute(2, 0, 1)
    permuted.mul_(3.0)
    h.unfold(1, 2, 2).mul_(2.0)
    h.as_strided((2, 3), (8, 2)).add_(1.0)
    h.unsqueeze_(0)
    return h, permuted


def windows_of_a_fill(s, x):
    ones = torch.ones_like(x)
    return s.m[0](x) + ones.as_strided((3, 8), (2, 1))[:1]


def write_into_pieces(s, x):
    h = s.m[0](x)
    with torch.no_grad():
        h.chunk(2, -1)[1].zero_()
        h.unbind(1)[2].fill_(3.0)
        h.split([3, 5], -1)[0].mul_(2.0)
    return h * 2 + s.m[1](x)


def write_elsewhere(s, x):
    h = s.m[0](x)
    with torch.no_grad():
        out = torch.empty_like(h)
        torch.mul(h, 2.0, out=out)
        out.add_(1)
    return s.m[1](h + out)


def write_by_index(s, x, index):
    out = torch.zeros(6, 8).index_add_(0, index, s.m[0](x[0]))
    out.scatter_add_(0, index[:, None].expand(-1, 8), x[1])
    out[index] = s.m[1](x[0])
    return out.masked_fill_(out > 1, 0.5)


def call_twice(s, x):
    h = s.m[1](s.m[0](x))
    return s.m[1](s.m[0](h)) + h


def idle_dropout_is_its_input(s, x):
    h = s.m[0](x)
    nn.functional.dropout(h, 0.5, training=False).mul_(2.0)
    return h


def regions(s, x):
    with torch.no_grad():
        fixed = s.m[0](x) * 2
        flat = fixed.view(-1)
        flat.add_(1)
    h = checkpoint(s.m[1], x, use_reentrant=False)
    s.kept = h
    return {"fixed": fixed, "h": h + torch.arange(8) + torch.tensor(2.0), "none": None, "number": 3}


def on_dataclass(s, batch, scale=1.0):
    return Result(s.m[0](batch.tokens) * scale, 3, (s.m[0](batch.extra["k"]), None, "text"))


def block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def unet(s, x):
    shallow = s.m[0](x)
    return s.m[3](torch.cat([s.m[2](s.m[1](nn.functional.max_pool2d(shallow, 2))), shallow], 1))


def encoder(**options) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    return model


def x() -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


MASK = nn.Transformer.generate_square_subsequent_mask(5)
IDS = torch.tensor([[1, 2, 3], [0, 7, 1]])

CASES: dict[str, tuple[Callable[[], nn.Module], tuple, dict]] = {
    "slices": (lambda: Scripted(write_into_slices, square(), square(), square()), (x(),), {}),
    "views": (lambda: Scripted(write_into_views, square()), (x(),), {}),
    "fill": (lambda: Scripted(windows_of_a_fill, square()), (x(),), {}),
    "pieces": (lambda: Scripted(write_into_pieces, square(), square()), (x(),), {}),
    "out": (lambda: Scripted(write_elsewhere, square(), square()), (x(),), {}),
    "index": (lambda: Scripted(write_by_index, square(), square()), (x(), torch.tensor([0, 1, 1, 3, 5])), {}),
    "twice": (lambda: Scripted(call_twice, square(), nn.ReLU(inplace=True)), (x(),), {}),
    "idle dropout": (lambda: Scripted(idle_dropout_is_its_input, square()), (x(),), {}),
    "regions": (lambda: Scripted(regions, square(), nn.Sequential(square(), nn.ReLU(inplace=True))), (x(),), {}),
    "dataclasses": (lambda: Scripted(on_dataclass, square()), (Batch(x(), {"k": x() + 1}),), {"scale": 3.0}),
    "tied": (tied, (IDS,), {}),
    "unet": (
        lambda: Scripted(unet, block(3, 4), block(4, 8), nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(8, 2, 1)),
        (torch.randn(2, 3, 8, 8),),
        {},
    ),
    "lstm": (lambda: nn.LSTM(8, 4, 2, batch_first=True, bidirectional=True), (x(),), {}),
    "gru": (lambda: nn.GRU(8, 4, 2, batch_first=True), (x(),), {}),
    "attention": (lambda: Scripted(lambda s, q: s.m[0](q, q, q), nn.MultiheadAttention(8, 2, batch_first=True)), (x(),), {}),
    "encoder": (lambda: encoder(norm_first=True), (x(),), {"mask": MASK}),
}
