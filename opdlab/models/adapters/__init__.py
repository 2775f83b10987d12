"""Add, switch, copy, fold and remove the adapters of one model, through PEFT.

Only LoRA (with rsLoRA and DoRA) is understood; other kinds are refused by name. All functions take
the transformers model itself. The state is read from its layers and not kept beside them, so
whatever else switches adapters is noticed.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model_state_dict
from peft.functional import cast_adapter_dtype, delete_adapter, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from opdlab.errors import InvalidValue
from opdlab.models.adapters.coverage import find_unused_settings
from opdlab.models.adapters.layers import (
    compute_in_float32,
    find_layers,
    find_outermost_layers,
    fold_layer,
    forget_configuration,
    is_in_force,
    names_in_force,
    put_in_force,
    replace_module,
    take_off_layers,
    untie_embeddings,
)
from opdlab.models.adapters.lora_options import check_config
from opdlab.models.quantization import set_evaluation


def unwrap(model: Any) -> Any:
    """Take the transformers model out of a `PeftModel`, with its adapters in place.

    Anything else is returned as it is.

    Args:
        model: A model of transformers or PEFT, or anything else.

    Returns:
        The model; its layers still carry the adapters.

    Raises:
        InvalidValue: The adapter is not inside the model's layers (prompt tuning and the like), or
            is of several kinds.
    """
    if isinstance(model, PeftMixedModel):
        raise InvalidValue(
            "A PeftMixedModel has adapters of several kinds. Merge them into the model:"
            " merge_and_unload()."
        )
    if not isinstance(model, PeftModel):
        return model
    for name, config in model.peft_config.items():
        check_config(name, config)
    return model.get_base_model()


def names(model: nn.Module) -> list[str]:
    """List the names of all adapters on `model`.

    Args:
        model: A transformers model, without PEFT's wrapper.

    Returns:
        The names, in the order in which the adapters were made; `[]` for a bare model.
    """
    return list(_configs(model))


def _configs(model: nn.Module) -> dict[str, LoraConfig]:
    # PEFT adds this attribute with the first adapter.
    return getattr(model, "peft_config", None) or {}


def config_of(model: nn.Module, name: str) -> LoraConfig:
    """Look up the PEFT configuration of an adapter.

    Args:
        model: The model with the adapter on it.
        name: The adapter's name.

    Returns:
        The configuration itself, and not a copy.
    """
    return _configs(model)[name]


def has_config(model: nn.Module, name: str, config: LoraConfig) -> bool:
    """Tell whether the adapter of that name is still the one that this configuration made.

    Args:
        model: The model.
        name: The adapter's name; it may be gone.
        config: The configuration object.

    Returns:
        False if there is no such adapter, or if it has another configuration object.
    """
    return _configs(model).get(name) is config


def check(model: nn.Module) -> None:
    """Check every adapter on `model`.

    Args:
        model: A transformers model, without PEFT's wrapper.

    Raises:
        InvalidValue: One is no LoRA, moves the base model, or is merged into it.
    """
    for name in names(model):
        check_config(name, config_of(model, name))
    if any(layer.merged for layer in find_layers(model) if isinstance(layer, BaseTunerLayer)):
        raise InvalidValue(
            "An adapter of the model is merged into it for now, so it cannot be switched off or"
            " trained. Call unmerge_adapter(), or make it permanent with merge_and_unload()."
        )


def in_force(model: nn.Module) -> list[str]:
    """List the adapters that a forward pass of `model` goes through, `[]` for the bare model.

    Args:
        model: The model.

    Returns:
        The names; several if the layers go through several adapters at once.

    Raises:
        InvalidValue: The layers disagree.
    """
    states = {
        names_in_force(layer) for layer in find_layers(model) if isinstance(layer, BaseTunerLayer)
    }
    if len(states) > 1:
        raise InvalidValue(
            "The model's layers go through different adapters:"
            f" {' and '.join(sorted(repr(list(state)) for state in states))}. Choose one:"
            " Policy.of(…, adapter=name)."
        )
    return list(states.pop()) if states else []


def switch(model: nn.Module, name: str | None) -> None:
    """Put one adapter in force, its weights trainable, or none: then the bare model answers.

    Args:
        model: The model.
        name: The adapter's name; None for the bare model.
    """
    layers = find_layers(model)
    if not all(is_in_force(layer, name) for layer in layers):
        put_in_force(layers, name)


def make_trainable(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Put an adapter in force with its weights trainable, and freeze everything else.

    They train also if something froze them before.

    Args:
        model: The model.
        name: The adapter's name.

    Returns:
        The trainable parameters: those of the adapter.
    """
    model.requires_grad_(False)
    put_in_force(find_layers(model), name)
    return [p for p in model.parameters() if p.requires_grad]


def add(model: nn.Module, name: str, config: LoraConfig) -> None:
    """Make a new adapter, in float32, and leave it in force.

    Args:
        model: The model.
        name: A name that no adapter has yet.
        config: The adapter's settings.

    Raises:
        InvalidValue: PEFT cannot put it on this model. The model is as it was.
    """
    # Looked up first, because PEFT adds patterns of its own for fused experts.
    has_patterns = bool(config.rank_pattern or config.alpha_pattern)
    asked = copy.copy(config)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            inject_adapter_in_model(config, model, name)
        except Exception as error:  # whatever PEFT or the model's layers say to these options
            remove(model, name)
            raise InvalidValue(f"{type(model).__name__} cannot take this LoRA: {error}") from error
    messages = [str(warning.message) for warning in said]
    if asked.target_modules == "all-linear" and not asked.target_parameters:
        # PEFT adds settings for fused experts, which a model with dense layers only does not have.
        messages = [message for message in messages if "no parameter was" not in message]
        config = asked
    if unused := find_unused_settings(model, config, messages, has_patterns):
        remove(model, name)
        raise InvalidValue(
            f"Some settings of the LoRA fit nothing in {type(model).__name__}: {'; '.join(unused)}."
            " Use names as in model.named_modules(), or leave them out."
        )
    model._hf_peft_config_loaded = True  # type: ignore[assignment]
    set_evaluation(model)  # new layers come in train mode, with their dropout on
    make_float32(model, name)


def clone(model: nn.Module, source: str, name: str) -> None:
    """Make `name` an exact copy of the adapter `source`: all settings, tensors and precision.

    Args:
        model: The model.
        source: Name of the adapter to copy.
        name: Name of the copy, which is left in force.
    """
    original = config_of(model, source)
    config = plain_config(original)
    with torch.random.fork_rng(devices=[]):
        add(model, name, config)
    config.init_lora_weights = original.init_lora_weights
    set_state(model, name, state(model, source))


def plain_config(config: LoraConfig) -> LoraConfig:
    """Copy a configuration for an adapter whose tensors are overwritten at once.

    Args:
        config: The configuration to copy.

    Returns:
        The copy, with the plain initialisation: some (PiSSA and the like) change the base model.
    """
    plain = copy.deepcopy(config)
    plain.init_lora_weights = True
    plain.inference_mode = False
    return plain


def state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Take the adapter's tensors, named as PEFT names them in files. They are not copies.

    Args:
        model: The model.
        name: The adapter's name.

    Returns:
        The tensors by name, in the adapter's own memory.
    """
    with warnings.catch_warnings():
        # PEFT takes biases for matrices.
        warnings.filterwarnings("ignore", "Adapter .* have invalid shape")
        # PEFT's "auto" for embedding layers would ask the Hub each time.
        found: dict[str, Tensor] = get_peft_model_state_dict(
            model, adapter_name=name, save_embedding_layers=False
        )
    return found


def set_state(model: nn.Module, name: str, values: dict[str, Tensor]) -> None:
    """Copy `values` into the adapter's tensors.

    Args:
        model: The model.
        name: The adapter's name.
        values: Tensors under the names that `state` gives.

    Raises:
        InvalidValue: Names or shapes are not those of the adapter; nothing is changed then.
    """
    there = state(model, name)
    odd = sorted(there.keys() ^ values.keys()) or sorted(
        key for key, value in values.items() if value.shape != there[key].shape
    )
    if odd:
        raise InvalidValue(
            f"These are not the tensors of the adapter {name!r}: {odd[0]!r} is missing, too much,"
            f" or of another shape ({len(odd)} of {len(there)} differ). Use weights of an adapter"
            " with the same targets and rank."
        )
    with torch.no_grad():
        for key, value in values.items():
            there[key].copy_(value)


def make_float32(model: nn.Module, name: str) -> None:
    """Keep an adapter's weights in float32 whatever the base model's dtype.

    Small updates vanish in bfloat16.

    Args:
        model: The model.
        name: The adapter's name.
    """
    cast_adapter_dtype(model, name)
    for layer in find_layers(model):
        if isinstance(layer, ModulesToSaveWrapper) and name in layer.modules_to_save:
            compute_in_float32(layer.modules_to_save[name])


def remove(model: nn.Module, name: str) -> None:
    """Take an adapter off the model; with the last one, PEFT's layers go as well.

    Nothing happens if it is not there.

    Args:
        model: The model.
        name: The adapter's name.
    """
    layers = find_layers(model)
    before = None
    if not any(name in names_in_force(layer) for layer in layers):
        before = next(iter(in_force(model)), None)
    with warnings.catch_warnings():
        # The one in force is set again below.
        warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
        put_in_force(layers, None)
        delete_adapter(model, adapter_name=name, prefix="lora_")
    _configs(model).pop(name, None)
    if names(model):
        put_in_force(find_layers(model), before)
    else:
        take_off_layers(model)


def fold(model: nn.Module, name: str | None) -> None:
    """Add one adapter to the base weights for good and take all adapters off.

    Args:
        model: The model, which is changed in place.
        name: The adapter to fold; None takes all off and leaves the weights as they are.

    Raises:
        InvalidValue: PEFT cannot add this one to the weights. The model is spoilt then.
    """
    if name is not None:
        untie_embeddings(model, name)
        switch(model, name)
    for path, layer in find_outermost_layers(model):
        try:
            replace_module(model, path, fold_layer(layer, name))
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise InvalidValue(
                f"The adapter {name!r} cannot be folded into {path}: {error} Train it on as it is."
            ) from error
    forget_configuration(model)
    model.requires_grad_(False)
