"""The result of controls: the share, its verdict and its interval, on scores made by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from opdlab.errors import InvalidValue
from opdlab.evidence.controls import ArmResult, Controls, Verdict


def arm(name: str, right: float, *, is_free: bool = False, seeds: int = 3) -> ArmResult:
    """An arm that is right on that share of 200 prompts, the first ones; seeds differ by one."""
    greedy = np.array(
        [[float(p < 200 * right + seed) for p in range(200)] for seed in range(seeds)]
    )
    numbers = np.ones(seeds)
    nothing = np.full_like(greedy, np.nan)
    return ArmResult(
        name, f"arm {name}", is_free, tuple(range(seeds)), greedy, nothing, numbers, numbers
    )


def controls(*arms: ArmResult, start: float = 0.3) -> Controls:
    before = np.array([float(p < 200 * start) for p in range(200)])
    nothing = np.full(200, np.nan)
    facts = {"task": "made up", "method": "OPD", "settings": {"steps": 3}}
    return Controls(before, nothing, {one.name: one for one in arms}, {"sign": "no"}, facts)


def test_the_share_is_what_the_best_arm_without_a_teacher_leaves_over():
    found = controls(arm("teacher", 0.9), arm("a", 0.45, is_free=True), arm("b", 0.6, is_free=True))
    gain, free = 0.6 + 1 / 200, 0.3 + 1 / 200  # seeds 0, 1, 2 add one prompt on average
    share = found.share
    assert share.value == pytest.approx(1 - free / gain)
    assert share.against == "b"
    assert share.low < share.value < share.high
    assert (share.prompts, share.seeds) == (200, 3)
    assert "200 prompts, 3 seeds" in repr(share)


def test_an_arm_that_does_harm_leaves_all_of_the_gain_to_the_teacher():
    share = controls(arm("teacher", 0.95), arm("a", 0.05, is_free=True)).share
    assert share.value == 1.0
    assert share.against == ""
    assert share.verdict is Verdict.TEACHER


def test_an_arm_that_does_as_well_leaves_nothing():
    share = controls(arm("teacher", 0.95), arm("a", 0.95, is_free=True)).share
    assert share.value == pytest.approx(0)
    assert share.low < 0 < share.high < 0.5
    assert share.verdict is Verdict.NOT_TEACHER


def test_half_is_neither():
    share = controls(arm("teacher", 0.7), arm("a", 0.5, is_free=True)).share
    assert share.verdict is Verdict.UNCLEAR


@pytest.mark.parametrize("right", [0.3, 0.31, 0.1])
def test_without_a_clear_gain_there_is_nothing_to_share_out(right):
    found = controls(arm("teacher", right), arm("a", 0.2, is_free=True))
    assert found.share.verdict is Verdict.NO_GAIN
    assert math.isnan(found.share.value)
    assert repr(found).startswith("There is no clear gain")
    assert found.table["share"].isna().all()


def test_more_arms_without_a_teacher_make_the_interval_wider_upward_only_by_their_number():
    one = controls(arm("teacher", 0.9), arm("a", 0.6, is_free=True)).share
    worse = [arm(f"x{i}", 0.31, is_free=True) for i in range(4)]
    five = controls(arm("teacher", 0.9), arm("a", 0.6, is_free=True), *worse).share
    assert five.value == one.value
    assert five.low == one.low
    assert one.high < five.high < one.high + 0.1


def test_the_table_has_a_row_for_each_arm_and_the_start():
    found = controls(arm("teacher", 0.9), arm("a", 0.45, is_free=True))
    table = found.table
    assert table["arm"].tolist() == ["teacher", "a", "start"]
    row = table.set_index("arm").loc["a"]
    assert row["share"] == pytest.approx(
        row["gain"] / table.set_index("arm").loc["teacher", "gain"]
    )
    assert row["low"] < row["gain"] < row["high"]
    assert "Left out: sign, since no." in repr(found)


def test_one_seed_alone():
    found = controls(arm("teacher", 0.9), arm("a", 0.1, is_free=True)).at_seed(2)
    assert found.seeds == (2,)
    assert found.arms["teacher"].greedy.sum() == 182
    with pytest.raises(InvalidValue, match="There is no seed 1"):
        found.at_seed(1)


def test_arms_pair_over_the_seeds_that_both_have():
    found = controls(arm("teacher", 0.9), arm("a", 0.4, is_free=True, seeds=2))
    assert found.share.seeds == 2
    assert found.difference("a").seeds == 2


def test_it_survives_json():
    found = controls(arm("teacher", 0.9), arm("a", 0.45, is_free=True))
    again = Controls.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert repr(again) == repr(found)


@pytest.mark.parametrize("stored", [{}, {"before": [1.0]}, {"arms": 3, "before": []}])
def test_other_json_is_refused(stored):
    with pytest.raises(InvalidValue, match="no result of"):
        Controls.from_json(stored)


def test_without_an_arm_that_needs_no_teacher_there_is_no_share():
    found = controls(arm("teacher", 0.9))
    with pytest.raises(InvalidValue, match="no arm without a teacher"):
        _ = found.share
    assert repr(found).startswith("Controls without")
    with pytest.raises(InvalidValue, match="no arm 'b'"):
        found.gain("b")
