"""Find the layers that a LoRA does not reach: left out on purpose, impossible, or misspelt."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import tuners_utils
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from opdlab.models.forward import find_backbone, run_backbone
from opdlab.models.placement import input_device
from opdlab.models.vocabulary import count_rows, pick_ordinary_tokens

# Share of the model's weights; smaller parts (a recurrence's decay, a router) deserve no warning.
WARN_FROM = 0.1


def find_refused_layers(model: nn.Module) -> list[str]:
    """List the names of linear layers that PEFT refuses to wrap.

    Some families read these layers' weights without calling them.

    Args:
        model: The model, before the adapter is made.

    Returns:
        Last parts of the layers' paths, sorted; `[]` where PEFT refuses none.
    """
    # A private function of PEFT, which another version may not have; then PEFT refuses nothing.
    refuses = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    if refuses is None:
        return []
    names = {
        path.rsplit(".", 1)[-1]
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    refused = []
    for name in sorted(names):
        try:
            refuses(LoraConfig(), model, name)
        except ValueError:
            refused.append(name)
    return refused


def find_special_layers(model: nn.Module) -> list[str]:
    """List the paths of linear layers that a family computes in a way of its own.

    Such are routers that return several tensors; a LoRA would break them.

    Args:
        model: The model, before the adapter is made.

    Returns:
        The paths, as in `model.named_modules()`.
    """
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is not nn.Linear.forward
        and type(module).__module__.startswith("transformers.models")
        and not _is_plain(module)
    ]


@torch.no_grad()
def _is_plain(layer: nn.Linear) -> bool:
    """Whether a linear layer with its own `forward` (as Falcon's) computes what any other does."""
    some = torch.ones(2, layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype)
    try:
        out = layer(some)
    except Exception:
        return False
    return isinstance(out, Tensor) and torch.allclose(
        out, functional.linear(some, layer.weight, layer.bias), rtol=0.02, atol=1e-4
    )


@torch.no_grad()
def find_unused_layers(model: PreTrainedModel) -> list[str]:
    """List the paths of linear layers that plain text never enters, as of an image encoder.

    They could not learn. The backbone runs once on four tokens to tell, if it has more than one
    part with linear layers.

    Args:
        model: The model, before the adapter is made.

    Returns:
        The paths, as in `model.named_modules()`.
    """
    parts = [
        part
        for part in find_backbone(model).children()
        if any(isinstance(layer, nn.Linear) for layer in part.modules())
    ]
    if len(parts) < 2:
        return []
    entered: set[nn.Module] = set()

    def note(module: nn.Module, args: Any) -> None:
        entered.add(module)

    modules = {module for part in parts for module in part.modules()}
    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try:
        ids = pick_ordinary_tokens(model, count_rows(model), 4)
        run_backbone(model, torch.tensor([ids], device=input_device(model)))
    finally:
        for hook in hooks:
            hook.remove()
    unused: set[nn.Module] = set()
    for part in parts:
        if not entered.intersection(part.modules()):
            unused.update(part.modules())
    return [
        path
        for path, layer in model.named_modules()
        if layer in unused and isinstance(layer, nn.Linear)
    ]


def find_unused_settings(
    model: nn.Module, config: LoraConfig, said: list[str], has_patterns: bool
) -> list[str]:
    """List the settings of an adapter that fit nothing in the model.

    Args:
        model: With the adapter on it.
        config: The adapter's configuration.
        said: PEFT's warnings while it made the adapter; it warns of some settings only.
        has_patterns: Whether the user gave ranks or alphas for single layers.

    Returns:
        One text per setting, for an error; `[]` if all settings fit.
    """
    paths = [path for path, _ in model.named_modules()]
    there = [*paths, *(path for path, _ in model.named_parameters())]
    wanted = [*(config.modules_to_save or []), *(config.target_parameters or [])]
    if not isinstance(config.target_modules, str):
        wanted += list(config.target_modules or [])
    unused = [
        f"{target!r}"
        for target in wanted
        if not any(_without_peft(path).endswith(target) for path in there)
    ]
    asked = config.layers_to_transform
    # A foreign configuration: not every family counts its layers under this name.
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)  # type: ignore[union-attr,operator]
    if layers is not None:
        numbers = [asked] if isinstance(asked, int) else list(asked or [])
        unused += [f"layer {i} (there are {layers})" for i in numbers if not 0 <= i < layers]
    unused += [text for text in said if "no module" in text or "no parameter was" in text]
    unused += [text for text in said if has_patterns and "did not match any" in text]
    return unused


def _without_peft(path: str) -> str:
    """A module's or a parameter's path as it is in the model without adapters."""
    return path.replace(".base_layer", "").replace(".original_module", "")


def find_unreached_weights(model: nn.Module) -> dict[str, int]:
    """Count the entries of matrices that no adapter wraps, as those of fused experts.

    Args:
        model: The model with the adapter on it.

    Returns:
        By place, such as "mlp.experts.down_proj": the entries in all layers together.
    """
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        parts = path.split(".")
        if "base_layer" in parts or type(module).__module__.startswith(("torch.nn", "peft.")):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                place = ".".join([*(part for part in parts[-2:] if not part.isdigit()), name])
                found[place] = found.get(place, 0) + parameter.numel()
    return found


def warn_about_unreached_weights(model: nn.Module) -> None:
    """Warn of a large part of the model that the LoRA on it does not reach, if there is one.

    Parts below the share `WARN_FROM` of all parameters pass in silence.

    Args:
        model: The model with the adapter on it.
    """
    left = find_unreached_weights(model)
    share = sum(left.values()) / sum(parameter.numel() for parameter in model.parameters())
    if share < WARN_FROM:
        return
    largest = sorted(left, key=lambda place: -left[place])[:3]
    warnings.warn(
        f"The LoRA does not reach {share:.0%} of {type(model).__name__}'s weights, which are no"
        f" linear layers (as fused experts are): {', '.join(largest)}. They stay as they are, the"
        " rest learns. To train them too, train all weights: lora=None.",
        stacklevel=3,
    )
