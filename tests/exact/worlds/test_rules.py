"""Rules and instances: shares, scores, and the step of self-distillation against the method."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.maps import self_distillation
from opdlab import OPD, SelfDistillation, exact
from opdlab.errors import InvalidValue
from opdlab.exact.worlds import RuleWorld

WORLD = RuleWorld(rule=0.5, hint=0.6, prompts=8, vocab=4, seed=2)


def test_half_of_the_prompts_follow_a_rule_and_the_teacher_knows_these_alone():
    assert WORLD.follows[:8].sum() == WORLD.follows[8:].sum() == 4
    for kind in range(WORLD.classes):
        here = WORLD.follows & (WORLD.classes_of == kind)
        assert len(set(WORLD.answers[here].tolist())) <= 1
    known = WORLD.teacher().exp().gather(-1, WORLD.answers[:, None])[:, 0]
    assert known[WORLD.follows].min() == pytest.approx(0.97)
    assert known[~WORLD.follows].max() == pytest.approx(0.25)


@pytest.mark.parametrize("hint", [0.0, 0.5, 1.0])
def test_the_hint_tells_as_much_as_it_says(hint):
    told = RuleWorld(hint=hint, vocab=4).student(hinted=True).softmax(-1)
    known = told.gather(-1, RuleWorld(hint=hint, vocab=4).answers[:, None])
    assert known.mean() == pytest.approx(0.25 + hint * 0.72)


def test_scores_are_over_the_prompts_that_they_name():
    logits = WORLD.student()
    logits[8:][WORLD.follows[8:]] = (
        100 * torch.nn.functional.one_hot(WORLD.answers[8:][WORLD.follows[8:]], 4).double()
    )
    assert WORLD.hit_rate(logits, held_out=True, follows=True) == pytest.approx(1)
    assert WORLD.hit_rate(logits, held_out=True, follows=False) == pytest.approx(0.25)
    assert WORLD.hit_rate(logits, held_out=True) == pytest.approx(0.625)
    assert WORLD.log_score(logits, held_out=False) == pytest.approx(-math.log(4))


@pytest.mark.parametrize(
    ("arm", "method"),
    [
        ("self_reverse", SelfDistillation("reverse_kl")),
        ("self_forward", SelfDistillation("forward_kl")),
        ("self_jsd", SelfDistillation("jensen_shannon")),
        ("teacher", OPD("reverse_kl")),
    ],
)
def test_a_step_is_that_of_the_method(arm, method):
    tables = WORLD.policies()
    moved = tables["student"].add(
        torch.randn(8, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    want = exact.gradient(method, tables | {"student": moved})[:, 0]
    found = self_distillation.pull_of(WORLD, arm, moved.logp[:, 0])
    torch.testing.assert_close(found, want)


def test_knobs_out_of_range_are_refused():
    with pytest.raises(InvalidValue, match="RuleWorld got rule"):
        RuleWorld(rule=3)
