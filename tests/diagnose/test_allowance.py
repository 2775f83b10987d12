"""Fitting a diagnosis into seconds: what is given up first, and the line that shows it."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest

from opdlab.diagnose.allowance import Allowance, Pace, Scope, Timing, choose_scope
from opdlab.support.progress import Progress

WHOLE = Scope(k=8, graded=8, length=100, asks_teacher=True, asks_half=True)


def timing(first: float, per_token: float) -> Timing:
    """A stage of 11 passes."""
    return Timing(0.0, passes=11, first=first, seconds=first + 10 * per_token)


PACE = Pace(8, timing(2.0, 0.1), timing(4.0, 0.2), read=0.01, compare=0.01, prompt=50)


def test_the_pace_adds_up_what_a_prompt_takes():
    writes, answers = (2 + 100 * 0.1) / 2, (4 + 100 * 0.2) / 2
    grades = 8 * (0.01 * 150 + 0.01 * 100)
    assert PACE.per_prompt(WHOLE) == pytest.approx(writes + 2 * answers + grades)


def test_everything_is_asked_where_there_is_time():
    assert choose_scope(WHOLE, PACE, math.inf, 32) == (WHOLE, 32)
    assert choose_scope(WHOLE, PACE, 10_000, 32) == (WHOLE, 32)


def test_texts_are_given_up_before_prompts_and_prompts_before_length():
    seen = []
    for seconds in (400, 300, 250, 200, 100, 40, 20, 8):
        scope, prompts = choose_scope(WHOLE, PACE, seconds, 32)
        seen.append((scope.graded, scope.k, scope.asks_half, scope.length, prompts))
        if scope.length == 100:
            assert PACE.per_prompt(scope) * prompts <= seconds
    assert [row[3] for row in seen] == sorted((row[3] for row in seen), reverse=True)
    assert seen[0][:3] == (8, 8, True)
    assert [row[0] for row in seen] == sorted((row[0] for row in seen), reverse=True)
    assert not scope.asks_teacher
    assert 50 < seen[-1][3] < 60  # 2 (1.5 + 0.045 n) s for two texts of n tokens
    assert all(row[4] >= 2 for row in seen)


def test_what_was_left_out_is_said():
    scope = Scope(k=4, graded=1, length=30, asks_teacher=False, asks_half=False)
    assert scope.missing(WHOLE) == [
        "texts were cut after 30 of 100 tokens, so they were not scored",
        "4 of 8 texts of each prompt were written",
        "1 of each prompt's texts was graded",
        "the teacher was not asked to answer",
    ]
    without_half = replace(WHOLE, asks_half=False)
    assert without_half.missing(WHOLE) == [
        "the teacher was not asked to go on from the student's text"
    ]
    assert WHOLE.missing(WHOLE) == []


def test_a_stage_counts_and_times_the_passes_of_its_models(student, prompts):
    allowance = Allowance(100.0, Progress(4, "doctor", quiet=True))
    began = time.monotonic()
    with allowance.stage("writing", [student], tokens=5) as stage:
        rollout = student.sample(prompts, max_new_tokens=5, seed=1)
    assert 0 < stage.first <= stage.seconds <= time.monotonic() - began
    assert stage.passes >= int(rollout.lengths.max())
    student.sample(prompts, max_new_tokens=5)
    assert not student.weights.model.base_model._forward_hooks  # it is no longer listened to


def test_the_line_says_what_is_done_how_far_and_how_long(capsys):
    allowance = Allowance(100.0, Progress(4, "doctor", "prompt", clock=False, leave=False))
    allowance.done = 1
    allowance.expect(30.0)
    allowance.draw("the student writes, token 3 of 24", is_due=True)
    allowance.finish()
    line = capsys.readouterr().err
    assert "1 of 4 prompts, now the student writes, token 3 of 24 · left 30 s" in line
