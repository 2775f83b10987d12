"""The layers that PEFT puts into a model: find them, switch them, run them in float32, fold them or
take them off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn


def adapter_layers(model: nn.Module) -> list[Any]:
    """PEFT's layers: those that carry adapters, and wrappers around whole modules that an adapter
    replaces.
    """
    return [m for m in model.modules() if isinstance(m, (BaseTunerLayer, ModulesToSaveWrapper))]


def adapters_of(layer: Any) -> tuple[str, ...]:
    return () if layer.disable_adapters else tuple(layer.active_adapters)


def is_in_force(layer: Any, name: str | None) -> bool:
    if isinstance(layer, BaseTunerLayer):
        return adapters_of(layer) == (() if name is None else (name,))
    return adapters_of(layer) == ((name,) if name in layer._adapters else ())


def set_in_force(layers: list[Any], name: str | None) -> None:
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
    """Give a module float32 weights behind inputs and before outputs of the model's own dtype."""
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if own not in (torch.float16, torch.bfloat16):
        return
    module.float()
    module.register_forward_pre_hook(_inputs_to_float32, with_kwargs=True)
    module.register_forward_hook(_ToDtype(own))


def _inputs_to_float32(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    as_float32 = lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
    return tuple(map(as_float32, args)), {key: as_float32(value) for key, value in kwargs.items()}


@dataclasses.dataclass(frozen=True)
class _ToDtype:
    """A forward hook that gives a tensor back in a dtype; a class, so that it can be deep-copied
    with its module.
    """

    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output.to(self.dtype) if isinstance(output, Tensor) else output


def outermost_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers that are in no other of them, by path."""
    inside: list[str] = []
    for path, module in list(model.named_modules()):
        if any(path.startswith(f"{outer}.") for outer in inside):
            continue
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            inside.append(path)
            yield path, module


def folded_layer(layer: Any, name: str | None) -> nn.Module:
    """What computes the same as `layer` under the adapter, without PEFT."""
    while isinstance(layer, (BaseTunerLayer, ModulesToSaveWrapper)):
        if isinstance(layer, ModulesToSaveWrapper):
            own = name is not None and name in layer.modules_to_save
            layer = layer.modules_to_save[str(name)] if own else layer.original_module
        else:
            if name is not None:
                layer.merge(safe_merge=True, adapter_names=[name])
            layer = layer.get_base_layer()
    return layer


def untie_embeddings(model: Any, name: str) -> None:
    """Give embeddings and head matrices of their own where they share one and the adapter changes
    either.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not (_is_changed(embeddings, name) or _is_changed(head, name)):
        return
    inner, outer = (_base(layer) for layer in (embeddings, head))
    if inner.weight is outer.weight:
        outer.weight = nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
    model.config.get_text_config().tie_word_embeddings = False
    model.config.tie_word_embeddings = False


def _is_changed(layer: Any, name: str) -> bool:
    if isinstance(layer, BaseTunerLayer):
        return name in layer._get_available_adapters()
    return isinstance(layer, ModulesToSaveWrapper) and name in layer._adapters


def _base(layer: Any) -> Any:
    while isinstance(layer, (BaseTunerLayer, ModulesToSaveWrapper)):
        layer = (
            layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
        )
    return layer


def take_off_layers(model: nn.Module) -> None:
    for path, layer in outermost_layers(model):
        replace_module(model, path, _base(layer))
    forget_configuration(model)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def forget_configuration(model: Any) -> None:
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False
