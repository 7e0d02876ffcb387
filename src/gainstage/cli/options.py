"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from gainstage.cli.models import LoadedModel

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

MODEL_HELP = """\b
MODEL is one of
  package.module:callable   a function or class of an importable module
  path/to/file.py:callable  the same, in a file
  timm:NAME                 timm.create_model(NAME)
  torchvision:NAME          torchvision.models.get_model(NAME)
  hf:MODEL_TYPE             a Transformers model from its default configuration
  path/to/config.json       a Transformers model from a configuration file
The callable returns a module, or (module, args), or (module, args, kwargs).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """What the user said of the model and its inputs, not yet loaded."""

    source: str
    inputs: tuple[str, ...]
    settings: tuple[str, ...]
    meta: bool
    training: bool | None
    seed: int
    runs: bool = True  # the command needs inputs

    def load(self) -> LoadedModel:
        """Build the model and its inputs. Imports torch."""
        from gainstage.cli.models import load

        device = "meta" if self.meta else "cpu"
        return load(
            self.source, inputs=self.inputs if self.runs else None, settings=self.settings, device=device,
            training=self.training, seed=self.seed,
        )  # fmt: skip


def model_options(*, meta: bool, runs: bool = True) -> _Decorator:
    """Add MODEL and everything that says how to build and feed it; the command receives it as its first argument.

    Args:
        meta: whether the command can work without values, on the meta device.
        runs: whether the model is run or followed, and needs inputs.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def invoke(source: str, settings: tuple[str, ...], **rest: Any) -> Any:
            choice = ModelChoice(
                source=source, inputs=rest.pop("inputs", ()), settings=settings, meta=rest.pop("meta", False),
                training=rest.pop("training", None), seed=rest.pop("seed"), runs=runs,
            )  # fmt: skip
            return command(choice, **rest)

        invoke.__doc__ = f"{inspect.cleandoc(command.__doc__ or '')}\n\n{MODEL_HELP}"
        decorated: Callable[..., Any] = invoke
        for option in reversed([*_MODEL_OPTIONS, *(_RUN_OPTIONS if runs else []), _SEED, *([_META] if meta else [])]):
            decorated = option(decorated)
        return decorated

    return decorate


# In the order of the help text.
_MODEL_OPTIONS: list[_Decorator] = [
    click.argument("source", metavar="MODEL"),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="An entry of the configuration (hf; dots go into sub-configurations), or a keyword argument of the callable.",
    ),
]
_RUN_OPTIONS: list[_Decorator] = [
    click.option(
        "--input",
        "inputs",
        multiple=True,
        metavar="[NAME=]SHAPE[:TYPE]",
        help="An input, positional or by name: 2x3x224x224, input_ids=2x32:int, ids=2x32:int:1000 (below 1000), "
        "mask=2x32:bool. Replaces the model's own; repeat for more.",
    ),
    click.option("--train/--eval", "training", default=None, help="Mode of the model.  [default: as it is built]"),
]
_SEED: _Decorator = click.option("--seed", default=0, show_default=True, help="Seed of everything that is drawn.")
_META: _Decorator = click.option("--meta", is_flag=True, help="Build on the meta device: shapes without values.")


def plan_options(command: _Command) -> _Command:
    """Add what decides a plan: policy, balance, distribution, roles, parameters to keep."""
    for option in reversed(
        [
            click.option("--policy", default="unit", show_default=True, help="Named set of targets."),
            click.option(
                "--balance",
                default="forward",
                show_default=True,
                help="What hidden weights keep: forward, backward (gradients), or geometric, the mean of both.",
            ),
            click.option("--distribution", help="Family that weights are drawn from.  [default: what the policy says]"),
            click.option("--role", "roles", multiple=True, metavar="PATTERN=ROLE", help="Role of matching parameters; repeat."),
            click.option("--keep", multiple=True, metavar="PATTERN", help="Parameters to leave as they are; repeat."),
            click.option("--include-frozen", is_flag=True, help="Plan parameters that take no gradient, too."),
        ]
    ):
        command = option(command)
    return command


def output_options(command: _Command) -> _Command:
    """Add ``--json`` and ``--all``."""
    command = click.option("--all", "ungrouped", is_flag=True, help="One row each: do not group repeated blocks.")(command)
    return click.option("--json", "as_json", is_flag=True, help="JSON on standard output, and nothing else there.")(command)


def existing_file(option: str, *, required: bool = False, text: str) -> Callable[[_Command], _Command]:
    """An option that names a file to read."""
    kind = click.Path(exists=True, dir_okay=False, path_type=Path)
    return click.option(option, type=kind, required=required, metavar="FILE", help=text)
