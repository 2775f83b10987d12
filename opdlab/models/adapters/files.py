"""Read and write the files of an adapter, as PEFT reads and writes them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.functional import inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opdlab.errors import InvalidValue, OpdlabError
from opdlab.models import adapters
from opdlab.models.adapters.lora_options import check_config
from opdlab.models.quantization import set_evaluation

PREFIX = "base_model.model."  # under which PEFT stores the names of a model's own modules
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def read_config(folder: Path) -> LoraConfig:
    """Read the configuration of an adapter.

    Args:
        folder: A local folder.

    Returns:
        The configuration, checked.

    Raises:
        InvalidValue: It cannot be read, or is that of an adapter that opdlab does not compute.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT on fields of its other versions
            config: Any = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidValue(
            f"{folder / CONFIG} cannot be read ({' '.join(str(error).split())[:200]}). Give the"
            " folder of a PEFT adapter."
        ) from error
    check_config(folder.name, config)
    config.inference_mode = False
    read: LoraConfig = config  # check_config lets LoRA pass alone
    return read


def read_state(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of an adapter's file.

    Args:
        folder: A local folder.

    Returns:
        Tensors by the names that the bare model's modules have.

    Raises:
        InvalidValue: There is no such file, or it is damaged.
    """
    path = folder / TENSORS
    if not path.is_file():
        pickled = folder / "adapter_model.bin"
        way = "Give the folder of a PEFT adapter."
        if pickled.exists():
            way = (
                "It has adapter_model.bin, a pickle, which opdlab does not open. Save the adapter"
                " again with PEFT, which writes safetensors."
            )
        raise InvalidValue(f"There is no {TENSORS} in {folder}. {way}")
    try:
        return {name.removeprefix(PREFIX): value for name, value in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise InvalidValue(
            f"{path} cannot be read ({error}). Fetch the adapter again, or take another copy."
        ) from error


def load(model: Any, folder: Path, name: str) -> None:
    """Put an adapter from a folder on a model, and leave it in force.

    Embeddings that lie beside the adapter, of a vocabulary that was resized, replace the model's.

    Args:
        model: A transformers model.
        folder: A local folder.
        name: A name that no adapter of the model has yet.

    Raises:
        InvalidValue: The adapter does not fit the model.
    """
    config, state = read_config(folder), read_state(folder)
    _check_initialisation(config, folder)
    beside = split_embeddings(model, config, state)
    _resize(model, {**state, **beside}, folder)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # on settings that matter while a LoRA is made
            inject_adapter_in_model(adapters.plain_config(config), model, name)
        model._hf_peft_config_loaded = True
        set_evaluation(model)
        adapters.make_float32(model, name)
        adapters.set_state(model, name, state)
    except (OpdlabError, ValueError, RuntimeError, KeyError, TypeError) as error:
        adapters.remove(model, name)
        raise InvalidValue(
            f"The adapter in {folder} does not fit {type(model).__name__}:"
            f" {' '.join(str(error).split())[:200]} Use the base model that it was trained on"
            f" ({config.base_model_name_or_path!r})."
        ) from error
    _copy_embeddings(model, beside)


def _check_initialisation(config: LoraConfig, folder: Path) -> None:
    """Refuse adapters that belong to a changed copy of their base model."""
    way = str(config.init_lora_weights).lower()
    if way.startswith(("pissa", "olora", "corda", "lora_ga")):
        raise InvalidValue(
            f"The adapter in {folder} was made with init_lora_weights={way!r}, which changes the"
            " base model. Save it with PEFT's path_initial_model_for_weight_conversion, which makes"
            " a plain LoRA of it."
        )


def split_embeddings(model: Any, config: LoraConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the embeddings of the base model out of an adapter's tensors.

    PEFT and opdlab put them there when the vocabulary was resized.

    Args:
        model: A transformers model, without this adapter.
        config: The adapter's configuration. Modules that it saves whole are its own.
        state: The adapter's tensors, from which they are removed.

    Returns:
        The embeddings by name.
    """
    own = tuple(config.modules_to_save or ())
    paths = embedding_paths(model)
    beside = {}
    for name in list(state):
        path, _, kind = name.replace(".base_layer.", ".").rpartition(".")
        is_saved_whole = path in own or path.rpartition(".")[2] in own
        if path in paths and kind in ("weight", "bias") and not is_saved_whole:
            beside[f"{path}.{kind}"] = state.pop(name)
    return beside


def has_embeddings(model: Any, folder: Path) -> bool:
    """Tell whether an adapter's file also holds embeddings of the base model.

    Args:
        model: A transformers model.
        folder: The adapter's local folder.

    Returns:
        True for adapters of a vocabulary that was resized.
    """
    return bool(split_embeddings(model, read_config(folder), read_state(folder)))


def embedding_paths(model: Any) -> list[str]:
    """Find where a model's input and output embeddings are.

    Args:
        model: A transformers model.

    Returns:
        Paths as in `model.named_modules()`, the input first.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(layer)] for layer in layers if layer is not None and id(layer) in paths]


def _resize(model: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Give the model as many rows as the embeddings of the adapter have."""
    paths = embedding_paths(model)
    rows = {
        int(value.shape[0]) for name, value in tensors.items() if name.rpartition(".")[0] in paths
    }
    now = int(model.get_input_embeddings().weight.shape[0])
    if not rows or rows == {now}:
        return
    if len(rows) > 1:
        raise InvalidValue(
            f"The embeddings in {folder} have {' and '.join(map(str, sorted(rows)))} rows. Give"
            " an adapter with as many rows in all of them."
        )
    model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _copy_embeddings(model: Any, beside: Mapping[str, Tensor]) -> None:
    for name, value in beside.items():
        path, _, kind = name.rpartition(".")
        layer = model.get_submodule(path)
        while hasattr(layer, "base_layer"):  # a layer of PEFT
            layer = layer.base_layer
        parameter = getattr(layer, kind)
        parameter.data.copy_(value.to(parameter.dtype))


def write(
    folder: Path,
    config: LoraConfig,
    state: Mapping[str, Tensor],
    base: str | None,
) -> None:
    """Write an adapter's files.

    Args:
        folder: A folder that exists; files of the same names are replaced.
        config: The adapter's configuration.
        state: Its tensors, and embeddings beside them, by the names of the bare model's modules.
        base: Name or folder of the base model; None where nobody knows.
    """
    tensors = {PREFIX + name: value.detach().contiguous() for name, value in state.items()}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    described = config.to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    text = json.dumps(described, indent=1, default=json_default)
    (folder / CONFIG).write_text(text, encoding="utf-8")


def json_default(value: Any) -> Any:
    """Turn values of PEFT's configurations that JSON does not know into ones that it does.

    Args:
        value: A set, an enum member, or anything else.

    Returns:
        A sorted list, the member's value, or the text of the value.
    """
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if isinstance(value, Enum) else str(value)
