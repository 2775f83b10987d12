"""Intervals over prompts and seeds: their formula, and how often they contain the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from opdlab.errors import EmptyPrompts, InvalidValue, NonFinite
from opdlab.training.crossed import crossed_mean, crossed_ratio


def answers(rng, chance: float, seeds: int, hard: np.ndarray, spread: float) -> np.ndarray:
    """Right or wrong `[S, P]` with the given mean chance: prompts differ, and so do seeds."""
    effect = rng.normal(0, spread, (seeds, 1))
    level = stats.norm.ppf(chance) * math.sqrt(2 + spread**2)
    return (level + effect + hard + rng.normal(size=(seeds, len(hard))) > 0).astype(float)


@pytest.mark.parametrize(
    ("seeds", "prompts", "chance", "spread"),
    [(1, 60, 0.6, 0.0), (3, 50, 0.6, 0.2), (3, 60, 0.95, 0.3), (10, 60, 0.9, 0.3)],
)
def test_the_interval_of_a_gain_contains_the_truth_in_95_of_100_cases(
    seeds, prompts, chance, spread
):
    rng, cases, hits = np.random.default_rng(seeds), 400, 0
    for _ in range(cases):
        hard = rng.normal(size=prompts)
        before = (rng.random(prompts) < 0.35).astype(float)
        found = crossed_mean(answers(rng, chance, seeds, hard, spread) - before)
        hits += found.low <= chance - 0.35 <= found.high
    assert stats.binomtest(hits, cases, 0.95, alternative="less").pvalue > 0.01, hits / cases


@pytest.mark.parametrize(("whole", "part", "spread"), [(0.9, 0.6, 0.2), (0.7, 0.35, 0.0)])
def test_the_interval_of_a_ratio_contains_the_truth_in_95_of_100_cases(whole, part, spread):
    rng, cases, hits = np.random.default_rng(7), 300, 0
    for _ in range(cases):
        hard = rng.normal(size=60)
        before = (rng.random(60) < 0.35).astype(float)
        tables = [answers(rng, chance, 3, hard, spread) - before for chance in (part, whole)]
        _, low, high = crossed_ratio(*tables)
        hits += low <= (part - 0.35) / (whole - 0.35) <= high
    assert stats.binomtest(hits, cases, 0.95, alternative="less").pvalue > 0.01, hits / cases


def test_one_seed_is_students_interval_over_prompts_and_pseudo_prompts():
    change = np.array([[1.0, 0, 1, 0, 0, -1, 1, 1, 0, 1]])
    found = crossed_mean(change)
    padded = [*change[0], 1, -1]
    want = stats.ttest_1samp(padded, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((want.low, want.high))
    assert found.mean == pytest.approx(0.4)
    assert "10 prompts, 1 seed: nothing about other seeds" in repr(found)


def test_the_variance_is_that_of_the_two_way_layout():
    rng = np.random.default_rng(0)
    change = rng.integers(-1, 2, (4, 9)).astype(float)
    x = np.concatenate([change, np.tile([1.0, -1.0], (4, 1))], 1)
    seeds, prompts = x.shape
    mean = x.mean()
    of_seeds = prompts * sum((row.mean() - mean) ** 2 for row in x) / (seeds - 1)
    of_prompts = seeds * sum((column.mean() - mean) ** 2 for column in x.T) / (prompts - 1)
    rest = sum(
        (x[s, p] - x[s].mean() - x[:, p].mean() + mean) ** 2
        for s in range(seeds)
        for p in range(prompts)
    ) / ((seeds - 1) * (prompts - 1))
    variance = max(of_seeds + of_prompts - rest, of_seeds, of_prompts)
    squares = ((of_seeds, 3), (of_prompts, 10), (rest, 30))
    freedom = max(3, variance**2 / sum(square**2 / free for square, free in squares))
    half = stats.t.ppf(0.975, freedom) * math.sqrt(variance / (seeds * prompts))
    found = crossed_mean(change)
    assert found.high == pytest.approx(max(change.mean(), mean + half))
    assert found.low == pytest.approx(min(change.mean(), mean - half))


def test_an_interval_keeps_a_width_where_every_prompt_changed_alike():
    found = crossed_mean(np.ones((3, 50)))
    assert found.mean == found.high == 1.0
    assert 0.85 < found.low < 0.99
    nothing = crossed_mean(np.zeros((3, 50)))
    assert nothing.low < 0 < nothing.high
    assert not nothing.is_clear


def test_few_changed_prompts_are_not_clear():
    change = np.zeros((3, 100))
    change[:, :5] = 1.0
    assert not crossed_mean(change).is_clear
    change[:, :12] = 1.0
    assert crossed_mean(change).is_clear


def test_a_ratio_to_nothing_is_unbounded():
    balanced = np.tile([1.0, -1.0, 0.0, 1.0, -1.0, 0.0], (3, 10))
    balanced[0, 2] = 1.0  # the whole is not exactly nothing
    _, low, high = crossed_ratio(np.ones((3, 60)), balanced)
    assert math.isinf(low) or math.isinf(high)
    assert crossed_ratio(np.ones((2, 9)), np.zeros((2, 9)))[1:] == (-math.inf, math.inf)


def test_equal_tables_have_a_ratio_of_one_with_a_width():
    table = np.ones((3, 60))
    ratio, low, high = crossed_ratio(table, table)
    assert ratio == 1.0
    assert 0.8 < low < 1.0 < high < 1.2


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (np.zeros(3), InvalidValue, "shape"),
        (np.zeros((0, 3)), EmptyPrompts, "at least one"),
        (np.full((2, 3), np.nan), NonFinite, "NaN"),
        (np.full((2, 3), 2.0), InvalidValue, "between -1 and 1"),
    ],
)
def test_what_is_no_table_of_scores_is_refused(change, error, match):
    with pytest.raises(error, match=match):
        crossed_mean(change)


def test_tables_of_other_shapes_do_not_pair():
    with pytest.raises(InvalidValue, match="shapes"):
        crossed_ratio(np.zeros((2, 3)), np.zeros((2, 4)))
