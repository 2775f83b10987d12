"""Which layers a LoRA on "all linear layers" leaves out, by need or because they are no linear
layers.
"""

from __future__ import annotations

import warnings

import torch
from peft import LoraConfig
from peft.tuners import tuners_utils
from torch import nn
from transformers import PreTrainedModel

from opdlab.models.compatibility import ordinary_tokens
from opdlab.models.forward import backbone, run_backbone
from opdlab.models.vocabulary import vocabulary_rows

# of the model's weights; smaller parts (a recurrence's decay, a router) are not worth a warning
SHARE_TOLD = 0.1


def incompatible_layers(model: nn.Module) -> list[str]:
    """Names of linear layers that PEFT refuses, because a family reads their weights without
    calling them.
    """
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


@torch.no_grad()
def unused_layers(model: PreTrainedModel) -> list[str]:
    """Paths of the linear layers in parts that plain text never enters, as an image encoder: they
    could not learn.
    """
    inner = backbone(model)
    parts = [
        part
        for part in inner.children()
        if any(isinstance(layer, nn.Linear) for layer in part.modules())
    ]
    if len(parts) < 2:
        return []
    entered: set[nn.Module] = set()
    modules = {module for part in parts for module in part.modules()}
    hooks = [
        module.register_forward_pre_hook(lambda module, _: entered.add(module))
        for module in modules
    ]
    try:
        run_backbone(
            model,
            torch.tensor([ordinary_tokens(model, vocabulary_rows(model), 4)], device=model.device),
        )
    finally:
        for hook in hooks:
            hook.remove()
    unused = {
        layer
        for part in parts
        if not entered.intersection(part.modules())
        for layer in part.modules()
    }
    return [
        path
        for path, layer in model.named_modules()
        if layer in unused and isinstance(layer, nn.Linear)
    ]


def unreached_weights(model: nn.Module) -> dict[str, int]:
    """Matrices outside of PyTorch's layers that no adapter wraps, as fused experts: how many
    numbers each has in all layers.
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
    """Say which large part of a model the LoRA that it carries does not reach, if there is one."""
    left = unreached_weights(model)
    share = sum(left.values()) / sum(parameter.numel() for parameter in model.parameters())
    if share < SHARE_TOLD:
        return
    largest = sorted(left, key=lambda place: -left[place])[:3]
    warnings.warn(
        f"The LoRA does not reach {share:.0%} of {type(model).__name__}'s weights, which are no"
        f" linear layers (as fused experts are): {', '.join(largest)}. They stay as they are, the"
        " rest learns. To train them too, train all weights: lora=None.",
        stacklevel=3,
    )
