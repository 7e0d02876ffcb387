"""Files that commands write: JSON, and the states of models."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from gainstage.cli.files import read_state, to_json, write_state
from gainstage.errors import InputError, PlanMismatchError


def test_json_has_no_nan():
    assert json.loads(to_json({"a": (float("nan"), 1.5), "b": {1: float("inf")}})) == {"a": [None, 1.5], "b": {"1": None}}


@pytest.mark.parametrize("name", ["state.pt", "state.safetensors"])
def test_a_state_comes_back_and_another_models_is_refused(tmp_path, name):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    first, second = nn.Linear(3, 4), nn.Linear(3, 4)
    write_state(tmp_path / name, first)
    read_state(tmp_path / name, second)
    assert torch.equal(first.weight, second.weight)
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing temporary is left
    with pytest.raises(PlanMismatchError, match="another model"):
        read_state(tmp_path / name, nn.Linear(3, 5))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    path.write_bytes(b"old")

    def fail(state, temporary):
        Path(temporary).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(InputError, match=r"cannot write .*No space left"):
        write_state(path, nn.Linear(2, 2))
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]
    with pytest.raises(InputError, match="no known format"):
        write_state(tmp_path / "state.bin2", nn.Linear(2, 2))
