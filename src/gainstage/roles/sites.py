"""Where every parameter is used, and as what: contraction, scale, shift, look-up. The structures come later."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from gainstage.graph import NodeKind, TensorMeta
from gainstage.graph.families import ATTENTION as ATTENTION_OPS
from gainstage.graph.families import (
    CONCATENATION,
    CONTRACTIONS,
    CONVOLUTIONS,
    LOOKUP,
    MOVEMENT,
    NOISE,
    NORMS,
    RECURRENT,
    SOFTMAX,
    argument,
    groups_of,
    is_transposed,
)
from gainstage.roles.coordinates import arriving, numbered, thin
from gainstage.roles.model import TABLES, Role
from gainstage.roles.wiring import Wiring

CONTRACTED = (Role.HIDDEN, Role.DEPTHWISE)


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One use of one parameter by one node, before anything is known of the structures that the node is part of.

    ``degree``: the output is multiplied by c^degree when the parameter is by c. ``rows``: for each coordinate of the output
    along ``axis`` the coordinate of the parameter along ``dim`` that makes it; None where that cannot be said.
    """

    parameter: str
    node: int
    role: Role
    reason: str
    degree: float = 1.0
    output_dims: tuple[int, ...] = (0,)
    dim: int = 0
    axis: int = -1
    rows: torch.Tensor | None = None

    @property
    def is_contraction(self) -> bool:
        """Tell whether the parameter is contracted here, not looked up, added or multiplied."""
        return self.role in CONTRACTED

    @property
    def sets_level(self) -> bool:
        """Tell whether the output's level follows the parameter's scale."""
        scales = self.is_contraction or self.role in (Role.NORM_SCALE, Role.LAYER_SCALE, Role.EMBEDDING)
        return scales and self.degree != 0.0 and not math.isnan(self.degree)


def find_sites(wiring: Wiring) -> Mapping[int, tuple[Site, ...]]:
    """The uses of all parameters, by node."""
    logit_path = feeding_softmax(wiring)
    parameters = {node.parameter: i for i, node in enumerate(wiring.nodes) if node.kind is NodeKind.PARAMETER}
    found: dict[int, list[Site]] = {}
    for weight, degrees in wiring.weights.items():
        for reader in wiring.readers[weight]:
            if wiring.is_signal[reader]:
                for parameter, degree in degrees.items():
                    site = _Reader(wiring, reader, weight, parameters[parameter], degree, logit_path).site()
                    found.setdefault(reader, []).append(site)
    interpolating = {
        site.parameter for sites in found.values() for site in sites if site.role in TABLES and math.isnan(site.degree)
    }
    data = {site.parameter for sites in found.values() for site in sites if site.role in TABLES}
    return {node: tuple(_token(_kept(site, interpolating), data) for site in sites) for node, sites in found.items()}


def _token(site: Site, data: set[str]) -> Site:
    """A vector that is added here and read as data elsewhere (a class token on its stream) is no bias."""
    return replace(site, role=Role.KEPT) if site.role is Role.BIAS and site.parameter in data else site


def _kept(site: Site, interpolating: set[str]) -> Site:
    """A scale that another product uses through a function of its own, w x + (1 - w) y, has no level to be set."""
    if site.role not in (Role.NORM_SCALE, Role.LAYER_SCALE) or site.parameter not in interpolating:
        return site
    return replace(site, role=Role.KEPT, degree=0.0, reason=f"{site.reason}, and enters other products through other functions")


def feeding_softmax(wiring: Wiring) -> frozenset[int]:
    """Nodes from which a softmax is reached by scalings, masks and movement alone, and masks of fused attention."""
    found: set[int] = set()
    easy = MOVEMENT | NOISE | CONCATENATION | {"add", "sub", "mul", "div", "where", "masked_fill", "tanh", "clamp", "sigmoid"}
    for i in range(len(wiring.nodes) - 1, -1, -1):
        name = wiring.names[i]
        if name in SOFTMAX or (i in found and name in easy):
            found.update(wiring.operands[i])
        elif name in ATTENTION_OPS and (mask := wiring.at(i, 3)) >= 0:
            found.add(mask)
    return frozenset(found)


def _widths(shape: Sequence[int]) -> int:
    return sum(size != 1 for size in shape)


@dataclass(frozen=True, slots=True)
class _Reader:
    """One node that reads one weight, seen from one of the parameters that the weight is computed from."""

    wiring: Wiring
    node: int
    weight: int
    source: int
    degree: float
    logit_path: frozenset[int]

    @property
    def parameter(self) -> str:
        name = self.wiring.nodes[self.source].parameter
        assert name is not None
        return name

    @property
    def place(self) -> str:
        return self.wiring.nodes[self.node].name

    def site(self) -> Site:
        name = self.wiring.names[self.node]
        if name in CONTRACTIONS:
            return self.contraction()
        if name in NORMS:
            scale, _ = NORMS[name]
            if self.wiring.at(self.node, scale) == self.weight:
                return self.plain(Role.NORM_SCALE, f"multiplies what {self.place} has normalised", degree=self.degree)
            if self.wiring.at(self.node, 0) == self.weight:
                return self.plain(Role.KEPT, f"is data that {self.place} normalises")
            return self.plain(Role.NORM_SHIFT, f"is added to what {self.place} has normalised")
        if name in LOOKUP:
            return self.lookup()
        if name in RECURRENT:
            if len(self.shape()) < 2:
                return self.plain(Role.BIAS, f"is added inside the cells of {self.place}")
            return self.plain(Role.RECURRENT, f"is contracted inside the cells of {self.place}")
        if name == "prelu":
            return self.plain(Role.SLOPE, f"is the slope of {self.place} on negative values")
        if name in ("add", "sub", "rsub", "add_"):
            return self.addition()
        if name in ("mul", "div"):
            return self.product()
        if name == "addcmul":
            return self.addition() if self.wiring.at(self.node, 0) == self.weight else self.product()
        return self.plain(Role.KEPT, f"enters {self.place} as data; nothing contracts it")

    def shape(self) -> tuple[int, ...]:
        meta = self.wiring.nodes[self.source].meta
        assert isinstance(meta, TensorMeta)
        return meta.shape

    def plain(self, role: Role, reason: str, degree: float = 0.0) -> Site:
        return Site(parameter=self.parameter, node=self.node, role=role, reason=reason, degree=degree)

    def lookup(self) -> Site:
        if self.node in self.logit_path:
            return self.plain(Role.KEPT, f"its rows are added to attention logits after {self.place}")
        rows = Site(
            parameter=self.parameter,
            node=self.node,
            role=Role.EMBEDDING,
            reason=f"its rows are picked by integers in {self.place}",
            degree=self.degree,
            output_dims=(0, 1),
        )
        return rows if self.wiring.at(self.node, 0) == self.weight else self.plain(Role.KEPT, f"weighs the rows of {self.place}")

    def addition(self) -> Site:
        others = [j for j in self.wiring.signals[self.node] if j != self.weight]
        if _widths(self.shape()) > 1 or self.node in self.logit_path:
            return self.plain(Role.KEPT, f"is a table that {self.place} adds as it is")
        if self.sets_rate():
            return self.plain(Role.KEPT, f"shifts a rate: what {self.place} makes goes through an exponential into a product")
        if others and (self.wiring.is_normalised[others[0]] or self.is_scaled_norm(others[0])):
            return self.plain(Role.NORM_SHIFT, f"is added to a normalised signal by {self.place}")
        return self.plain(Role.BIAS, f"is added by {self.place}")

    def sets_rate(self) -> bool:
        """Tell whether a softplus or exponential alone reads the sum, and multiplies: a state space's time step."""
        i = self.node
        while len(self.wiring.readers[i]) == 1:
            i = self.wiring.readers[i][0]
            if self.wiring.names[i] in ("softplus", "exp"):
                return any(name == "mul" for name in (self.wiring.names[j] for j in self.after(i)))
            if self.wiring.names[i] not in MOVEMENT:
                return False
        return False

    def after(self, i: int) -> list[int]:
        """Readers of a node, and of what is moved or clamped in between."""
        found: list[int] = []
        stack = [i]
        while stack:
            for j in self.wiring.readers[stack.pop()]:
                found.append(j)
                if self.wiring.names[j] in MOVEMENT or self.wiring.names[j] in ("clamp", "clamp_min"):
                    stack.append(j)
        return found

    def is_scaled_norm(self, i: int) -> bool:
        """Tell whether a node is a normalised signal times a weight."""
        return self.wiring.names[i] == "mul" and self.wiring.main[i] >= 0 and self.wiring.is_normalised[self.wiring.main[i]]

    def product(self) -> Site:
        signal = self.wiring.main[self.node]
        if signal >= 0 and self.node in self.logit_path and _widths(self.shape()) <= 1:
            return self.temperature()
        if signal < 0 or math.isnan(self.degree) or self.degree <= 0.0:
            if self.is_exponential():
                return self.plain(Role.LOG_SCALE, f"multiplies a signal in {self.place} by its exponential", degree=math.nan)
            return self.plain(Role.KEPT, f"enters {self.place} through a function that is no scale", degree=math.nan)
        if self.wiring.names[self.node] == "div":
            return self.plain(Role.KEPT, f"divides in {self.place}")
        if self.node in self.logit_path:
            return self.plain(Role.KEPT, f"is a table that multiplies logits in {self.place}")
        if self.wiring.is_normalised[signal]:
            return self.plain(Role.NORM_SCALE, f"multiplies a normalised signal in {self.place}", degree=self.degree)
        return self.plain(Role.LAYER_SCALE, f"multiplies a signal entry by entry in {self.place}", degree=self.degree)

    def is_exponential(self) -> bool:
        """Tell whether the weight is the exponential of the parameter, but for signs and movement."""
        passed = set()
        i = self.weight
        while i != self.source and len(self.wiring.operands[i]) == 1:
            passed.add(self.wiring.names[i])
            i = self.wiring.operands[i][0]
        return i == self.source and "exp" in passed and passed <= MOVEMENT | {"exp", "neg"}

    def temperature(self) -> Site:
        """What multiplies or divides logits as a whole or head by head; by its own effect, whatever function it comes through."""
        divides = self.wiring.names[self.node] == "div"
        text = f"{'divides' if divides else 'multiplies'} the logits in {self.place}, which feeds a softmax"
        return self.plain(Role.TEMPERATURE, text, degree=-1.0 if divides else 1.0)

    def contraction(self) -> Site:
        data, weight, bias = self.wiring.factors(self.node)
        if self.wiring.nodes[self.node].short_name == "bilinear":
            data, weight, bias = self.wiring.at(self.node, 0), self.wiring.at(self.node, 2), self.wiring.at(self.node, 3)
        if self.weight == bias and self.weight != weight:
            if self.sets_rate():
                return self.plain(Role.KEPT, f"shifts a rate: what {self.place} makes goes through an exponential into a product")
            role = Role.BIAS if _widths(self.shape()) < 2 else Role.KEPT
            return self.plain(role, f"is added to the contraction {self.place}")
        if self.weight != weight and data >= 0:
            return self.plain(Role.KEPT, f"is data of the contraction {self.place}")
        return self.contracted()

    def contracted(self) -> Site:
        """The weight of a contraction: which of its dimensions index outputs, and which output each row makes."""
        axes = contraction_axes(self.wiring, self.node, self.weight)
        output_dims, dim, axis, rows = self.laid_out(axes)
        name = self.wiring.names[self.node]
        text = f"is contracted by {self.place}"
        degrees = self.wiring.weights[self.weight]
        if self.degree == 0.0:
            text += "; its own scale cancels, as the weight is normalised before"
        elif any(degree == 0.0 for degree in degrees.values()) and not self.varies_along_fan_in(axes):
            return Site(
                parameter=self.parameter,
                node=self.node,
                role=Role.NORM_SCALE,
                reason=f"is the gain of the normalised weight of {self.place}, whose level it sets alone",
                degree=self.degree,
                output_dims=output_dims,
                dim=dim,
                axis=axis,
                rows=rows,
            )
        role = Role.HIDDEN
        if name in CONVOLUTIONS and self.is_depthwise():
            role, text = Role.DEPTHWISE, f"filters each channel by itself in {self.place}"
        return Site(
            parameter=self.parameter,
            node=self.node,
            role=role,
            reason=text,
            degree=self.degree,
            output_dims=output_dims,
            dim=dim,
            axis=axis,
            rows=rows,
        )

    def is_depthwise(self) -> bool:
        node = self.wiring.nodes[self.node]
        groups = groups_of(node)
        data = self.wiring.factors(self.node)[0]
        channels = self.wiring.shape(data)[-(len(self.wiring.shape(self.weight)) - 1)]
        return groups > 1 and groups == channels

    def arrived(self, dim: int) -> list[torch.Tensor]:
        """The coordinate along one dimension of the parameter, at every entry of the weight."""
        start = numbered(self.shape(), dim)
        if self.source == self.weight:
            return [start]
        return arriving(self.wiring, self.source, start, [self.weight], self.path())

    def path(self) -> list[int]:
        """Nodes between the parameter and the weight."""
        found, stack = {self.weight}, [self.weight]
        while stack:
            for j in self.wiring.operands[stack.pop()]:
                if j not in found and j in self.wiring.weights and self.parameter in self.wiring.weights[j]:
                    found.add(j)
                    stack.append(j)
        return sorted(found)

    def varies_along_fan_in(self, axes: Mapping[int, int]) -> bool:
        shape = self.wiring.shape(self.weight)
        contracted = [d for d in range(len(shape)) if d not in axes]
        return any(
            tuple(tensor.shape) == shape and _varies(tensor, d)
            for dim in range(len(self.shape()))
            if self.shape()[dim] > 1
            for tensor in self.arrived(dim)
            for d in contracted
        )

    def laid_out(self, axes: Mapping[int, int]) -> tuple[tuple[int, ...], int, int, torch.Tensor | None]:
        """Output dimensions of the parameter; then one of them with the axis of the output and its rows."""
        if self.source == self.weight:
            dims = tuple(sorted(axes))
            dim = next((d for d in sorted(axes, reverse=True) if axes[d] < 0 or len(axes) == 1), dims[0] if dims else 0)
            rows = numbered(self.shape(), dim) if dims else None
            return dims or (0,), dim, axes.get(dim, -1), None if rows is None else thin(rows)
        shape = self.wiring.shape(self.weight)
        outputs: dict[int, tuple[int, torch.Tensor]] = {}
        for dim in range(len(self.shape())):
            for tensor in self.arrived(dim)[:1]:
                along = [d for d in axes if tuple(tensor.shape) == shape and _varies(tensor, d)]
                if along and not any(_varies(tensor, d) for d in range(len(shape)) if d not in axes):
                    line = tensor
                    for d in range(len(shape) - 1, -1, -1):
                        line = line if d == along[-1] else line.select(d, 0)
                    outputs[dim] = (axes[along[-1]], line)
        if not outputs:
            return (0,), 0, -1, None
        dim = max(outputs)
        return tuple(outputs), dim, *outputs[dim]


def _varies(tensor: torch.Tensor, dim: int) -> bool:
    if tensor.stride(dim) == 0 or tensor.shape[dim] < 2:
        return False
    first = tensor.narrow(dim, 0, 1)
    return bool((thin_pair(tensor, dim) != thin_pair(first, dim)).any())


def thin_pair(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The values without the other dimensions along which they are constant by construction."""
    for d in range(tensor.dim()):
        if d != dim and tensor.stride(d) == 0 and tensor.shape[d] > 1:
            tensor = tensor.narrow(d, 0, 1)
    return tensor


def contraction_axes(wiring: Wiring, i: int, weight: int) -> Mapping[int, int]:
    """Dimensions of the weight that index outputs -> the axis of the output that they become (batch axes counted from 0)."""
    node, name = wiring.nodes[i], wiring.names[i]
    rank = len(wiring.shape(weight))
    if name == "linear":
        return {0: -1} if rank == 2 else {}
    if name in CONVOLUTIONS:
        return {1 if is_transposed(node) else 0: 1 - rank}
    if name == "einsum":
        return _einsum_axes(wiring, i, weight)
    if name == "bilinear":
        return {0: -1}
    if rank < 2:
        return {}
    is_left = wiring.factors(i)[1] == weight and wiring.at(i, _left_place(name)) == weight
    kept = rank - 2 if is_left else rank - 1
    axis = -2 if is_left and len(wiring.shape(wiring.factors(i)[0])) > 1 else -1
    return {**{d: d for d in range(rank - 2)}, kept: axis}


def _left_place(name: str) -> int:
    return 1 if name in ("addmm", "baddbmm", "addbmm", "addmv") else 0


def _einsum_axes(wiring: Wiring, i: int, weight: int) -> Mapping[int, int]:
    equation = str(argument(wiring.nodes[i], 0)).replace(" ", "")
    left, _, output = equation.partition("->")
    factors = argument(wiring.nodes[i], 1)
    place = next(k for k, ref in enumerate(factors) if wiring.number[ref.name] == weight)
    labels = left.split(",")[place]
    if "." in labels:
        return {}
    after = output.rpartition(".")[2]
    return {
        d: after.index(label) - len(after) if label in after else output.index(label)
        for d, label in enumerate(labels)
        if label in output
    }
