"""Equation: the formula's value is the recorded loss, and gradients are those of autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from viz.traces import made

import opdlab as opd
from opdlab.audit.what_if import what_if, with_gradients
from opdlab.data.trace import Trace
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.viz import Equation, payload

WORDS = [f" w{i}".encode() for i in range(9)]


@pytest.fixture(scope="module")
def trace():
    return made(WORDS, top=15)  # all words are kept: sums are exact


def test_sums_over_all_words_give_the_recorded_loss(trace):
    filled = what_if(trace, opd.OPD("forward_kl"))
    view = Equation(filled, method=opd.OPD("forward_kl"))
    assert view.formula.text == "sum(teacher * log(teacher / student))"
    np.testing.assert_allclose(view.values, filled.column("loss"), rtol=1e-5)
    assert "loss" in view.channels
    assert repr(view).splitlines()[0].startswith("Equation: completion 0, 9 tokens, loss = sum(")


def test_gradients_are_the_slopes_of_the_loss(trace):
    found = with_gradients(trace, opd.OPD())
    before, after = found.column("logit_gradient"), found.column("logp_gradient")
    np.testing.assert_allclose(before.sum(1), 0.0, atol=1e-6)
    top = np.exp(trace.column("student_top").astype(float))
    tail = trace.column("student_tail").clip(0)[:, None]
    p = np.concatenate([top, tail], 1)
    np.testing.assert_allclose(before, after - p * after.sum(1, keepdims=True), atol=1e-6)
    # Against finite differences of the reverse KL in one logit, on the kept words.
    q = np.concatenate([np.exp(trace.column("teacher_top").astype(float)), tail], 1)
    teacher = torch.tensor(q[4]).clamp_min(1e-80).log()
    step = 1e-5
    logits = torch.tensor(p[4]).clamp_min(1e-80).log()

    def loss(z):
        s = z.log_softmax(-1)
        return float((s.exp() * (s - teacher)).sum())

    for k in range(3):
        shift = torch.zeros_like(logits)
        shift[k] = step
        slope = (loss(logits + shift) - loss(logits - shift)) / (2 * step)
        assert before[4, k] == pytest.approx(slope, abs=1e-4)
    drawn = payload.unpack(payload.pack(Equation(found).data()))["duel"]
    start = int(drawn["count"][:4].sum())
    ids = drawn["ids"][drawn["row"][start : start + int(drawn["count"][4])]]
    support = trace.column("support")[4].tolist()
    want = [before[4, support.index(i)] for i in ids]
    np.testing.assert_allclose(
        drawn["beside"]["logit_gradient"][start:][: len(want)], want, rtol=1e-5
    )
    rest = before[4].sum() - sum(want)
    assert drawn["beside_other"]["logit_gradient"][4] == pytest.approx(rest, abs=1e-5)


def test_the_formula_travels_with_the_trace(tmp_path):
    student, teacher, task = opd.load("market")
    rollout = student.sample(task.prompts(2, seed=1), seed=1, max_new_tokens=8)
    method = opd.OPD(estimator="sampled")
    scored = Trace.load(
        opd.score(rollout, student, teacher, method=method).save(tmp_path / "t.parquet")
    )
    view = Equation(scored)
    assert view.formula.names == ["advantage", "student_logp", "sampler_logp"]
    assert list(view.channels)[:3] == view.formula.names
    np.testing.assert_allclose(view.values, view.trace.column("loss"), atol=1e-5)
    assert Equation.fits(scored)


def test_an_own_method_gets_the_general_form(trace):
    def mine(rows):
        return -rows.student[:, 1]

    view = Equation(trace, method=mine)
    assert view.formula is None
    assert np.isnan(view.values).all()
    assert (view.trace.column("logp_gradient")[:, 1] == -1).all()
    assert view.data()["tree"] == []


def test_what_a_file_says_is_not_believed(trace):
    for text in ("__import__('os')", 3, ["a"], "nothing_here + 1"):
        odd = Trace(trace.table, {**trace.meta, "formula": text})
        assert np.isnan(Equation(odd).values).all()


def test_wrong_objects_are_refused(trace):
    with pytest.raises(OpdlabError):
        Equation("trace.parquet")
    with pytest.raises(InvalidValue):
        Equation(trace, method=3)
