"""Situation 2: branches that merge contribute equally, or as asked, forward and in the gradient that they receive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from benchmarks.situations.models import Subject, each, from_timm, from_torch, from_torchvision, from_transformers
from benchmarks.situations.rows import DRAWS, Measurement, Row, row_over
from benchmarks.zoo.reference import Example

import gainstage as gs
from gainstage.capture import capture
from gainstage.cli.models import cpu_torchvision
from gainstage.graph import Graph, NodeKind
from gainstage.propagate.execution import Execution
from gainstage.roles import Roles, infer_roles

FORWARD, BACKWARD = (1.0, 1.1), (1.0, 1.25)


def _pyramid() -> Example:
    cpu_torchvision()
    from collections import OrderedDict

    from torchvision.ops import FeaturePyramidNetwork

    class Pyramid(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pyramid = FeaturePyramidNetwork([16, 32, 64], 64)

        def forward(self, *levels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(self.pyramid(OrderedDict((str(i), level) for i, level in enumerate(levels))).values())

    return Example(Pyramid(), tuple(torch.randn(8, n, 512 // n, 512 // n) for n in (16, 32, 64)))


def _explicit() -> Example:
    """Torch's modules: the explicit form of ResNeXt, 8 paths that are added."""

    class Paths(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.paths = torch.nn.ModuleList(
                torch.nn.Sequential(
                    torch.nn.Conv2d(64, 4 * n, 1), torch.nn.ReLU(), torch.nn.Conv2d(4 * n, 4 * n, 3, padding=1), torch.nn.ReLU(),
                    torch.nn.Conv2d(4 * n, 64, 1),
                )
                for n in (64, 64, 128, 256)
            )  # fmt: skip
            self.head = torch.nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = [path(x) for path in self.paths]
            output: torch.Tensor = self.head(sum(found[1:], found[0]).relu().mean((2, 3)))
            return output

    return Example(Paths(), (torch.randn(8, 64, 14, 14),))


SUBJECTS = (
    from_torch("4 paths that are added", _explicit),
    from_torchvision("inception_v3", size=299, init_weights=False, aux_logits=False),
    from_torchvision("googlenet", init_weights=False, aux_logits=False),
    Subject("torchvision", "FeaturePyramidNetwork", _pyramid),
    from_timm("repvgg_a0", size=128, batch=4),
    from_timm("resnext50_32x4d", size=128, batch=4),
    from_timm("res2net50_26w_4s", size=128, batch=4),
    from_timm("hrnet_w18_small", size=128, batch=4),
    from_timm("skresnet18", size=128, batch=4),
    from_transformers("gptj", n_layer=2, n_head=4, n_embd=128, rotary_dim=16),
    from_transformers("gpt_neox", use_parallel_residual=True),
    from_transformers("falcon", "falcon, PaLM's form", parallel_attn=True, ffn_hidden_size=256),
)


def measurements() -> list[Measurement]:
    """Loudest over quietest branch of each merge."""
    return each(SUBJECTS, rows_of)


def mergings(graph: Graph, roles: Roles) -> list[tuple[str, ...]]:
    """Sums and concatenations of siblings, and several branches that one addition puts on a stream."""
    found = [tuple(branch.operand for branch in merge.branches) for merge in roles.merges]
    for stream in roles.streams:
        pairs = list(zip(stream.adds, stream.branches, strict=True))
        found += [tuple(b.operand for other, b in pairs if other == add) for add in dict.fromkeys(stream.adds)]
    first = {node.name: position for position, node in enumerate(graph.nodes)}
    return [names for names in sorted(found, key=lambda names: first[names[0]]) if len(set(names)) > 1]


def rows_of(subject: Subject) -> Iterator[Row]:
    """Forward: summed squares of a branch, what a merged second moment is made of. Gradient: mean squares of its entries."""
    first = subject.draw(0)
    plan = gs.plan(first.model, first.args, first.kwargs)
    squares, slopes = [], []
    for seed in range(DRAWS if subject.package in ("timm", "torchvision") else 4 * DRAWS):  # the others are narrow, and quick
        example = subject.draw(seed)
        gs.apply(example.model, plan, seed=seed)
        forward, backward = passed(example)
        squares.append(forward)
        slopes.append(backward)
    named = {"situation": "branches", "package": subject.package, "model": subject.name}
    yield row_over(ratios(squares), **named, quantity="loudest over quietest branch", asked=FORWARD)
    yield row_over(ratios(slopes), **named, quantity="loudest over quietest gradient", asked=BACKWARD)


def ratios(draws: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """Largest over smallest of the means over draws, for each merge."""
    means = [np.mean(branches, axis=0) for branches in zip(*draws, strict=True)]
    return [float(mean.max() / mean.min()) for mean in means]


def passed(example: Example) -> tuple[list[list[float]], list[list[float]]]:
    """For each merge the summed squares of its branches and the mean squares of their gradients, in a real pass of the graph."""
    graph = capture(example.model, example.args, example.kwargs)
    found = mergings(graph, infer_roles(graph))
    wanted = {name for merging in found for name in merging}
    read = Counter(name for node in graph.nodes for name in node.operands())
    parameters = dict(example.model.named_parameters())
    results: dict[str, torch.Tensor] = {}
    with torch.enable_grad():
        for node, result in Execution(graph, parameters, wanted).run():
            if node.name in wanted or node.name in graph.outputs:
                results[node.name] = result
    outputs = [results[name] for name in graph.outputs if name in results and results[name].requires_grad]
    names = [name for name in sorted(wanted) if name in results and graph.by_name[name].kind is NodeKind.OP]
    gradients = torch.autograd.grad(
        outputs, [results[name] for name in names], [torch.randn_like(output) for output in outputs], allow_unused=True
    )
    by_name = {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
    made = [merging for merging in found if all(name in by_name for name in merging)]
    return (
        [[float(results[name].detach().double().square().sum()) for name in merging] for merging in made],
        [
            [float(by_name[name].double().square().mean()) for name in merging]
            for merging in made
            if all(read[name] == 1 for name in merging)  # other readers send gradients of their own
        ],
    )
