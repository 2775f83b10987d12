"""Keep the keys and values of a prompt once for all texts that go on from it.

A plain cache holds a prompt's keys and values once per text, and each new token reads all of these
copies. Here a layer has two parts: the tokens of the prompts, `[P, …]`, and those of the `n` texts
of each prompt, `[P * n, …]`. The scores of both parts share one softmax, so the numbers are those
of plain attention: softmax(q K^T) V with K = [K_prompt; K_text] and V likewise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from opdlab.models.growing_cache import GrowingLayer
from opdlab.models.products import gives_float32

# The name under which transformers finds `attend`. Its masks are left out for names that it does
# not know: a single new token may look at everything but padding, which `Parts` carries.
ATTENTION = "opdlab_parts"

# What some families hand to attention beside a mask, and two parts do not follow: windows, sinks,
# biases, a choice of keys. Most matter in long texts only, which no check of a few tokens sees.
REFUSED = ("sliding_window", "s_aux", "sinks", "position_bias", "indices", "block_indices")


class Parts(NamedTuple):
    """The keys, or the values, of a layer.

    Attributes:
        prompt: Those of the prompts, `[P, heads, S, D]`.
        text: Those of the texts, `[P * n, heads, T, D]`; text `i * n + j` goes on from prompt `i`.
        padding: True where a prompt is padded, `[P, S]`; None for no padding.
        unwritten: True for tokens of the texts that are not written yet, `[T]`; None for none.
    """

    prompt: Tensor
    text: Tensor
    padding: Tensor | None = None
    unwritten: Tensor | None = None


class PartedLayer(GrowingLayer):
    """The keys and values of one layer, prompts and texts apart.

    Args:
        keys: The keys of the prompts, `[P, heads, S, D]`.
        values: The values of the prompts, `[P, heads, S, D']`.
        padding: As in `Parts`.
    """

    _layer_type = None

    def __init__(self, keys: Tensor, values: Tensor, padding: Tensor | None) -> None:
        super().__init__(DynamicLayer())
        self.prompt_keys, self.prompt_values, self.padding = keys, values, padding
        self.lazy_initialization(self.prompt_keys, self.prompt_values)  # no tokens of texts yet

    def update(  # type: ignore[override]  # `attend` takes parts in place of tensors
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Parts, Parts]:
        """Add the keys and values of one new token per text.

        Args:
            key_states: `[P * n, heads, 1, D]`.
            value_states: `[P * n, heads, 1, D']`.

        Returns:
            The keys and values of all tokens so far, in two parts.
        """
        keys, values = super().update(key_states, value_states)
        return (
            Parts(self.prompt_keys, keys, self.padding),
            Parts(self.prompt_values, values, self.padding),
        )

    def get_seq_length(self) -> int:
        """Count the tokens of each text, prompt and padding included.

        Returns:
            The number of tokens.
        """
        return self.prompt_keys.shape[2] + int(super().get_seq_length())

    def keep(self, prompts: Tensor, texts: Tensor) -> None:
        """Go on with some prompts and texts only.

        Args:
            prompts: Numbers of the prompts.
            texts: Numbers of their texts, equally many for each prompt.
        """
        self.prompt_keys, self.prompt_values = (
            self.prompt_keys[prompts],
            self.prompt_values[prompts],
        )
        self.padding = None if self.padding is None else self.padding[prompts]
        if self.keys is not None and self.keys.numel():
            self.reorder_cache(cast(torch.LongTensor, texts))


class Room:
    """The room that the layers of a cache have for the tokens of the texts, and how much is used.

    Its tensors change in place.

    Args:
        tokens: Tokens of each text that there is room for.
        device: The device of the model.

    Attributes:
        tokens: Tokens of each text that there is room for.
        place: The place of the token that is being added, `[1]`.
        unwritten: True for the places after it, `[tokens]`.
    """

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.tokens = tokens
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.unwritten = torch.ones(tokens, dtype=torch.bool, device=device)
        self._places = torch.arange(tokens, device=device)

    def begin_token(self) -> None:
        """Mark the places after the token that is going to be added."""
        torch.gt(self._places, self.place, out=self.unwritten)

    def end_token(self) -> None:
        """Go on to the next place."""
        self.place.add_(1)

    def grow(self, tokens: int) -> None:
        """Make room for more tokens.

        Args:
            tokens: Tokens more of each text.
        """
        device, self.tokens = self.place.device, self.tokens + tokens
        self.unwritten = torch.ones(self.tokens, dtype=torch.bool, device=device)
        self._places = torch.arange(self.tokens, device=device)


class FixedLayer(PartedLayer):
    """A `PartedLayer` whose tokens of the texts are written in place, into a room of fixed size.

    Args:
        layer: The layer, before any text has tokens.
        room: The room, of all layers.
        texts: Number of texts.
    """

    _layer_type = None

    def __init__(self, layer: PartedLayer, room: Room, texts: int) -> None:
        super().__init__(layer.prompt_keys, layer.prompt_values, layer.padding)
        self.room = room
        # Zeros: a place without weight must not add 0 * NaN.
        self.keys, self.values = (
            states.new_zeros(texts, states.shape[1], room.tokens, states.shape[3])
            for states in (self.prompt_keys, self.prompt_values)
        )

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Parts, Parts]:
        """Add the keys and values of one new token per text; see `PartedLayer`."""
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self.room.place, key_states)
        self.values.index_copy_(2, self.room.place, value_states)
        unwritten = self.room.unwritten
        return (
            Parts(self.prompt_keys, self.keys, self.padding, unwritten),
            Parts(self.prompt_values, self.values, self.padding, unwritten),
        )

    def get_seq_length(self) -> int:
        """Count the places of each text, also those that are not written yet.

        How many are written is known to the device alone. Families that take positions from here
        are found by the self-check.

        Returns:
            The tokens of the prompts, padding included, and the room.
        """
        return self.prompt_keys.shape[2] + self.room.tokens

    def grow(self, tokens: int) -> None:
        """Make room for more tokens.

        Args:
            tokens: Tokens more of each text.
        """
        assert self.keys is not None
        assert self.values is not None
        self.keys = functional.pad(self.keys, (0, 0, 0, tokens))
        self.values = functional.pad(self.values, (0, 0, 0, tokens))


def split_cache(cache: DynamicCache, mask: Tensor | None) -> list[PartedLayer]:
    """Turn a cache of prompts into one of prompts and their texts, if all its layers only append.

    Args:
        cache: The cache after a pass over the prompts; its layers are replaced.
        mask: 1 for tokens and 0 for padding of the prompts, `[P, S]`; None for no padding.

    Returns:
        The new layers; none where a layer is of another kind, and the cache is as it was then.
    """
    padding, layers = None if mask is None else mask == 0, []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            return []
        layers.append(PartedLayer(layer.keys, layer.values, padding))
    cache.layers = [*layers]
    return layers


@contextmanager
def attention_to_parts(model: PreTrainedModel) -> Iterator[None]:
    """Let a model's layers attend with `attend` until the block ends.

    Args:
        model: The backbone; its layers read the name of their attention from its configuration.

    Yields:
        Nothing.
    """
    config = model.config
    # What `set_attn_implementation` sets, which goes through all modules: too slow for each token.
    before = config._attn_implementation_internal
    config._attn_implementation_internal = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def attend(
    module: nn.Module,
    query: Tensor,
    key: Parts,
    value: Parts,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend from one new token per text to the tokens of prompts and texts.

    Args:
        module: The attention layer.
        query: `[P * n, query heads, 1, D]`.
        key: The keys of all tokens.
        value: The values of all tokens.
        attention_mask: A mask that the model makes by itself, which is refused.
        scaling: Factor of the scores; D ** -0.5 by default.
        softcap: Scores stay between -softcap and softcap, by a tanh; None for no cap.
        options: What else a family hands over; those of `REFUSED` must be None.

    Returns:
        `[P * n, 1, query heads, D']`, and None for the weights, which are not kept.

    Raises:
        NotImplementedError: The family attends in a way that two parts do not have.
    """
    is_split = isinstance(key, Parts) and isinstance(value, Parts) and query.shape[2] == 1
    has_more = any(options.get(name) is not None for name in REFUSED)
    if not is_split or attention_mask is not None or has_more:
        raise NotImplementedError(f"one new token per text, no mask, and none of {REFUSED}")
    prompts, heads, width = key.prompt.shape[0], key.text.shape[1], key.prompt.shape[2]
    n, group = len(query) // prompts, query.shape[1] // heads  # query heads per key head
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    # All queries of a prompt at once: [P, heads, n * group, D] against its keys [P, heads, S, D].
    per_text = query.view(prompts * n, heads, group, -1)
    per_prompt = _by_prompt(per_text, prompts)
    to_prompt = _scores(per_prompt, key.prompt)
    to_text = _scores(per_text, key.text)
    scores = torch.cat([_by_text(to_prompt, n), to_text], -1) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    hidden = _hidden_from_texts(key, n)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1).to(query.dtype)
    on_prompt, on_text = weights.split([width, key.text.shape[2]], -1)
    out = torch.matmul(on_text, value.text)
    out = out + _by_text(torch.matmul(_by_prompt(on_prompt, prompts), value.prompt), n)
    return out.flatten(1, 2)[:, None], None


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Multiply `[B, heads, Q, D]` with `[B, heads, T, D]` to scores in float32 at least.

    In half precision the products would be rounded, which a fused attention does not do.
    """
    if query.dtype in (torch.float32, torch.float64):
        return torch.matmul(query, key.transpose(-1, -2))
    if gives_float32(query.device, query.dtype):
        flat = query.flatten(0, 1), key.flatten(0, 1).transpose(-1, -2)
        wide: Tensor = torch.bmm(*flat, out_dtype=torch.float32)
        return wide.view(*query.shape[:3], -1)
    scores: Tensor = torch.matmul(query.float(), key.float().transpose(-1, -2))
    return scores


def _hidden_from_texts(key: Parts, n: int) -> Tensor | None:
    """Find the places that are hidden from each text, `[P * n, 1, 1, S + T]`; None for none."""
    if key.padding is None and key.unwritten is None:
        return None
    prompts, width, tokens = key.prompt.shape[0], key.prompt.shape[2], key.text.shape[2]
    padding, unwritten = key.padding, key.unwritten
    if padding is None:
        padding = torch.zeros(prompts, width, dtype=torch.bool, device=key.text.device)
    if unwritten is None:
        unwritten = torch.zeros(tokens, dtype=torch.bool, device=key.text.device)
    padding = padding.repeat_interleave(n, 0)
    hidden = torch.cat([padding, unwritten.expand(len(padding), -1)], -1)
    return hidden[:, None, None]


def _by_prompt(values: Tensor, prompts: int) -> Tensor:
    """Rearrange `[P * n, heads, group, D]` to `[P, heads, n * group, D]`."""
    texts, heads, group, size = values.shape
    n = texts // prompts
    return values.view(prompts, n, heads, group, size).transpose(1, 2).flatten(2, 3)


def _by_text(values: Tensor, n: int) -> Tensor:
    """Rearrange `[P, heads, n * group, D]` to `[P * n, heads, group, D]`."""
    prompts, heads, rows, size = values.shape
    return values.view(prompts, heads, n, rows // n, size).transpose(1, 2).flatten(0, 1)


AttentionInterface.register(ATTENTION, attend)
