"""Writing a plan into a checkpoint directory, file by file, without the model: what a reader finds is the old or the new.

The new shards are written under new names, beside the old ones. Renaming the index into place is the moment of change: before
it the directory is the old checkpoint, after it the new one. Then the old shards are removed. A single file without an index is
replaced by renaming. So the disk has to hold the checkpoint twice, and memory one shard.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gainstage.apply.box import whole_box
from gainstage.apply.parts import Holding
from gainstage.apply.stream import STREAM_VERSION
from gainstage.apply.write import Writer, digest_of, integer_seed
from gainstage.errors import InputError
from gainstage.plan import Family, ParameterPlan, Plan

_INDEX = ".safetensors.index.json"
_TENSORS = ".safetensors"
_PARTIAL = ".gainstage-partial"  # ends the name of a file that is being written
_DIGEST = 8  # letters of the digest in a file name

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    shape: tuple[int, ...]
    dtype: torch.dtype
    aliases: tuple[str, ...]


def apply_to_checkpoint(
    folder: Path, plan: Plan, *, seed: int = 0, progress: Callable[[int, int], object] | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Draw the tensors of a checkpoint of safetensors files that a plan names; the others stay.

    The files get the plan, the seed and the stream's version as metadata.

    Args:
        folder: has one ``.safetensors`` file, or several and their index.
        plan: what to draw; of a tied parameter the names that the checkpoint has are written.
        seed: any integer.
        progress: called with the number of files written so far and in all.

    Returns:
        names that were drawn, and names that are as they were.

    Raises:
        InputError: no such checkpoint, or safetensors is not installed.
        PlanMismatchError: the plan is for other parameters than those of the checkpoint.
    """
    number = integer_seed(seed)
    index, files = _files(folder)
    planned = {name: parameter for parameter in plan.parameters.values() for name in (parameter.name, *parameter.aliases)}
    held = {file: _headers(folder / file) for file in files}
    _check(plan, {name: facts for headers in held.values() for name, facts in headers.items()})
    digest = digest_of(plan, number)[:_DIGEST]
    metadata = {
        "gainstage.plan": plan.to_json(),
        "gainstage.seed": str(number),
        "gainstage.stream": str(STREAM_VERSION),
    }
    renamed = {file: file if index is None else _renamed(file, digest) for file in files}
    for done, file in enumerate(files, 1):
        _write_file(folder / file, folder / renamed[file], planned, number, metadata)
        if progress is not None:
            progress(done, len(files))
    if index is not None:
        _write_index(folder / index, renamed)
        for file in files:
            if renamed[file] != file:
                (folder / file).unlink()
    names = [name for headers in held.values() for name in headers]
    drawn = tuple(name for name in names if name in planned and not _is_kept(planned[name]))
    return drawn, tuple(name for name in names if name not in drawn)


def _files(folder: Path) -> tuple[str | None, list[str]]:
    """The index, if there is one, and the files with tensors."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no directory.")
    indices = sorted(path.name for path in folder.glob(f"*{_INDEX}"))
    found = sorted(path.name for path in folder.glob(f"*{_TENSORS}"))
    if len(indices) > 1 or (not indices and len(found) != 1):
        count = f"{len(found)} files *{_TENSORS} and {len(indices)} indices *{_INDEX}"
        raise InputError(f"{folder} has {count}; one file, or one index of several, is a checkpoint.")
    if not indices:
        return None, found
    named = sorted(set(_read_index(folder / indices[0])["weight_map"].values()))
    missing = [name for name in named if name not in found]
    if missing:
        raise InputError(f"{indices[0]} names {missing[0]!r}, which is not in {folder}.")
    return indices[0], named


def _read_index(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        read["weight_map"] = {str(name): Path(file).name for name, file in read["weight_map"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is no index of safetensors files.") from error
    return read


def _headers(path: Path) -> dict[str, _Facts | None]:
    """Shapes and types of the tensors of one file; None where the type is not a parameter's."""
    found: dict[str, _Facts | None] = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118  (a method of theirs; the file is no mapping)
            part = file.get_slice(name)
            dtype = _TYPES.get(part.get_dtype())
            found[name] = None if dtype is None else _Facts(shape=tuple(part.get_shape()), dtype=dtype, aliases=())
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import safetensors  # noqa: PLC0415  (an extra)
    except ModuleNotFoundError as error:
        raise InputError("safetensors is not installed; run: pip install 'gainstage[checkpoints]'") from error
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _check(plan: Plan, held: Mapping[str, _Facts | None]) -> None:
    """Every planned parameter is there, under one of its names at least, unless it is to be kept."""
    facts = {}
    for parameter in plan.parameters.values():
        for name in (parameter.name, *parameter.aliases):
            known = held.get(name)
            if known is not None:
                facts[parameter.name] = _Facts(shape=known.shape, dtype=known.dtype, aliases=parameter.aliases)
        if parameter.name not in facts and _is_kept(parameter):
            dtype = getattr(torch, parameter.dtype)
            facts[parameter.name] = _Facts(shape=parameter.shape, dtype=dtype, aliases=parameter.aliases)
    plan.check_fits(facts)


def _is_kept(parameter: ParameterPlan) -> bool:
    return all(part.family is Family.KEEP for part in parameter.distributions)


def _renamed(file: str, digest: str) -> str:
    """``model-00001-of-00003`` becomes ``model-4f2a90c1-00001-of-00003``, whatever it was called by an earlier run."""
    match = re.fullmatch(rf"(.*?)(-[0-9a-f]{{{_DIGEST}}})?((?:-\d+-of-\d+)?{re.escape(_TENSORS)})", file)
    assert match is not None
    return f"{match[1]}-{digest}{match[3]}"


def _write_file(source: Path, target: Path, planned: Mapping[str, ParameterPlan], seed: int, metadata: Mapping[str, str]) -> None:
    import safetensors.torch  # noqa: PLC0415  (an extra; its absence is told where the file is opened)

    tensors: dict[str, torch.Tensor] = {}
    with _opened(source) as file:
        merged = {"format": "pt", **(file.metadata() or {}), **metadata}
        for name in file.keys():  # noqa: SIM118  (as above)
            parameter = planned.get(name)
            if parameter is None or any(part.family is Family.KEEP for part in parameter.distributions):
                tensors[name] = file.get_tensor(name)
            else:
                tensors[name] = torch.empty(parameter.shape, dtype=getattr(torch, parameter.dtype))
    targets = [(planned[name], _whole(tensor)) for name, tensor in tensors.items() if name in planned]
    Writer(seed, None, {name for name in tensors if name in planned}).write(targets, _alone)
    with _replacing(target) as partial:
        safetensors.torch.save_file(tensors, str(partial), metadata=merged)


def _alone(work: Callable[[], str]) -> None:
    work()


def _whole(tensor: torch.Tensor) -> Holding:
    shape = tuple(tensor.shape)
    return Holding(shape=shape, dtype=tensor.dtype, aliases=(), parameter=tensor, memory=tensor, boxes=(whole_box(shape),))


def _write_index(path: Path, renamed: Mapping[str, str]) -> None:
    index = _read_index(path)
    index["weight_map"] = {name: renamed[file] for name, file in index["weight_map"].items()}
    with _replacing(path) as partial:
        partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to fill; in its place, and on the disk, when this ends."""
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)  # noqa: PTH105  (atomic on every platform, and says so)
        _sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    """Down to the disk, so that the order of changes survives a loss of power."""
    if path.is_dir() and os.name == "nt":  # no such thing there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
