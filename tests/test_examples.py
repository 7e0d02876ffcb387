"""Every example runs as it stands, and the list of examples has it."""

import runpy
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
LONGEST = 60.0  # seconds of processor on a busy machine: an example that one waits for is not read
# What trains networks is only seen to run here.
QUICK = {"deep_plain": ["--steps", "2", "--only", "relu"], "flows": ["--steps", "20"]}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_runs_and_says_something(script, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(script), *QUICK.get(script.stem, [])])
    start = time.process_time()
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert time.process_time() - start < LONGEST


def test_the_list_of_examples_is_complete():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [script.name for script in SCRIPTS if f"]({script.name})" not in page] == []
