"""A plan as a Python script that needs no Gainstage: a table of rules, and the body in ``standalone.py``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import resources

from gainstage.plan.distribution import Distribution, ParameterPlan

# Between these lines stands what a plan says.
_BEGIN, _END = "# What the plan says.\n", "# End of what the plan says.\n"

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a name that is a number


def script_of(policy: str, parameters: Mapping[str, ParameterPlan], notes: tuple[str, ...]) -> str:
    """The text of the script.

    Args:
        policy: of the plan.
        parameters: of the plan.
        notes: of the plan.
    """
    body = resources.files("gainstage.plan").joinpath("standalone.py").read_text(encoding="utf-8")
    _, _, body = body.partition('"""\n\n')  # its own docstring
    before, _, rest = body.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    rules = "\n".join(line for group in _groups(parameters) for line in _rule(group))
    tied = [f"    {alias!r}: {name!r}," for name, parameter in parameters.items() for alias in parameter.aliases]
    aliases = "\n".join(["ALIASES: dict[str, str] = {", *tied, "}"]) if tied else "ALIASES: dict[str, str] = {}"
    return f"{_docstring(policy, notes)}\n\n{before}RULES: tuple[Rule, ...] = (\n{rules}\n)\n{aliases}\n{after}"


def _docstring(policy: str, notes: tuple[str, ...]) -> str:
    lines = [
        f"Initialization of a model, planned by Gainstage for the policy {policy!r}.",
        "",
        "    initialize(model)                     the planned distributions, with torch's generator",
        "    initialize_exactly(model, seed=0)     the values of gainstage.apply(model, plan, seed=0), bit for bit",
        "    set_init_weights(LlamaPreTrainedModel)  for Transformers: its models are born with the planned distributions",
        "    set_param_init(model)                 for torchtitan: then model.init_states() draws the planned distributions",
        *([""] if notes else []),
        *notes,
    ]
    text = "\n".join(lines).replace("\\", "\\\\").replace('"""', "'''")
    return f'"""{text}\n"""'


def _groups(parameters: Mapping[str, ParameterPlan]) -> Iterator[list[ParameterPlan]]:
    """Parameters that are drawn alike and whose names differ in numbers only, in the order of the first of each."""
    groups: dict[tuple[object, ...], list[ParameterPlan]] = {}
    for name, parameter in parameters.items():
        alike = (_NUMBER.sub("0", name), parameter.distribution, parameter.blocks, parameter.output_dims)
        groups.setdefault((*alike, parameter.shape if parameter.blocks else None), []).append(parameter)
    yield from groups.values()


def _rule(group: list[ParameterPlan]) -> Iterator[str]:
    """The lines of one rule, with its derivation."""
    first = group[0]
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    for line in (f"{first.name}{more}: {first.role}", *first.derivation):
        yield "    # " + " ".join(line.split())
    yield f"    Rule({_pattern([parameter.name for parameter in group])!r}, ("
    for part in _parts(first):
        yield f"        {part},"
    yield f"    ), {first.output_dims!r}),"


def _pattern(names: list[str]) -> str:
    """A regular expression for these names and no others that differ in a number."""
    pieces = [_NUMBER.split(name) for name in names]
    numbers = [_NUMBER.findall(name) for name in names]
    varying = [sorted({row[column] for row in numbers}, key=int) for column in range(len(numbers[0]))]
    count = 1
    for choices in varying:
        count *= len(choices)
    if count != len(names):  # not every combination of the numbers
        return "|".join(re.escape(name) for name in names)
    pattern = re.escape(pieces[0][0])
    for choices, piece in zip(varying, pieces[0][1:], strict=True):
        pattern += (choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})") + re.escape(piece)
    return pattern


def _parts(parameter: ParameterPlan) -> Iterator[str]:
    if not parameter.blocks:
        yield _part(parameter.distribution)
        return
    dim = parameter.blocks[0].dim
    end = 0
    for block in parameter.blocks:
        if end < block.start:
            yield _part(parameter.distribution, dim, end, block.start)
        yield _part(block.distribution, dim, block.start, block.stop)
        end = block.stop
    if end < parameter.shape[dim]:
        yield _part(parameter.distribution, dim, end, parameter.shape[dim])


def _part(distribution: Distribution, *place: int) -> str:
    values = (distribution.family.value, distribution.mean, distribution.std, *place)
    mixing = distribution.mixing
    mixed = "" if mixing is None else f", mixing=({mixing.stream!r}, {mixing.rank}, {mixing.text!r})"
    return f"Part({', '.join(map(repr, values))}{mixed})"
