"""A cache with room against transformers' own, which copies everything at each token."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from opdlab.models.growing_cache import LEAST_ROOM, GrowingLayer, let_grow

HEADS, KEY_SIZE, VALUE_SIZE = 2, 3, 5


def new_tokens(rows: int, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Keys and values of some tokens."""
    sizes = (KEY_SIZE, VALUE_SIZE)
    return tuple(torch.randn(rows, HEADS, tokens, size, generator=generator) for size in sizes)


@given(
    seed=st.integers(0, 10**6),
    begun=st.booleans(),
    acts=st.lists(st.sampled_from(["one", "many", "pick", "drop", "crop"]), max_size=12),
)
def test_a_growing_layer_holds_what_a_plain_one_holds(seed, begun, acts):
    generator = torch.Generator().manual_seed(seed)
    plain, rows = DynamicLayer(), 3
    if begun:
        plain.update(*new_tokens(rows, 4, generator))
    growing = GrowingLayer(plain)
    for act in ["one", *acts]:
        if act in ("one", "many"):
            added = new_tokens(rows, 1 if act == "one" else LEAST_ROOM + 1, generator)
            for mine, theirs in zip(growing.update(*added), plain.update(*added), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        elif act == "crop":
            growing.crop(-1)
            plain.crop(-1)
        else:
            index = torch.randint(rows, (rows if act == "pick" else max(1, rows - 1),))
            growing.reorder_cache(index)
            plain.reorder_cache(index)
            rows = len(index)
        assert growing.get_seq_length() == plain.get_seq_length()
        assert growing.get_mask_sizes(1) == plain.get_mask_sizes(1)


def test_tokens_are_written_in_place():
    generator = torch.Generator().manual_seed(0)
    growing = GrowingLayer(DynamicLayer())
    places = {growing.update(*new_tokens(2, 1, generator))[0].data_ptr() for _ in range(1000)}
    assert len(places) < 20  # a plain layer has a place of its own for each of the 1,000 tokens


def test_other_rows_do_not_see_what_is_written_later():
    generator = torch.Generator().manual_seed(0)
    growing = GrowingLayer(DynamicLayer())
    before, _ = growing.update(*new_tokens(2, 3, generator))
    seen = before.clone()
    growing.reorder_cache(torch.tensor([1, 0]))
    growing.update(*new_tokens(2, 1, generator))
    torch.testing.assert_close(before, seen, rtol=0, atol=0)


def test_only_layers_that_append_are_changed_and_new_caches_are_transformers_own():
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=2))
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    let_grow(cache)
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [GrowingLayer, GrowingLayer, DynamicSlidingWindowLayer]
    fresh = DynamicCache(config=LlamaConfig(num_hidden_layers=2))
    assert [type(layer) for layer in fresh.layers] == [DynamicLayer, DynamicLayer]
