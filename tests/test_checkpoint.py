"""A checkpoint directory: drawn as apply draws, the rest as it was; killed at any point, it is the old or the new."""

import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from gainstage.apply import apply
from gainstage.apply.checkpoint import apply_to_checkpoint
from gainstage.cli import main
from gainstage.errors import InputError, PlanMismatchError
from gainstage.plan import Block, Distribution, Family, ParameterPlan, Plan

NORMAL = Distribution(family=Family.NORMAL, std=0.5)
KEEP = Distribution(family=Family.KEEP)
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def model():
    built = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "norm": nn.BatchNorm1d(4), "fused": nn.Linear(4, 6)})
    built["head"] = nn.Linear(4, 5, bias=False)
    built["head"].weight = built["embedding"].weight
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(7.0)
    built["fused"].bfloat16()
    return built


def plan():
    def planned(name, *shape, **fields):
        fields = {"dtype": "float32", "distribution": NORMAL, **fields}
        return ParameterPlan(name=name, shape=shape, role="weight", **fields)

    parameters = (
        planned("embedding.weight", 5, 4, aliases=("head.weight",)),
        planned("norm.weight", 4, distribution=KEEP),
        planned("norm.bias", 4),
        planned("fused.weight", 6, 4, dtype="bfloat16", blocks=(Block(0, 2, 4, KEEP),)),
        planned("fused.bias", 6, dtype="bfloat16"),
    )
    return Plan(policy="test", fingerprint="", training=True, parameters={p.name: p for p in parameters})


@pytest.fixture
def folder(tmp_path):
    """Two shards and an index, as Transformers writes them; the tied weight under its second name."""
    state = {name: value.clone() for name, value in model().state_dict().items() if name != "embedding.weight"}
    names = sorted(state)
    halves = (names[:3], names[3:])
    for file, half in zip(FILES, halves, strict=True):
        save_file({name: state[name] for name in half}, tmp_path / file, metadata={"format": "pt", "note": "mine"})
    weight_map = {name: file for file, half in zip(FILES, halves, strict=True) for name in half}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def read(folder):
    """All tensors, as a reader finds them by the index."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    return {name: load_file(folder / file)[name] for name, file in weight_map.items()}


def expected(seed):
    drawn = model()
    apply(drawn, plan(), seed=seed)
    return {name: value for name, value in drawn.state_dict().items() if name != "embedding.weight"}


def is_same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_gets_what_a_model_would(folder):
    drawn, kept = apply_to_checkpoint(folder, plan(), seed=3)
    assert is_same(read(folder), expected(3))
    assert sorted(drawn) == ["fused.bias", "fused.weight", "head.weight", "norm.bias"]
    assert sorted(kept) == ["norm.num_batches_tracked", "norm.running_mean", "norm.running_var", "norm.weight"]


def test_the_files_say_what_they_are(folder):
    apply_to_checkpoint(folder, plan(), seed=3)
    named = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    assert {path.name for path in folder.iterdir()} == {INDEX, "config.json", *named}
    assert not named & set(FILES)
    for file in named:
        with safe_open(folder / file, "pt") as opened:
            metadata = opened.metadata()
        assert Plan.from_json(metadata.pop("gainstage.plan")) == plan()
        assert metadata == {"format": "pt", "note": "mine", "gainstage.seed": "3", "gainstage.stream": "1"}
    assert json.loads((folder / INDEX).read_text())["metadata"] == {"total_size": 1}


def test_again_with_another_seed_and_with_the_same(folder):
    for seed in (3, 4, 4):
        apply_to_checkpoint(folder, plan(), seed=seed)
        assert is_same(read(folder), expected(seed))
        assert len(list(folder.iterdir())) == 4


def test_a_single_file_keeps_its_name(folder):
    tensors = read(folder)
    for path in folder.iterdir():
        path.unlink()
    save_file(tensors, folder / "model.safetensors")
    apply_to_checkpoint(folder, plan())
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert is_same(load_file(folder / "model.safetensors"), expected(0))


# Runs in a process of its own, which forks one for each point to be killed at.
_KILLED_AT = """
import os, sys
from pathlib import Path
import torch
from gainstage.apply.checkpoint import apply_to_checkpoint
from gainstage.plan import Plan

plan, *folders = sys.argv[1:]
plan = Plan.from_json(Path(plan).read_text())
for point, folder in enumerate(folders):
    if os.fork() == 0:
        calls = 0
        def dying(function):
            def call(*args, **kwargs):
                global calls
                if calls == point:
                    os._exit(9)
                calls += 1
                return function(*args, **kwargs)
            return call
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
            setattr(owner, name, dying(getattr(owner, name)))
        apply_to_checkpoint(Path(folder), plan, seed=3)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
def test_a_kill_at_any_point_leaves_the_old_or_the_new(folder, tmp_path_factory):
    old, new = read(folder), expected(3)
    copies = []
    for _ in range(14):  # three files: synced, renamed, the folder synced; two removed; three points where it runs to the end
        copies.append(tmp_path_factory.mktemp("killed"))
        for path in folder.iterdir():
            (copies[-1] / path.name).write_bytes(path.read_bytes())
    plan_file = tmp_path_factory.mktemp("plan") / "plan.json"
    plan_file.write_text(plan().to_json())
    command = [sys.executable, "-c", _KILLED_AT, str(plan_file), *map(str, copies)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.split() == ["9"] * 11 + ["0"] * 3
    outcomes = ["old" if is_same(read(copy), old) else "new" if is_same(read(copy), new) else "mixed" for copy in copies]
    # The eighth call renames the index.
    assert outcomes == ["old"] * 8 + ["new"] * 6
    for copy in copies:  # and the next run cleans up
        apply_to_checkpoint(copy, plan(), seed=5)
        assert is_same(read(copy), expected(5))


def test_a_failure_leaves_no_trace(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        apply_to_checkpoint(folder, plan())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: (folder / INDEX).unlink(), InputError, "has 2 files .* and 0 indices"),
        (lambda folder: (folder / INDEX).write_text("{}"), InputError, "is no index"),
        (lambda folder: (folder / FILES[0]).unlink(), InputError, "names 'model-00001"),
        (lambda folder: (folder / FILES[0]).write_bytes(b"nothing"), InputError, "cannot be read"),
        (lambda folder: save_file({"x": torch.ones(2)}, folder / FILES[0]), PlanMismatchError, "The plan has 'embedding.weight'"),
        (lambda folder: save_file({"head.weight": torch.ones(2)}, folder / FILES[0]), PlanMismatchError, r"but is \[2\]"),
    ],
)
def test_what_is_no_such_checkpoint_is_refused(folder, damage, error, message):
    damage(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(error, match=message):
        apply_to_checkpoint(folder, plan())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_from_the_command_line(folder, tmp_path_factory):
    plan_file = tmp_path_factory.mktemp("plan") / "plan.json"
    plan_file.write_text(plan().to_json())
    result = CliRunner().invoke(main, ["apply", str(folder), "--plan", str(plan_file), "--seed", "3"])
    assert result.exit_code == 0, result.output
    assert "4 tensors drawn with seed 3, 4 left as they were" in result.output
    assert is_same(read(folder), expected(3))
    refused = CliRunner().invoke(main, ["apply", str(folder), "--plan", str(plan_file), "--output", "x.pt"])
    assert refused.exit_code == 2
    assert "written in place" in refused.output
