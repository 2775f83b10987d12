"""Laws and visits against the loops that define them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from opdlab import exact
from opdlab.losses import Generator, forward_kl, reverse_kl, total_variation

WORLDS = [{}, {"eos": 2}]
every = pytest.mark.parametrize("world", WORLDS, ids=["fixed length", "with eos"])


def chance(table: exact.Table, x: int, body: list[int]) -> float:
    """Product of next-token probabilities, one exponential after another."""
    out = 1.0
    for t, token in enumerate(body):
        logits = table.logits[x, table.start(body[:t])].tolist()
        out *= math.exp(logits[token]) / sum(map(math.exp, logits))
    return out


@every
def test_the_law_is_a_product_and_sums_to_one(world):
    table = exact.Table.random(3, 3, 2, seed=1, **world)
    rollout = exact.everything(table.prompts, 3, 3, eos=table.eos)
    got = exact.law(table, rollout)
    want = [
        chance(table, table.place(p), body)
        for p, body in zip(rollout.prompts, rollout.completions(), strict=True)
    ]
    assert got.tolist() == pytest.approx(want, abs=1e-14)
    assert got.view(2, -1).sum(1).tolist() == pytest.approx([1, 1], abs=1e-14)


@every
def test_visits_are_the_marginals_of_the_law(world):
    table = exact.Table.random(3, 3, 2, seed=2, **world)
    rollout = exact.everything(table.prompts, 3, 3, eos=table.eos)
    want = torch.zeros(2, 13, dtype=torch.float64)
    for prompt, body, p in zip(
        rollout.prompts, rollout.completions(), exact.law(table, rollout).tolist(), strict=True
    ):
        for t in range(len(body)):
            want[table.place(prompt), table.start(body[:t])] += p
    torch.testing.assert_close(exact.visits(table), want)
    if table.eos is None:
        assert [want[0, a:b].sum().item() for a, b in ((0, 1), (1, 4), (4, 13))] == pytest.approx(
            [1, 1, 1]
        )


def test_visits_of_longer_texts():
    table = exact.Table.random(2, 5, seed=2)
    want = [
        chance(table, 0, list(p)) for t in range(5) for p in itertools.product(range(2), repeat=t)
    ]
    assert exact.visits(table)[0].tolist() == pytest.approx(want, abs=1e-14)


@every
def test_expectations(world):
    table = exact.Table.random(3, 3, 2, seed=3, **world)
    ones = exact.expectation(table, lambda rollout: torch.ones(len(rollout), dtype=torch.float64))
    assert ones.tolist() == pytest.approx([1, 1])
    length = exact.expectation(table, lambda rollout: rollout.lengths.double())
    torch.testing.assert_close(length, exact.visits(table).sum(1))
    both = exact.expectation(
        table, lambda rollout: torch.stack([rollout.lengths.double(), rollout.logp.sum(1)], 1)
    )
    torch.testing.assert_close(both[:, 0], length)
    logp = table.logp
    entropy = -(exact.visits(table) * (logp.exp() * logp).sum(-1)).sum(1)
    torch.testing.assert_close(both[:, 1], -entropy)  # entropy of a text = what its steps add up to


@every
def test_all_are_differentiable_in_the_logits(world):
    table = exact.Table.random(3, 2, seed=4, **world)
    logits = table.logits.clone().requires_grad_()
    live = exact.Table(logits, table.prompts, 2, table.eos)
    rollout = exact.everything(table.prompts, 3, 2, eos=table.eos)
    values = torch.arange(len(rollout), dtype=torch.float64)
    (got,) = torch.autograd.grad(exact.expectation(live, lambda _: values).sum(), logits)
    want = exact.differences(lambda t: (exact.law(t, rollout) * values).sum(), table)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    (got,) = torch.autograd.grad((exact.visits(live) * torch.arange(4)).sum(), logits)
    torch.testing.assert_close(
        got,
        exact.differences(lambda t: (exact.visits(t) * torch.arange(4)).sum(), table),
        rtol=1e-7,
        atol=1e-9,
    )


@every
def test_chain_rules(world):
    """What tokens add up to (f-DISTILL, arXiv 2307.15190): reverse KL on the student's prefixes and
    forward KL on the teacher's are those of whole texts; the rest are not, and total variation
    is a bound.
    """
    student, teacher = (exact.Table.random(3, 3, seed=s, **world) for s in (5, 6))
    rollout = exact.everything(student.prompts, 3, 3, eos=student.eos)
    p, q = exact.law(student, rollout).log(), exact.law(teacher, rollout).log()
    tokens = lambda divergence, where: (
        (exact.visits(where) * divergence(student.logp, teacher.logp)).sum().item()
    )
    assert tokens(reverse_kl, student) == pytest.approx(reverse_kl(p, q).item())
    assert tokens(forward_kl, teacher) == pytest.approx(forward_kl(p, q).item())
    assert abs(tokens(forward_kl, student) - forward_kl(p, q).item()) > 0.01
    jsd = Generator("jensen_shannon").divergence
    assert abs(tokens(jsd, student) - jsd(p, q).item()) > 0.01
    both = (tokens(total_variation, student) + tokens(total_variation, teacher)) / 2
    assert 0 < total_variation(p, q).item() <= both


@every
def test_expected_divergences_along_a_text_are_less_noisy_than_its_log_ratio(world):
    """Both are unbiased for the KL of whole texts; the sum of KLs at the prefixes varies less
    (arXiv 2504.10637).
    """
    student, teacher = (exact.Table.random(3, 3, seed=s, **world) for s in (7, 8))
    rollout = exact.everything(student.prompts, 3, 3, eos=student.eos)
    p, q = exact.law(student, rollout), exact.law(teacher, rollout)
    each = reverse_kl(student.logp, teacher.logp)[student.where(rollout)]
    assert (each >= 0).all()
    along = (
        torch.zeros(rollout.ids.shape, dtype=torch.float64)
        .masked_scatter(rollout.mask, each)
        .sum(1)
    )
    sampled = (p / q).log()
    mean = lambda value: (p * value).sum().item()
    assert (
        mean(along)
        == pytest.approx(mean(sampled))
        == pytest.approx((p * (p / q).log()).sum().item())
    )
    assert mean(along**2) < 0.8 * mean(sampled**2)
