"""Tokens that the loss sees: those of `rollout.learn`, as when a tool spoke in between."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import opdlab as opd
from opdlab.engine.batch import Batch
from opdlab.engine.planned import run_plan
from opdlab.engine.signals import cheap
from opdlab.losses import reverse_kl
from opdlab.training import phases

KL = opd.method(needs=("teacher",))(lambda rows: reverse_kl(rows.student, rows.teacher))


def with_turns(rollout: opd.Rollout) -> opd.Rollout:
    """Every third token was said by somebody else; a new turn begins behind it."""
    place = torch.arange(rollout.ids.shape[1])
    learn = rollout.mask & (place % 3 != 2)
    return replace(rollout, learn=learn, turn=(place // 3).expand_as(rollout.ids))


@pytest.fixture(scope="module")
def rollout(student, prompts):
    return with_turns(student.sample(prompts, n=2, max_new_tokens=9, seed=1))


@pytest.mark.parametrize("rows", [None, range(2, 5)])
def test_the_gradient_is_that_of_the_learned_tokens_alone(rollout, student, teacher, rows):
    batch = Batch(rollout, {"student": student, "teacher": teacher})
    weight = torch.linspace(0.1, 1, rollout.tokens)
    found = run_plan(KL, batch).gradient(weight, rows=rows, watch=cheap)
    chosen = range(len(rollout)) if rows is None else rows
    part = rollout.select(chosen)
    start = int(rollout.lengths[: chosen.start].sum())
    weight = weight[start : start + part.tokens]

    hidden = student.hidden(part).detach().requires_grad_()
    log_probs = student.head(hidden).log_softmax(-1)
    loss = reverse_kl(log_probs, teacher.log_probs(part))
    (loss * weight)[part.learned].sum().backward()
    torch.testing.assert_close(found.gradient, hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, loss.detach() * part.learned, rtol=1e-4, atol=1e-5)
    assert 0 < int(part.learned.sum()) < part.tokens
    assert (found.columns["grad_norm"][~part.learned] == 0).all()


def test_a_loss_that_breaks_on_other_tokens_does_no_harm(rollout, student, teacher):
    def plan(batch):
        return {"scale": torch.where(batch.learn, 1.0, torch.nan)}

    broken = opd.method(needs=("teacher",), plan=plan)(
        lambda rows: rows.scale * reverse_kl(rows.student, rows.teacher)
    )
    batch = Batch(rollout, {"student": student, "teacher": teacher})
    found = run_plan(broken, batch).gradient(torch.ones(rollout.tokens))
    assert found.gradient.isfinite().all()


def test_statistics_are_over_learned_tokens(rollout, student):
    batch = Batch(rollout, {"student": student})
    values = torch.randn(rollout.ids.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(batch.gather(values), values[rollout.learn])
    assert torch.equal(batch.gather(values, rollout.mask), values[rollout.mask])
    mean = values[rollout.learn].double().mean()
    torch.testing.assert_close(batch.mean(values), mean)
    several = torch.stack([values, 2 * values], -1)
    torch.testing.assert_close(batch.mean(several), torch.stack([mean, 2 * mean]))
    assert batch.mean(values, torch.zeros_like(rollout.mask)).isnan()


@pytest.fixture
def stepped(monkeypatch):
    """A step of a run on the market whose completions have turns; and the run."""

    def make(**options):
        write = phases.write_rollout
        monkeypatch.setattr("opdlab.training.run.write_rollout", lambda run: with_turns(write(run)))
        run = opd.distill(*opd.load("market"), steps=1, batch=4, quiet=True, **options)
        step = next(run)
        monkeypatch.undo()
        return run, step

    return make


@pytest.mark.parametrize("normalize", ["token", "sequence", "constant"])
def test_a_step_counts_learned_tokens_alone(stepped, normalize):
    run, step = stepped(normalize=normalize)
    rollout, learned = step.rollout, step.rollout.learned
    weight = phases.token_weights(run, rollout)
    per_row = rollout.learn.sum(1)
    assert (weight[~learned] == 0).all()
    if normalize == "constant":
        share = per_row.sum() / (len(rollout) * run.settings.max_new_tokens)
        torch.testing.assert_close(weight.sum(), share.float())
    else:
        torch.testing.assert_close(weight.sum(), torch.tensor(1.0))
    if normalize == "sequence":
        sums = torch.stack([part.sum() for part in weight.split(rollout.lengths.tolist())])
        torch.testing.assert_close(sums, torch.full((len(rollout),), 1 / len(rollout)))
    assert step.metrics["tokens"] == int(learned.sum())
    entropy = step.columns["student_entropy"][learned].mean()
    assert step.metrics["entropy"] == pytest.approx(float(entropy), rel=1e-5)
    assert step.metrics["loss"] == pytest.approx(
        float((step.columns["loss"] * weight).sum()), rel=1e-5
    )


def test_micro_batches_change_nothing(stepped):
    (one, first), (two, second) = stepped(), stepped(micro_batch=1)
    assert second.metrics["loss"] == pytest.approx(first.metrics["loss"], rel=1e-5)
    for name, parameter in one.parameters.items():
        torch.testing.assert_close(two.parameters[name].grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_a_trace_tells_turns_apart_where_there_are_several(stepped, student, teacher, prompts):
    _, step = stepped()
    trace = step.trace()
    assert trace.column("turn").max() >= 2
    assert (trace.column("learn") == step.rollout.learned.numpy()).all()
    one_turn = opd.score(student.sample(prompts[:1], max_new_tokens=4), student, teacher)
    assert not {"turn", "learn"} & set(one_turn.table.column_names)
