"""The same weights on 1, 2, 3 and 4 processes, and an error on all of them where one goes astray. Real processes, gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_ANY = (
    "rows",
    "columns",
    "taps",
    "copies",
    "fully_shard",
    "fully_shard, bfloat16",
    "fully_shard, offloaded",
    "tensor parallel",
    "flattened",
    "flattened, original parameters",
    "planned on each rank",
)
_TWO_DIMENSIONS = (
    "rows and rows",
    "rows and columns",
    "columns and rows",
    "copies of columns",
    "taps and columns",
    "fully_shard over tensor parallel",
)
_ASTRAY = ("another plan", "another seed", "another model", "a failure", "an absent rank", "a killed rank")
_CASES = {
    1: _ANY,
    2: (*_ANY, *_ASTRAY),
    3: (*_ANY, *_ASTRAY),
    4: (*_ANY, *_TWO_DIMENSIONS, *_ASTRAY),
}
_KILLED = {"a killed rank": 1}  # has nothing to say


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each rank reports of each case; one start of the processes for all cases of their number."""
    known = {}

    def run(processes):
        if processes not in known:
            folder = tmp_path_factory.mktemp(f"ranks{processes}")
            script = Path(__file__).with_name("on_ranks.py")
            subprocess.run(
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
                    *(str(script), str(folder), *_CASES[processes]),
                ],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                check=False,
                capture_output=True,
                timeout=120,
            )
            files = [folder / f"{rank}.json" for rank in range(processes)]
            known[processes] = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        return known[processes]

    return run


@pytest.mark.parametrize(("processes", "case"), [(processes, case) for processes, cases in _CASES.items() for case in cases])
def test_on_ranks(outcomes, processes, case):
    for rank, found in enumerate(outcomes(processes)):
        if _KILLED.get(case) == rank:
            assert case not in found
        else:
            assert found.get(case, "no report") == "passed", f"rank {rank}:\n{found.get(case)}"
