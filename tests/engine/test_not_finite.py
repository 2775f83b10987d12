"""Numbers that are none: who is to blame, and what helps."""

from __future__ import annotations

import pytest
import torch

from opdlab import Policy, Task, distill, method, score
from opdlab.engine.passes import gradient
from opdlab.errors import NonFinite
from opdlab.losses.divergences import (
    entropy,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_reverse_kl,
    total_variation,
)
from opdlab.models.graded import States
from opdlab.models.head import Head


@pytest.fixture
def task(prompts) -> Task:
    return Task("some", lambda n, seed, split: prompts[:n])


def identity_states(logits: torch.Tensor) -> States:
    return States(logits, Head(torch.eye(logits.shape[-1]), None, logits.shape[-1]))


def make_case(ruled_out: list[int]):
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4, 6, generator=g), torch.randn(4, 6, generator=g)
    head = Head(
        torch.eye(6),
        torch.zeros(6).index_fill(0, torch.tensor(ruled_out, dtype=torch.long), -torch.inf),
        6,
    )
    return (
        {"student": identity_states(student), "teacher": States(teacher, head)},
        torch.zeros(4, dtype=torch.long),
        torch.full((4,), 0.25),
    )


def test_a_teacher_without_probability_for_a_token_is_named_with_a_way_out():
    states, token, weight = make_case([2, 5])
    with pytest.raises(NonFinite) as caught:
        gradient(lambda rows: reverse_kl(rows.student, rows.teacher), states, token, weight)
    said = str(caught.value)
    assert "loss is inf at token row 0" in said
    assert (
        "'teacher' gives tokens 2, 5 no probability at all (-inf), and the student gives some"
        in said
    )
    assert all(
        way in said
        for way in (
            "jensen_shannon",
            "skew_reverse_kl",
            "clamp(min=-30)",
            "A lower learning rate does not help",
        )
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda rows: jensen_shannon(rows.student, rows.teacher),
        lambda rows: skew_reverse_kl(rows.student, rows.teacher),
        lambda rows: total_variation(rows.student, rows.teacher),
        lambda rows: reverse_kl(rows.student, rows["teacher"].clamp(min=-30)),
    ],
)
def test_the_ways_out_work(loss):
    states, token, weight = make_case([2, 5])
    result = gradient(loss, states, token, weight)
    assert bool(torch.isfinite(result.loss).all() and torch.isfinite(result.gradient).all())


def test_a_student_without_probability_makes_the_forward_kl_infinite():
    states, token, weight = make_case([3])
    states = {"student": states["teacher"], "teacher": states["student"]}
    with pytest.raises(
        NonFinite, match=r"'student' gives token 3 no probability at all.*the teacher gives some"
    ):
        gradient(lambda rows: forward_kl(rows.student, rows.teacher), states, token, weight)


def test_a_run_says_it_too_and_not_to_lower_the_learning_rate(make_policy, task):
    teacher = make_policy(1)
    bias = torch.zeros(teacher.vocab if hasattr(teacher, "vocab") else teacher.weights.vocab_size)
    bias[7] = -torch.inf
    object.__setattr__(teacher.weights.head, "bias", bias)
    with pytest.raises(
        NonFinite, match=r"Step 1, prompt .*'teacher' gives token 7 no probability"
    ) as caught:
        next(distill(make_policy(0), teacher, task, steps=1, batch=2, max_new_tokens=4, quiet=True))
    assert "Lower the learning rate" not in str(caught.value)
    assert "The weights are as they were" in str(caught.value)


@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl, jensen_shannon, total_variation])
def test_nan_never_looks_like_agreement(divergence):
    fine, broken = torch.randn(3, 5).log_softmax(-1), torch.full((3, 5), torch.nan)
    assert bool(divergence(fine, broken).isnan().all())
    assert bool(divergence(broken, fine).isnan().all())
    assert bool(entropy(broken).isnan().all())


def break_weights(policy: Policy, where: str) -> Policy:
    model = policy.weights.model
    with torch.no_grad():
        (
            model.get_output_embeddings() if where == "head" else model.model.layers[0].mlp.up_proj
        ).weight[1].fill_(torch.nan)
    return policy


@pytest.mark.parametrize("where", ["head", "layer"])
def test_a_teacher_with_nan_weights_is_named_before_any_update(
    make_policy, student, task, prompts, where
):
    teacher = break_weights(make_policy(1), where)
    run = distill(make_policy(0), teacher, task, steps=1, batch=2, max_new_tokens=4, quiet=True)
    with pytest.raises(
        NonFinite, match="log-probs of 'teacher' are NaN: its weights or its precision are broken"
    ):
        next(run)
    assert run.done == 0
    with pytest.raises(NonFinite, match="log-probs of 'teacher' are NaN"):
        score(student.sample(prompts, max_new_tokens=3), student, teacher)


def test_a_teacher_with_nan_weights_is_named_where_the_plan_alone_reads_it(make_policy, task):
    @method(plan=lambda batch: {"advantage": batch.signals["teacher_logp"]})
    def gated(rows):
        return -rows.logp * (rows.advantage > -1)

    with pytest.raises(NonFinite, match="log-probs of 'teacher' are NaN"):
        next(
            distill(
                make_policy(0),
                break_weights(make_policy(1), "layer"),
                task,
                method=gated,
                steps=1,
                batch=2,
                max_new_tokens=4,
                quiet=True,
            )
        )
