"""The KL from the start in `history`: exact with a reference, estimated where it is asked for."""

from __future__ import annotations

import pytest
import torch

import opdlab as opd

SMALL = {"steps": 3, "batch": 6, "max_new_tokens": 10, "lr": 3e-3, "quiet": True, "seed": 1}


@pytest.fixture(scope="module")
def world():
    return opd.load("market")


def test_with_a_reference_it_is_exact_and_free(world):
    student, teacher, task = world
    run = opd.distill(student.frozen(), teacher, task, method=opd.GOPD(), **SMALL)
    for step in run:
        trace = step.trace()
        want = trace.column("reference_reverse_kl").mean()
        assert step.metrics["start_kl"] == pytest.approx(want, abs=1e-6)
    moved = run.history["start_kl"]
    assert moved.iloc[0] == pytest.approx(0, abs=1e-6)
    assert moved.iloc[-1] > 1e-5


def test_elsewhere_it_is_asked_for_and_estimated_from_the_sampled_tokens(world):
    student, teacher, task = world
    start = student.frozen()
    run = opd.distill(student.frozen(), teacher, task, start_kl=True, **SMALL)
    for step in run:
        rollout = step.planned.batch.rollout
        trace = step.trace()
        then = opd.score(rollout, start).column("student_logp")
        ratio = torch.tensor(then - trace.column("student_logp")).double()
        assert step.metrics["start_kl"] == pytest.approx(
            float((ratio.exp() - 1 - ratio).mean()), abs=1e-6
        )
    assert (run.history["start_kl"] >= 0).all()
    assert run.history["start_kl"].iloc[-1] > 0


def test_it_is_not_measured_unasked(world):
    student, teacher, task = world
    run = opd.distill(student.frozen(), teacher, task, **(SMALL | {"steps": 1})).train()
    assert "start_kl" not in run.history


def test_a_reference_of_the_users_own_is_not_the_start(world):
    student, teacher, task = world
    options = SMALL | {"steps": 1, "lr": 0.0, "method": opd.GOPD()}
    run = opd.distill(
        student.frozen(), teacher, task, policies={"reference": teacher}, start_kl=True, **options
    ).train()
    assert run.history["start_kl"].iloc[0] == pytest.approx(0, abs=1e-9)
