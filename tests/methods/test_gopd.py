"""G-OPD: the exact expected gradient, its relation to OPD, and the optimum of the extrapolated
reward.
"""

from __future__ import annotations

import math

import pytest
import torch
from plans import plan_values

import opdlab as opd
from opdlab import GOPD, OPD, exact
from opdlab.engine.batch import Batch


def tables(vocab: int = 4, length: int = 3) -> dict[str, exact.Table]:
    return {
        name: exact.Table.random(vocab, length, 2, seed=i)
        for i, name in enumerate(("student", "teacher", "reference"))
    }


def test_at_scale_one_it_is_plain_opd_to_the_bit_whatever_the_reference():
    policies = tables()
    rollout = policies["student"].sample(policies["student"].prompts, n=5)
    plain = plan_values(OPD(estimator="sampled"), Batch(rollout, policies))
    for reference in ("reference", "teacher", "student"):
        ours = plan_values(
            GOPD(scale=1), Batch(rollout, policies | {"reference": policies[reference]})
        )
        assert ours.keys() == plain.keys()
        assert all(torch.equal(ours[name], plain[name]) for name in plain)
    weight = torch.ones(len(rollout), dtype=torch.float64)
    assert torch.equal(
        exact.gradient_on(GOPD(1), policies, rollout, weight),
        exact.gradient_on(OPD(estimator="sampled"), policies, rollout, weight),
    )


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.25, 2.0])
def test_advantages_by_hand(scale):
    policies = tables(length=2)
    rollout = exact.everything(policies["student"].prompts, 4, 2, by=policies["student"])
    batch = Batch(rollout, policies)
    got = plan_values(GOPD(scale), batch)["advantage"][batch.mask]
    where, token = policies["student"].where(rollout), batch.token[:, None]
    p, q, r = (
        policies[name].logp[where].gather(-1, token)[:, 0]
        for name in ("student", "teacher", "reference")
    )
    torch.testing.assert_close(got, scale * (q - r) - (p - r))


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.25, 2.0])
def test_the_expected_gradient_is_that_of_the_kl_to_the_extrapolated_teacher(scale):
    """Every completion:

    E[grad] = grad of KL(p || p*) at each prefix, weighted by how often the student comes there.
    """
    policies = tables()
    got = exact.gradient(GOPD(scale), policies)
    logits = policies["student"].logits.clone().requires_grad_()
    best = (
        (1 - scale) * policies["reference"].logp + scale * policies["teacher"].logp
    ).log_softmax(-1)
    p = logits.log_softmax(-1)
    value = (p.exp() * (p - best)).sum(-1)
    (want,) = torch.autograd.grad(
        (exact.visits(policies["student"]).detach() * value).sum(), logits
    )
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    assert want.norm() > 0.1


@pytest.mark.parametrize("scale", [0.5, 1.25, 2.0])
def test_the_optimum_is_the_teacher_sharpened_away_from_the_reference(scale):
    """At p* ∝ r^(1-λ) q^λ there is no gradient, the objective is log Z, and every other student has
    less.
    """
    policies = tables(length=2)
    q, r = policies["teacher"].logp, policies["reference"].logp
    unnormalised = (1 - scale) * r + scale * q
    best = exact.Table(unnormalised.log_softmax(-1), policies["student"].prompts, 2)
    assert exact.gradient(GOPD(scale), policies | {"student": best}).abs().max() < 1e-12
    objective = lambda p: (p.exp() * (scale * (q - r) - (p - r))).sum(-1)
    torch.testing.assert_close(objective(best.logp), unnormalised.logsumexp(-1))
    for seed in range(5):
        other = exact.Table.random(4, 2, 2, seed=10 + seed)
        assert (objective(other.logp) < objective(best.logp)).all()
        assert exact.gradient(GOPD(scale), policies | {"student": other}).norm() > 0.1
    if scale > 1:
        likely, drawn = best.logp.exp(), (q - r) > 0
        assert (likely * drawn).sum(-1).mean() > (q.exp() * drawn).sum(
            -1
        ).mean()  # beyond the teacher, away from the reference


def test_needs_and_bad_scales():
    assert GOPD.needs == ("teacher", "reference")
    assert GOPD().scale == 1.25
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(
            ValueError,
            match=r"the weight of the teacher's reward\. Use a number above 0; 1 is plain OPD",
        ):
            GOPD(scale)


def test_two_steps_with_either_reference():
    student, teacher, task = opd.load("market", secret=True)
    steps = list(opd.distill(student, teacher, task, method=GOPD(), batch=8, steps=2, quiet=True))
    assert all(
        math.isfinite(step.metrics["loss"]) and step.metrics["grad_norm"] > 0 for step in steps
    )
    base = opd.load("market", student="novice")[0]
    student, teacher, task = opd.load("market")
    step = next(
        opd.distill(
            student,
            teacher,
            task,
            method=GOPD(),
            policies={"reference": base},
            batch=8,
            steps=1,
            quiet=True,
        )
    )
    assert "reference_logp" in step.columns
    want = (
        1.25 * (step.columns["teacher_logp"] - step.columns["reference_logp"])
        - step.columns["student_logp"]
        + step.columns["reference_logp"]
    )
    torch.testing.assert_close(step.plan["advantage"], want, rtol=1e-4, atol=1e-4)


def test_micro_batches_change_nothing(make_policy, prompts):
    task, found = opd.Task("asked", lambda n, seed, split: prompts[:n], max_new_tokens=8), []
    for size in (None, 1):
        run = opd.distill(
            make_policy(0),
            make_policy(1),
            task,
            method=GOPD(),
            batch=4,
            steps=1,
            quiet=True,
            micro_batch=size,
        )
        next(run)
        found.append([p.grad.clone() for p in run.parameters.values()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)
