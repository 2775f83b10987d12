"""Privileged self-distillation: its settings against the divergences they name, through the engine,
and in training.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import opdlab as opd
from opdlab import SelfDistillation, Task, TopK, exact
from opdlab.engine.batch import Batch
from opdlab.methods.self_distillation import clipped_forward_kl

NEEDS = {"live": "student+hint", "frozen": "reference+hint", "ema": "ema+hint"}


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * (a.log() - b.log())).sum(-1)


def jsd(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return kl(t, (s + t) / 2) / 2 + kl(s, (s + t) / 2) / 2


# a named setting, whose hinted self teaches, and what of student s and teacher t it descends
SETTINGS = {
    "opsd": (SelfDistillation.opsd(), "frozen", jsd),
    "opsd clipped": (
        SelfDistillation.opsd(clip=0.05),
        "frozen",
        lambda s, t: (t * (t / s).log()).clamp(max=0.05).sum(-1),
    ),
    "sdft": (SelfDistillation.sdft(), "ema", kl),
    "sdft forward": (SelfDistillation.sdft("forward_kl"), "ema", lambda s, t: kl(t, s)),
    "context": (SelfDistillation.context_distillation(), "frozen", kl),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_descends_what_its_paper_says(name):
    """Exact expected gradient over every completion of toy tables, against autograd on the naive
    sum.
    """
    method, anchor, naive = SETTINGS[name]
    assert method.anchor == anchor
    assert method.needs == (NEEDS[anchor],)
    student, told = (exact.Table.random(4, 2, 2, seed=seed) for seed in (0, 1))
    got = exact.gradient(method, {"student": student, NEEDS[anchor]: told})
    logits = student.logits.clone().requires_grad_()
    value = naive(logits.softmax(-1), told.logp.exp())
    (want,) = torch.autograd.grad((exact.visits(student).detach() * value).sum(), logits)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    assert want.norm() > 0.01


@pytest.mark.parametrize(("by", "k"), [("student", 3), ("teacher", 3)])
def test_the_top_k_is_taken_from_whom_it_says(by, k):
    method = SelfDistillation("reverse_kl", top_k=TopK(k, by=by))
    student, told = (exact.Table.random(6, 1, seed=seed) for seed in (3, 4))
    rollout = exact.everything(student.prompts, 6, 1, by=student)
    batch = Batch(rollout, {"student": student, "reference+hint": told})
    s, t = student.logp[0, 0], told.logp[0, 0]
    assert {*s.topk(k).indices.tolist()} != {*t.topk(k).indices.tolist()}
    ids = (s if by == "student" else t).topk(k).indices
    fold = lambda x: torch.cat([x.exp()[ids], 1 - x.exp()[ids].sum(0, keepdim=True)])
    want = kl(fold(s), fold(t))
    torch.testing.assert_close(batch.map(method.loss)[batch.mask], want.expand(6))


def test_context_distillation_on_a_support():
    assert SelfDistillation.context_distillation(256).top_k == TopK(256)
    assert SelfDistillation.context_distillation().top_k is None


@given(seed=st.integers(0, 10**6), clip=st.floats(1e-3, 2))
def test_the_clipped_kl_is_bounded_an_entry_at_a_time(seed, clip):
    g = torch.Generator().manual_seed(seed)
    s, t = (
        torch.randn(5, 7, generator=g, dtype=torch.float64).mul(2).log_softmax(-1) for _ in range(2)
    )
    got = clipped_forward_kl(s, t, clip)
    want = [
        sum(min(q * math.log(q / p), clip) for p, q in zip(*rows, strict=True))
        for rows in zip(s.exp().tolist(), t.exp().tolist(), strict=True)
    ]
    assert got.tolist() == pytest.approx(want)
    assert (got <= kl(t.exp(), s.exp()) + 1e-12).all()
    torch.testing.assert_close(clipped_forward_kl(s, t, 1e9), kl(t.exp(), s.exp()))


def test_the_clipped_kl_can_be_negative_and_stays_finite():
    s, t = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    assert clipped_forward_kl(s, t, 0.05).item() == pytest.approx(0.05 + 0.1 * math.log(0.2))
    s = torch.tensor([[0.0, 2.0, -math.inf], [0.0, 1.0, 2.0]]).requires_grad_()
    t = torch.tensor([[0.0, -math.inf, 3.0], [1.0, 1.0, -math.inf]]).log_softmax(-1)
    value = clipped_forward_kl(s.log_softmax(-1), t, 0.5)
    (slope,) = torch.autograd.grad(value.sum(), s)
    assert torch.isfinite(value).all()
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"divergence": "kl"}, "SelfDistillation has no divergence 'kl'. Use one of forward_kl"),
        (
            {"anchor": "teacher"},
            "SelfDistillation got anchor='teacher'. Use one of live, frozen, ema",
        ),
        ({"clip": 0.1}, "clip=0.1 with 'jensen_shannon'"),
        ({"divergence": "forward_kl", "clip": 0.0}, "clip=0.0"),
        ({"divergence": "generalized_jsd", "options": {"beta": 0}}, "beta=0"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, says):
    with pytest.raises(ValueError, match=says):
        SelfDistillation(**settings)


# In training.


def hinted(prompts) -> Task:
    return Task(
        "hinted",
        lambda n, seed, split: [prompts[(seed + i) % len(prompts)] for i in range(n)],
        max_new_tokens=12,
    )


@pytest.mark.parametrize(
    "method",
    [
        *(SelfDistillation(anchor=anchor) for anchor in NEEDS),
        SelfDistillation.opsd(0.05),
        SelfDistillation.sdft(),
        SelfDistillation.context_distillation(8),
        SelfDistillation("reverse_kl", top_k=TopK(8, by="teacher")),
    ],
    ids=lambda m: f"{m.divergence}-{m.anchor}-{m.clip}-{m.top_k and m.top_k.by}",
)
def test_two_steps_on_tiny_models_without_a_teacher(make_policy, prompts, method):
    student = make_policy(0)
    run = opd.distill(
        student,
        task=hinted(prompts),
        method=method,
        batch=4,
        steps=2,
        lr=1e-2,
        quiet=True,
        micro_batch=3,
    )
    steps = list(run)
    assert all(
        math.isfinite(step.metrics["loss"]) and step.metrics["grad_norm"] > 0 for step in steps
    )
    name = method.needs[0]
    assert f"{name}_reverse_kl" in steps[0].columns


@pytest.mark.parametrize(
    "method",
    [SelfDistillation.opsd(), SelfDistillation.sdft(), SelfDistillation.context_distillation()],
    ids=["opsd", "sdft", "context"],
)
def test_two_steps_on_the_market_with_secrets(method):
    student, _, task = opd.load("market", secret=True)
    run = opd.distill(student, task=task, method=method, batch=8, steps=2, quiet=True)
    assert all(step.metrics["loss"] > 0 and step.metrics["grad_norm"] > 0 for step in run)


def test_micro_batches_change_nothing(make_policy, prompts):
    found = []
    for size in (None, 1):
        run = opd.distill(
            make_policy(0),
            task=hinted(prompts),
            method=SelfDistillation.opsd(),
            batch=4,
            steps=1,
            quiet=True,
            micro_batch=size,
        )
        found.append((next(run).metrics["loss"], [p.grad.clone() for p in run.parameters.values()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for one, two in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


def test_it_learns_what_the_hint_shows_and_the_frozen_anchor_stays():
    """The market's student adds correctly when it is shown the calculation; without it, its skill
    is dormant.
    """
    student, _, task = opd.load("market")
    run = opd.distill(
        student, task=task, method=SelfDistillation.opsd(), batch=16, steps=8, quiet=True
    )
    rollout = student.sample(task.prompts(16, split="test"), seed=9, max_new_tokens=24)
    told = run.policies["reference+hint"]
    still = told.log_probs(rollout)
    far = jsd(student.log_probs(rollout).exp(), still.exp()).mean()
    run.train()
    assert torch.equal(told.log_probs(rollout), still)
    assert jsd(student.log_probs(rollout).exp(), still.exp()).mean() < 0.7 * far


def test_one_context_for_all_prompts(make_policy, prompts):
    student = make_policy(0)
    bare = [opd.Prompt(p.text or "ben", id=p.id) for p in prompts]
    rule = {"reference+hint": student.frozen().seeing("say sum")}
    run = opd.distill(
        student,
        task=hinted(bare),
        method=SelfDistillation.context_distillation(),
        policies=rule,
        batch=4,
        steps=1,
        quiet=True,
    )
    assert next(run).metrics["loss"] > 0
    with pytest.raises(opd.errors.MissingHint, match="has no hint"):
        opd.distill(
            make_policy(0),
            task=hinted(bare),
            method=SelfDistillation.context_distillation(),
            batch=4,
        )
