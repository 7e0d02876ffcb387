"""From the MODEL argument to a module with example inputs."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gainstage.cli.inputs import InputSpecification, draw_inputs, parse_input, smallest_vocabulary
from gainstage.errors import InputError, UnknownNameError

BATCH = 2  # two samples show whether depth erases the difference between inputs
_FORMS = "package.module:callable, path/to/file.py:callable, timm:NAME, torchvision:NAME, hf:MODEL_TYPE or path/to/config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A module with the arguments of its forward."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A way to build a model: the module, its own arguments if it came with any, and its default input specifications."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any]
    inputs: tuple[InputSpecification, ...] = ()
    vocabulary: int | None = None


def load(
    source: str,
    *,
    inputs: Sequence[str] | None = (),
    settings: Sequence[str] = (),
    device: str = "cpu",
    training: bool | None,
    seed: int,
) -> LoadedModel:
    """Build the model that a MODEL argument names, and its example inputs.

    Args:
        source: the MODEL argument.
        inputs: ``--input`` texts; they replace the inputs that come with the model. None: the model is not to be run.
        settings: ``--set`` texts, KEY=VALUE.
        device: of the model, "cpu" or "meta"; inputs always have values.
        training: mode of the model, None to leave it as it is built.
        seed: of torch's generator, set before building and again before the inputs are drawn.

    Raises:
        InputError: for a source of no known form, a library that is not installed, a callable that fails or returns
            something else than a model, or inputs that cannot be read.
        UnknownNameError: for a name that the library does not have.
    """
    specifications = [parse_input(text) for text in inputs or ()]
    torch.manual_seed(seed)
    built = _builder(source)(source, parse_settings(settings), device)
    if training is not None:
        built.model.train(training)
    if inputs is None:
        return LoadedModel(model=built.model, kwargs={})
    if built.args or built.kwargs:
        own = (built.args, dict(built.kwargs))
        if not specifications:
            return LoadedModel(model=built.model, args=own[0], kwargs=own[1])
    vocabulary = built.vocabulary or smallest_vocabulary(built.model)
    torch.manual_seed(seed)
    args, kwargs = draw_inputs(specifications or built.inputs, vocabulary=vocabulary)
    if not args and not kwargs:
        raise InputError(
            f"{source} comes without inputs: return (module, args) from the callable, or add --input, e.g. 2x3x224x224"
        )
    return LoadedModel(model=built.model, args=args, kwargs=kwargs)


def _builder(source: str) -> Callable[[str, Mapping[str, Any], str], Source]:
    prefix, colon, rest = source.partition(":")
    if colon and rest and prefix == "timm":
        return _timm
    if colon and rest and prefix == "torchvision":
        return _torchvision
    if (colon and rest and prefix == "hf") or source.endswith(".json"):
        from gainstage.cli.huggingface import build

        return build
    if source.rpartition(":")[0] and source.rpartition(":")[2]:
        return _callable
    raise InputError(f"MODEL {source!r} has no known form; use {_FORMS}")


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts as a dict; a value is a Python literal, or else the text itself.

    Raises:
        InputError: for a text without a key.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise InputError(f"--set {text!r} is not KEY=VALUE; write --set num_hidden_layers=4")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = {"true": True, "false": False, "none": None}.get(value.lower(), value)
    return settings


def require(library: str) -> ModuleType:
    """Import an optional library.

    Raises:
        InputError: where it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise InputError(f"{library} is not installed; run: pip install 'gainstage[{library}]'") from error


def suggest(name: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` with the nearest known names, or nothing."""
    near = get_close_matches(name, list(known), n=3)
    return f"; did you mean {', '.join(near)}?" if near else ""


def _timm(source: str, settings: Mapping[str, Any], device: str) -> Source:
    cpu_torchvision()  # timm imports it
    timm = require("timm")
    name = source.partition(":")[2]
    if not timm.is_model(name):
        raise UnknownNameError(f"timm has no model {name!r}{suggest(name, timm.list_models())}")
    model = construct(source, device, lambda: timm.create_model(name, pretrained=False, **settings))
    size = settings.get("img_size")
    shape = model.pretrained_cfg["input_size"] if size is None else (settings.get("in_chans", 3), size, size)
    return Source(model=model, kwargs={}, inputs=(InputSpecification(shape=(BATCH, *shape)),))


def _torchvision(source: str, settings: Mapping[str, Any], device: str) -> Source:
    models = cpu_torchvision().models
    name = source.partition(":")[2]
    if name not in models.list_models():
        raise UnknownNameError(f"torchvision has no model {name!r}{suggest(name, models.list_models())}")
    options = {"weights": None} | dict(settings)
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options.setdefault("weights_backbone", None)  # by default the backbone of a segmentation model is downloaded
    if name in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", False)  # its truncated normal takes seconds, and warns that it will be removed

    def build() -> nn.Module:
        model: nn.Module = models.get_model(name, **options)
        return model

    if device == "meta" and name.startswith("regnet"):
        model = construct(source, "cpu", build).to("meta")  # their constructors read tensor values
    else:
        model = construct(source, device, build)
    side = 299 if name == "inception_v3" else settings.get("image_size", 224)
    return Source(model=model, kwargs={}, inputs=(InputSpecification(shape=(BATCH, 3, side, side)),))


def cpu_torchvision() -> ModuleType | Any:
    """Import torchvision, also one built for CUDA beside a torch for CPU.

    Its extension, which would define ``nms`` and ``qnms``, cannot load there, and its Python part fails at giving shape
    functions to operations that do not exist. Declared without kernels they suffice for everything but detection.
    """
    try:
        return require("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for half_imported in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[half_imported]
    for operation in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{operation}", schema)
    return require("torchvision")


def _callable(source: str, settings: Mapping[str, Any], device: str) -> Source:
    home, _, name = source.rpartition(":")
    module = _module_from_file(Path(home)) if home.endswith(".py") else _importable_module(home)
    if not hasattr(module, name):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UnknownNameError(f"{home} has no {name!r}{suggest(name, public)}")
    factory = getattr(module, name)
    if isinstance(factory, nn.Module):
        result: Any = factory
    elif callable(factory):
        result = construct(source, device, lambda: factory(**settings))
    else:
        raise InputError(f"{source} is of type {type(factory).__name__}, not a callable that returns a model")
    return _as_source(source, result)


def _as_source(source: str, result: Any) -> Source:
    match result:
        case nn.Module():
            return Source(model=result, kwargs={})
        case (nn.Module() as model, args):
            return Source(model=model, args=_as_arguments(args), kwargs={})
        case (nn.Module() as model, args, dict() as kwargs):
            return Source(model=model, args=_as_arguments(args), kwargs=kwargs)
    raise InputError(
        f"{source} returned {type(result).__name__}; return a module, (module, args) or (module, args, kwargs: dict)"
    )


def _as_arguments(args: Any) -> tuple[Any, ...]:
    return tuple(args) if isinstance(args, (tuple, list)) else (args,)


def construct(source: str, device: str, build: Callable[[], Any]) -> Any:
    """Call ``build`` on a device; its failure becomes ours, with the innermost line of the code that failed.

    Raises:
        InputError: for anything that ``build`` raises.
    """
    try:
        with torch.device(device):
            return build()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"
        remedy = "; it may not support the meta device: try without --meta" if device == "meta" else ""
        raise InputError(f"{source} failed with {type(error).__name__}: {error} (at {where}){remedy}") from error


def _importable_module(name: str) -> ModuleType:
    _search_first(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise InputError(f"importing {name} failed: {error}") from error
        raise InputError(f"there is no module {error.name!r} to import; for a file write path/to/file.py:callable") from error
    except Exception as error:
        raise InputError(f"importing {name} failed with {type(error).__name__}: {error}") from error


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no file {path}; give a path from {Path.cwd()}")
    _search_first(path.resolve().parent)  # a script imports its neighbours, as under python path/to/file.py
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    previous = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses and pickling look a class's module up by name
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(f"{path} failed with {type(error).__name__}: {error} (line {frame.lineno})") from error
    finally:
        if previous is not None:
            sys.modules[path.stem] = previous  # a model file named torch.py must not replace torch
    return module


def _search_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
