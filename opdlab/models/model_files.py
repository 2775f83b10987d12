"""Write and read whole models in checkpoints, and embeddings that were resized for new tokens."""

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
    """Take the model's own parameters and buffers, by the names that the bare model has.

    Tied weights are there once, under their first name. They are not copies.

    Args:
        weights: The model.

    Returns:
        The tensors by name, in the model's own memory.
    """
    tensors = base_tensors(weights.model)
    return {name: tensors[name] for name in dict.fromkeys(_first_names(tensors).values())}


def _first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Give for every name the first one of the same memory; tied weights have two or more."""
    first: dict[Any, str] = {}
    for name, value in tensors.items():
        first.setdefault(_place(name, value), name)
    return {name: first[_place(name, value)] for name, value in tensors.items()}


def _place(name: str, value: Tensor) -> Any:
    return (value.data_ptr(), tuple(value.shape)) if value.numel() and not value.is_meta else name


def write_model(weights: Weights, folder: Path) -> None:
    """Save model and tokenizer so that `from_pretrained(folder)` gives them back.

    Adapters on the model are left out.

    Args:
        weights: The model with its tokenizer.
        folder: The folder to write to.
    """
    model: Any = weights.model
    state = {name: value.detach() for name, value in base_tensors(model).items()}
    with _without_adapters(model), _savable_generation(model, folder), _quiet():
        model.save_pretrained(folder, state_dict=state)
    weights.tokenizer.save_pretrained(folder)


def read_model(weights: Weights, folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a saved model, under the names of `own_tensors`.

    Args:
        weights: A model of the same family and size; it is not changed.
        folder: The folder that `write_model` wrote, also in the first format.

    Returns:
        The tensors by name; those that the folder lacks are missing.

    Raises:
        DamagedFile: The file cannot be read.
    """
    there, path = own_tensors(weights), folder / "model.safetensors"
    first = _first_names(base_tensors(weights.model))
    if path.exists():
        values = read_tensors(path)
        values = {name.replace(".base_layer.", "."): value for name, value in values.items()}
        values = {first.get(name, name): value for name, value in values.items()}
        if not (folder / "config.json").exists():
            # The first format held the parameters without the buffers.
            for name, value in there.items():
                if not isinstance(value, nn.Parameter):
                    values.setdefault(name, value)
            return values
        if values.keys() == there.keys():
            return values
    # Some families are saved under other names than they have in memory, and large models in
    # several files.
    kind: Any = type(weights.model)
    with _quiet():
        saved = kind.from_pretrained(folder, dtype=weights.model.dtype).state_dict()
    return {name: saved[name] for name in there if name in saved}


def has_new_embeddings(weights: Weights) -> bool:
    """Tell whether the vocabulary was resized after loading.

    Then the embeddings have another number of rows than the configuration on the disk says. Only
    files that are already on this machine are read. A model that was made in memory has no
    configuration to compare with.

    Args:
        weights: The model.

    Returns:
        False as well where no configuration can be read.
    """
    # A private field of transformers: where a configuration was read from, if it was.
    source = weights.source or getattr(weights.model.config, "_name_or_path", "")
    if not source:
        return False
    try:
        config = AutoConfig.from_pretrained(  # nosec B615  # only a file that is here already
            source, local_files_only=True, trust_remote_code=False
        )
        saved = config.get_text_config().vocab_size
    except (OSError, ValueError, AttributeError):
        return False
    return bool(saved != weights.embeddings.shape[0])


def embeddings(weights: Weights, wanted: Container[str] | None = None) -> dict[str, Tensor]:
    """Take the model's own input and output embeddings, as PEFT names them beside an adapter.

    Args:
        weights: The model.
        wanted: Which names to take; all by default.

    Returns:
        The parameters by name. They are not copies.
    """
    layers = [weights.model.get_input_embeddings(), weights.model.get_output_embeddings()]
    names = set()
    for path, module in weights.model.named_modules():
        if any(module is layer for layer in layers):
            for inside in ("", "base_layer."):
                names |= {f"{path}.{inside}weight", f"{path}.{inside}bias"}
    return {
        name: value
        for name, value in weights.model.named_parameters()
        if name in names and (wanted is None or name in wanted)
    }


def embedding_names(weights: Weights) -> set[str]:
    """List the names of the input and output embeddings in the bare model.

    Args:
        weights: The model.

    Returns:
        The names, those of tied copies included.
    """
    own = embeddings(weights)
    first_names = _first_names(base_tensors(weights.model))
    tied = {name for name, first in first_names.items() if first in own}
    return {name.replace(".base_layer.", ".") for name in own} | tied


@contextlib.contextmanager
def _without_adapters(model: Any) -> Iterator[None]:
    """Let transformers save the whole model; where it knows of an adapter, it saves that alone."""
    before = getattr(model, "_hf_peft_config_loaded", False)  # a private mark of transformers
    model._hf_peft_config_loaded = False
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before


@contextlib.contextmanager
def _savable_generation(model: Any, folder: Path) -> Iterator[None]:
    """Write generation settings as they are; transformers refuses some of those that it loads."""
    # Not every model of transformers has one.
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
    """Hide the bars that transformers draws while it reads and writes."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
