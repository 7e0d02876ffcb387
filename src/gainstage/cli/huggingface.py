"""Transformers models from a model type or a configuration file, never from weights."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gainstage.cli.inputs import InputSpecification
from gainstage.cli.models import BATCH, Source, construct, cpu_torchvision, require, suggest
from gainstage.errors import InputError, UnknownNameError

TOKENS = 32  # positions of a text input: enough for attention to average over, cheap to run
# Heads in the order of preference: encoder-decoders stand in several tables, BERT in the one for causal models too.
_ENCODER_DECODER_HEADS = ("AutoModelForSpeechSeq2Seq", "AutoModelForSeq2SeqLM")
_HEADS = (
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForZeroShotImageClassification",  # CLIP and its kin: two towers
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
    "AutoModel",
)


def build(source: str, settings: Mapping[str, Any], device: str) -> Source:
    """Model and default inputs for ``hf:MODEL_TYPE`` or ``path/to/config.json``.

    Raises:
        InputError: where the configuration cannot be read or the model not be built.
        UnknownNameError: for a model type or an entry of the configuration that does not exist.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a configuration must suffice: never ask for files
    cpu_torchvision_if_installed()
    transformers = require("transformers")
    transformers.logging.set_verbosity_error()
    config = _config(source, settings)
    _switch_caches_off(config)
    model: nn.Module = construct(source, device, lambda: _model_class(transformers, config)(config))
    model.to(device)  # some modules choose a device themselves
    text = config.get_text_config()
    inputs = tuple(_default_inputs(model, config))
    return Source(model=model, kwargs={}, inputs=inputs, vocabulary=getattr(text, "vocab_size", None))


def cpu_torchvision_if_installed() -> None:
    """Import torchvision where there is one, before Transformers does and fails at one built for CUDA."""
    try:
        cpu_torchvision()
    except InputError:
        return


def _config(source: str, settings: Mapping[str, Any]) -> Any:
    mapping = require("transformers").CONFIG_MAPPING
    entries: dict[str, Any]
    if source.startswith("hf:") and not source.endswith(".json"):
        entries = {"model_type": source.removeprefix("hf:")}
    else:
        entries = _read_json(Path(source.removeprefix("hf:")))
    model_type = entries.pop("model_type", None)
    if model_type not in mapping:
        known = suggest(str(model_type), mapping.keys())
        raise UnknownNameError(f"Transformers has no model type {model_type!r}{known}")
    known_entries = construct(source, "cpu", mapping[model_type]).to_dict()
    for key, value in settings.items():
        _set(entries, known_entries, key, value)
    return construct(source, "cpu", lambda: mapping[model_type].from_dict(entries))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, dict) or "model_type" not in entries:
        raise InputError(f'{path} has no "model_type": it is not the configuration of a Transformers model')
    return entries


def _set(entries: dict[str, Any], known: Mapping[str, Any], key: str, value: Any) -> None:
    """Set ``a.b.c`` in nested dicts; an entry that the default configuration does not have is a typing error."""
    *path, last = key.split(".")
    for step in path:
        entries = entries.setdefault(step, {})
        known = known.get(step) or {}
    if last not in known:
        raise UnknownNameError(f"--set {key}: the configuration has no entry {last!r}{suggest(last, known)}")
    entries[last] = value


def _switch_caches_off(config: Any) -> None:
    """A cache is an output that export cannot carry, and says nothing of initialization."""
    for part in (config, config.get_text_config()):
        if getattr(part, "use_cache", None):
            part.use_cache = False


def _model_class(transformers: Any, config: Any) -> Any:
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for head in (*(_ENCODER_DECODER_HEADS if config.is_encoder_decoder else ()), *_HEADS):
        tables = getattr(transformers, head)._model_mapping
        if type(config) in tables:
            found = tables[type(config)]
            return found[0] if isinstance(found, (tuple, list)) else found
    raise InputError(
        f"Transformers has no model class for {type(config).__name__}; name one under architectures in a config.json"
    )


def _default_inputs(model: nn.Module, config: Any) -> Iterator[InputSpecification]:
    """Inputs by the name of the model's main one; nothing for a name that we do not know."""
    main = str(getattr(model, "main_input_name", ""))
    text, vision = config.get_text_config(), getattr(config, "vision_config", config)
    tokens = (BATCH, min(TOKENS, getattr(text, "max_position_embeddings", None) or TOKENS))
    has_two_towers = vision is not config and text is not config and "pixel_values" in inspect.signature(model.forward).parameters
    if main == "input_ids" or has_two_towers:
        yield InputSpecification(shape=tokens, name="input_ids", kind="int")
    if main == "pixel_values" or has_two_towers:
        size = getattr(vision, "image_size", None) or 224
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        yield InputSpecification(shape=(BATCH, getattr(vision, "num_channels", 3), height, width), name="pixel_values")
    if main == "input_values":
        yield InputSpecification(shape=(BATCH, 16_000), name="input_values")  # one second of sound at 16 kHz
    if main == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        frames = 2 * config.max_source_positions  # the encoder's second convolution has a stride of 2
        yield InputSpecification(shape=(BATCH, config.num_mel_bins, frames), name="input_features")
    if config.is_encoder_decoder:
        yield InputSpecification(shape=tokens, name="decoder_input_ids", kind="int")
