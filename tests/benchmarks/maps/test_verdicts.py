"""Verdicts of five of the maps, on seeds that no file has.

Each test computes the cells of a verdict anew. What holds in docs/maps.md is asserted here, and
what does not hold as well.
"""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.maps import dopd, omniopd, policies, self_distillation, topd

FRESH = (101, 102, 103)


def scores(plan, budget="updates", **settings):
    """Scores by metric, then by arm and setting in the plan's order: `[seeds]` each."""
    found: dict = {}
    for one in plan.measure({name: settings[name] for name in plan.grid}, FRESH):
        key = (one.arm, *(one.knobs[name] for name in plan.grid if len(settings[name]) > 1))
        for metric, score in one.scores[budget].items():
            found.setdefault(metric, {}).setdefault(key, []).append(score)
    return {m: {key: np.array(v) for key, v in cells.items()} for m, cells in found.items()}


@pytest.fixture(scope="module")
def forks():
    return scores(topd.PLAN, depth=(4,), reach=(0.0, 1.0), wordings=(0,))["area"]


def test_looking_ahead_pays_behind_a_fork(forks):
    for reach in (0.0, 1.0):
        assert (forks["topd_diagonal", reach] > forks["opd", reach] + 0.01).all()
        assert (forks["teacher_context", reach] > forks["opd", reach] + 0.03).all()


def test_the_students_context_needs_reach_and_the_teachers_does_not(forks):
    first = forks["first_token", 0.0], forks["first_token", 1.0]
    assert (forks["topd_diagonal", 0.0] < first[0]).all(), "one token does better"
    assert (forks["topd_diagonal", 1.0] > first[1] + 0.01).all()
    assert (forks["teacher_context", 0.0] > first[0] + 0.01).all()


def test_the_plan_that_sees_no_order_is_worse_than_opd(forks):
    lead = [forks["topd", reach] - forks["opd", reach] for reach in (0.0, 1.0)]
    assert np.mean(lead) < -0.02
    assert np.max(lead) < 0.02


def test_at_equal_teacher_tokens_the_students_context_loses_its_lead_without_reach():
    found = scores(topd.PLAN, "teacher", depth=(2,), reach=(0.0, 1.0), wordings=(0,))["area"]
    lead = {r: found["topd_diagonal", r] - found["opd", r] for r in (0.0, 1.0)}
    assert lead[0.0].mean() < 0.02
    assert (lead[1.0] > lead[0.0] + 0.02).all()


@pytest.fixture(scope="module")
def hints():
    settings = {"help": (0.0, 1.0), "certainty": (0.15, 0.8), "secrets": (0.5,)}
    return scores(dopd.PLAN, **settings)


@pytest.mark.parametrize("certainty", [0.15, 0.8])
def test_dopd_attenuates_the_illusion_and_does_not_remove_it(hints, certainty):
    honesty = hints["honesty"]
    for help_ in (0.0, 1.0):
        ours, theirs = (honesty[arm, help_, certainty] for arm in ("dopd", "privileged"))
        assert (ours > theirs + 0.05).all()
        assert (ours < -0.1).all()
        assert np.abs(honesty["opd", help_, certainty]).max() < 1e-6, "no hint, no illusion"
    helped = honesty["dopd", 1.0, certainty] - honesty["privileged", 1.0, certainty]
    unhelped = honesty["dopd", 0.0, certainty] - honesty["privileged", 0.0, certainty]
    assert unhelped.mean() > helped.mean(), "more so where the hint does not help the student"


def test_hs_freezes_what_the_student_seldom_gets_right_and_hs_to_the_teacher_does_not(hints):
    """It samples the right token in 3 % (certainty 0.8), 12 % (0.15) or 40 % of the cases."""
    stuck = hints["stuck"]
    for help_ in (0.0, 1.0):
        for certainty in (0.15, 0.8):
            assert (stuck["dopd", help_, certainty] < 0.35).all()
            assert (stuck["privileged", help_, certainty] > 0.9).all()
            assert (stuck["dopd_hs_teacher", help_, certainty] > 0.4).all()
        assert (stuck["dopd_hs_none", help_, 0.15] > 0.5).all(), "the anchor holds it, not the gap"
        assert (stuck["dopd_hs_none", help_, 0.8] < 0.2).all(), "it is never sampled"
        assert (hints["skill"]["dopd", help_, 0.8] > 0.85).all()


@pytest.fixture(scope="module")
def texts():
    settings = {"style": (2.0,), "unaligned": (0.0, 1.0), "trap": (0.1,), "continuations": (2,)}
    return {
        phi: scores(omniopd.PLAN, similarity=(phi,), **settings) for phi in ("rouge1", "content")
    }


def test_texts_win_over_logits_where_the_logits_cannot_be_told(texts):
    found = texts["content"]["accuracy"]
    assert (found["opd", 0.0] > found["omniopd", 0.0] + 0.1).all()
    assert (found["omniopd", 1.0] > found["opd", 1.0] + 0.2).all()
    assert np.abs(found["omniopd", 1.0] - found["omniopd", 0.0]).max() < 0.15, "any tokenizer"


def test_whole_texts_teach_more_than_continuations_and_change_the_form(texts):
    for unaligned in (0.0, 1.0):
        accuracy, own_form = texts["content"]["accuracy"], texts["content"]["own_form"]
        assert (accuracy["sequence_kd", unaligned] > accuracy["omniopd", unaligned] + 0.05).all()
        assert (own_form["omniopd", unaligned] > own_form["sequence_kd", unaligned] + 0.4).all()


def test_a_similarity_that_sees_the_form_loses_by_the_style(texts):
    for unaligned in (0.0, 1.0):
        lead = texts["content"]["accuracy"]["omniopd", unaligned]
        lead = lead - texts["rouge1"]["accuracy"]["omniopd", unaligned]
        assert lead.mean() > 0.1


@pytest.fixture(scope="module")
def roads():
    settings = {"horizon": (32,), "noise": (0.0, 0.5, 1.0), "capacity": (0.25,), "rate": (0.3, 1.0)}
    return scores(policies.PLAN, **settings)["on_road"]


@pytest.mark.parametrize("name", ["forward", "reverse"])
def test_own_texts_win_where_the_teacher_knows_the_way_back_and_lose_where_it_is_noise(roads, name):
    own, theirs = f"{name}_student", f"{name}_teacher"
    assert (roads[own, 0.0, 1.0] > roads[theirs, 0.0, 1.0] + 0.03).all()
    assert (roads[own, 1.0, 1.0] < roads[theirs, 1.0, 1.0] - 0.03).all()


def test_in_between_only_the_reverse_kl_prefers_own_texts(roads):
    lead = {
        name: (roads[f"{name}_student", 0.5, 1.0] - roads[f"{name}_teacher", 0.5, 1.0]).mean()
        for name in ("forward", "reverse")
    }
    assert lead["reverse"] > 0.05 > lead["forward"]


@pytest.fixture(scope="module")
def rules():
    settings = {"rule": (0.0, 1.0), "hint": (0.25, 1.0), "prompts": (32,)}
    return scores(self_distillation.PLAN, **settings)


@pytest.mark.parametrize("arm", ["self_reverse", "self_forward", "self_jsd"])
def test_a_rule_amortises_and_an_instance_is_memorised(rules, arm):
    assert (rules["held_out"][arm, 1.0, 1.0] > 0.8).all()
    assert (rules["held_out"][arm, 0.0, 1.0] < 0.25).all(), "chance is 0.125"
    assert (rules["training"][arm, 0.0, 1.0] > 0.35).all()
    assert (rules["log_score"][arm, 0.0, 1.0] < -0.1).all(), "surer than is right"


def test_no_more_is_learnt_than_the_hint_tells_and_answers_tell_all(rules):
    held_out = rules["held_out"]
    assert (held_out["self_forward", 1.0, 0.25] < 0.4).all()
    assert (held_out["answers", 1.0, 0.25] > 0.9).all()
    log_score = rules["log_score"]
    assert (log_score["self_jsd", 0.0, 1.0] > log_score["answers", 0.0, 1.0] + 0.3).all()
