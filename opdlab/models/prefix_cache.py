"""Go on from beginnings that several rows of a batch share, with a gradient where one is asked for.

A cache of transformers stores what a pass adds to it. Layers that run again in the backward pass
(`opdlab.models.recomputation`) would add it twice, and a beginning that `n` rows share would lie in
memory `n` times for every layer. The layers here store nothing of the pass that they serve: they
hold the keys and values of the beginnings once, and hand them out row by row.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class _FixedBeginning:
    """Put new tokens behind a beginning that never changes, for both kinds of layers.

    Attributes:
        before: Keys and values of the beginnings, `[D, heads, P, size]` each; None for none.
        places: Which of the `D` beginnings each row of the batch has, `[B]`; None for none.
        is_recording: Whether the pass is itself one of beginnings, which are kept for `after`.
    """

    before: tuple[Tensor, Tensor] | None = None
    places: Tensor | None = None
    is_recording = True
    keys: Tensor | None
    values: Tensor | None

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Put the keys and values of new tokens behind those of their rows' beginnings.

        Args:
            key_states: `[B, heads, T, size]`.
            value_states: `[B, heads, T, size']`.

        Returns:
            The keys and values of all tokens. Called once more, it returns the same.
        """
        keys, values = key_states, value_states
        if self.before is not None and self.places is not None:
            keys = _behind(self.before[0], self.places, keys)
            values = _behind(self.before[1], self.places, values)
        if self.is_recording:
            self.keys, self.values = keys, values
        return keys, values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refuse; a new cache is made instead (`after`)."""
        raise NotImplementedError("The rows of a fixed beginning are chosen when it is made.")


class _FullLayer(_FixedBeginning, DynamicLayer):
    """A layer whose tokens see all tokens before them.

    Args:
        length: Tokens of the beginnings.
    """

    def __init__(self, length: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = length

    def get_seq_length(self) -> int:
        """Return the tokens of the beginnings."""
        return self.length

    def after(self, tokens: int, places: Tensor, *, is_last: bool) -> _FullLayer:
        """Make the layer that goes on from what this one recorded; see `continue_cache`."""
        layer = _FullLayer(tokens)
        _hand_over(self, layer, places, is_last)
        return layer


class _SlidingLayer(_FixedBeginning, DynamicSlidingWindowLayer):
    """A layer whose tokens see a window of the tokens before them."""

    def after(self, tokens: int, places: Tensor, *, is_last: bool) -> _SlidingLayer:
        """Make the layer that goes on from what this one recorded; see `continue_cache`."""
        layer = _SlidingLayer(self.sliding_window)
        layer.cumulative_length = tokens
        if self.keys is not None and self.values is not None:
            # No later token sees more. All of it where the window is 1, as in transformers.
            seen = slice(-self.sliding_window + 1, None)
            self.keys, self.values = self.keys[:, :, seen], self.values[:, :, seen]
        _hand_over(self, layer, places, is_last)
        return layer


def _behind(beginnings: Tensor, places: Tensor, new: Tensor) -> Tensor:
    if len(beginnings) == 1:
        repeated = beginnings.expand(len(new), -1, -1, -1)
    else:
        repeated = beginnings.index_select(0, places.to(beginnings.device))
    return torch.cat([repeated, new], -2)


def _hand_over(old: _FixedBeginning, new: _FixedBeginning, places: Tensor, is_last: bool) -> None:
    """Move what `old` recorded to `new`.

    The old layer may run again in the backward pass. Without its records no circle of references
    keeps a graph alive that is never run backward.
    """
    if old.keys is not None and old.values is not None:
        new.before = (old.keys, old.values)
    new.places, new.is_recording = places, not is_last
    old.keys = old.values = None
    old.is_recording = False


def begin_cache(model: PreTrainedModel) -> DynamicCache:
    """Make the cache for a pass of beginnings.

    Args:
        model: The model.

    Returns:
        An empty cache. Where the model has other layers than those of attention to all tokens or to
        a window, it is a plain one of transformers, through which no gradient flows.
    """
    cache = DynamicCache(config=model.config)
    layers: list[Any] = []
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layers.append(_FullLayer())
        elif type(layer) is DynamicSlidingWindowLayer:
            layers.append(_SlidingLayer(layer.sliding_window))
        else:
            return cache
    cache.layers = layers
    return cache


def carries_gradient(cache: DynamicCache) -> bool:
    """Tell whether a gradient flows back through a cache, also where layers run again.

    Args:
        cache: A cache of `begin_cache`.

    Returns:
        True for one of fixed beginnings.
    """
    return bool(cache.layers) and all(isinstance(one, _FixedBeginning) for one in cache.layers)


def continue_cache(
    cache: DynamicCache, tokens: int, places: Tensor, *, is_last: bool
) -> DynamicCache:
    """Make the cache for a pass that goes on from beginnings.

    Args:
        cache: The cache with which the beginnings were run; not to be used afterwards.
        tokens: Tokens of each beginning.
        places: The beginning that each row goes on from, `[B]`.
        is_last: Whether no other pass goes on from this one, which then stores nothing.

    Returns:
        The cache of `B` rows.
    """
    if not carries_gradient(cache):
        cache.reorder_cache(cast(torch.LongTensor, places))
        return cache
    following = copy.copy(cache)
    following.layers = [
        cast(Any, layer).after(tokens, places, is_last=is_last) for layer in cache.layers
    ]
    return following
