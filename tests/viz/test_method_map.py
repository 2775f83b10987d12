"""The map of methods without a browser: its numbers against the records, and its table."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from scipy import stats

from opdlab.data.map_results import MapResults
from opdlab.errors import InvalidValue
from opdlab.viz import MethodMap
from opdlab.viz.map_picture import SMALL, Cell, Selection, T, summarize
from opdlab.viz.method_map import example_results

RESULTS = example_results("words")


def test_an_interval_is_that_of_students_t():
    values = [0.1, 0.4, 0.35, 0.2]
    cell = summarize(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (cell.low, cell.high) == pytest.approx((low, high), abs=1e-3)
    assert stats.t.ppf(0.975, range(1, len(T) + 1)) == pytest.approx(T, abs=1e-3)
    assert math.isnan(summarize([0.3]).low)
    assert summarize([]).seeds == 0


@pytest.mark.parametrize(
    ("low", "high", "side"),
    [(0.02, 0.3, 1), (0.005, 0.3, 0), (-0.3, -0.02, -1), (-0.1, 0.1, 0), (math.nan, math.nan, 0)],
)
def test_a_difference_is_clear_where_its_interval_is_beyond_what_matters(low, high, side):
    assert SMALL == 0.01
    assert Cell(0.0, low, high, 3).side == side


def test_rows_are_paired_differences_of_the_choice():
    view = MethodMap(RESULTS)
    assert (view.arm, view.against, view.metric, view.budget, view.at) == (
        "second",
        "first",
        "score",
        "updates",
        [0],
    )
    assert len(view.df) == 12
    row = view.df[(view.df.x == 0.01) & (view.df.y == 1)].iloc[0]
    assert row["mean"] == pytest.approx((2 - 1) / 10)
    view.budget = "teacher"
    row = view.df[(view.df.x == 0.01) & (view.df.y == 1)].iloc[0]
    assert row["mean"] == pytest.approx((2 - 2) / 10)


def test_the_page_gets_the_numbers_of_every_choice():
    view = MethodMap(RESULTS)
    data = view.data()
    choices = [(b, z) for b in ("updates", "teacher") for z in (0, 1)]
    assert data["pairs"] == [["second", "first"]]
    want = [
        cell.mean
        for budget, z in choices
        for cell in view.picture.cells(Selection("second", "first", "score", budget, (z,)))
    ]
    np.testing.assert_allclose(data["mean"], want, atol=1e-3)
    assert len(data["own"]) == 2 * len(want)


def test_the_line_runs_between_cells_of_different_sides():
    view = MethodMap(RESULTS)
    rows = re.findall(r"<tr>(.*?)</tr>", view.static())[1:]
    sides = np.array([cell.side for cell in view.picture.cells(view.selection)]).reshape(3, 4)
    for y, row in enumerate(rows):
        for x, look in enumerate(re.findall(r'<td class="([^"]*)"', row)):
            assert ("opd-mm-right" in look) == (x < 3 and sides[y, x] != sides[y, min(x + 1, 3)])
            assert ("opd-mm-below" in look) == (y < 2 and sides[y, x] != sides[min(y + 1, 2), x])
            assert ("opd-mm-clear" in look) == (sides[y, x] != 0)


def test_a_missing_setting_is_an_empty_cell():
    records = [r for r in RESULTS.records if r.knobs["x"] != 1 or r.knobs["y"] != 2]
    kept = MapResults.from_json(RESULTS.as_json() | {"records": []}).add(records)
    view = MethodMap(kept)
    assert math.isnan(view.df.iloc[11]["mean"])
    assert "–" in view.static()
    assert "+nan" not in repr(view)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arm": "third"}, "no arm 'third'"),
        ({"metric": "x"}, "no metric 'x'"),
        ({"budget": "x"}, "no budget 'x'"),
        ({"results": 3}, "MethodMap got 3"),
        ({"results": "nowhere.json"}, "nowhere"),
    ],
)
def test_what_is_not_there_is_refused(options, words):
    with pytest.raises(InvalidValue, match=words):
        MethodMap(**({"results": RESULTS} | options))


@pytest.mark.parametrize(
    ("trait", "value", "words"),
    [
        ("arm", "x", "no arm 'x'"),
        ("budget", "x", "no budget"),
        ("at", [], "at is"),
        ("at", [5], "at is"),
    ],
)
def test_a_choice_that_is_not_there_is_refused_when_it_is_drawn(trait, value, words):
    view = MethodMap(RESULTS)
    setattr(view, trait, value)
    with pytest.raises(InvalidValue, match=words):
        _ = view.df


def test_a_map_without_records_says_how_to_measure_it():
    with pytest.raises(InvalidValue, match=r"benchmarks\.maps --only example"):
        MethodMap(MapResults.from_json(RESULTS.as_json() | {"records": []}))
