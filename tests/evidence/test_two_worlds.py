"""The two verdicts, live and recorded: most of the gain in `market` is the teacher's, and in the
other world most of it needs no teacher.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import opdlab as opd
from opdlab.evidence.controls import Verdict

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "controls.json"
VERDICTS = {"market": Verdict.TEACHER, "sharpening": Verdict.NOT_TEACHER}
SHARES = {"market": (0.9, 1.0), "sharpening": (-0.5, 0.5)}  # the interval lies within
ALONE = {"market": 0.9, "sharpening": 0.75}  # of the seeds give the verdict alone


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_the_gain_is_the_teachers():
    """One seed of `benchmarks.controls`, with its settings."""
    student, teacher, task = opd.load("market")
    options = {"steps": 40, "batch": 32, "seeds": 1, "prompts": 100, "quiet": True}
    found = opd.controls(student, teacher, task, arms=["no_teacher"], **options)
    assert found.gain().low > 0.3
    assert found.gain("no_teacher").high < 0.1
    assert found.share.verdict is Verdict.TEACHER


def test_the_gain_needs_no_teacher():
    """One seed, with the settings of `benchmarks.controls`."""
    student, teacher, task = opd.load("sharpening")
    options = {"seeds": 1, "prompts": 60, "samples": 4, "by": "samples", "quiet": True}
    found = opd.controls(student, teacher, task, arms=["no_teacher"], **options)
    assert found.gain().low > 0.2
    assert found.gain("no_teacher").low > 0.1
    assert found.share.value < 0.5


@pytest.mark.parametrize("world", VERDICTS)
def test_the_recorded_verdicts(recorded, world):
    found = opd.Controls.from_json(recorded[world])
    assert found.prompts == 100
    assert len(found.seeds) >= 10
    assert found.arms["no_teacher"].seeds == found.seeds
    assert found.share.verdict is VERDICTS[world]
    assert recorded[world]["verdict"] == VERDICTS[world].value
    least, most = SHARES[world]
    assert least <= found.share.low <= found.share.high <= most


@pytest.mark.parametrize("world", VERDICTS)
def test_the_recorded_verdicts_seed_by_seed(recorded, world):
    """No seed alone gives the other verdict, and nearly all give this one."""
    found = opd.Controls.from_json(recorded[world])
    verdicts = [found.at_seed(seed).share.verdict for seed in found.seeds]
    assert set(verdicts) <= {VERDICTS[world], Verdict.UNCLEAR}
    assert verdicts.count(VERDICTS[world]) >= ALONE[world] * len(verdicts)


def test_the_recorded_rules(recorded):
    """Rules find the tokens that decide better than chance, and training on them beats chance."""
    ranking, rules = recorded["ranking"], recorded["rules"]
    for world, truth in (("sharpening", "matters"), ("sharpening", "harms"), ("market", "skill")):
        rows = {row["rule"]: row for row in ranking[world]["rules"][truth]}
        chance = rows.pop("random")
        assert abs(chance["auroc"] - 0.5) < 0.1
        assert all(row["low"] > 0.5 for row in rows.values())
        assert rows["gap"]["auroc"] == max(row["auroc"] for row in rows.values())
    scores = {name: one["accuracy"] for name, one in rules.items() if name != "before"}
    assert min(scores, key=scores.__getitem__) == "random"
    assert max(scores, key=scores.__getitem__) == "all tokens"
    assert {one["seeds"] for name, one in rules.items() if name != "before"} == {3}
