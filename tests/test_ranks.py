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
    "learning rates",
    "measured inputs",
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
_VERIFIED = (
    "verified",
    "verified, DDP",
    "verified, FSDP1",
    "verified, FSDP1 with parameters",
    "verified, fully_shard",
    "verified, tensor parallel",
    "verified, slices",
    "verified before it exists",
    "verified with another plan",
)
_CASES = {
    1: _ANY,
    2: (*_ANY, *_VERIFIED, *_ASTRAY),
    3: _ANY,
    4: (*_ANY, *_TWO_DIMENSIONS, *_ASTRAY),
}
_KILLED = {"a killed rank": 1}  # has nothing to say


def run(processes, folder):
    """What each rank reports of each case; one start of the processes for all cases, as the imports take longest."""
    script = Path(__file__).with_name("on_ranks.py")
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    subprocess.run(
        [*launch, str(script), str(folder), *_CASES[processes]],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        timeout=120,
    )
    files = [folder / f"{rank}.json" for rank in range(processes)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


@pytest.mark.parametrize("processes", _CASES)
def test_on_ranks(processes, tmp_path):
    wrong = []
    for rank, found in enumerate(run(processes, tmp_path)):
        for case in _CASES[processes]:
            outcome = found.get(case, "no report")
            if outcome != ("no report" if _KILLED.get(case) == rank else "passed"):
                wrong.append(f"{case}, rank {rank}:\n{outcome}")
    assert not wrong, "\n".join(wrong)
