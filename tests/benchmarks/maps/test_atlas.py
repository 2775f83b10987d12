"""Measuring maps: parts, resuming, and files."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.maps.atlas import MapPlan, head, narrowed, record
from benchmarks.maps.plans import PLANS
from opdlab.data.map_results import MapResults, Named

HEAD = head(
    "toy",
    "Why?",
    "",
    knobs=(Named("x", "x"), Named("y", "y"), Named("z", "z")),
    arms=(Named("a", "a"), Named("b", "b")),
    metrics=(Named("score", "score"),),
    against=("a",),
)


def plan_that_counts(asked: list) -> MapPlan:
    def measure(grid, seeds):
        asked.append((dict(grid), list(seeds)))
        for x in grid["x"]:
            for y in grid["y"]:
                for seed in seeds:
                    for arm in ("a", "b"):
                        knobs = {"x": x, "y": y, "z": grid["z"][0]}
                        yield record(knobs, seed, arm, {"score": x + seed}, {"score": 1.0})

    grid = {"x": (1, 2), "y": (1, 2), "z": ("p", "q")}
    return MapPlan(HEAD, grid, {"x": (1,), "y": (1,), "z": ("p",)}, measure, ("x", "y"))


def test_a_part_has_one_setting_of_each_knob_that_is_not_computed_together():
    parts = list(plan_that_counts([]).parts())
    assert parts == [
        {"x": (1, 2), "y": (1, 2), "z": ("p",)},
        {"x": (1, 2), "y": (1, 2), "z": ("q",)},
    ]
    assert list(plan_that_counts([]).parts(quick=True)) == [{"x": (1,), "y": (1,), "z": ("p",)}]


def test_a_run_that_was_stopped_measures_only_what_is_missing(tmp_path):
    asked: list = []
    plan, path = plan_that_counts(asked), tmp_path / "toy.json"
    whole = plan.run(None, keep=path)
    assert len(whole.records) == 2 * 2 * 2 * 3 * 2
    assert [seeds for _, seeds in asked] == [[0, 1, 2]] * 2
    held = MapResults.load(path)
    assert held == whole
    asked.clear()
    plan.run(held)
    assert asked == []
    lost = replace(
        held, records=tuple(r for r in held.records if (r.seed, r.knobs["z"]) != (1, "q"))
    )
    assert len(plan.run(lost).records) == len(whole.records)
    assert all(seeds == [1] and grid["z"] == ("q",) for grid, seeds in asked)


@pytest.mark.parametrize("name", PLANS)
def test_the_files_hold_what_the_plans_say(name):
    plan = PLANS[name]
    held = MapResults.load(plan.path)
    assert held.add([]).records == held.records
    for key in ("name", "question", "premise", "knobs", "arms", "metrics", "budgets", "against"):
        assert getattr(held, key) == getattr(plan.head, key), f"{name}: measure it anew, or add"
    assert {record.seed for record in held.records} >= set(range(plan.seeds))
    for knob, settings in plan.grid.items():
        assert set(held.values(knob)) >= {s if isinstance(s, str) else float(s) for s in settings}
    assert all(part in list(plan.parts()) for part in narrowed(plan).parts())
