"""Arranging rows into passes: each row once, little padding, what prompts share run once."""

from __future__ import annotations

import random

import pytest
import torch

from opdlab.models.micro_batches import (
    Limits,
    arrange,
    count_alike,
    find_levels,
    in_order,
    make_level,
)


def tokens_run(levels, starts, width: int) -> int:
    """Tokens of all passes of a batch whose rows are `width` long."""
    begun = total = 0
    for level in levels:
        total += len(level.rows) * (level.length - begun)
        begun = level.length
    return total + len(starts) * (width - begun)


def beginnings_run(levels, starts) -> list[list[int]]:
    """Each row's prompt, put together from the beginnings that are run for it."""
    found = []
    for i, start in enumerate(starts):
        begun, text = 0, []
        for level in levels:
            text += starts[level.rows[level.places[i]]][begun : level.length]
            begun = level.length
        found.append(text + start[begun:])
    return found


def test_tokens_that_two_texts_begin_with():
    assert count_alike([1, 2, 3], [1, 2, 4]) == 2
    assert count_alike([1, 2], [1, 2, 4]) == 2
    assert count_alike([5], [1]) == count_alike([], [1]) == 0


def test_samples_of_a_prompt_share_all_of_it_but_the_last_token():
    starts = [[7] * 100] * 3 + [[8] * 100] * 3
    levels = find_levels(starts, 10)
    assert [level.length for level in levels] == [99]
    assert levels[0].rows == (0, 3)
    assert levels[0].places == (0, 0, 0, 1, 1, 1)


def test_a_system_message_and_the_prompts_behind_it_are_two_levels():
    starts = [[1] * 50 + [question] * 50 for question in (2, 2, 3, 3, 4)]
    levels = find_levels(starts, 10)
    assert [(level.length, len(level.rows)) for level in levels] == [(50, 1), (99, 3)]
    assert tokens_run(levels, starts, 100) == 50 + 3 * 49 + 5


def test_what_saves_less_than_a_pass_costs_is_not_shared():
    assert find_levels([[1] * 11, [1] * 11], 9) != []
    assert find_levels([[1] * 11, [1] * 11], 10) == []
    assert find_levels([[1] * 100], 1) == []
    assert find_levels([[1], [1]], 0) == []


@pytest.mark.parametrize("seed", range(30))
def test_levels_run_the_rows_and_never_more_than_without_them(seed):
    draw = random.Random(seed)
    trees = [[draw.randint(0, 2) for _ in range(draw.randint(1, 40))] for _ in range(4)]
    starts = [
        draw.choice(trees)[:20] + [draw.randint(0, 1) for _ in range(draw.randint(1, 9))]
        for _ in range(draw.randint(1, 12))
    ]
    cost, width = draw.randint(0, 20), max(map(len, starts)) + 3
    levels = find_levels(starts, cost)
    assert beginnings_run(levels, starts) == starts
    spent = tokens_run(levels, starts, width) + cost * len(levels)
    one_level = [
        tokens_run([make_level(starts, length)], starts, width) + cost
        for length in range(1, min(map(len, starts)))
    ]
    assert spent <= min([tokens_run([], starts, width), *one_level])


@pytest.mark.parametrize("limits", [(64, None), (None, None), (None, 3), (10, None)])
@pytest.mark.parametrize("shares", [True, False])
def test_every_row_is_in_one_pass(limits, shares):
    draw = random.Random(0)
    starts = [[draw.randint(0, 1)] * draw.randint(1, 9) for _ in range(20)]
    lengths = [len(start) + draw.randint(0, 30) for start in starts]
    tokens, rows = limits
    passes = arrange(starts, lengths, Limits(tokens, rows, 8, shares))
    assert sorted(row for one in passes for row in one) == list(range(20))
    assert passes == sorted(sorted(one) for one in passes)
    if rows is not None:
        assert sorted(map(len, passes)) == [2, 3, 3, 3, 3, 3, 3]


def test_rows_of_similar_length_stand_together_and_passes_are_equally_large():
    lengths = [100, 10, 99, 11, 98, 12]
    starts = [[i] for i in range(6)]
    assert arrange(starts, lengths, Limits(None, None, 20, True)) == [[0, 2, 4], [1, 3, 5]]
    assert arrange(starts, lengths, Limits(None, 3, 20, True)) == [[0, 2, 4], [1, 3, 5]]
    assert arrange(starts, lengths, Limits(None, None, 1000, True)) == [[0, 1, 2, 3, 4, 5]]
    equal = arrange([[i] for i in range(8)], [192] * 8, Limits(1024, None, 32, True))
    assert [len(one) for one in equal] == [4, 4]


def test_samples_of_a_prompt_stand_together_where_the_prompt_is_long():
    starts = [[1] * 100, [2] * 100] * 4
    lengths = [100 + extra for extra in (30, 30, 20, 20, 10, 10, 5, 5)]
    apart = Limits(150, None, 60, shares=True)
    assert arrange(starts, lengths, apart) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_beginning_of_all_prompts_does_not_count_for_each():
    starts = [[1] * 500 + [i] for i in range(8)]
    limits = Limits(256, None, 32, shares=True)
    assert arrange(starts, [521] * 8, limits) == [list(range(8))]
    assert len(arrange(starts, [521] * 8, Limits(256, None, 32, shares=False))) == 8


def test_tokens_come_back_in_the_order_of_the_rows():
    passes, lengths = [[0, 3], [1, 2]], [2, 1, 0, 3]
    parts = [torch.tensor([0, 0, 3, 3, 3]), torch.tensor([1])]
    assert in_order(parts, passes, lengths).tolist() == [0, 0, 1, 3, 3, 3]
