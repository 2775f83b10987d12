"""Handle the layers that PEFT puts into a model: find, switch, fold or take them off.

PEFT's layers are typed as `Any`: what they have differs between its kinds and versions, and this
file is the one place that knows them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn


def find_layers(model: nn.Module) -> list[Any]:
    """List PEFT's layers.

    They are those that carry adapters, and wrappers around whole modules that an adapter replaces.

    Args:
        model: The model.

    Returns:
        The layers, outer ones before those inside them.
    """
    return [m for m in model.modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper))]


def names_in_force(layer: Any) -> tuple[str, ...]:
    """List the names of the adapters that a layer goes through.

    Args:
        layer: A layer of PEFT.

    Returns:
        The names; `()` where adapters are switched off.
    """
    return () if layer.disable_adapters else tuple(layer.active_adapters)


def is_in_force(layer: Any, name: str | None) -> bool:
    """Tell whether a layer goes through exactly this adapter, or through none.

    Args:
        layer: A layer of PEFT.
        name: The adapter's name; None for no adapter.

    Returns:
        Whether it does. A wrapper around a whole module that this adapter does not replace must be
        off.
    """
    if isinstance(layer, BaseTunerLayer):
        return names_in_force(layer) == (() if name is None else (name,))
    return names_in_force(layer) == ((name,) if name in layer._adapters else ())


def put_in_force(layers: list[Any], name: str | None) -> None:
    """Let layers go through this adapter, or through none.

    Args:
        layers: Layers of PEFT, as `find_layers` gives them.
        name: The adapter's name; None switches adapters off.
    """
    for layer in layers:
        if name is None:
            layer.enable_adapters(False)
        elif isinstance(layer, BaseTunerLayer):
            layer.set_adapter([name])
            layer.enable_adapters(True)
        else:  # a whole module of an adapter's own; only some adapters have one here
            own = name in layer._adapters
            layer.set_adapter(name if own else [])
            layer.enable_adapters(own)


def compute_in_float32(module: nn.Module) -> None:
    """Give a module float32 weights behind inputs and before outputs of the model's own dtype.

    Modules that are not in float16 or bfloat16 stay as they are.

    Args:
        module: The module, which is changed in place.
    """
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if own not in (torch.float16, torch.bfloat16):
        return
    module.float()
    module.register_forward_pre_hook(_inputs_to_float32, with_kwargs=True)
    module.register_forward_hook(_ToDtype(own))


def _inputs_to_float32(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    def convert(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.float() if is_float else value

    return tuple(map(convert, args)), {key: convert(value) for key, value in kwargs.items()}


@dataclasses.dataclass(frozen=True)
class _ToDtype:
    """A forward hook that turns the output into a dtype.

    It is a class, so that it can be deep-copied with its module.
    """

    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output.to(self.dtype) if isinstance(output, Tensor) else output


def find_outermost_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Find PEFT's layers that are in no other of them, with their paths.

    Args:
        model: The model; its modules may be replaced meanwhile.

    Yields:
        Path and layer.
    """
    inside: list[str] = []
    for path, module in list(model.named_modules()):
        if any(path.startswith(f"{outer}.") for outer in inside):
            continue
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            inside.append(path)
            yield path, module


def fold_layer(layer: Any, name: str | None) -> nn.Module:
    """Make a layer without PEFT that computes what `layer` does under the adapter.

    Args:
        layer: A layer of PEFT, whose own base layer is changed.
        name: The adapter's name; None for no adapter.

    Returns:
        The folded base layer, or the module that the adapter has in its place.
    """
    while isinstance(layer, (BaseTunerLayer, ModulesToSaveWrapper)):
        if isinstance(layer, ModulesToSaveWrapper):
            own = name is not None and name in layer.modules_to_save
            layer = layer.modules_to_save[str(name)] if own else layer.original_module
        else:
            if name is not None:
                layer.merge(safe_merge=True, adapter_names=[name])
            layer = layer.get_base_layer()
    folded: nn.Module = layer
    return folded


def untie_embeddings(model: Any, name: str) -> None:
    """Give embeddings and head one matrix each if they share one and the adapter changes either.

    Args:
        model: The model, which is changed in place, its configuration too.
        name: The adapter's name.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not (_is_changed(embeddings, name) or _is_changed(head, name)):
        return
    inner, outer = (_find_base(layer) for layer in (embeddings, head))
    if inner.weight is outer.weight:
        outer.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False


def _is_changed(layer: Any, name: str) -> bool:
    if isinstance(layer, BaseTunerLayer):
        return name in layer._get_available_adapters()
    return isinstance(layer, ModulesToSaveWrapper) and name in layer._adapters


def _find_base(layer: Any) -> Any:
    while isinstance(layer, (BaseTunerLayer, ModulesToSaveWrapper)):
        if isinstance(layer, ModulesToSaveWrapper):
            layer = layer.original_module
        else:
            layer = layer.get_base_layer()
    return layer


def take_off_layers(model: nn.Module) -> None:
    """Put the model's own layers back in the place of PEFT's.

    Args:
        model: The model, which is changed in place; what the adapters added is lost.
    """
    for path, layer in find_outermost_layers(model):
        replace_module(model, path, _find_base(layer))
    forget_configuration(model)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put another module at a path.

    Args:
        model: The model.
        path: The path, as in `model.named_modules()`.
        module: The module to put there.
    """
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def forget_configuration(model: Any) -> None:
    """Let PEFT and transformers know of no adapter on the model any more.

    Args:
        model: The model; its layers are not touched.
    """
    if hasattr(model, "peft_config"):  # an attribute that PEFT adds
        del model.peft_config
    model._hf_peft_config_loaded = False
