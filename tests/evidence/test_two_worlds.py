"""The two verdicts, live and recorded: in `market` the gain is the teacher's, in the other not."""

from __future__ import annotations

import json
from pathlib import Path

import opdlab as opd
from opdlab.evidence.controls import Verdict

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "controls.json"


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


def test_the_recorded_runs_agree_seed_by_seed():
    stored = json.loads(RESULTS.read_text(encoding="utf-8"))["market"]
    found = opd.Controls.from_json(stored)
    assert found.share.verdict is Verdict.TEACHER
    assert found.share.low > 0.9
    seeds = [seed for seed in found.seeds if seed in found.arms["no_teacher"].seeds]
    assert len(seeds) >= 3
    verdicts = [found.at_seed(seed).share.verdict for seed in seeds]
    assert verdicts.count(Verdict.TEACHER) >= 0.9 * len(seeds)
