"""Know where a model's parts are: on one device, spread over several, or offloaded.

Accelerate spreads a model by hooks on its modules. A hook moves a module's inputs to where it
computes, and fetches offloaded weights for as long as it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opdlab.errors import InvalidValue


def input_device(model: Any) -> torch.device:
    """Find the device that token ids are to be on.

    Args:
        model: A transformers model.

    Returns:
        Where its embeddings compute. The device of a spread model's first parameter may be none on
        which anything computes.
    """
    layer: Any = model.get_input_embeddings()
    while hasattr(layer, "base_layer"):  # a layer of PEFT
        layer = layer.base_layer
    return module_device(layer)


def module_device(module: Any) -> torch.device:
    """Find the device that a module computes on.

    Args:
        module: A module with parameters of its own.

    Returns:
        The device, also of one whose weights are offloaded.
    """
    hook = _hook_of(module)
    if hook is not None:
        return torch.device(_as_device(hook.execution_device))
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def is_spread(model: nn.Module) -> bool:
    """Tell whether Accelerate moves tensors between the parts of a model.

    Args:
        model: The model.

    Returns:
        True for models on several devices, and for those that are partly offloaded.
    """
    return any(_hook_of(module) is not None for module in model.modules())


def is_offloaded(model: nn.Module) -> bool:
    """Tell whether some weights of a model are fetched only while they are used.

    Args:
        model: The model.

    Returns:
        True where a module's hook keeps its weights elsewhere.
    """
    hooks = (_hook_of(module) for module in model.modules())
    return any(getattr(hook, "offload", False) for hook in hooks)


def refuse_offloaded(model: nn.Module, name: str) -> None:
    """Refuse to put an adapter on a model whose weights are not where they compute.

    Args:
        model: The model.
        name: Its name, for the error.

    Raises:
        InvalidValue: Some weights are offloaded.
    """
    if is_offloaded(model):
        raise InvalidValue(
            f"Some weights of {name} are offloaded, so it can teach but cannot carry a LoRA. Load"
            " it whole (device='cuda' or 'cpu'), smaller (quantization='4bit'), or spread over"
            " GPUs alone; an adapter can be merged before (merge_and_unload())."
        )


def refuse_copy(model: nn.Module, name: str) -> None:
    """Refuse to copy a model whose hooks would go on pointing at the original.

    Args:
        model: The model.
        name: Its name, for the error.

    Raises:
        InvalidValue: Accelerate has put hooks on it.
    """
    if is_spread(model):
        raise InvalidValue(
            f"{name} is spread over several places, and cannot be copied in memory. Load it a"
            " second time, or load it on one device (device= in place of device_map=)."
        )


def fetch(module: Any, name: str) -> Tensor | None:
    """Take a parameter of a module, from where it is offloaded to if need be.

    Args:
        module: The module that owns it.
        name: Its name there.

    Returns:
        The parameter itself, or a copy of an offloaded one on the device where the module computes;
        None where there is none.
    """
    parameter: Tensor | None = module._parameters.get(name)
    if parameter is None or not parameter.is_meta:
        return parameter
    stored = _stored(module)
    if stored is None or name not in stored:
        return parameter
    return stored[name].to(module_device(module), parameter.dtype)


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """List the offloaded tensors of a model by name.

    Args:
        model: The model.

    Returns:
        Those that are on no device now, read from where they are kept.
    """
    found = {}
    for path, module in model.named_modules():
        stored = _stored(module)
        for name, value in module._parameters.items():
            if value is not None and value.is_meta and stored is not None and name in stored:
                found[f"{path}.{name}" if path else name] = stored[name]
    return found


def _hook_of(module: Any) -> Any:
    """The hook of Accelerate that places this module; None for none."""
    hook = getattr(module, "_hf_hook", None)  # an attribute that Accelerate adds
    if hook is None:
        return None
    hooks = getattr(hook, "hooks", (hook,))  # of several in a row
    return next((one for one in hooks if getattr(one, "execution_device", None) is not None), None)


def _stored(module: Any) -> Mapping[str, Tensor] | None:
    hook = _hook_of(module)
    return None if hook is None else getattr(hook, "weights_map", None)


def _as_device(place: Any) -> Any:
    return torch.device("cuda", place) if isinstance(place, int) else place
