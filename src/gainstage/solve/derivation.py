"""How each number came about, as a textbook would write it: the formula, then the numbers filled in, then why."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gainstage.findings import WIDEST_SPREAD
from gainstage.graph import Graph, NodeKind
from gainstage.plan import Passage
from gainstage.policies import Fan, FanScaled
from gainstage.propagate.trace import Signal
from gainstage.roles import Role, Roles
from gainstage.signal import Value
from gainstage.solve.constraint import Demand, Kind, Own, Quantity, data_operand, goal_value, is_lookup, level_of, measure
from gainstage.solve.demands import Demands
from gainstage.solve.determinant import determinant_off
from gainstage.solve.initial import nominal_fan_of
from gainstage.solve.passage import Balance, Passages
from gainstage.solve.setting import Part, Setting
from gainstage.solve.walk import Progress, Solution, fans, output_gain


@dataclass(frozen=True, slots=True)
class Explainer:
    """Writes the lines of every parameter from a finished walk."""

    graph: Graph
    roles: Roles
    demands: Demands
    solution: Solution
    passages: Passages

    def lines(self, name: str) -> tuple[str, ...]:
        """Lines for one parameter."""
        setting = self.solution.settings[name]
        found = [*self._reasons(name), *setting.lines]
        answering = self.demands.answering.get(name, ())
        own = self.demands.own_of.get(name)
        if own is not None and (own.parts or not answering):
            found += self._own(own, setting)
        for demand, parts in answering:
            found += self._demand(demand, own, setting, parts)
        if own is None and not answering and not setting.lines and setting.variance == 0.0:
            effect = setting.slope * setting.mean + setting.offset
            found.append("starts at zero" if effect == 0.0 else "starts as the identity")
        return tuple(found)

    def passage(self, name: str) -> Passage | None:
        """What the parameter does to levels forward and backward; None where it is not contracted with a signal."""
        own = self.demands.own_of.get(name)
        found = None if own is None else self.passages.through(own, self.solution.values)
        return None if found is None else replace(found, origin=self._place(found.origin))

    def centred(self, setting: Setting) -> Setting:
        """A kernel with its centre tap only, which never falls into the padding: as loud as the one with independent taps."""
        own = self.demands.own_of.get(setting.info.name)
        if own is None:
            return setting
        ratio = fans(own, self.graph, self.solution.values, setting)[0] / nominal_fan_of(own.use, setting.info, self.graph)
        return replace(setting, variances=tuple(variance * ratio for variance in setting.variances))

    def _reasons(self, name: str) -> list[str]:
        uses = self.roles.uses.get(name, ())
        reasons = list(dict.fromkeys(use.reason for use in uses if use.reason))
        calls = {use.node for use in uses}
        if len(calls) > 1 and len(reasons) > 4:
            reasons = [*reasons[:3], f"and {len(reasons) - 3} more uses like these; the first in execution order decides"]
        elif len(calls) > 1 and not any(use.rows for use in uses):
            reasons.append(f"it is used {len(calls)} times; the first use decides, unless a demand below names another")
        return reasons

    def _own(self, own: Own, setting: Setting) -> list[str]:
        values = self.solution.values
        part = min(own.parts)[1] if own.parts else 0
        variance = setting.variances[part]
        progress = self.solution.own[own.use.parameter]
        rows = f"rows {_rows(setting, own.parts)}: " if len(own.parts) < len(setting.variances) else ""
        if not isinstance(values.get(own.use.node), Value) or progress.has_no_effect or (own.parts and not own.starts):
            fan = nominal_fan_of(own.use, setting.info, self.graph)
            return [f"{rows}its scale cancels further down (the weight is normalised), so any will do: Var(w) = 1 / {fan:g}"]
        fan_in, fan_out = fans(own, self.graph, values, setting)
        nominal = nominal_fan_of(own.use, setting.info, self.graph)
        padded = f" ({nominal:g} in the weight; the rest falls into the padding)" if fan_in < 0.999 * nominal else ""
        if isinstance(own.target, FanScaled):
            if own.target.fan is Fan.IN:
                return [f"{rows}Var(w) = {own.target.gain:g} / n = {own.target.gain:g} / {fan_in:.6g} = {variance:.4g}{padded}"]
            text = f"{rows}Var(w) = {own.target.gain:g} / ((n_in + n_out) / 2) = "
            return [f"{text}{2 * own.target.gain:g} / ({fan_in:.6g} + {fan_out:.6g}) = {variance:.4g}{padded}"]
        level = own.target.second_moment
        node = self.graph.by_name[own.use.node]
        if is_lookup(node):
            return [f"{rows}Var(w) = E[y^2] = {variance:.4g}: a look-up has fan-in 1"]
        operand = data_operand(node, values)
        if operand is None or setting.mixing is not None:
            gain = output_gain(own, values, setting)
            return [f"{rows}Var(w) = {level:g} / {gain:.4g} = {variance:.4g}, so that the output starts with E[y^2] = {level:g}"]
        x = level_of(operand[1])
        if own.is_balanced and self.passages.balance is not Balance.FORWARD:
            return self._balanced(own, level, setting, rows)
        return [
            f"{rows}Var(w) = E[y^2] / (n E[x^2]), so that the output starts with E[y^2] = {level:g}",
            f"n = {fan_in:.6g}{padded}; {self._predicted(*operand)}",
            f"Var(w) = {level:g} / ({fan_in:.6g} x {x:.4g}) = {variance:.4g}, std {math.sqrt(variance):.4g}",
        ]

    def _balanced(self, own: Own, level: float, setting: Setting, rows: str) -> list[str]:
        """The variance that the gradient asks for, alone or with that of the signal."""
        values, variance = self.solution.values, setting.variance
        passage = self.passages.through(own, values)
        if passage is None or passage.backward <= 0.0:
            return [f"{rows}Var(w) = {variance:.4g} by the level alone: no gradient passes"]
        forward, backward = level / output_gain(own, values, setting), variance / passage.backward
        fan_out = fans(own, self.graph, values, setting)[1]
        lines = [
            f"{rows}Var(w) = 1 / (n_out s^2) keeps E[g^2] on the way back to {self._place(passage.origin)}",
            f"n_out = {fan_out:.6g}; s^2 = {1.0 / (backward * fan_out):.4g} is left of E[g^2] by what lies on that way",
        ]
        if self.passages.balance is Balance.BACKWARD:
            return [*lines, f"Var(w) = {variance:.4g}, where E[y^2] = {level:g} would take {forward:.4g}"]
        return [
            *lines,
            f"that is {backward:.4g}, where E[y^2] = {level:g} takes {forward:.4g}",
            f"Var(w) = {variance:.4g}, the geometric mean of both",
        ]

    def _demand(self, demand: Demand, own: Own | None, setting: Setting, parts: Iterable[Part]) -> list[str]:
        progress = self.solution.demands[demand]
        rows = f"rows {_rows(setting, parts)}: " if len(set(parts)) < len(setting.variances) else ""
        explain = {
            Kind.STREAM: self._stream,
            Kind.MERGE: self._merge,
            Kind.LOGITS: self._logits,
            Kind.HEAD: self._head,
            Kind.DETERMINANT: self._determinant,
            Kind.GAIN: self._gain,
        }[demand.kind]
        lines = explain(demand)
        lines[0] = rows + lines[0]
        if demand.share != 1.0:
            lines.append(f"this branch is asked for {demand.share:.4g} times an equal share")
        part = min(parts)[1]
        lines += self._filled_in(demand, own, setting.variances[part]) if own is not None else []
        lines.append(self._result(demand, setting, part, progress))
        return lines

    def _filled_in(self, demand: Demand, own: Own, variance: float) -> list[str]:
        """The demand's formula in terms of the weight's own contraction, with its numbers."""
        values = self.solution.values
        setting = self.solution.settings[own.use.parameter]
        operand = data_operand(self.graph.by_name[own.use.node], values)
        is_product = operand is not None and not is_lookup(self.graph.by_name[own.use.node]) and setting.mixing is None
        if operand is None or not is_product or operand[1].second_moment <= 0.0:
            return []
        fan_in, _ = fans(own, self.graph, values, setting)
        level = level_of(operand[1])
        given = f"n = {fan_in:.6g}; {self._predicted(*operand)}"
        goal = goal_value(demand.goal, values)
        if demand.kind is Kind.LOGITS:
            rest = math.sqrt(goal) / (fan_in * level * variance)
            return [
                given,
                f"Var(w) = {math.sqrt(goal):.4g} / (n E[x^2] c) = {variance:.4g} with c = scale sqrt(d_h (1 - r)) = {rest:.4g}",
            ]
        rest = goal / (fan_in * level * variance)
        further = f" x {rest:.4g}" if abs(rest - 1.0) > 1e-3 else ""
        why = f"; {rest:.4g} is the gain from there to the place of the demand" if further else ""
        return [given, f"Var(w) = {goal:.4g} / ({fan_in:.6g} x {level:.4g}{further}) = {variance:.4g}{why}"]

    def _result(self, demand: Demand, setting: Setting, part: int, progress: Progress) -> str:
        found = measure(demand.quantity, self.graph, demand.node, self.solution.values) - demand.prior
        goal = goal_value(demand.goal, self.solution.values)
        variance, mean = setting.variances[part], setting.means[part]
        chosen = f"w = {mean:.4g}" if variance == 0.0 else f"Var(w) = {variance:.4g}, std {math.sqrt(variance):.4g}"
        if progress.is_met:
            return f"{chosen} gives {found:.4g}"
        if found <= 0.0:
            return f"{chosen}: nothing of it arrives at {self._place(demand.node)}"
        if progress.has_no_effect:
            return f"{chosen}: what follows is normalised or bounded, {demand.quantity.value} is {found:.4g} whatever it is"
        return f"{chosen} gives {found:.4g} where {goal:.4g} is asked for: out of reach"

    def _stream(self, demand: Demand) -> list[str]:
        first, _ = demand.goal.terms[0]
        level = self._level(first)
        goal = goal_value(demand.goal, self.solution.values)
        start = f"E[stream^2] = {level:.4g} at {self._place(first)}"
        if level == 0.0:
            start, level = f"the stream is silent at {self._place(first)}, and taken as if it started at 1", 1.0
        return [
            f"E[branch^2] = E[stream^2] / N: each of the N = {demand.count} branches adds an equal share; the stream stays O(1)",
            f"{start}: each share is {level:.4g} / {demand.count} = {goal / demand.share:.4g}",
        ]

    def _merge(self, demand: Demand) -> list[str]:
        goal = goal_value(demand.goal, self.solution.values)
        goal /= demand.share
        if demand.goal.terms:
            others = ", ".join(self._place(name) for name, _ in demand.goal.terms)
            channels = f": n_b E[branch^2] is the same, n_b = {demand.width} here" if demand.width > 1 else ""
            return [f"E[branch^2] = {goal:.4g}: contributes as much as its sibling at {others}{channels}"]
        if demand.width:
            return [
                f"n_b E[branch^2] is the same for all {demand.count} branches, and 1 on average over the channels",
                f"n_b = {demand.width} of the concatenated channels: E[branch^2] = {goal:.4g}",
            ]
        return [f"E[branch^2] = 1 / {demand.count} = {goal:.4g}: {demand.count} siblings are added, to a second moment of 1"]

    def _logits(self, demand: Demand) -> list[str]:
        goal = demand.goal.constant
        place = f"logits at {self._place(demand.node)} with variance {goal:g} over the keys, where r is their correlation:"
        roles = {lever.use.role for group in demand.groups for lever in group}
        cancels = "queries and keys are normalised, so that the scale of their weights cancels"
        if Role.TEMPERATURE in roles:
            return [place, f"t^2 d_h E[q^2] E[k^2] (1 - r) = {goal:g} for the temperature t; {cancels}"]
        if Role.NORM_SCALE in roles:
            return [place, f"scale^2 d_h (g_q g_k)^2 (1 - r) = {goal:g} for the scales g of the norms; {cancels}"]
        return [place, f"scale^2 d_h (n v E[x^2])^2 (1 - r) = {goal:g} with v_q = v_k = v"]

    def _head(self, demand: Demand) -> list[str]:
        goal = demand.goal.constant
        if demand.width <= 1:
            text = f"E[loss] = log 2 + s^2/8 for one logit under a sigmoid: s^2 = {goal:.4g} is 1 % above chance"
        else:
            text = (
                f"E[loss] = log C + s^2 (1 - 1/C)/2 for C = {demand.width} logits of variance s^2: "
                f"s^2 = {goal:.4g} is 1 % above chance"
            )
        lines = [text] if not demand.prior else [text, f"its bias holds class priors of mean square {demand.prior:.4g} besides"]
        names = {lever.part[0] for group in demand.groups for lever in group}
        if any(self.roles.of(name) is Role.TIED_HEAD for name in names):
            lines.append(
                "it is also the embedding: the head's demand wins, and the stream starts at the level that this gives it"
            )
            if demand.quantity is Quantity.LOSS_ABOVE_CHANCE:
                level = self._level(demand.node)
                lines.append(
                    f"the own logit of each token is higher, so that E[y^2] = {level:.4g} costs what {goal:.4g} does else"
                )
        return lines

    def _determinant(self, demand: Demand) -> list[str]:
        value = self.solution.values[demand.node]
        mean = value.mean if isinstance(value, Value) else 0.0
        is_off = determinant_off(demand, self.solution.values) != 0.0
        if self.graph.by_name[demand.node].kind is NodeKind.CONSTANT:
            return [
                f"log det is {mean:.3g} whatever the weights are: these couplings only add;",
                f"their shifts get a variance of {demand.goal.constant:.4g}, so that the flow starts near the identity",
            ]
        return [
            f"Var(log det) = {demand.goal.constant:.4g} at {self._place(demand.node)}, over draws and inputs: a volume near 1;",
            "scales and shifts, which the flow adds, are equally quiet",
            f"its mean is {mean:.3g}" + (": the library's functions of a scale are bounded, or have no bias" if is_off else ""),
        ]

    def _gain(self, demand: Demand) -> list[str]:
        return [
            f"the weight that it scales is normalised: it sets E[y^2] = {demand.goal.constant:g} at {self._place(demand.node)}"
        ]

    def _level(self, node: str) -> float:
        value = self.solution.values[node]
        return level_of(value) if isinstance(value, Value) else 0.0

    def _predicted(self, name: str, x: Value) -> str:
        predicted = f"E[x^2] = {level_of(x):.4g} predicted at {self._place(name)}"
        if Signal(x).is_typical:
            return predicted
        return f"{predicted}, an average over draws that stray by factors beyond {math.exp(WIDEST_SPREAD):.0f}"

    def _place(self, name: str) -> str:
        node = self.graph.by_name[name]
        path = node.provenance.module_path
        return f"{path} ({name})" if path else name


def _rows(setting: Setting, parts: Iterable[Part]) -> str:
    spans: list[list[int]] = []
    for _, part in sorted(parts):
        start, stop = setting.cuts[part], setting.cuts[part + 1]
        if spans and spans[-1][1] == start:
            spans[-1][1] = stop
        else:
            spans.append([start, stop])
    return ", ".join(f"{start}:{stop}" for start, stop in spans)
