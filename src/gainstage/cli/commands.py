"""The commands. Each loads a model, calls the public function of the same name, and shows the result."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gainstage import __version__
from gainstage.cli.options import ModelChoice, existing_file, model_options, output_options, plan_options
from gainstage.errors import GainstageError, InputError, PlanFormatError

if TYPE_CHECKING:
    from rich.console import Console

    from gainstage.cli.models import LoadedModel
    from gainstage.plan import Plan


class _Refusal(click.ClickException):
    """One of our exceptions as one message; 2 is the exit code for what is wrong with the input."""

    exit_code = 2


class _Group(click.Group):
    """Shows Gainstage's own exceptions without a traceback; any other is a bug, and keeps it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GainstageError as error:
            raise _Refusal(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, package_name="gainstage")
def main() -> None:
    """Signal levels of any PyTorch model at initialization: predict, plan, apply, verify.

    \b
    gainstage inspect torchvision:resnet50     what every layer puts out at step zero
    gainstage plan hf:llama --meta             a distribution for every parameter
    gainstage verify timm:convnext_tiny        one real pass against the prediction
    """  # noqa: D301  (the backslash is click's mark for text that is not to be wrapped)


@main.command()
@click.option("--roles", "only_roles", is_flag=True, help="What every parameter is for, and why, in the place of the signals.")
@click.option("--role", "roles", multiple=True, metavar="PATTERN=ROLE", help="With --roles: as plan would take it; repeat.")
@click.option("--modes", is_flag=True, help="Where training and evaluation differ, as by dropout.")
@output_options
@model_options(meta=True)
def inspect(
    choice: ModelChoice, *, as_json: bool, ungrouped: bool, only_roles: bool, roles: tuple[str, ...], modes: bool
) -> None:
    """Predict every tensor at the present weights, or say what every parameter is for (--roles, also with --meta)."""
    import gainstage as gs

    if only_roles:
        _show_roles(choice, _role_pairs(roles), as_json=as_json, ungrouped=ungrouped)
        return
    if roles or choice.meta:
        raise InputError("--role and --meta go with --roles: the prediction needs values, and knows no roles")
    loaded = choice.load()
    if modes:
        _show_modes(loaded, as_json=as_json, ungrouped=ungrouped)
        return
    trace = gs.inspect(loaded.model, loaded.args, loaded.kwargs)
    if as_json:
        _write_json(trace.to_dict())
        return
    from gainstage.report.traces import trace_report

    console().print(trace_report(trace, grouped=not ungrouped))


def _show_modes(loaded: LoadedModel, *, as_json: bool, ungrouped: bool) -> None:
    import gainstage as gs
    from gainstage.report.modes import mode_rows, modes_report

    traces = [gs.inspect(loaded.model.train(mode), loaded.args, loaded.kwargs, gradients=False) for mode in (True, False)]
    rows = mode_rows(*traces)
    if as_json:
        _write_json([row.to_dict() for row in rows])
    else:
        console().print(modes_report(rows, grouped=not ungrouped))


def _show_roles(choice: ModelChoice, overrides: dict[str, str] | None, *, as_json: bool, ungrouped: bool) -> None:
    from gainstage.capture import capture
    from gainstage.report.roles import roles_report
    from gainstage.roles import infer_roles

    loaded = choice.load()
    found = infer_roles(capture(loaded.model, loaded.args, loaded.kwargs), overrides)
    if as_json:
        _write_json(found.to_dict())
    else:
        console().print(roles_report(found, grouped=not ungrouped))


@main.command()
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write the plan, as JSON.")
@click.option("--explain", multiple=True, metavar="PATTERN", help="How matching parameters were derived, not the table; repeat.")
@output_options
@plan_options
@model_options(meta=True)
def plan(
    choice: ModelChoice, *, output: Path | None, explain: tuple[str, ...], as_json: bool, ungrouped: bool, **options: Any
) -> None:
    """Choose a distribution for every parameter."""
    import gainstage as gs

    arguments = _plan_arguments(**options)
    loaded = choice.load()
    made = gs.plan(loaded.model, loaded.args, loaded.kwargs, **arguments)
    if output is not None:
        from gainstage.cli.files import write_text

        write_text(output, made.to_json() + "\n")
    if as_json:
        click.echo(made.to_json())
    elif output is not None:
        click.echo(f"{len(made.parameters)} parameters planned, written to {output}")
    if explain:
        texts = [text for pattern in explain for text in _explained(made, pattern)]
        console().print("\n\n".join(texts), markup=False, highlight=False)
    elif not as_json and output is None:
        from gainstage.report.plans import plan_report

        console().print(plan_report(made, grouped=not ungrouped))


def _explained(plan: Plan, pattern: str) -> list[str]:
    """The derivation of every parameter that matches, or of the one, or the activation, of that name."""
    matching = [name for name in plan.parameters if fnmatchcase(name, pattern)]
    return [plan.explain(name) for name in matching or [pattern]]


@main.command()
@existing_file("--plan", required=True, text="Plan to draw from (gainstage plan --output).")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="State dict to write: .safetensors, or .pt by torch.save.",
)
@model_options(meta=False, runs=False)
def apply(choice: ModelChoice, *, plan: Path, output: Path | None) -> None:
    """Draw every parameter from a plan, and write the state dict.

    MODEL can also be a directory with a checkpoint of safetensors files: then no model is built, and the tensors that the plan
    names are drawn in place. Interrupted at any point, the directory holds the old checkpoint or the new one.
    """
    import gainstage as gs
    from gainstage.cli.files import check_state_name, write_state
    from gainstage.report.progress import progress_bar

    if Path(choice.source).is_dir():
        _apply_to_checkpoint(choice, plan, output)
        return
    if output is None:
        raise InputError("say where to write the state dict: --output FILE")
    check_state_name(output)
    drawn_from = _read_plan(plan)
    loaded = choice.load()
    with progress_bar("drawing") as progress:
        gs.apply(loaded.model, drawn_from, seed=choice.seed, progress=progress)
    write_state(output, loaded.model)
    click.echo(f"{len(drawn_from.parameters)} parameters drawn with seed {choice.seed}, written to {output}")


def _apply_to_checkpoint(choice: ModelChoice, plan: Path, output: Path | None) -> None:
    from gainstage.apply.checkpoint import apply_to_checkpoint
    from gainstage.report.progress import progress_bar

    if output is not None:
        raise InputError("a checkpoint directory is written in place; copy it first, and leave out --output")
    with progress_bar("files") as progress:
        drawn, kept = apply_to_checkpoint(Path(choice.source), _read_plan(plan), seed=choice.seed, progress=progress)
    click.echo(f"{len(drawn)} tensors drawn with seed {choice.seed}, {len(kept)} left as they were, in {choice.source}")


@main.command()
@existing_file("--plan", text="Judge against this plan. Without --weights it is applied first.")
@existing_file("--weights", text="State dict to load first (.safetensors or .pt).")
@output_options
@model_options(meta=True)
def verify(choice: ModelChoice, *, plan: Path | None, weights: Path | None, as_json: bool, ungrouped: bool) -> None:
    """Run the model and compare with the prediction.

    With --meta and --plan each parameter is drawn when it is needed and dropped after: the model may be larger than memory. Exit
    code 1 where something is wrong.
    """
    import gainstage as gs
    from gainstage.report.progress import progress_bar

    drawn_from = None if plan is None else _read_plan(plan)
    loaded = choice.load()
    if weights is not None:
        from gainstage.cli.files import read_state

        read_state(weights, loaded.model)
    elif drawn_from is not None and not choice.meta:
        with progress_bar("drawing") as progress:
            gs.apply(loaded.model, drawn_from, seed=choice.seed, progress=progress)
    with progress_bar("running") as progress:
        check = gs.verify(loaded.model, loaded.args, loaded.kwargs, plan=drawn_from, seed=choice.seed, progress=progress)
    if as_json:
        _write_json(check.to_dict())
    else:
        from gainstage.report.checks import check_report

        console().print(check_report(check, grouped=not ungrouped))
    sys.exit(0 if check.ok else 1)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output, and nothing else there.")
@model_options(meta=True)
def ops(choice: ModelChoice, *, as_json: bool) -> None:
    """List the operations of a model, and how each is predicted."""
    from gainstage.api.operations import operations
    from gainstage.report.ops import count_ops, ops_report

    loaded = choice.load()
    found = operations(loaded.model, loaded.args, loaded.kwargs)
    if as_json:
        rows = [{"op": row.op, "count": row.count, "treatment": row.treatment} for row in count_ops(found.graph, found.sampled)]
        _write_json({"rung": found.graph.rung, "assumptions": list(found.remarks), "operations": rows})
    else:
        console().print(ops_report(found.graph, found.sampled, found.remarks))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output, and nothing else there.")
def rules(*, as_json: bool) -> None:
    """List every operation that has a rule."""
    from gainstage.report.ops import list_rules, rules_report

    rows = list_rules()
    if as_json:
        _write_json([{"op": row.op, "family": row.family, "rule": row.formula} for row in rows])
    else:
        console().print(rules_report(rows))


@main.command()
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Also draw the curves, as PNG.")
@click.option("--quick", is_flag=True, help="Fewer steps: a look, not a result.")
def demo(*, plot: Path | None, quick: bool) -> None:
    """See it work on a small model that the usual recipes fail on."""
    from gainstage import demo as demonstration

    demonstration.run(console(), plot, quick)


def console() -> Console:
    """The terminal, or 100 columns where there is none and the environment does not say."""
    import os

    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100)


def _plan_arguments(
    *, policy: str, balance: str, distribution: str | None, roles: tuple[str, ...], keep: tuple[str, ...], include_frozen: bool
) -> Any:
    return {
        "policy": policy,
        "balance": balance,
        "distribution": distribution,
        "roles": _role_pairs(roles),
        "keep": keep,
        "include_frozen": include_frozen,
    }


def _role_pairs(roles: tuple[str, ...]) -> dict[str, str] | None:
    pairs = {}
    for text in roles:
        pattern, equals, role = text.rpartition("=")
        if not equals or not pattern:
            raise InputError(f"--role {text!r} is not PATTERN=ROLE; write --role 'decoder.*.out=residual_end'")
        pairs[pattern] = role
    return pairs or None


def _read_plan(path: Path) -> Plan:
    from gainstage.plan import Plan

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PlanFormatError(f"{path} is not text; give the file that gainstage plan --output wrote") from error
    return Plan.from_json(text)


def _write_json(data: Any) -> None:
    from gainstage.cli.files import to_json

    click.echo(to_json(data))
