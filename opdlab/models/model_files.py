"""A whole model in a checkpoint, as transformers writes and reads it; and embeddings that were
resized for new tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

from opdlab.models.fingerprints import base_tensors
from opdlab.models.weights import Weights
from opdlab.support.tensor_files import read_tensors


def own_tensors(weights: Weights) -> dict[str, Tensor]:
    """The model's own parameters and buffers by the bare model's names, each tied one under its
    first name only.
    """
    tensors = base_tensors(weights.model)
    return {name: tensors[name] for name in dict.fromkeys(_first_names(tensors).values())}


def _first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """For every name the first one under which the same memory stands: tied weights have two names
    or more.
    """
    first: dict[Any, str] = {}
    for name, value in tensors.items():
        first.setdefault(_place(name, value), name)
    return {name: first[_place(name, value)] for name, value in tensors.items()}


def _place(name: str, value: Tensor) -> Any:
    return (value.data_ptr(), tuple(value.shape)) if value.numel() and not value.is_meta else name


def write_model(weights: Weights, folder: Path) -> None:
    """Save model and tokenizer so that `from_pretrained(folder)` gives them back."""
    model: Any = weights.model
    state = {name: value.detach() for name, value in base_tensors(model).items()}
    with _without_adapters(model), _savable_generation(model, folder), _quiet():
        model.save_pretrained(folder, state_dict=state)
    weights.tokenizer.save_pretrained(folder)


def read_model(weights: Weights, folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved model, under the names of `own_tensors`.

    Raises:
        DamagedFile: The file cannot be read.
    """
    there, path = own_tensors(weights), folder / "model.safetensors"
    first = _first_names(base_tensors(weights.model))
    if path.exists():
        values = read_tensors(path)
        values = {name.replace(".base_layer.", "."): value for name, value in values.items()}
        values = {first.get(name, name): value for name, value in values.items()}
        if not (
            folder / "config.json"
        ).exists():  # the first format held the parameters without the buffers
            buffers = {
                name: value for name, value in there.items() if not isinstance(value, nn.Parameter)
            }
            return {**buffers, **values}
        if values.keys() == there.keys():
            return values
    # Some families are saved under other names than they have in memory, and large models in
    # several files.
    kind: Any = type(weights.model)
    with _quiet():
        saved = kind.from_pretrained(folder, dtype=weights.model.dtype).state_dict()
    return {name: saved[name] for name in there if name in saved}


def has_new_embeddings(weights: Weights) -> bool:
    """Whether the vocabulary was resized after loading: the rows are not those of the configuration
    on the disk.

    Only what is already on this machine is read. A model that was made in memory has no
    configuration to compare with.
    """
    source = weights.source or getattr(weights.model.config, "_name_or_path", "")
    if not source:
        return False
    try:
        saved = (
            AutoConfig.from_pretrained(source, local_files_only=True).get_text_config().vocab_size
        )
    except (OSError, ValueError, AttributeError):
        return False
    return bool(saved != weights.model.get_input_embeddings().weight.shape[0])


def embeddings(weights: Weights, wanted: Container[str] | None = None) -> dict[str, Tensor]:
    """The input and output embeddings of the model itself, as PEFT names them beside an adapter
    (all, or those `wanted`).
    """
    layers = [weights.model.get_input_embeddings(), weights.model.get_output_embeddings()]
    modules = {
        name: module
        for name, module in weights.model.named_modules()
        if any(module is layer for layer in layers)
    }
    found = {}
    for name, value in weights.model.named_parameters():
        for module in modules:
            if name in (
                f"{module}.weight",
                f"{module}.bias",
                f"{module}.base_layer.weight",
                f"{module}.base_layer.bias",
            ):
                found[name] = value
    return {name: value for name, value in found.items() if wanted is None or name in wanted}


def embedding_names(weights: Weights) -> set[str]:
    """The names of the input and output embeddings in the bare model."""
    return {name.replace(".base_layer.", ".") for name in embeddings(weights)} | {
        name
        for name, first in _first_names(base_tensors(weights.model)).items()
        if first in embeddings(weights)
    }


@contextlib.contextmanager
def _without_adapters(model: Any) -> Iterator[None]:
    """transformers saves the adapter alone where it knows of one; here the model is what is wanted."""
    before = getattr(model, "_hf_peft_config_loaded", False)
    model._hf_peft_config_loaded = False
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before


@contextlib.contextmanager
def _savable_generation(model: Any, folder: Path) -> Iterator[None]:
    """transformers refuses to save some generation settings that it loads; these are written as
    they are.
    """
    config: Any = getattr(model, "generation_config", None)
    try:
        if config is not None:
            config.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig.from_model_config(model.config)
        try:
            yield
        finally:
            model.generation_config = config
        if config is not None:
            config.to_json_file(folder / "generation_config.json")
        return
    yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars that transformers draws while it reads and writes."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
