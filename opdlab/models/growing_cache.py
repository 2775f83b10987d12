"""Keep room at the end of a cache, so that a new token is written and not copied together.

transformers' `DynamicLayer` concatenates at each token, which copies all keys and values of all
texts again. A `GrowingLayer` copies them when its room is used up, and then takes a quarter more
than it needs, as lists do: each number is copied a few times in all, however long the texts get.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

LEAST_ROOM = 32  # tokens


class GrowingLayer(DynamicLayer):
    """The keys and values of one layer, with room for more tokens behind them.

    It writes in place, so no gradient can flow through it.

    Args:
        layer: The layer whose keys and values it begins with.
    """

    _layer_type = None  # with a type, transformers would make it for every new cache of that type

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rooms: dict[str, Tensor] = {}
        if layer.keys is not None and layer.values is not None:
            self.lazy_initialization(layer.keys, layer.values)
            self.keys, self.values = layer.keys, layer.values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens.

        Args:
            key_states: `[B, heads, T, D]`.
            value_states: `[B, heads, T, D']`.

        Returns:
            The keys and values of all tokens so far.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take other rows; see `DynamicLayer`.

        Args:
            beam_idx: Numbers of the rows, in the order that they shall have.
        """
        super().reorder_cache(beam_idx)
        self._rooms.clear()  # of other rows

    def _append(self, name: str, old: Tensor | None, new: Tensor) -> Tensor:
        """Write `new` behind `old`, `[B, heads, T, D]` each, in a larger tensor if need be."""
        begun = old if old is not None and old.numel() else new[:, :, :0]
        start, end = begun.shape[2], begun.shape[2] + new.shape[2]
        room = self._rooms.get(name)
        if room is None or room.data_ptr() != begun.data_ptr() or room.shape[2] < end:
            tokens = end + max(LEAST_ROOM, end // 4)
            room = new.new_empty(*new.shape[:2], tokens, new.shape[3])
            room[:, :, :start] = begun
            self._rooms[name] = room
        room[:, :, start:end] = new
        return room[:, :, :end]


def let_grow(cache: DynamicCache) -> None:
    """Give room to the layers of a cache that only ever append.

    Layers of other kinds (sliding windows, recurrent states) stay as they are.

    Args:
        cache: A cache that is used without gradient from now on; it is changed.
    """
    cache.layers = [
        GrowingLayer(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
