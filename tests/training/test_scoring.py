"""`opdlab.score` with a method: what its plan and loss say about a rollout, without training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import opdlab as opd
from opdlab.data.column import Column
from opdlab.errors import BadLoss, InvalidValue, MissingPolicy


@pytest.fixture(scope="module")
def rollout(student, prompts):
    return student.sample(prompts, n=2, max_new_tokens=8, seed=3)


def test_a_methods_columns_and_loss_are_in_the_trace(rollout, student, teacher):
    def plan(batch):
        return {"twice": Column(2 * batch.rollout.logp, "twice the log-prob", unit="nats")}

    method = opd.method(needs=("teacher",), plan=plan)(
        lambda rows: opd.losses.reverse_kl(rows.student, rows.teacher) + rows.twice
    )
    before = {name: value.clone() for name, value in student.weights.model.state_dict().items()}
    trace = opd.score(rollout, student, teacher, method=method)
    plain = opd.score(rollout, student, teacher)
    twice = 2 * rollout.logp[rollout.mask].numpy()
    np.testing.assert_allclose(trace.column("twice"), twice, rtol=1e-6)
    want = plain.column("teacher_reverse_kl") + twice
    np.testing.assert_allclose(trace.column("loss"), want, rtol=1e-4, atol=1e-5)
    assert trace.describe("twice").description == "twice the log-prob"
    assert (trace.column("teacher_logp") == plain.column("teacher_logp")).all()
    after = student.weights.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_needs_are_resolved_as_in_a_run(rollout, student, teacher):
    trace = opd.score(rollout, student, teacher, method=opd.EOPD)
    assert trace.describe("gated").labels == ("reverse KL alone", "gated: forward KL too")
    both = opd.method(needs=("teacher", "reference"))(
        lambda rows: opd.losses.reverse_kl(rows.student, rows.reference)
    )
    trace = opd.score(rollout, student, teacher, method=both)
    assert "reference_logp" in trace.table.column_names
    assert np.abs(trace.column("loss")).max() < 1e-5  # the student before training is the student


def test_what_a_method_lacks_is_said(rollout, student, teacher):
    with pytest.raises(MissingPolicy, match="needs 'teacher', but there is no such policy"):
        opd.score(rollout, student, method=opd.OPD())
    with pytest.raises(InvalidValue, match=r"score got the text 'OPD'"):
        opd.score(rollout, student, teacher, method="OPD")
    with pytest.raises(MissingPolicy, match="has no verifier"):
        opd.score(rollout, student, teacher, method=opd.GRPO())


def test_a_loss_that_breaks_its_contract_is_refused_in_words(rollout, student, teacher):
    def mean(rows):
        return opd.losses.reverse_kl(rows.student, rows.teacher).mean()

    def constant(rows):
        return opd.losses.entropy(rows.teacher)

    with pytest.raises(BadLoss, match=r"returned shape \[\] for .* Return one number per token"):
        opd.score(rollout, student, teacher, method=opd.method(mean))
    with pytest.raises(BadLoss, match="carries no gradient"):
        opd.score(rollout, student, teacher, method=opd.method(constant))


def test_tokens_that_the_loss_does_not_see_have_loss_zero(rollout, student, teacher):
    place = torch.arange(rollout.ids.shape[1])
    said = replace(rollout, learn=rollout.mask & (place % 3 != 2))
    method = opd.method(needs=("teacher",), plan=lambda batch: {"scale": _only_learned(batch)})(
        lambda rows: rows.scale * opd.losses.reverse_kl(rows.student, rows.teacher)
    )
    trace = opd.score(said, student, teacher, method=method)
    learned = said.learned.numpy()
    assert 0 < learned.sum() < len(learned)
    assert (trace.column("loss")[~learned] == 0).all()
    want = trace.column("teacher_reverse_kl")[learned]
    np.testing.assert_allclose(trace.column("loss")[learned], want, rtol=1e-4, atol=1e-5)


def _only_learned(batch):
    return torch.where(batch.learn, 1.0, torch.nan)
