"""Add a LoRA to its layers' weights while a text is written, one token at a time.

A LoRA layer makes three products in place of one, and for a few rows each costs about as much as
the large one: with rank 16, writing took a fifth longer than without a LoRA. Learning needs the
matrices apart; writing does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from opdlab.models.adapters.layers import find_layers, names_in_force

FEWEST_TOKENS = 8  # of a text: adding takes as long as writing some


@contextmanager
def merged_for_writing(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Add the LoRA in force to float32 weights on a CPU until the block ends.

    The layers get sums of their own and afterwards their own weights back, bit for bit. Layers stay
    as they are where a sum would round (other dtypes, autocast), where it would take memory of a
    GPU, and where the adapter is no plain LoRA on a plain linear layer. The head stays too: its
    logits are computed from the matrix and its LoRA (`opdlab.models.head`).

    Args:
        model: The model, with the adapter in force that writes.
        tokens: Tokens of each text; nothing is done for a few.

    Yields:
        Nothing; forward passes in the block compute what they did before, up to rounding.
    """
    pays = tokens >= FEWEST_TOKENS and not torch.is_autocast_enabled("cpu")
    head = model.get_output_embeddings()
    layers = [layer for layer in find_layers(model) if layer is not head] if pays else []
    own: list[tuple[Any, nn.Parameter]] = []
    try:
        with torch.no_grad():
            for layer in layers:
                if (total := _sum(layer)) is not None:
                    base = layer.get_base_layer()
                    own.append((layer, base.weight))
                    base.weight = nn.Parameter(total, requires_grad=False)
                    layer._disable_adapters = True
        yield
    finally:
        for layer, weight in own:
            layer.get_base_layer().weight = weight
            layer._disable_adapters = False


def _sum(layer: Any) -> Tensor | None:
    """The weight of a layer with its LoRA; None where they are better left apart."""
    names = names_in_force(layer)
    if not isinstance(layer, LoraLinear) or len(names) != 1 or layer.merged:
        return None
    (name,), base = names, layer.get_base_layer()
    if type(base) is not nn.Linear or name not in layer.lora_A:
        return None
    weight = base._parameters["weight"]
    is_plain = (
        weight is not None
        and type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and layer.lora_A[name].weight.dtype == torch.float32
        and name not in layer.lora_variant
        and not layer.lora_bias[name]
    )
    return weight + layer.get_delta_weight(name) if is_plain and weight is not None else None
