"""Prompts that are kept once for their texts, against a cache that holds each text whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opdlab.models import continuation
from opdlab.models.abilities import Abilities
from opdlab.models.continuation import Cached, InPlace, Parted, begin, read_prompts
from opdlab.models.parted_cache import ATTENTION, REFUSED, Parts, attend, split_cache

SHORT, LONG = [3, 4, 5, 6], [7, 8, 9, 3, 4, 5, 6, 7]
FAMILIES = {
    "llama": {},
    "qwen3": {"num_key_value_heads": 2},  # two query heads for each key
    # scores under a tanh, which padding must not pass through
    "gemma2": {"layer_types": ["full_attention"] * 2, "attn_logit_softcapping": 0.05},
    "granite": {"attention_multiplier": 0.7},  # a scale of its own
}


def both_ways(model, starts: list[list[int]], n: int) -> tuple[Cached, Parted]:
    """Texts in a cache that holds them whole, and in one that is split."""
    whole, read = read_prompts(model, starts), read_prompts(model, starts)
    layers = split_cache(read.cache, read.mask)
    assert layers
    return Cached(model, whole, n), Parted(model, read, layers, n)


def assert_same(whole: Cached, parted: Parted) -> None:
    torch.testing.assert_close(parted.states, whole.states, rtol=1e-4, atol=1e-4)
    assert torch.equal(parted.position, whole.position)


@torch.no_grad()
@pytest.mark.parametrize("starts", [[LONG], [LONG, LONG[::-1]], [SHORT, LONG, SHORT[::-1]]])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_a_whole_cache(family, starts, make_model):
    model, n = make_model(40, family=family, **FAMILIES[family]).eval(), 3
    whole, parted = both_ways(model, starts, n)
    assert_same(whole, parted)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        tokens = torch.randint(40, (len(whole.states),), generator=generator)
        whole.append(tokens)
        parted.append(tokens)
        assert_same(whole, parted)
        if step == 1:  # the last text of each prompt ends, and all of the first prompt of several
            going = torch.tensor([True, True, False]).repeat(len(starts))
            going[:n] &= len(starts) == 1
            rows = parted.choose(going)
            assert torch.equal(rows, going.nonzero()[:, 0])
            whole.keep(rows)
            parted.keep(rows)
    for layer in parted.layers:
        assert layer.prompt_keys.shape[0] == max(1, len(starts) - 1)  # each prompt once
        assert layer.get_seq_length() == max(map(len, starts)) + 5


@torch.no_grad()
@pytest.mark.parametrize("starts", [[LONG], [SHORT, LONG, SHORT[::-1]]])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_in_place_are_those_of_a_whole_cache(family, n, starts, make_model, monkeypatch):
    monkeypatch.setattr(continuation, "ROOM", 3)
    model = make_model(40, family=family, **FAMILIES[family]).eval()
    whole = Cached(model, read_prompts(model, starts), n)
    fixed = begin(model, starts, n, Abilities(), replay=True)
    assert isinstance(fixed, InPlace)
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        tokens = torch.randint(40, (len(whole.states),), generator=generator)
        fixed.make_room()
        held = fixed.layout, [fixed.states, fixed.position, *(x.keys for x in fixed.fixed)]
        places = [values.data_ptr() for values in held[1]]
        for texts in (whole, fixed):
            texts.append(tokens)
        assert_same(whole, fixed)
        # A recorded kernel would find its tensors again, unless the layout says otherwise.
        now = [fixed.states, fixed.position, *(x.keys for x in fixed.fixed)]
        assert [values.data_ptr() for values in now] == places
        assert fixed.layout == held[0]
        if step == 1 and n > 1:
            going = torch.tensor([True, True, False]).repeat(len(starts))
            rows = fixed.choose(going)
            whole.keep(rows)
            fixed.keep(rows)
            assert fixed.layout != held[0]
    assert fixed.room.tokens == 9


@torch.no_grad()
def test_rows_may_end_before_the_first_token(make_model):
    model = make_model(40).eval()
    whole, parted = both_ways(model, [SHORT, LONG], 2)
    for texts in (whole, parted):
        texts.keep(torch.tensor([2, 3]))
        texts.append(torch.tensor([5, 6]))
    assert_same(whole, parted)


@torch.no_grad()
def test_the_model_attends_as_before_afterwards(make_model):
    model = make_model(40).eval()
    before = model.config._attn_implementation
    _, parted = both_ways(model, [SHORT], 2)
    parted.append(torch.tensor([1, 2]))
    assert model.config._attn_implementation == before != ATTENTION
    with pytest.raises(IndexError):
        parted.append(torch.tensor([1, 2, 3, 999]))
    assert model.config._attn_implementation == before


@given(
    prompts=st.integers(1, 4),
    n=st.integers(1, 4),
    data=st.data(),
)
def test_equally_many_texts_of_each_prompt_are_chosen(prompts, n, data):
    flags = st.lists(st.booleans(), min_size=prompts * n, max_size=prompts * n).filter(any)
    going = torch.tensor(data.draw(flags))
    texts = Parted.__new__(Parted)  # `choose` reads the number of texts only
    texts.n = n
    rows = texts.choose(going)
    assert torch.equal(rows, rows.unique())
    assert set(going.nonzero()[:, 0].tolist()) <= set(rows.tolist())
    counts = [int(((rows // n) == i).sum()) for i in range(prompts)]
    most = int(going.view(prompts, n).sum(1).max())
    has_any: Tensor = going.view(prompts, n).any(1)
    assert counts == [most if has_any[i] else 0 for i in range(prompts)]


def test_one_text_per_prompt_needs_no_parts_and_several_do(make_model):
    model = make_model(40).eval()
    with torch.no_grad():
        assert isinstance(begin(model, [SHORT, LONG], 1, Abilities()), Cached)
        assert isinstance(begin(model, [SHORT, LONG], 2, Abilities()), Parted)
        without = Abilities(splits_cache=False)
        assert isinstance(begin(model, [SHORT, LONG], 2, without), Cached)


def test_layers_of_other_kinds_are_left_as_they_are(make_model):
    model = make_model(40, family="gemma2").eval()  # sliding windows
    with torch.no_grad():
        read = read_prompts(model, [SHORT])
        layers = list(read.cache.layers)
        assert split_cache(read.cache, read.mask) == []
        assert read.cache.layers == layers
        assert isinstance(begin(model, [SHORT], 2, Abilities()), Cached)


@pytest.mark.parametrize("name", REFUSED)
def test_attention_of_other_kinds_is_refused(name):
    """Windows and chosen keys show in long texts only, which no check of a few tokens sees."""
    query = torch.zeros(2, 4, 1, 8)
    parts = Parts(torch.zeros(1, 2, 3, 8), torch.zeros(2, 2, 1, 8))
    attend(torch.nn.Identity(), query, parts, parts, None, **{name: None})
    with pytest.raises(NotImplementedError):
        attend(torch.nn.Identity(), query, parts, parts, None, **{name: 5})


def test_short_texts_get_little_room(make_model):
    with torch.no_grad():
        limits = torch.tensor([7, 3])
        texts = begin(make_model(40), [SHORT], 2, Abilities(), limits=limits, replay=True)
    assert isinstance(texts, InPlace)
    assert texts.room.tokens == 7
