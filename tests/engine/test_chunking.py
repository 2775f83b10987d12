"""Sizes of chunks and blocks: pure functions of the free memory."""

from __future__ import annotations

import itertools

import pytest
import torch

from opdlab.engine import chunking
from opdlab.engine.chunking import (
    ASSUMED,
    BLOCKS,
    BUFFERS,
    CPU,
    FEWEST_OF_BLOCK,
    FEWEST_OF_CHUNK,
    LARGEST,
    SHARE,
    SMALLEST,
    Budget,
    blocks,
    budget_of,
    budget_of_free,
    bytes_of_pass,
    chunks,
)

GIB = 1 << 30


def test_chunks_cover_every_token_once_within_the_budget():
    # As many as fit 32 MiB, in multiples of 32.
    for vocab, most in ((32_000, 256), (40_000, 192), (10_000, 832), (152_000, FEWEST_OF_CHUNK)):
        pieces = chunks(1000, vocab, CPU)
        assert [i for p in pieces for i in range(p.start, p.stop)] == list(range(1000))
        assert {p.stop - p.start for p in pieces[:-1]} == {most}


def test_blocks_cover_every_token_once_within_the_budget():
    for vocab, most in ((40_000, (2 << 20) // (4 * 40_000)), (152_000, FEWEST_OF_BLOCK)):
        pieces = blocks(100, vocab, CPU)
        assert [i for p in pieces for i in range(p.start, p.stop)] == list(range(100))
        assert {p.stop - p.start for p in pieces[:-1]} == {most}


@pytest.mark.parametrize("size", [chunks, blocks])
def test_no_tokens_are_one_empty_slice(size):
    assert size(0, 10, CPU) == [slice(0, 0)]


# On a GPU.


@pytest.mark.parametrize(
    ("free", "chunk"),
    [
        (0, 64 << 20),
        (-5 * GIB, 64 << 20),  # an estimate of what is left may be below 0
        (GIB, 64 << 20),
        (2 * GIB, 128 << 20),
        (3.9 * GIB, 128 << 20),
        (4 * GIB, 256 << 20),
        (15.9 * GIB, 512 << 20),
        (16 * GIB, GIB),
        (139 * GIB, GIB),
    ],
)
def test_a_chunk_is_a_power_of_two_near_a_share_of_the_free_memory(free, chunk):
    assert budget_of_free(free) == Budget(chunk, chunk // BLOCKS)


def test_more_memory_never_gives_a_smaller_chunk_and_bounds_hold():
    budgets = [budget_of_free(free) for free in range(0, 40 * GIB, 97 << 20)]
    for less, more in itertools.pairwise(budgets):
        assert less.chunk <= more.chunk
    assert {SMALLEST, LARGEST} <= {budget.chunk for budget in budgets}
    assert len({budget.chunk for budget in budgets}) == 5  # seldom another one


@pytest.mark.parametrize("free", [2 * GIB, 8 * GIB, 80 * GIB])
def test_a_pass_of_two_policies_takes_less_than_half_of_the_free_memory(free):
    assert bytes_of_pass(100_000, 151_936, "cuda", free=free) < free / 2


def test_the_budget_of_a_card_follows_its_free_memory(monkeypatch):
    """The driver's free bytes count, and those that PyTorch's allocator keeps unused."""
    numbers = {"mem_get_info": (2 * GIB, 80 * GIB), "memory_reserved": 9 * GIB}
    numbers["memory_allocated"] = 3 * GIB
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert chunking.free_bytes(torch.device("cuda")) == 8 * GIB
    assert budget_of(torch.device("cuda")) == budget_of_free(8 * GIB) == Budget(GIB // 2, GIB // 8)


def test_a_device_that_does_not_tell_gets_the_budget_of_some_free_memory():
    assert budget_of(torch.device("mps")) == budget_of_free(ASSUMED)
    assert budget_of(torch.device("cpu")) == CPU


# The estimate.


@pytest.mark.parametrize("free", [None, GIB, 6 * GIB, 139 * GIB])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("vocab", [32_000, 151_936])
@pytest.mark.parametrize("tokens", [1, 50, 100_000])
def test_the_estimate_counts_the_tensors_of_a_chunk_and_a_block(free, kind, vocab, tokens):
    budget = chunking.budget_of_kind(kind, free)
    chunk = chunks(tokens, vocab, budget)[0].stop
    block = blocks(chunk, vocab, budget)[0].stop
    row = 4 * vocab
    held = 3 * chunk * row + BUFFERS * block * row
    counted = bytes_of_pass(tokens, vocab, kind, policies=3, free=free)
    assert held <= counted < held + (3 + BUFFERS) * row  # whole rows fit


def test_the_largest_pass_on_a_card_is_a_few_gibibytes():
    chunks_of_two = 2 * 1760 * 4 * 151_936  # multiples of 32 rows below 1 GiB each
    got = bytes_of_pass(65_536, 151_936, "cuda", free=LARGEST * SHARE)
    assert got == chunks_of_two + 2.5 * GIB
