"""Every model of the zoos: captured, planned, drawn and compared, each in a process of its own.

python -m benchmarks.zoo [--only timm torchvision] [--all] [--models resnet50 vit_b_16] [--again] [--draws 16]

Writes a line for each model to benchmarks/results/zoo.jsonl as it goes; models that have one are skipped, unless --again. With
``--again --draws 0`` models are planned anew, and keep the errors of their last draws.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import warnings
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection

import torch
from benchmarks.measure import one_thread
from benchmarks.tables import plain_table
from benchmarks.zoo.load import ZOOS, Loaded, zoo_models
from benchmarks.zoo.row import ENOUGH, ZooRow, examine
from benchmarks.zoo.summary import FAILURE_HEADINGS, RESULTS, TOTAL_HEADINGS, failures, read_rows, totals
from rich.console import Console
from rich.progress import Progress

import gainstage as gs
from gainstage.cli.models import cpu_torchvision

LIMIT = 120.0  # seconds for one model


def main() -> None:
    """Run what is missing, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ZOOS, nargs="+", default=ZOOS, help="these zoos, in this order (default: all)")
    parser.add_argument("--all", action="store_true", help="of timm all models, instead of one of each module")
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help="these only")
    parser.add_argument("--again", action="store_true", help="also models that have a row")
    parser.add_argument("--draws", type=int, default=ENOUGH, help="of weights and inputs (default: %(default)s); 0: plan only")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one model (default: %(default)s)")
    options = parser.parse_args()
    one_thread()
    warnings.simplefilter("ignore")  # of the model libraries, about themselves
    _import_libraries()
    before = read_rows()
    done = set() if options.again else set(before)
    work = [
        (zoo, name, build)
        for zoo in options.only
        for name, build in zoo_models(zoo, every=options.all).items()
        if (zoo, name) not in done and (not options.models or name in options.models)
    ]
    # No thread that draws the bar: processes are forked here, so that the libraries are imported once.
    with Progress(console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task("", total=len(work))
        for zoo, name, build in work:
            progress.update(task, description=f"{zoo}:{name}", refresh=True)
            row = apart(zoo, name, build, options.draws, options.limit)
            _append(row if options.draws else row.with_draws_of(before.get((zoo, name), row)))
            progress.update(task, advance=1, refresh=True)
    rows = list(read_rows().values())
    console = Console(width=None if Console().is_terminal else 180)
    console.print(plain_table("Zoos, planned with 'unit'", TOTAL_HEADINGS, totals(rows)))
    console.print(plain_table("Failures", FAILURE_HEADINGS, failures(rows)))


def apart(zoo: str, name: str, build: Callable[[], Loaded], draws: int, limit: float) -> ZooRow:
    """Examine a model in a forked process, which is ended at the time limit."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, zoo, name, build, draws))
    process.start()
    sender.close()
    failure = f"limit: more than {limit:.0f} seconds"
    try:
        if receiver.poll(limit):
            return ZooRow(**receiver.recv())
    except EOFError:
        failure = "process: ended without a result (memory?)"
    finally:
        process.kill()
        process.join()
    return ZooRow(zoo=zoo, model=name, failure=failure)


def _report(sender: Connection, zoo: str, name: str, build: Callable[[], Loaded], draws: int) -> None:
    sender.send(asdict(examine(zoo, name, build, draws)))


def _import_libraries() -> None:
    cpu_torchvision()
    import timm
    import transformers

    assert timm.__version__
    transformers.logging.set_verbosity_error()
    layer = torch.nn.Linear(2, 2)  # what a first plan imports is imported once, not in each process
    gs.plan(layer, (torch.randn(2, 2),))


def _append(row: ZooRow) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(row)) + "\n")


if __name__ == "__main__":
    main()
