"""Windows and transport against linear programs, dense targets, and text written token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from window_oracles import cosine_cost, greedy, made_pair, program, text, texts_of

from opdlab import Policy, Rollout
from opdlab.engine.batch import Batch
from opdlab.methods import topd, windows

# Transport: tests 1 to 5 of the paper file.


def vectors(seed: int, n: int, width: int = 6, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(
        n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


@given(seed=st.integers(0, 10**6), k=st.integers(1, 7), m=st.integers(1, 7))
def test_exact_transport_is_the_linear_program(seed, k, m):
    a, b = vectors(seed, k), vectors(seed + 1, m)
    cost = cosine_cost(a, b)
    distance, plan = topd.transport(a, b)
    assert distance == pytest.approx(program(cost), abs=1e-9)
    assert distance == pytest.approx(float((plan.numpy() * cost).sum()))
    if k == m:
        assert distance == pytest.approx(cost[linear_sum_assignment(cost)].mean())


@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 7),
    m=st.integers(1, 7),
    epsilon=st.sampled_from([None, 1.0, 0.05, 1e-3]),
)
def test_plans_keep_to_their_marginals(seed, k, m, epsilon):
    a, b = vectors(seed, k, dtype=torch.float32), vectors(seed + 1, m, dtype=torch.float32)
    distance, plan = topd.transport(a, b, epsilon)
    assert plan.shape == (k, m)
    assert torch.isfinite(plan).all()
    assert (plan >= 0).all()
    torch.testing.assert_close(
        plan.sum(1), torch.full((k,), 1 / k, dtype=torch.float64), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        plan.sum(0), torch.full((m,), 1 / m, dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert topd.transport(a, b)[0] - 1e-9 <= distance <= windows.cost(a, b).max() + 1e-9


def test_the_entropic_plan_tends_to_the_exact_one():
    a, b = vectors(0, 6), vectors(1, 6)
    best, plan = topd.transport(a, b)
    gaps = [topd.transport(a, b, e) for e in (1.0, 0.3, 0.1, 0.03, 0.01, 1e-3)]
    over = [distance - best for distance, _ in gaps]
    assert over == sorted(over, reverse=True)
    assert over[0] > 0.05
    assert over[-1] < 1e-4
    torch.testing.assert_close(gaps[-1][1], plan, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("epsilon", "sizes"), [(0.5, (4, 4)), (0.5, (3, 5)), (0.1, (4, 4))])
def test_the_entropic_plan_is_that_of_plain_sinkhorn(epsilon, sizes):
    a, b = vectors(2, sizes[0]), vectors(3, sizes[1])
    kernel = np.exp(-cosine_cost(a, b) / epsilon)
    v = np.ones(sizes[1])
    for _ in range(20_000):
        u = 1 / sizes[0] / (kernel @ v)
        v = 1 / sizes[1] / (kernel.T @ u)
    np.testing.assert_allclose(
        topd.transport(a, b, epsilon)[1].numpy(), u[:, None] * kernel * v, atol=1e-5
    )


@pytest.mark.parametrize("epsilon", [None, 0.2])
def test_symmetry_permutation_and_identity(epsilon):
    a, b = vectors(4, 5), vectors(5, 5)
    distance, plan = topd.transport(a, b, epsilon)
    back, turned = topd.transport(b, a, epsilon)
    assert back == pytest.approx(distance)
    torch.testing.assert_close(turned, plan.T, rtol=0, atol=1e-5)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved, permuted = topd.transport(a[order], b, epsilon)
    assert moved == pytest.approx(distance)
    torch.testing.assert_close(permuted, plan[order], rtol=0, atol=1e-5)  # rows are the student's
    assert topd.transport(a, a)[0] == 0.0
    assert topd.transport(a.float(), a.float()[order])[0] == 0.0


def test_a_vector_of_zeros_has_a_finite_cost():
    assert windows.cost(torch.zeros(1, 3), vectors(0, 2, 3)).tolist() == [[0.5, 0.5]]


@given(
    a=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    b=st.lists(st.integers(0, 5), min_size=4, max_size=4),
)
def test_orthogonal_tokens_make_it_one_minus_the_overlap(a, b):
    overlap = sum(min(a.count(i), b.count(i)) for i in range(6)) / 4
    assert topd.transport(torch.eye(6)[a], torch.eye(6)[b])[0] == pytest.approx(
        1 - overlap, abs=1e-12
    )
    assert windows.solve(windows.costs([a], [b], "onehot", {}))[0].item() == pytest.approx(
        1 - overlap, abs=1e-12
    )


def test_many_at_once_are_each_alone():
    pairs = [(vectors(i, 3 + i % 2), vectors(9 + i, 4)) for i in range(5)]
    for epsilon in (None, 0.3):
        distances, plans = windows.solve([windows.cost(a, b) for a, b in pairs], epsilon)
        for (a, b), distance, plan in zip(pairs, distances.tolist(), plans, strict=True):
            alone = topd.transport(a, b, epsilon)
            assert distance == pytest.approx(alone[0], abs=1e-6)
            torch.testing.assert_close(plan, alone[1], rtol=0, atol=1e-5)


# Targets: tests 6, 7, 8, 10, 11 and 12.


def dense(columns: dict[str, torch.Tensor], vocab: int = 12) -> torch.Tensor:
    """The columns' targets as `[B, T, V]`."""
    out = torch.zeros(*columns["target"].shape[:2], vocab, dtype=torch.float64)
    return out.scatter_add_(-1, columns["target"], columns["target_weight"].double())


def test_targets_by_hand():
    """Rows sum to 1/K, equal teacher tokens are one target, and nothing else is a target."""
    rollout, plan = text([0, 1, 2, 3, 4]), torch.tensor([[0.1, 0.2, 0.2], [0.3, 0.1, 0.1]])
    columns = windows.scatter(Batch(rollout, {}), [(0, 2)], [[7, 5, 7]], [plan])
    assert columns["target"].shape == (1, 5, 2)
    want = torch.zeros(1, 5, 12)
    want[0, 2, [5, 7]], want[0, 3, [5, 7]] = torch.tensor([0.2, 0.3]), torch.tensor([0.1, 0.4])
    torch.testing.assert_close(
        dense(columns), 5 * want.double()
    )  # 5 tokens: the engine divides by them


def test_overlapping_windows_add_up():
    rollout, eye = text([0, 1, 2, 3], [4, 5, 6]), torch.eye(2) / 2
    columns = windows.scatter(
        Batch(rollout, {}), [(0, 1), (0, 2), (1, 0)], [[8, 9], [9, 10], [8, 8]], [eye] * 3
    )
    want = torch.zeros(2, 4, 12)
    want[0, 1, 8] = want[0, 3, 10] = want[1, 0, 8] = want[1, 1, 8] = 1 / 6
    want[0, 2, 9] = 2 / 6
    torch.testing.assert_close(dense(columns), 7 * want.double())


def test_the_loss_is_the_kl_to_the_targets_up_to_their_entropy():
    """And the printed form, with targets of mass 1/K, has its gradient divided by K: value relation
    and gradient by autograd.
    """
    g, k = torch.Generator().manual_seed(0), 4
    a, b = vectors(0, k), vectors(1, k)
    taught = [3, 5, 3, 8]
    plan = topd.transport(a, b, 0.5)[1]
    ideal = k * torch.zeros(k, 12, dtype=torch.float64).index_add_(1, torch.tensor(taught), plan)
    torch.testing.assert_close(ideal.sum(1), torch.ones(k).double())
    logits = torch.randn(k, 12, generator=g, dtype=torch.float64).requires_grad_()
    logp = logits.log_softmax(-1)
    kl = torch.special.xlogy(ideal, ideal).sum() - (ideal * logp).sum()
    literal = torch.special.xlogy(ideal / k, ideal / k).sum() - (ideal / k * logp).sum()
    assert literal.item() == pytest.approx((kl.item() - k * math.log(k)) / k)
    columns = windows.scatter(Batch(text([0, 1, 2, 3]), {}), [(0, 0)], [taught], [plan])
    ours = -(columns["target_weight"][0] * logp.gather(-1, columns["target"][0])).sum(-1).mean()
    entropy = -torch.special.xlogy(ideal, ideal).sum() / k
    assert ours.item() == pytest.approx((kl / k + entropy).item())
    slopes = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (kl / k, literal, ours)]
    torch.testing.assert_close(slopes[1], slopes[0])
    torch.testing.assert_close(slopes[2], slopes[0])
    torch.testing.assert_close(slopes[0], (logp.exp() - ideal).detach() / k)


def test_agreement_is_the_likelihood_of_the_own_tokens():
    """Not zero: without the gate the term would sharpen the student."""
    own = [4, 7, 2, 9]
    plan = topd.transport(torch.eye(12)[own], torch.eye(12)[own])[1]
    columns = windows.scatter(Batch(text(own), {}), [(0, 0)], [own], [plan])
    torch.testing.assert_close(dense(columns)[0], torch.eye(12, dtype=torch.float64)[own])


def test_an_inserted_token_is_nearly_no_distance_and_teaches_the_own_tokens():
    """The pathology of the method: the teacher opens a bracket, and every place but the last is
    told what it already says.
    """
    student, teacher = [1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7]
    distance, plan = topd.transport(torch.eye(12)[student], torch.eye(12)[teacher])
    assert distance == pytest.approx(1 / 8)
    targets = dense(windows.scatter(Batch(text(student), {}), [(0, 0)], [teacher], [plan]))[0]
    assert targets.argmax(-1).tolist() == [*student[:-1], 0]
    entropic = topd.transport(torch.eye(12)[student], torch.eye(12)[teacher], 0.05)[1]
    assert (8 * entropic).gather(1, torch.arange(1, 8).repeat(8, 1)).diagonal().min() > 0.99


# Where windows are, and what is in them: test 14.


@pytest.fixture(scope="module")
def pair(make_policy, make_tokenizer) -> dict[str, Policy]:
    return made_pair(make_policy, make_tokenizer)


@pytest.fixture(scope="module")
def written(pair) -> Rollout:
    return texts_of(pair["student"])


@pytest.fixture(scope="module")
def points(written, pair) -> list[windows.Point]:
    return [tuple(p) for p in windows.room(pair["student"], written, 4).nonzero().tolist()]


def test_windows_go_on_from_exactly_the_prefix(pair, written, points):
    got = windows.write(pair["teacher"], written, points, 4)
    want = [
        greedy(pair["teacher"], written.prompts[b], written.ids[b, :t].tolist(), 4)
        for b, t in points
    ]
    assert got == want
    assert len(points) > 20
    assert any(len(w) < 4 for w in want)  # the teacher may end its text
    own = windows.slices(written, points, 4)
    assert all(
        w[0] == int(written.ids[p]) and len(w) == 4 for w, p in zip(own, points, strict=True)
    )
    assert windows.write(pair["teacher"], written, [], 4) == []
    short = int(written.lengths.argmin())
    assert windows.slices(written, [(short, 1)], 50) == [
        written.completions()[short][1:]
    ]  # never padding


def test_like_prefixes_are_written_once_and_in_passes_of_bounded_size(
    pair, written, points, monkeypatch
):
    asked = []
    sample = Policy.sample
    monkeypatch.setattr(
        Policy,
        "sample",
        lambda self, prompts, **o: asked.append(len(prompts)) or sample(self, prompts, **o),
    )
    want = windows.write(pair["teacher"], written, points, 4)
    assert asked == [
        len({(written.prompts[b].id, *written.ids[b, :t].tolist()) for b, t in points})
    ]
    assert asked[0] < len(points)  # position 0 of four samples is one prefix
    asked.clear()
    monkeypatch.setattr(windows, "TOKENS_PER_PASS", 50)
    assert windows.write(pair["teacher"], written, points, 4) == want
    assert len(asked) > 5


def test_no_window_at_special_tokens_or_past_the_end(pair, written):
    room = windows.room(pair["student"], written, 4)
    special = {0, 1, 2}
    for b, body in enumerate(written.completions()):
        assert room[b].nonzero()[:, 0].tolist() == [
            t for t in range(len(body) - 3) if body[t] not in special
        ]
    assert any(i in special for body in written.completions() for i in body[:-1])


def test_a_share_is_rounded_up_and_not_by_rounding_errors():
    assert windows.quota(torch.tensor([0, 1, 30, 31, 9688]), 0.1) == [0, 1, 3, 4, 969]
    assert 0.07 * 100 > 7
    assert windows.quota(torch.tensor([100]), 0.07) == [7]
    assert windows.quota(torch.tensor([9688]), 0.0225) == [218]  # the paper's 218 points
