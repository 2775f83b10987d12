"""Top tokens that a step keeps: one token's update is explained by the trace of the step alone."""

from __future__ import annotations

import every_method
import numpy as np
import pytest
import torch

import opdlab as opd
from opdlab import Trace, viz
from opdlab.audit.what_if import with_gradients
from opdlab.errors import InvalidValue
from opdlab.tasks import market
from opdlab.tasks.market import model

METHODS = tuple(every_method.methods())
# Losses that put together all tokens outside of a top k: no formula of columns says which.
GENERAL = {"OPD top-k", "ahead", "ahead, many teachers"}
SMALL = {"steps": 1, "batch": 3, "max_new_tokens": 12, "seed": 3, "quiet": True}


@pytest.fixture(scope="module")
def models():
    base, teacher, task = opd.load("market")
    return base, teacher, task, every_method.other_teachers(base, teacher)


def start(models, name, **changes):
    base, teacher, task, others = models
    method, settings = every_method.methods()[name]
    options = {**SMALL, **settings, **changes}
    return opd.distill(base.frozen(), others.get(name, teacher), task, method=method, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
def test_an_update_is_explained_by_its_trace_alone(models, name, tmp_path):
    """All tokens are kept, so the formula gives the loss, and the slopes are those of autograd."""
    everything = models[0].weights.vocab_size
    run = start(models, name, trace_k=everything)
    path = next(run).trace().save(tmp_path / "trace.parquet")
    trace = Trace.load(path)  # as by a reader who has nothing else
    loss = trace.column("loss").astype(float)
    assert (trace.meta["formula"] == "") == (name in GENERAL)
    before, after = trace.column("logit_gradient"), trace.column("logp_gradient")
    # A constant on all logits changes nothing; `after` is the size of what is rounded.
    assert (np.abs(before.sum(1)) <= 1e-5 * np.abs(after).sum(1) + 1e-6).all()
    if name not in GENERAL:
        views = [viz.Equation(trace, sample=i) for i in range(len(trace.meta["texts"]))]
        values = np.concatenate([view.values for view in views])
        np.testing.assert_allclose(values, loss, rtol=1e-3, atol=2e-4)
        found = with_gradients(trace, run.method)
        np.testing.assert_allclose(before, found.column("logit_gradient"), rtol=1e-3, atol=2e-3)
        np.testing.assert_allclose(after, found.column("logp_gradient"), rtol=1e-3, atol=2e-3)
    if trace.column("grad_norm").max() > 0:
        assert np.abs(before).max() > 0


def test_the_top_tokens_are_those_of_before_the_update(models):
    base, teacher, task, _ = models
    student = base.frozen()
    run = opd.distill(student, teacher, task, **SMALL | {"steps": 2, "lr": 1e-2}, trace_k=4)
    next(run)
    frozen = student.frozen()  # as the second step finds it
    step = next(run)
    trace = step.trace()
    want = opd.score(step.rollout, frozen, teacher, k=4, method=opd.OPD())
    for name in ("student_top", "teacher_top", "student_tail", "teacher_tail", "loss"):
        np.testing.assert_allclose(trace.column(name), want.column(name), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(trace.column("support"), want.column("support"))
    moved = opd.score(step.rollout, student, teacher, k=4, method=opd.OPD())
    assert np.abs(moved.column("loss") - want.column("loss")).max() > 1e-3
    view = viz.Equation(trace)
    drawn = view.data()
    assert drawn["duel"]["beside"].keys() == {"logit_gradient", "logp_gradient"}
    assert "sum(student" in view.formula.text


@pytest.mark.parametrize("name", ["OPD full", "DOPD", "GRPO"])
def test_training_does_not_change(models, name):
    runs = [start(models, name, trace_k=k, steps=2) for k in (0, 5)]
    one, two = (run.train() for run in runs)
    assert one.history["loss"].tolist() == two.history["loss"].tolist()
    assert one.history["grad_norm"].tolist() == two.history["grad_norm"].tolist()
    pairs = zip(one.parameters.values(), two.parameters.values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert "support" not in one.last.columns


@pytest.mark.parametrize("size", [1, 2, None])
def test_micro_batches_keep_the_same(models, size):
    whole, parts = (next(start(models, "DOPD", micro_batch=n)).trace() for n in (None, size))
    np.testing.assert_array_equal(whole.column("support"), parts.column("support"))
    for name in ("student_top", "teacher+hint_top", "logit_gradient"):
        np.testing.assert_allclose(whole.column(name), parts.column(name), rtol=1e-3, atol=1e-4)


def test_the_bytes_of_a_token(models):
    step = next(start(models, "OPD full", trace_k=8))
    kept = [name for name in step.columns if name.endswith(("_top", "_tail", "_gradient"))]
    size = sum(step.columns[name].nbytes for name in [*kept, "support"])
    k, policies = 8, 2
    tokens = 1 + k * policies
    assert size / step.rollout.tokens == 16 * tokens + 4 * policies * (tokens + 1) + 8 == 424


def test_what_a_tool_says_has_no_top_tokens():
    task, student, teacher = market(tools=True), model("trainee"), model("clerk")
    run = opd.distill(student, teacher, task, steps=1, batch=4, trace_k=4, quiet=True)
    trace = next(run).trace()
    learn = trace.column("learn")
    assert 0 < learn.mean() < 1
    support = trace.column("support")
    assert (support[~learn] == -1).all()
    assert (support[learn][:, 0] == trace.column("token_id")[learn]).all()
    assert (trace.column("student_tail")[~learn] == 1).all()
    assert np.isfinite(with_gradients(trace, opd.OPD()).column("logit_gradient")).all()
    assert "Equation" in repr(viz.Equation(trace))


def test_a_resumed_run_goes_on_keeping_them(models, tmp_path):
    base, teacher, task, _ = models
    run = opd.distill(
        base.frozen(), teacher, task, **SMALL | {"steps": 2}, save=tmp_path, save_every=1, trace_k=3
    )
    whole = run.train().last.trace()
    again = opd.resume(
        tmp_path, base.frozen(), teacher, task, step=1, save=tmp_path / "b", quiet=True
    )
    trace = next(again).trace()
    for name in ("support", "student_top", "logit_gradient"):
        np.testing.assert_array_equal(trace.column(name), whole.column(name))
    without = opd.resume(
        tmp_path, base.frozen(), teacher, task, step=1, save=tmp_path / "c", quiet=True, trace_k=0
    )
    assert "support" not in next(without).columns


@pytest.mark.parametrize("k", [-1, 1.5, True, "8", 10**6])
def test_sizes_that_cannot_be_are_refused(models, k):
    with pytest.raises(InvalidValue, match="trace_k"):
        start(models, "OPD full", trace_k=k)
