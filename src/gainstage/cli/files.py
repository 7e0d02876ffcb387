"""Files that the command line reads and writes. A file appears whole or not at all."""

from __future__ import annotations

import json
import math
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gainstage.errors import InputError, PlanMismatchError

_SAFETENSORS = ".safetensors"
_PICKLED = (".pt", ".pth", ".bin")


def to_json(data: Any) -> str:
    """Indented JSON; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(data), indent=2, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return data


def write_text(path: Path, text: str) -> None:
    """Write a text file at once."""
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_state_name(path: Path) -> None:
    """Refuse a file name of no known format, before any work is done.

    Raises:
        InputError: for another suffix than .safetensors, .pt, .pth or .bin.
    """
    if path.suffix not in (_SAFETENSORS, *_PICKLED):
        raise InputError(f"{path} has no known format: name it .safetensors or .pt")


def write_state(path: Path, model: nn.Module) -> None:
    """Write the state dict of a model; tied parameters once in .safetensors, under their first name."""
    check_state_name(path)
    if path.suffix == _SAFETENSORS:
        _replace(path, lambda temporary: _safetensors().save_model(model, str(temporary)))
    else:
        _replace(path, lambda temporary: torch.save(model.state_dict(), temporary))


def read_state(path: Path, model: nn.Module) -> None:
    """Load a state dict into a model.

    Raises:
        InputError: for a file that cannot be read.
        PlanMismatchError: for the state of another model.
    """
    check_state_name(path)
    try:
        if path.suffix == _SAFETENSORS:
            _safetensors().load_model(model, str(path))
        else:
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    except RuntimeError as error:
        first, *details = str(error).splitlines()
        raise PlanMismatchError(f"{path} holds the state of another model: {(details or [first])[0].strip()}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise InputError("safetensors is not installed; run: pip install safetensors, or name the file .pt") from error
    return safetensors.torch


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in place: a reader never sees half a file."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            temporary = Path(folder) / path.name
            write(temporary)
            os.replace(temporary, path)  # noqa: PTH105  (atomic on every platform, and says so)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
