"""SODA against DPO by autograd on whole sequences, and inside a run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from plans import plan_values
from torch.nn.functional import logsigmoid

import opdlab
from opdlab import SODA, exact
from opdlab.data.rollout import Rollout, concat_rollouts
from opdlab.engine.batch import Batch
from opdlab.errors import MissingPolicy, OpdlabError
from opdlab.tasks import from_records
from opdlab.tasks.market import tokenizers
from opdlab.teachers import TextOnly


def pairs(student: exact.Table, chosen: list[int], rejected: list[int]) -> Rollout:
    """Completions of `everything` by number: the teacher's first, then the snapshot's."""
    body = exact.everything(student.prompts, student.vocab, student.length, eos=student.eos)
    half = len(chosen)
    both = body.select([*chosen, *rejected])
    return replace(both, writer=("teacher",) * half + ("reference",) * half)


@pytest.mark.parametrize("beta", [0.1, 3.0])
@pytest.mark.parametrize("eos", [None, 0])
def test_gradient_and_value_are_those_of_dpo(beta, eos):
    """The mean over pairs of -log sigmoid(beta (log-ratio chosen - log-ratio rejected)), texts of
    different lengths included.
    """
    student, reference = (
        exact.Table.random(3, 3, seed=0, eos=eos),
        exact.Table.random(3, 3, seed=1, eos=eos),
    )
    chosen, rejected = [0, 4, 9, 4], [3, 8, 1, 2]
    body = pairs(student, chosen, rejected)
    share = 1 / (len(body) * body.lengths.double())  # normalize="sequence"
    got = exact.gradient_on(SODA(beta), {"student": student, "reference": reference}, body, share)
    leaf = student.logits.clone().requires_grad_()
    law = exact.law(replace(student, logits=leaf), body).log() - exact.law(reference, body).log()
    value = -logsigmoid(beta * (law[:4] - law[4:])).mean()
    (want,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert want.abs().max() > 1e-3
    plan = plan_values(SODA(beta), Batch(body, {"student": student, "reference": reference}))
    assert (plan["pair_loss"] * share * body.lengths).sum().item() == pytest.approx(
        value.item(), abs=1e-12
    )
    assert plan["preferred"].tolist() == [1.0] * 4 + [-1.0] * 4
    torch.testing.assert_close(plan["delta"][:4], beta * (law[:4] - law[4:]).detach())


def test_one_step_raises_the_teachers_texts_over_the_snapshots():
    student = exact.Table.random(3, 3, seed=0)
    body = pairs(student, [4, 9], [8, 1])
    slope = exact.gradient_on(
        SODA(), {"student": student, "reference": student}, body, 1 / (4 * body.lengths.double())
    )
    moved = exact.law(student.add(-0.1 * slope), body).log() - exact.law(student, body).log()
    assert (moved[:2] - moved[2:]).min() > 0


def task(prompts):
    return from_records(
        [{"text": p.text, "id": p.id} for p in prompts if p.text], test=0, max_new_tokens=6
    )


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_in_a_run_the_first_loss_is_log_two(make_policy, prompts, micro_batch):
    student, scribe = make_policy(0), TextOnly(make_policy(1, tokenizers.characters()))
    run = opdlab.distill(
        student,
        scribe,
        task(prompts),
        method=SODA(),
        steps=3,
        batch=2,
        n=2,
        lr=1e-2,
        micro_batch=micro_batch,
        quiet=True,
    )
    first, second, _ = run
    assert first.rollout.writer == ("teacher",) * 4 + ("reference",) * 4
    assert first.rollout.prompts[:4] == first.rollout.prompts[4:]
    assert run.settings.normalize == "sequence"
    assert first.metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert second.metrics["loss"] != pytest.approx(math.log(2), abs=1e-5)
    assert "reward" not in first.metrics


def test_the_snapshot_stays_where_it_was(make_policy, prompts):
    """Its texts in a later step are those of the untrained student."""
    student = make_policy(0)
    run = opdlab.distill(
        student, make_policy(1), task(prompts), method=SODA(), steps=2, batch=2, lr=1e-1, quiet=True
    )
    _, second = run
    fresh = opdlab.distill(
        make_policy(0),
        make_policy(1),
        task(prompts),
        method=SODA(),
        steps=2,
        batch=2,
        lr=1e-9,
        quiet=True,
    )
    assert second.rollout.texts == list(fresh)[1].rollout.texts
    assert not torch.equal(
        student.log_probs(second.rollout), make_policy(0).log_probs(second.rollout)
    )


def test_other_rows_are_refused(student, prompts):
    rollout = student.sample(prompts[:2], n=2, max_new_tokens=3)
    with pytest.raises(OpdlabError, match=r"SODA compares pairs, but the rows are by student\."):
        SODA().plan(Batch(rollout, {"student": student, "reference": student}))
    one, other = (
        student.sample(prompts[i : i + 2], max_new_tokens=3, writer=who)
        for i, who in ((0, "teacher"), (1, "reference"))
    )
    with pytest.raises(OpdlabError, match="to the same prompts"):
        SODA().plan(
            Batch(concat_rollouts([one, other]), {"student": student, "reference": student})
        )


def test_it_needs_a_teacher_and_a_positive_beta(make_policy, prompts):
    with pytest.raises(MissingPolicy, match="SODA lets a teacher write, but there is none"):
        opdlab.distill(make_policy(0), None, task(prompts), method=SODA(), quiet=True)
    with pytest.raises(ValueError, match="Use a positive number"):
        SODA(beta=0)
