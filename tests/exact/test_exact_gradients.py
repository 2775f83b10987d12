"""The real method classes against finite differences of the objectives that their papers write
down.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from opdlab import GRPO, OPD, SequenceKD, Task, TopK, exact
from opdlab.errors import InvalidValue
from opdlab.losses import DIVERGENCES
from opdlab.losses.divergences import reverse_kl

OPTIONS = {"alpha_divergence": {"alpha": 0.3}, "generalized_jsd": {"beta": 0.9, "normalize": True}}
SHAPES = [{"vocab": 4, "length": 2, "prompts": 2}, {"vocab": 3, "length": 3, "eos": 0}]
every = pytest.mark.parametrize("shape", SHAPES, ids=["two prompts", "with eos"])


def pair(shape: dict, seed: int = 0) -> dict[str, exact.Table]:
    return {
        "student": exact.Table.random(**shape, seed=2 * seed),
        "teacher": exact.Table.random(**shape, seed=2 * seed + 1),
    }


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    assert want.norm() > 1e-2


@every
@pytest.mark.parametrize("name", DIVERGENCES)
def test_opd_descends_its_divergence_where_the_student_goes(name, shape):
    tables, options = pair(shape), OPTIONS.get(name, {})
    visits = exact.visits(tables["student"])  # of the student as it is: sampling has no gradient
    value = lambda table: (
        visits * DIVERGENCES[name](table.logp, tables["teacher"].logp, **options)
    ).sum()
    near(exact.gradient(OPD(name, options), tables), exact.differences(value, tables["student"]))


@every
@pytest.mark.parametrize("baseline", [None, "value"])
def test_returns_descend_the_divergence_of_texts(baseline, shape):
    tables = pair(shape, 1)
    rollout = exact.everything(
        tables["student"].prompts, shape["vocab"], shape["length"], eos=shape.get("eos")
    )
    theirs = exact.law(tables["teacher"], rollout)

    def value(table: exact.Table) -> torch.Tensor:
        ours = exact.law(table, rollout)
        return (ours * (ours / theirs).log()).sum()

    method = OPD(estimator="sampled", discount=1.0, baseline=baseline)
    near(exact.gradient(method, tables), exact.differences(value, tables["student"]))


@every
def test_a_coarse_support_is_the_engines_own(shape):
    tables, support = pair(shape, 2), TopK(2, by="teacher")
    visits, ids = exact.visits(tables["student"]), support.support(tables["teacher"].logp)
    coarse = lambda table: support.coarse(table.logp, ids)
    value = lambda table: (visits * reverse_kl(coarse(table), coarse(tables["teacher"]))).sum()
    near(exact.gradient(OPD(top_k=support), tables), exact.differences(value, tables["student"]))


@every
def test_others_may_write(shape):
    """Sequence KD: cross-entropy under the law of the teacher."""
    tables = pair(shape, 3)
    rollout = exact.everything(
        tables["student"].prompts, shape["vocab"], shape["length"], eos=shape.get("eos")
    )
    theirs = exact.law(tables["teacher"], rollout)
    value = lambda table: -(theirs * exact.law(table, rollout).log()).sum()
    near(
        exact.gradient(SequenceKD(), tables, writer="teacher"),
        exact.differences(value, tables["student"]),
    )


@every
def test_bare_losses_and_the_order_of_rows(shape):
    tables = pair(shape, 4)
    student = tables["student"]
    loss = lambda rows: reverse_kl(rows.student, rows.teacher)
    near(exact.gradient(loss, tables), exact.gradient(OPD(), tables))
    rollout = exact.everything(
        student.prompts, shape["vocab"], shape["length"], eos=shape.get("eos"), by=student
    )
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(0)).tolist()
    weight = exact.law(student, rollout)
    near(
        exact.gradient_on(loss, tables, rollout.select(order), weight[order]),
        exact.gradient(loss, tables),
    )


def test_many_samples_come_to_the_expectation():
    """Central limit: 4000 sampled completions give the exact gradient within 4.5 standard errors of
    every entry.
    """
    tables, n = pair({"vocab": 3, "length": 2}, 5), 4000
    student = tables["student"]
    rollout = student.sample(student.prompts, n, seed=8)
    method = OPD(estimator="sampled")
    want = exact.gradient(method, tables)
    mean = exact.gradient_on(method, tables, rollout, torch.full((n,), 1 / n, dtype=torch.float64))
    every = exact.everything(student.prompts, 3, 2, by=student)
    law = exact.law(student, every)
    one = lambda i: exact.gradient_on(
        method, tables, every.select([i]), torch.ones(1, dtype=torch.float64)
    )
    square = sum(p * one(i) ** 2 for i, p in enumerate(law.tolist()))
    error = ((square - want**2).clamp(min=0) / n).sqrt()
    assert ((mean - want).abs() <= 4.5 * error + 1e-12).all()
    assert (mean - want).abs().max() > 1e-4  # it is an estimate


def test_plans_that_compare_rows_are_summed_over_batches():
    """GRPO with two samples: half the gradient of the expected reward, by all pairs of texts (Dr.

    GRPO, no division).
    """
    tables = {"student": exact.Table.random(3, 2, seed=6)}
    student = tables["student"]
    reward = lambda text: (ord(text[0]) - 96 + (text[1] == "a")) / 4
    task = Task("letters", lambda n, seed, split: [], lambda prompt, text: reward(text))
    texts = exact.everything(student.prompts, 3, 2, by=student)
    law = exact.law(student, texts)
    total = torch.zeros_like(student.logits)
    for i in range(len(texts)):
        for j in range(len(texts)):
            rows = replace(texts.select([i, j]), n=2)
            total += exact.gradient_on(
                GRPO(scale=False), tables, rows, (law[i] * law[j] / 2).expand(2), task=task
            )
    rewards = torch.tensor([reward(text) for text in texts.texts], dtype=torch.float64)
    near(
        total,
        exact.differences(lambda table: -0.5 * (exact.law(table, texts) * rewards).sum(), student),
    )


@dataclass(frozen=True)
class Relative:
    """Reverse KL, weighted by the teacher's entropy over its mean in the step."""

    needs: ClassVar[tuple[str, ...]] = ("teacher",)

    def plan(self, batch):
        entropy = batch.signals["teacher_entropy"]
        return {"weight": entropy / batch.mean(entropy)}

    def loss(self, rows):
        return rows.weight * reverse_kl(rows.student, rows.teacher)


def relative_by_hand(tables, n):
    """The expected gradient of `Relative`, by autograd over all batches of `n` texts."""
    student, teacher = tables["student"], tables["teacher"]
    texts = exact.everything(student.prompts, 3, student.length, eos=student.eos)
    law = exact.law(student, texts).tolist()
    entropy = -(teacher.logp.exp() * teacher.logp).sum(-1)
    leaf = student.logits.clone().requires_grad_()
    logp = leaf.log_softmax(-1)
    kl = (logp.exp() * (logp - teacher.logp)).sum(-1)
    total = 0.0
    for batch in itertools.product(range(len(texts)), repeat=n):
        where = student.where(texts.select(batch))  # the prefix of every token of the batch
        weight = entropy[where] / entropy[where].mean()
        total = total + math.prod(law[i] for i in batch) * (weight * kl[where]).sum() / n
    return torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("n", [1, 2])
def test_a_batch_mean_is_that_of_each_batch_that_may_occur(n):
    tables = pair({"vocab": 3, "length": 2, "eos": 0}, 9)
    found = exact.gradient(Relative(), tables, n=n)
    near(found, relative_by_hand(tables, n))
    assert (found - exact.gradient(Relative(), tables, n=3 - n)).abs().max() > 1e-3


def test_a_plan_that_compares_texts_is_refused_without_n():
    """The plan would see every text once, likely or not: a few per cent beside the truth."""
    tables = pair({"vocab": 3, "length": 2}, 9)
    with pytest.raises(InvalidValue, match="'weight' of a text is another beside other texts"):
        exact.gradient(Relative(), tables)
    together = exact.everything(tables["student"].prompts, 3, 2, by=tables["student"])
    law = exact.law(tables["student"], together)
    want = relative_by_hand(tables, 2)
    apart = (exact.gradient_on(Relative(), tables, together, law) - want).norm() / want.norm()
    assert 0.01 < apart < 0.3


def test_large_batches_come_to_the_mean_over_the_students_tokens():
    """Many texts in one batch: `batch.mean` weighs a prefix by how often it is visited."""
    tables, many = pair({"vocab": 3, "length": 2, "eos": 0}, 9), 20_000
    student, teacher = tables["student"], tables["teacher"]
    rollout = student.sample(student.prompts, many, seed=1)
    share = torch.full((many,), 1 / many, dtype=torch.float64)
    got = exact.gradient_on(Relative(), tables, rollout, share)
    visits = exact.visits(student)
    entropy = -(teacher.logp.exp() * teacher.logp).sum(-1)
    weight = visits * entropy / ((visits * entropy).sum() / visits.sum())
    value = lambda table: (weight * reverse_kl(table.logp, teacher.logp)).sum()
    want = exact.differences(value, student)
    assert (got - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize("n", [1, 2])
def test_batches_change_nothing_for_a_plan_by_row(n):
    tables = pair({"vocab": 3, "length": 2}, 10)
    for method in (OPD(), OPD(estimator="sampled", discount=1.0)):
        near(exact.gradient(method, tables, n=n), exact.gradient(method, tables))


def test_batches_of_several_prompts():
    student, teacher = (exact.Table.random(2, 1, 2, seed=seed) for seed in (0, 1))
    tables = {"student": student, "teacher": teacher}
    near(exact.gradient(OPD(), tables, n=2), exact.gradient(OPD(), tables))
    assert exact.gradient(Relative(), tables, n=1).abs().max() > 1e-3


def test_a_group_of_grpo_is_n_completions():
    tables = {"student": exact.Table.random(3, 2, seed=6)}
    reward = lambda text: (ord(text[0]) - 96 + (text[1] == "a")) / 4
    task = Task("letters", lambda n, seed, split: [], lambda prompt, text: reward(text))
    texts = exact.everything(tables["student"].prompts, 3, 2, by=tables["student"])
    rewards = torch.tensor([reward(text) for text in texts.texts], dtype=torch.float64)
    near(
        exact.gradient(GRPO(scale=False), tables, n=2, task=task),
        exact.differences(
            lambda table: -0.5 * (exact.law(table, texts) * rewards).sum(), tables["student"]
        ),
    )
    with pytest.raises(InvalidValue, match="GRPO, whose plan compares completions"):
        exact.gradient(GRPO(), tables, task=task)


def test_sizes_of_batches_that_cannot_be():
    tables = pair({"vocab": 3, "length": 3}, 1)
    with pytest.raises(InvalidValue, match="27\\^4 batches"):
        exact.gradient(OPD(), tables, n=4)
    for n in (0, 1.5, True):
        with pytest.raises(InvalidValue):
            exact.gradient(OPD(), tables, n=n)


def test_differences_are_second_order():
    table = exact.Table.random(3, 1, seed=7)
    cubic = lambda t: (t.logits**3).sum()
    for step in (1e-1, 1e-2):  # the error of a cubic is step² itself
        torch.testing.assert_close(
            exact.differences(cubic, table, step) - 3 * table.logits**2,
            torch.full_like(table.logits, step**2),
        )
