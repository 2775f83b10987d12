"""The shape of a model: how many numbers it has and what a token costs, without its weights.

A configuration is enough. The model is built on PyTorch's `meta` device, which holds no numbers,
and its parameters are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from opdlab.errors import InvalidValue
from opdlab.support.validation import Text, validate_arguments

# Shapes that plans are often made for, as their configurations on the Hub say; these need no file.
# hidden size, layers, heads, key-value heads, intermediate size, and whether the head is tied
_DENSE = {
    "Qwen/Qwen3-0.6B": (1024, 28, 16, 8, 3072, True),
    "Qwen/Qwen3-1.7B": (2048, 28, 16, 8, 6144, True),
    "Qwen/Qwen3-4B": (2560, 36, 32, 8, 9728, True),
    "Qwen/Qwen3-8B": (4096, 36, 32, 8, 12288, False),
    "Qwen/Qwen3-14B": (5120, 40, 40, 8, 17408, False),
    "Qwen/Qwen3-32B": (5120, 64, 64, 8, 25600, False),
}
_EXPERTS = {  # with 128 experts, 8 of them for each token
    "Qwen/Qwen3-30B-A3B": (2048, 48, 32, 4, 768),
    "Qwen/Qwen3-235B-A22B": (4096, 94, 64, 4, 1536),
}
_SMALL = "small"  # SmolLM2-135M
_COMMON: dict[str, Any] = {"vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960}
KNOWN = (_SMALL, *_DENSE, *_EXPERTS)


@dataclass(frozen=True)
class Shape:
    """The sizes of a causal language model that decide what it costs.

    Attributes:
        name: The model's name.
        parameters: All of its numbers.
        inside: Numbers of the layers, without embeddings and head.
        active: Numbers of the layers that one token is multiplied with; of a mixture of experts,
            those of the experts that it goes to.
        vocab: Rows of the head.
        hidden: Width of the hidden states.
        layers: Number of layers.
        attention: Width of all query heads together.
        cache: Numbers of the key-value cache per token.
        inner: Width of the feed-forward layer that a token goes through.
        lora: Inputs plus outputs of all linear layers but the head; a LoRA of rank `r` has `r`
            times as many numbers.
    """

    name: str
    parameters: int
    inside: int
    active: int
    vocab: int
    hidden: int
    layers: int
    attention: int
    cache: int
    inner: int
    lora: int

    @property
    def head(self) -> int:
        """Numbers of the output head."""
        return self.vocab * self.hidden


@validate_arguments
def shape_of(source: Text) -> Shape:
    """Find the shape of a model by its configuration; no weights are loaded.

    Args:
        source: One of `KNOWN`, a folder with a `config.json`, or a name on the Hub.

    Returns:
        The shape.

    Raises:
        InvalidValue: There is no configuration, or it is not that of a causal language model.
    """
    return _shape_of(source)


@cache
def _shape_of(source: str) -> Shape:
    try:
        known = _known_config(source)
        config = known or AutoConfig.from_pretrained(source)  # nosec B615  # shapes alone
        return shape_of_config(config, Path(source).name)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidValue(
            f"{source!r} has no configuration from which a causal language model can be made"
            f" ({error}). Give a folder with a config.json, a name on the Hub, or one of"
            f" {', '.join(KNOWN)}."
        ) from None


def shape_of_config(config: PreTrainedConfig, name: str) -> Shape:
    """Count the numbers of the model that a configuration describes.

    Args:
        config: The configuration.
        name: The model's name.

    Returns:
        The shape.
    """
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    text: Any = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    pairs = getattr(text, "num_key_value_heads", None) or heads
    head = model.get_output_embeddings()
    outside = {id(head.weight), id(model.get_input_embeddings().weight)}
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 0
    chosen = getattr(text, "num_experts_per_tok", None) or 0
    inside = active = 0
    for path, parameter in model.named_parameters():
        if id(parameter) in outside:
            continue
        share = chosen / experts if experts and ".experts." in path else 1.0
        inside += parameter.numel()
        active += int(parameter.numel() * share)
    inner = text.intermediate_size
    if experts:
        inner = chosen * (getattr(text, "moe_intermediate_size", None) or text.intermediate_size)
    linear = [
        layer
        for layer in model.modules()
        if isinstance(layer, torch.nn.Linear) and layer is not head
    ]
    return Shape(
        name=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        inside=inside,
        active=active,
        vocab=int(head.weight.shape[0]),
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        attention=heads * size,
        cache=2 * text.num_hidden_layers * pairs * size,
        inner=inner,
        lora=sum(layer.in_features + layer.out_features for layer in linear),
    )


def _known_config(source: str) -> PreTrainedConfig | None:
    from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

    if source == _SMALL:
        return LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            tie_word_embeddings=True,
        )
    if source in _DENSE:
        hidden, layers, heads, pairs, inner, tied = _DENSE[source]
        return Qwen3Config(
            **_COMMON,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=pairs,
            intermediate_size=inner,
            tie_word_embeddings=tied,
        )
    if source in _EXPERTS:
        hidden, layers, heads, pairs, inner = _EXPERTS[source]
        return Qwen3MoeConfig(
            **_COMMON,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=pairs,
            moe_intermediate_size=inner,
            num_experts=128,
            num_experts_per_tok=8,
            tie_word_embeddings=False,
        )
    return None
