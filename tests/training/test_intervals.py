"""Intervals:

Wilson's against scipy, Tango's against a direct inversion of the score test, and both by how often
they hold the truth.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

from opdlab.errors import EmptyPrompts, InvalidValue, NonFinite
from opdlab.training.intervals import Difference, paired, tango, wilson

Z2 = stats.norm.ppf(0.975) ** 2


def changes(gained: int, lost: int, prompts: int) -> np.ndarray:
    return np.r_[np.ones(gained), -np.ones(lost), np.zeros(prompts - gained - lost)]


@pytest.mark.parametrize(
    ("right", "prompts"), [(0, 5), (5, 5), (1, 1), (3, 10), (124, 400), (399, 400)]
)
def test_wilson_equals_scipy(right, prompts):
    want = stats.binomtest(right, prompts).proportion_ci(method="wilson")
    got = wilson(right / prompts, prompts)
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-12)
    assert got.high - got.low > 0.001
    counted = f"{prompts} prompt{'s' * (prompts > 1)}, 1 seed"
    assert repr(got) == f"[{got.low:.3f}, {got.high:.3f}] (95 % Wilson, {counted})"


def test_wilson_has_a_width_at_0_and_1():
    assert wilson(0.0, 5).low == 0
    assert wilson(0.0, 5).high == pytest.approx(Z2 / (5 + Z2))
    assert wilson(1.0, 5).high == 1
    assert wilson(1.0, 5).low == pytest.approx(5 / (5 + Z2))


def by_likelihood(gained: int, lost: int, prompts: int, difference: float) -> float:
    """The score statistic, with the nuisance share that maximises the likelihood numerically."""

    def loss(worse: float) -> float:
        better, same = worse + difference, 1 - 2 * worse - difference
        terms = ((gained, better), (lost, worse), (prompts - gained - lost, same))
        return -sum(count * np.log(max(share, 1e-300)) for count, share in terms if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    worse = optimize.minimize_scalar(
        loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}
    ).x
    variance = prompts * (2 * worse + difference * (1 - difference))
    return (gained - lost - prompts * difference) / np.sqrt(variance)


@pytest.mark.parametrize(
    ("gained", "lost", "prompts"), [(12, 2, 50), (3, 9, 20), (30, 10, 60), (1, 0, 8), (5, 5, 40)]
)
def test_tango_equals_the_score_test_inverted_numerically(gained, lost, prompts):
    low, high = tango(changes(gained, lost, prompts))
    assert by_likelihood(gained, lost, prompts, low) == pytest.approx(np.sqrt(Z2), abs=1e-4)
    assert by_likelihood(gained, lost, prompts, high) == pytest.approx(-np.sqrt(Z2), abs=1e-4)


def test_tango_has_closed_forms_where_all_prompts_are_alike():
    assert tango(changes(0, 0, 50)) == pytest.approx((-Z2 / (50 + Z2), Z2 / (50 + Z2)))
    assert tango(changes(50, 0, 50)) == pytest.approx(((50 - Z2) / (50 + Z2), 1))
    low, high = tango(changes(12, 2, 50))
    assert tango(changes(2, 12, 50)) == pytest.approx((-high, -low))


@pytest.mark.parametrize(
    ("prompts", "better", "worse"),
    [(20, 0.5, 0.1), (30, 0.1, 0.1), (50, 0.6, 0.02), (200, 0.7, 0.01)],
)
def test_95_of_100_paired_intervals_hold_the_truth(prompts, better, worse):
    """Band stated beforehand: 93 to 98 %, for a nominal 95 % and 4000 draws (standard error 0.35
    %).
    """
    draws = np.random.default_rng(0).multinomial(
        prompts, [better, worse, 1 - better - worse], size=4000
    )
    kinds, counts = np.unique(draws, axis=0, return_counts=True)
    limits = [tango(changes(gained, lost, prompts)) for gained, lost, _ in kinds]
    held = sum(
        count
        for (low, high), count in zip(limits, counts, strict=True)
        if low <= better - worse <= high
    )
    assert 0.93 <= held / 4000 <= 0.98


def test_scores_in_between_get_an_interval_that_holds_the_truth_at_least_as_often():
    """Band stated beforehand: at least 95 %."""
    rng = np.random.default_rng(0)
    before = rng.beta(2, 3, size=(500, 30))
    after = np.clip(before + rng.normal(0.1, 0.2, size=before.shape), 0, 1)
    truth = float((after - before).mean())
    held = [
        (got := paired(a, b)).low <= truth <= got.high for a, b in zip(after, before, strict=True)
    ]
    assert np.mean(held) >= 0.95


def test_a_difference_has_a_width_where_all_prompts_change_alike():
    none, all_of_them = paired(np.zeros(200), np.zeros(200)), paired(np.ones(200), np.zeros(200))
    assert (none.low, none.high) == pytest.approx((-Z2 / (200 + Z2), Z2 / (200 + Z2)))
    assert not none.clear
    assert all_of_them.clear
    assert 0.9 < all_of_them.low < all_of_them.high == 1


@pytest.mark.parametrize("prompts", [1, 2, 3, 4, 5])
def test_nothing_is_clear_from_fewer_than_six_prompts(prompts):
    for after, before in (((1.0,), (0.0,)), ((0.0,), (1.0,)), ((9.0,), (2.0,))):
        got = paired(after * prompts, before * prompts)
        assert got.low <= 0 <= got.high
        assert not got.clear
    assert not Difference(1.0, 0.5, 1.0, prompts).clear


def test_six_prompts_that_change_the_same_way_are_clear_and_five_of_many_are_not():
    assert paired(changes(6, 0, 6), np.zeros(6)).clear
    assert not paired(changes(5, 0, 100), np.zeros(100)).clear


def test_numbers_without_bounds_get_students_interval():
    rng = np.random.default_rng(0)
    before = rng.normal(5, 3, 40)
    after = before + rng.normal(1, 1, 40)
    want = stats.ttest_rel(after, before).confidence_interval(0.95)
    got = paired(after, before)
    assert (got.low, got.high) == pytest.approx((want.low, want.high))


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(InvalidValue, match=r"shapes \[2\] and \[3\]\. Give one number a prompt"):
        paired([0.0, 1.0], [0.0, 1.0, 1.0])
    with pytest.raises(EmptyPrompts, match="got no prompts"):
        paired([], [])
    with pytest.raises(NonFinite, match="NaN or infinity"):
        paired([0.0, np.nan], [0.0, 1.0])
    with pytest.raises(EmptyPrompts, match="at least one prompt"):
        wilson(0.5, 0)
