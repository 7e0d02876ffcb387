"""Where a node comes from: the module call and the user's own line."""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from traceback import FrameSummary, StackSummary
from types import FrameType, TracebackType
from typing import Self

import torch
from torch import fx

from gainstage.graph import Provenance

_TORCH = str(Path(torch.__file__).parent) + "/"
_OWN = str(Path(__file__).parent) + "/"
_CALLERS = frozenset({_OWN + "run.py", _OWN + "outline.py"})  # what called the model
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n([^\n]*)')


def provenance_of(node: fx.Node, canonical_paths: Mapping[str, str]) -> Provenance:
    """The module call and the user's line of one node of an exported graph.

    Args:
        node: a node with ``nn_module_stack`` and ``stack_trace`` in its meta.
        canonical_paths: module path -> first path of the same module, as ``named_modules`` names it.

    Returns:
        The innermost module call; the innermost line outside torch.
    """
    source = _user_line(node.meta.get("stack_trace") or "")
    stack = module_stack(node, canonical_paths)
    if not stack:
        return Provenance(source=source)
    module_type = list(node.meta["nn_module_stack"].values())[-1][1]
    return Provenance(stack[-1][0], str(module_type), stack[-1][1], source)


def module_stack(node: fx.Node, canonical_paths: Mapping[str, str]) -> tuple[tuple[str, int], ...]:
    """Path and number of each module call that a node was made in, outermost first."""
    stack: Mapping[str, tuple[str, str]] = node.meta.get("nn_module_stack") or {}
    calls = []
    for key, (path, _) in stack.items():
        _, _, number = key.rpartition("@")
        plain = path.partition("@")[0]
        calls.append((canonical_paths.get(plain, plain), int(number) if number.isdigit() and "@" in key else 0))
    return tuple(calls)


def user_line_of(traceback: TracebackType | None) -> str:
    """The innermost line of a traceback outside torch and this package; empty where there is none."""
    line = ""
    while traceback is not None:
        filename, number = traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        if _is_users(filename):
            line = f"{_short(filename)}:{number}: {linecache.getline(filename, number).strip()}"
        traceback = traceback.tb_next
    return line


def current_line() -> str:
    """The innermost line outside torch and this package that a run on tape is at; empty where a model is torch's alone."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename not in _CALLERS:
        filename = frame.f_code.co_filename
        if _is_users(filename):
            return f"{_short(filename)}:{frame.f_lineno}: {linecache.getline(filename, frame.f_lineno).strip()}"
        frame = frame.f_back
    return ""


class UserFrame:
    """In the place of torch's record of all frames: the innermost one inside forward and outside torch, if there is one."""

    def __init__(self, found: list[FrameSummary]) -> None:
        self._found = found

    @classmethod
    def extract(cls) -> Self:
        """Look at the frames that lead here."""
        frame: FrameType | None = sys._getframe(1)
        innermost: FrameType | None = None
        while frame is not None:
            code = frame.f_code
            innermost = innermost or (frame if _is_users(code.co_filename) else None)
            if innermost is not None and code.co_name == "forward":
                return cls([FrameSummary(innermost.f_code.co_filename, innermost.f_lineno, innermost.f_code.co_name)])
            frame = frame.f_back
        return cls([])  # a model of torch's alone

    def summary(self) -> StackSummary:
        """As torch asks for it."""
        return StackSummary.from_list(self._found)


def _is_users(filename: str) -> bool:
    return not filename.startswith((_TORCH, _OWN, "<"))


@lru_cache(maxsize=1024)
def _user_line(stack_trace: str) -> str:
    for filename, number, code in reversed(_FRAME.findall(stack_trace)):
        if _is_users(filename):
            return f"{_short(filename)}:{number}: {code.strip()}"
    return ""


def _short(filename: str) -> str:
    return "/".join(Path(filename).parts[-2:])  # wherever it is run from: plans have these lines in their notes
