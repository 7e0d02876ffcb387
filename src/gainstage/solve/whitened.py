"""First layers that are whitened: which layers read an input whose covariance is known, and what they then put out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from gainstage.graph import Graph, Node, NodeKind, Ref, TensorMeta
from gainstage.graph.families import argument
from gainstage.inputs import Features, InputStatistics, Patches, Rows, Whitening, output_value, padding_of, whitening_of
from gainstage.plan import Block, Distribution, Family, Mixing, ParameterPlan
from gainstage.policies import FanScaled, Policy
from gainstage.roles import Roles
from gainstage.rules.linear import per_dim
from gainstage.signal import Value
from gainstage.signal.movement import reshape
from gainstage.solve.setting import Setting

aten = torch.ops.aten

# What leaves the order of entries as it is.
_IN_ORDER = frozenset(
    {
        aten.flatten.using_ints, aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.unflatten.int,
        aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.contiguous.default,
        aten.clone.default, aten.alias.default, aten.detach.default, aten.to.dtype, aten._to_copy.default,
    }
)  # fmt: skip
_CONVOLUTIONS = frozenset(
    {
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
        aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstLayer:
    """A contraction of an input with a weight that is drawn through the input's whitening matrix."""

    node: Node
    parameter: str
    bias: str | None
    statistics: InputStatistics
    whitening: Whitening
    batch: int  # samples in the example

    def value(self, setting: Setting) -> Value:
        """What it puts out, with the weight at its present variance."""
        assert isinstance(self.node.meta, TensorMeta)
        outputs = setting.info.shape[0]
        is_map = isinstance(self.statistics.rows, Patches)
        found = output_value(self.statistics, self.whitening, setting.variance, self.batch, outputs, is_map=is_map)
        return replace(reshape(found, self.node.meta.shape), lineage=1 << setting.index)

    @property
    def mixing(self) -> Mixing:
        """What the weight is drawn through."""
        return Mixing.by(self.parameter, self.whitening.matrix)[0]

    def lines(self) -> tuple[str, ...]:
        """The derivation of the weight's shape, for its explanation."""
        rows, found = self.statistics.rows, self.whitening
        count = "known moments" if self.statistics.samples is None else f"{self.statistics.samples:,} samples"
        kind = "covariance" if found.centre is not None else "second moments (there is no bias to take off the mean)"
        lines = [
            f"Cov(w) = Sigma^-1 / r: all outputs have the same second moment, and each {found.rank} of them no correlation",
            f"Sigma: {kind} of {rows} over {count}, condition {found.condition:.3g}",
        ]
        lost = rows.columns - found.silent - found.rank
        if found.silent or lost:
            lines.append(
                f"rank {found.rank} of {rows.columns}: {found.silent} columns do not vary, "
                f"{lost} directions are sums of others; no weight there"
            )
        if found.rare:
            lines.append(
                f"{found.rare} columns owe their variance to a few rows, which does not tell that of others; "
                "to each the variance of the average one of them is added"
            )
        if (how := found.shrinkage.said(found.target)) is not None:
            lines.append(f"{how}: under this each part of the data is likeliest given the others")
        return tuple(lines)

    def bias_of(self, weight: ParameterPlan, bias: ParameterPlan) -> ParameterPlan:
        """The bias that takes off what the weight makes of the mean, row by row."""
        assert self.whitening.centre is not None
        column = -(self.whitening.matrix @ self.whitening.centre)[:, None]
        if not column.any():
            return bias
        mixing, factor = Mixing.by(self.parameter, column)

        def like(distribution: Distribution) -> Distribution:
            if distribution.mixing is None:
                return Distribution(family=Family.CONSTANT)
            return Distribution(family=Family.MIXED, std=factor * distribution.std, mixing=mixing)

        return replace(
            bias,
            distribution=like(weight.distribution),
            blocks=tuple(Block(0, block.start, block.stop, like(block.distribution)) for block in weight.blocks),
            derivation=(f"b = -{self.parameter} times the mean of its input, row by row: outputs start with mean 0",),
        )


@dataclass(frozen=True, slots=True)
class FirstLayers:
    """All of a model, by node; and what is to be said of inputs that no such layer reads."""

    layers: Mapping[str, FirstLayer] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_first_layers(
    graph: Graph, roles: Roles, policy: Policy, inputs: Mapping[str, InputStatistics], settings: Mapping[str, Setting]
) -> FirstLayers:
    """Layers that read a measured input directly, with a weight that the solver decides.

    Args:
        graph: the captured model.
        roles: of its parameters.
        policy: its targets; a recipe that fixes variances by fans is left as it is.
        inputs: input node -> its statistics.
        settings: of all parameters before anything is decided.
    """
    layers: dict[str, FirstLayer] = {}
    notes = []
    for name, statistics in inputs.items():
        search = _Search(graph, roles, policy, settings, statistics, graph.by_name[name])
        found = search.run()
        layers |= {layer.node.name: layer for layer in found}
        if not found:
            notes.append(f"inputs: nothing that reads {name} is whitened: {search.why}")
    return FirstLayers(layers, tuple(notes))


@dataclass(slots=True)
class _Search:
    """Layers that read one input."""

    graph: Graph
    roles: Roles
    policy: Policy
    settings: Mapping[str, Setting]
    statistics: InputStatistics
    input: Node
    why: str = "no weight multiplies it directly"
    whitenings: dict[bool, Whitening] = field(default_factory=dict)  # by whether a bias takes off the mean

    def run(self) -> list[FirstLayer]:
        reached, found = {self.input.name}, []
        for node in self.graph.nodes:
            operands = list(node.operands())
            if node.op in _IN_ORDER and operands and operands[0] in reached:
                reached.add(node.name)
            elif (parts := _parts(node, self.graph, reached)) is not None and (layer := self.layer(node, *parts)) is not None:
                found.append(layer)
        return found

    def layer(self, node: Node, weight: str, bias: str | None) -> FirstLayer | None:
        """The layer, where the solver decides its weight and the statistics are of what it multiplies."""
        setting = self.settings[weight]
        if setting.is_fixed or isinstance(self.policy.targets[self.roles.of(weight)], FanScaled):
            self.why = f"{weight} is not decided by the signal"
            return None
        rows = _rows(node, setting.info.shape)
        if rows != self.statistics.rows or len({use.node for use in self.roles.uses[weight]}) > 1:
            multiplied = rows or "parts of its input by parts of it"
            self.why = f"{weight} multiplies {multiplied}, measured were {self.statistics.rows}; name the layer with first="
            return None
        assert isinstance(self.input.meta, TensorMeta)
        is_centred = bias is not None and _can_take_off(bias, self.roles, self.settings)
        if is_centred not in self.whitenings:
            self.whitenings[is_centred] = whitening_of(self.statistics, is_centred=is_centred)
        return FirstLayer(
            node=node,
            parameter=weight,
            bias=bias if is_centred else None,
            statistics=self.statistics,
            whitening=self.whitenings[is_centred],
            batch=self.input.meta.shape[0],
        )


def _parts(node: Node, graph: Graph, reached: set[str]) -> tuple[str, str | None] | None:
    """Weight and bias of a layer that reads one of these nodes."""
    if node.op is not aten.linear.default and node.op not in _CONVOLUTIONS:
        return None
    names = [argument.name if isinstance(argument, Ref) else None for argument in (*node.args[:3], None)]
    weight, bias = (graph.by_name[name] if name is not None else None for name in names[1:3])
    if names[0] not in reached or weight is None or weight.parameter is None:
        return None
    if bias is not None and bias.kind is not NodeKind.PARAMETER:
        return None
    return weight.parameter, None if bias is None else bias.parameter


def _rows(node: Node, shape: tuple[int, ...]) -> Rows | None:
    """What a node multiplies its weight with."""
    if node.op is aten.linear.default:
        return Features(shape[1])
    rank, kernel = len(shape) - 2, shape[2:]
    stride, padding, dilation, groups = (argument(node, place) for place in range(3, 7))
    if groups not in (None, 1):
        return None
    dilations = tuple(per_dim(1 if dilation is None else dilation, rank))
    around = padding if isinstance(padding, str) else tuple(per_dim(0 if padding is None else padding, rank))
    return Patches(
        channels=shape[1],
        kernel=kernel,
        stride=tuple(per_dim(1 if stride is None else stride, rank)),
        padding=padding_of(around, kernel, dilations),
        dilation=dilations,
    )


def _can_take_off(bias: str, roles: Roles, settings: Mapping[str, Setting]) -> bool:
    """Whether the plan may set this bias: it would be zero, and nothing else reads it."""
    setting = settings[bias]
    is_zero = setting.given is None and setting.mean == 0.0 and setting.variance == 0.0
    return is_zero and len({use.node for use in roles.uses[bias]}) == 1
