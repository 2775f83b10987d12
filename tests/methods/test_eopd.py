"""EOPD: a sum, gated by the teacher's entropy; against the naive sum, at both ends of the gate."""

from __future__ import annotations

import math

import pytest
import torch
from plans import plan_values

import opdlab as opd
from opdlab import EOPD, OPD, exact
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows


def tables(vocab: int = 6, length: int = 2) -> dict[str, exact.Table]:
    """A teacher that is sure at some prefixes and undecided at others."""
    student, teacher = (
        exact.Table.random(vocab, length, 2, seed=0),
        exact.Table.random(vocab, length, 2, seed=1, scale=2.5),
    )
    return {"student": student, "teacher": teacher}


def entropy(p: torch.Tensor) -> torch.Tensor:
    return -(p * p.log()).sum(-1)


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * (a / b).log()).sum(-1)


def fold(p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    top = p.gather(-1, ids)
    return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize(
    "method", [EOPD(k=3), EOPD(threshold=1.2, k=2, weight=0.5), EOPD(threshold=0.3, k=1)]
)
def test_the_expected_gradient_is_that_of_the_sum(method):
    policies = tables()
    logits = policies["student"].logits.clone().requires_grad_()
    s, t = logits.softmax(-1), policies["teacher"].logp.exp()
    gate = entropy(t) > method.threshold
    assert 0 < gate.double().mean() < 1
    ids = t.topk(method.k).indices
    value = kl(s, t) + method.weight * gate * kl(fold(t, ids), fold(s, ids))
    (want,) = torch.autograd.grad(
        (exact.visits(policies["student"]).detach() * value).sum(), logits
    )
    torch.testing.assert_close(exact.gradient(method, policies), want, rtol=1e-7, atol=1e-9)


def test_the_forward_kl_is_added_and_not_switched_to():
    policies = tables()
    rollout = exact.everything(policies["student"].prompts, 6, 2, by=policies["student"])
    batch = Batch(rollout, policies)
    gated = plan_values(EOPD(), batch)["gated"]
    assert set(gated[batch.mask].tolist()) == {0, 1}
    plain, ours = batch.map(OPD().loss)[batch.mask], run(EOPD(), batch)
    on = gated[batch.mask] == 1
    torch.testing.assert_close(ours[~on], plain[~on])
    full = batch.map(OPD("forward_kl").loss)[batch.mask]
    torch.testing.assert_close(ours[on], (plain + full)[on])  # k = 16 covers all six tokens
    assert (full[on] > 1e-3).any()


def run(method: EOPD, batch: Batch) -> torch.Tensor:
    gated = plan_values(method, batch)["gated"][batch.mask]
    rows = {
        name: batch.policies[name].logp[batch.policies["student"].where(batch.rollout)]
        for name in batch.policies
    }
    return method.loss(Rows(rows, batch.token, {"gated": gated}))


def test_both_ends_of_the_gate():
    policies = tables()
    torch.testing.assert_close(
        exact.gradient(EOPD(threshold=math.inf), policies), exact.gradient(OPD(), policies)
    )
    torch.testing.assert_close(
        exact.gradient(EOPD(weight=0), policies), exact.gradient(OPD(), policies)
    )
    both = exact.gradient(OPD(), policies) + exact.gradient(OPD("forward_kl"), policies)
    torch.testing.assert_close(exact.gradient(EOPD(threshold=0), policies), both)


def test_the_gate_is_strict_and_in_nats():
    teacher = exact.Table(
        torch.zeros(1, 1, 4, dtype=torch.float64), exact.Table.random(4, 1).prompts, 1
    )
    policies = {"student": exact.Table.random(4, 1), "teacher": teacher}
    rollout = exact.everything(teacher.prompts, 4, 1, by=policies["student"])
    for threshold, want in ((math.log(4) - 1e-9, 1), (math.log(4) + 1e-9, 0)):
        assert plan_values(EOPD(threshold), Batch(rollout, policies))[
            "gated"
        ].unique().tolist() == [want]


def test_a_student_that_rules_out_a_token_where_the_gate_is_shut():
    student = torch.tensor([[0.0, -math.inf, 1.0]]).requires_grad_()
    teacher = torch.tensor([[5.0, 0.0, 0.0]]).log_softmax(-1)
    loss = EOPD().loss(
        Rows(
            {"student": student.log_softmax(-1), "teacher": teacher},
            torch.zeros(1).long(),
            {"gated": torch.zeros(1)},
        )
    )
    assert torch.isfinite(loss).all()
    assert torch.isfinite(torch.autograd.grad(loss.sum(), student)[0]).all()


def test_defaults_and_bad_settings():
    assert (EOPD().threshold, EOPD().k, EOPD().weight, EOPD.needs) == (0.8, 16, 1.0, ("teacher",))
    for settings, says in (
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"k": 0}, "k=0"),
        ({"weight": math.nan}, "weight=nan"),
    ):
        with pytest.raises(ValueError, match=says):
            EOPD(**settings)


def test_two_steps_on_the_market_with_secrets():
    steps = list(
        opd.distill(*opd.load("market", secret=True), method=EOPD(), batch=8, steps=2, quiet=True)
    )
    assert all(
        math.isfinite(step.metrics["loss"]) and step.metrics["grad_norm"] > 0 for step in steps
    )
    trace = steps[0].trace()
    assert set(trace.column("gated")) == {0, 1}  # the teacher cannot know the secret and the lot


def test_micro_batches_change_nothing(make_policy, prompts):
    task, found = opd.Task("asked", lambda n, seed, split: prompts[:n], max_new_tokens=8), []
    for size in (None, 1):
        run = opd.distill(
            make_policy(0),
            make_policy(1),
            task,
            method=EOPD(),
            batch=4,
            steps=1,
            quiet=True,
            micro_batch=size,
        )
        next(run)
        found.append([p.grad.clone() for p in run.parameters.values()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)
