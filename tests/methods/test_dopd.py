"""DOPD against a naive float64 copy of its definition, closed forms, the tabular world, and real models with hints."""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import opdlab as opd
from opdlab import DOPD, Task, exact
from opdlab.batch import Batch
from opdlab.divergence import reverse_kl
from opdlab.exact import privilege
from opdlab.methods.dopd import Route, gap, route, thresholds
from opdlab.rows import Rows, States, compute, gradient

LH, LL, HT, HS = Route
T, S = "teacher+hint", "student+hint"
LN2 = math.log(2)


def sampled(seed: int, n: int = 60, scale: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of `n` sampled tokens under the hinted teacher and student."""
    g = torch.Generator().manual_seed(seed)
    return tuple(-scale * torch.rand(n, generator=g, dtype=torch.float64) ** 2 - 1e-3 for _ in range(2))


def naive_route(lt, ls, mask, trim: float = 0.05) -> list[int]:
    """The definition, token by token."""
    lt, ls, mask = (x.tolist() for x in (lt, ls, mask))
    a = [abs(x - y) for x, y, m in zip(lt, ls, mask, strict=True) if m]
    kept = [i for i, x in enumerate(a) if x <= np.quantile(a, 1 - trim)]
    q = [(math.exp(x), math.exp(y)) for x, y, m in zip(lt, ls, mask, strict=True) if m]
    mean, sure = np.mean([a[i] for i in kept]), np.mean([q[i][0] for i in kept]) + np.mean([q[i][1] for i in kept])
    found = [((0 if sum(p) >= sure else 1) if x < mean else 2 if p[0] >= p[1] else 3) for x, p in zip(a, q, strict=True)]
    return [found.pop(0) if m else -1 for m in mask]


# Routing: properties 1 to 5.


@given(seed=st.integers(0, 10**6), n=st.integers(1, 80), trim=st.sampled_from([0.0, 0.05, 0.3]))
def test_routes_are_the_definition_and_partition_the_tokens(seed, n, trim):
    lt, ls = sampled(seed, n)
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.8
    got = route(lt, ls, mask, trim)
    assert got.dtype == torch.int64
    assert (got[~mask] == -1).all()
    assert set(got[mask].tolist()) <= set(Route)
    if mask.any():
        assert got.tolist() == naive_route(lt, ls, mask, trim)


@given(seed=st.integers(0, 10**6))
def test_padding_enters_nothing(seed):
    lt, ls = sampled(seed, 20)
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[:, :5] = True
    for garbage in (0.0, -1e9, math.nan, -math.inf):
        wide = [torch.full((4, 9), garbage, dtype=torch.float64).masked_scatter(mask, x) for x in (lt, ls)]
        assert thresholds(*wide, mask) == thresholds(lt, ls, torch.ones(20, dtype=torch.bool))
        assert torch.equal(route(*wide, mask)[mask], route(lt, ls, torch.ones(20, dtype=torch.bool)))


def test_ties_go_to_high_to_confident_and_to_the_teacher():
    """Two gaps of ½ and one of 1 and of 0 each: the mean is ½. Powers of two, so that equal is equal."""
    lt, ls = torch.tensor([-1.0, -0.5, -1.0, -2.0]), torch.tensor([-0.5, -1.0, -2.0, -2.0])
    mask = torch.ones(4, dtype=torch.bool)
    assert thresholds(lt, ls, mask, trim=0)[0] == 0.5
    assert route(lt, ls, mask, trim=0).tolist() == [HS, HT, HT, LL]
    half = torch.full((4,), 0.5).log()
    uneven = torch.tensor([0.25, 0.75, 0.5, 0.5]).log()
    found = route(half, half.clone(), mask, limits=(1.0, 2 * half[0].double().exp().item()))
    assert found.tolist() == [LH] * 4  # all gaps below 1, the sum of both exactly the mean
    assert route(half, half.clone(), mask).tolist() == [HT] * 4  # no gap at all is not below the mean gap, and q_T = q_S
    assert route(uneven, half, mask, limits=(0.0, 0.0)).tolist() == [HS, HT, HT, HT]


@pytest.mark.parametrize("equal", [0.1, 0.3, 1.1, 2.7])
def test_equal_gaps_are_all_high_whatever_the_rounding(equal):
    above = 0  # how often a bare mean would exceed its equal values
    for n in range(1, 60):
        unsure, mask = torch.full((n,), -equal, dtype=torch.float64), torch.ones(n, dtype=torch.bool)
        sure = torch.zeros_like(unsure)
        above += unsure.abs().mean().item() > equal
        assert route(sure, unsure, mask).tolist() == [HT] * n
        assert route(unsure, sure, mask).tolist() == [HS] * n
    assert above


@given(seed=st.integers(0, 10**6))
def test_swapping_the_sides_swaps_who_leads(seed):
    lt, ls = sampled(seed)
    mask = torch.ones(60, dtype=torch.bool)
    assert (gap(lt, ls) >= 0).all()
    assert torch.equal(gap(lt, ls), gap(ls, lt))
    swap = torch.tensor([LH, LL, HS, HT])
    assert torch.equal(route(ls, lt, mask), swap[route(lt, ls, mask)])


@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 10))
def test_the_unit_of_the_gap_does_not_matter(seed, scale):
    lt, ls = sampled(seed)
    mask = torch.ones(60, dtype=torch.bool)
    merged = torch.tensor([LL, LL, HT, HS])  # confidence is not a matter of the gap
    assert torch.equal(merged[route(scale * lt, scale * ls, mask)], merged[route(lt, ls, mask)])


def test_means_are_those_of_the_whole_batch():
    lt, ls = sampled(3)
    mask = torch.ones(60, dtype=torch.bool)
    whole = route(lt, ls, mask)
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(route(lt[shuffled], ls[shuffled], mask), whole[shuffled])
    limits = thresholds(lt, ls, mask)
    halves = [route(lt[i : i + 30], ls[i : i + 30], mask[:30], limits=limits) for i in (0, 30)]
    assert torch.equal(torch.cat(halves), whole)
    order = gap(lt, ls).argsort()  # a part of small gaps only has another mean
    assert not torch.equal(route(lt[order[:30]], ls[order[:30]], mask[:30]), whole[order[:30]])


def test_an_outlier_moves_no_mean_and_is_still_routed():
    lt, ls = sampled(4, 100)
    mask = torch.ones(100, dtype=torch.bool)
    worst = int(gap(lt, ls).argmax())
    before, limits = route(lt, ls, mask), thresholds(lt, ls, mask)
    lt[worst] = -1e6
    assert thresholds(lt, ls, mask)[0] == pytest.approx(limits[0], rel=1e-12)
    assert thresholds(lt, ls, mask, trim=0)[0] > 1e3
    after = route(lt, ls, mask)
    assert after[worst] == HS
    others = torch.arange(100) != worst
    assert torch.equal(after[others], before[others])
    lt[worst] = -math.inf
    assert torch.equal(route(lt, ls, mask), after)


def test_tokens_that_both_rule_out_have_no_gap():
    none = torch.tensor([-math.inf, -1.0, -2.0])
    assert gap(none, none).tolist() == [0, 0, 0]
    assert route(none, torch.tensor([-math.inf, -1.5, -2.0]), torch.ones(3, dtype=torch.bool), trim=0).tolist() == [LL, HT, LL]


def test_no_tokens_have_no_routes():
    none = torch.zeros(2, 0)
    assert route(none, none, none.bool()).shape == (2, 0)
    assert route(torch.zeros(3), torch.zeros(3), torch.zeros(3, dtype=torch.bool)).tolist() == [-1] * 3


# Losses: properties 6 to 10.


def tables(vocab: int = 6, length: int = 3, seed: int = 0, **scales: float) -> dict[str, exact.Table]:
    names = ("student", T, S)
    return {name: exact.Table.random(vocab, length, 2, seed=3 * seed + i, scale=scales.get(name, 1.5)) for i, name in enumerate(names)}


def naive_kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * (a.log() - b.log())).sum()


def naive_loss(kind: int, s, t, anchor, k: int, weights=(0.6, 0.3, 1.0, 0.6)) -> torch.Tensor:
    """One token's loss from probabilities `[V]`, as the table of regimes has it."""

    def top_k(target):
        ids = sorted(range(len(s)), key=lambda i: -s[i].item())[:k]
        rest = [i for i in range(len(s)) if i not in ids]
        fold = lambda p: torch.stack([*(p[i] for i in ids), *([sum(p[i] for i in rest)] if rest else [])])
        return naive_kl(fold(s), fold(target))

    m = (s + t) / 2
    value = [lambda: top_k(t), lambda: top_k(anchor), lambda: (naive_kl(t, m) + naive_kl(s, m)) / 2, lambda: top_k(anchor)]
    return weights[kind] * value[kind]()


def naive_dopd(policies, rollout, logits, k: int, routes) -> torch.Tensor:
    """Loss of each token of the rollout, in order, differentiable in the student's `logits [X, S, V]` alone."""
    where = policies["student"].where(rollout)
    p = [logits[where].softmax(-1), *(policies[name].logits[where].softmax(-1) for name in (T, S))]
    return torch.stack([naive_loss(r, *(x[i] for x in p), k) for i, r in enumerate(routes)])


@pytest.mark.parametrize("k", [2, 5, 6, 128])
@pytest.mark.parametrize("seed", range(3))
def test_plan_and_loss_through_the_engine_are_the_definition(seed, k):
    """Values and gradients on sampled completions of toy tables, with all four regimes at once."""
    policies = tables(seed=seed)
    rollout = policies["student"].sample(policies["student"].prompts, n=8, seed=seed)
    weight = torch.rand(len(rollout), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    where = policies["student"].where(rollout)
    lt, ls = (policies[name].logp[where].gather(-1, rollout.ids[rollout.mask][:, None])[:, 0] for name in (T, S))
    routes = naive_route(lt, ls, torch.ones(len(lt), dtype=torch.bool))
    assert set(routes) == set(Route)

    batch = Batch(rollout, policies)
    plan = DOPD(k=k).plan(batch)
    assert plan["route"][batch.mask].tolist() == routes
    torch.testing.assert_close(plan["gap"][batch.mask], (lt - ls).abs())
    assert batch.notes["thresholds"]["gap"] == pytest.approx(thresholds(lt, ls, torch.ones(len(lt), dtype=torch.bool))[0])

    logits = policies["student"].logits.clone().requires_grad_()
    value = naive_dopd(policies, rollout, logits, k, routes)
    (want,) = torch.autograd.grad((value * weight.repeat_interleave(rollout.lengths)).sum(), logits)
    got = exact.gradient_on(DOPD(k=k), policies, rollout, weight)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    states = {name: batch.states(name) for name in policies}
    columns = {name: batch.flat(name, column) for name, column in plan.items()}
    torch.testing.assert_close(compute(DOPD(k=k).loss, states, batch.token, columns), value.detach(), rtol=1e-6, atol=1e-8)


def rows(seed: int = 0, n: int = 12, vocab: int = 9, scale: float = 1.5, routes=None) -> tuple[Rows, torch.Tensor]:
    """Random rows and the student's logits; all of one regime, or of given ones."""
    g = torch.Generator().manual_seed(seed)
    s, t, a = (scale * torch.randn(n, vocab, generator=g, dtype=torch.float64) for _ in range(3))
    s.requires_grad_()
    routes = torch.randint(0, 4, (n,), generator=g) if routes is None else torch.full((n,), routes)
    logp = {"student": s.log_softmax(-1), T: t.log_softmax(-1), S: a.log_softmax(-1)}
    return Rows(logp, torch.randint(0, vocab, (n,), generator=g), {"route": routes}), s


@pytest.mark.parametrize("kind", list(Route))
def test_one_regime_alone_has_its_weight_and_its_divergence(kind):
    r, _ = rows(routes=int(kind))
    weights = (0.125, 0.75, 1.0, 0.125)
    got = DOPD(light=0.125, weak=0.75, k=4).loss(r)
    for i in range(len(r)):
        s, t, a = (r[name][i].exp() for name in ("student", T, S))
        assert got[i].item() == pytest.approx(naive_loss(kind, s, t, a, 4, weights).item(), rel=1e-9)
    paper = DOPD(k=4).loss(r) / got
    torch.testing.assert_close(paper, torch.full_like(paper, (0.6 / 0.125, 0.3 / 0.75, 1.0, 0.6 / 0.125)[kind]))


def test_the_defaults_are_the_papers():
    m = DOPD()
    assert (m.light, m.weak, m.k, m.trim, m.adaptive, m.hs, m.gap_student) == (0.6, 0.3, 128, 0.05, True, "self", "privileged")
    assert m.needs == ("teacher+hint", "student+hint")
    assert m.recipe == {"normalize": "sequence"}
    assert [DOPD(anchor=a).needs[1] for a in ("live", "frozen", "ema")] == ["student+hint", "reference+hint", "ema+hint"]


@pytest.mark.parametrize("kind", list(Route))
def test_gradients_in_closed_form(kind):
    r, logits = rows(routes=int(kind))
    (got,) = torch.autograd.grad(DOPD(light=1, weak=1).loss(r).sum(), logits)
    s, target = r["student"].exp().detach(), r[T if kind in (LH, HT) else S]
    other = ((s + target.exp()) / 2).log() if kind == HT else target
    kl = (s * (s.log() - other)).sum(-1, keepdim=True)
    torch.testing.assert_close(got, (0.5 if kind == HT else 1) * s * (s.log() - other - kl))


def test_no_gradient_reaches_a_target_or_a_route(make_policy, make_tokenizer):
    """Teacher, student and hinted student on trainable float64 weights, the last two on the same ones."""
    student, teacher = (make_policy(seed, make_tokenizer(), dtype=torch.float64) for seed in (0, 1))
    for policy in (student, teacher):
        policy.weights.model.requires_grad_(True)
    prompts = [opd.Prompt("a b", hint="c"), opd.Prompt("b c", hint="d e f a a")]
    rollout = opd.rollout.written(student, prompts * 2, ["c d e f", "b a", "f f", "a e c"])
    policies = {"student": student, T: teacher.seeing(), S: student.seeing()}
    batch = Batch(rollout, policies)
    columns = {name: batch.flat(name, c) for name, c in DOPD(k=4).plan(batch).items()}
    hidden = student.hidden(rollout)
    states = {"student": States(hidden, student.weights.head), T: batch.states(T), S: batch.states(S)}
    hidden.backward(gradient(DOPD(k=4).loss, states, batch.token, torch.ones(rollout.tokens), columns).gradient)
    got = [p.grad.clone() for p in student.weights.model.parameters()]
    assert all(p.grad is None for p in teacher.weights.model.parameters())

    head = student.weights.head
    p = head(student.hidden(rollout)).softmax(-1)
    with torch.no_grad():
        t, still = policies[T].log_probs(rollout).exp(), policies[S].log_probs(rollout).exp()
    moving = head(policies[S].hidden(rollout)).softmax(-1)
    value = lambda anchor: torch.stack([naive_loss(k, p[i], t[i], anchor[i], 4) for i, k in enumerate(columns["route"].tolist())]).sum()
    assert set(columns["route"].tolist()) == set(Route)
    want, wrong = (torch.autograd.grad(value(a), list(student.weights.model.parameters()), retain_graph=True) for a in (still, moving))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert any((a - b).norm() > 0.1 * b.norm() for a, b in zip(wrong, want, strict=True))  # the test can tell


def test_without_a_hint_the_student_has_nothing_to_tell_itself():
    """p changes nothing: the student's own regimes have no value and no gradient."""
    policies = tables()
    policies[S] = policies["student"]
    rollout = policies["student"].sample(policies["student"].prompts, n=8)
    routes = DOPD().plan(Batch(rollout, policies))["route"]
    own = (routes == LL) | (routes == HS)
    assert own.any(1).any()
    for method in (DOPD(), DOPD(k=3)):
        batch = Batch(rollout, policies)
        states, columns = {n: batch.states(n) for n in policies}, {"route": routes[batch.mask]}
        result = gradient(method.loss, states, batch.token, torch.ones(rollout.tokens, dtype=torch.float64), columns)
        assert result.loss[own[batch.mask]].abs().max() < 1e-12
        assert result.gradient[own[batch.mask]].abs().max() < 1e-12
        assert (result.loss[~own[batch.mask]] > 1e-3).all()


def test_a_student_as_its_own_teacher_is_all_ht():
    policies = tables()
    policies[T] = policies[S]
    rollout = policies["student"].sample(policies["student"].prompts, n=8)
    batch = Batch(rollout, policies)
    plan = DOPD().plan(batch)
    assert (plan["route"][batch.mask] == HT).all()
    got = exact.gradient_on(DOPD(), policies, rollout, torch.ones(len(rollout), dtype=torch.float64))
    opsd = {"student": policies["student"], "reference+hint": policies[S]}
    want = exact.gradient_on(opd.SelfDistillation.opsd(), opsd, rollout, torch.ones(len(rollout), dtype=torch.float64))
    torch.testing.assert_close(got, want)
    assert want.norm() > 0.1


@pytest.mark.parametrize("kind", list(Route))
def test_extreme_logits_stay_finite(kind):
    big = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    s = big.clone().requires_grad_()
    target = big.flip(0).log_softmax(-1)
    value = DOPD(k=2).loss(
        Rows({"student": s.log_softmax(-1), T: target, S: target}, torch.zeros(2).long(), {"route": torch.full((2,), kind)})
    )
    (slope,) = torch.autograd.grad(value.sum(), s)
    assert torch.isfinite(value).all()
    assert torch.isfinite(slope).all()
    if kind == HT:
        assert value.tolist() == pytest.approx([LN2, LN2], rel=1e-6)


@given(seed=st.integers(0, 10**6))
def test_the_top_k_kl_is_a_growing_lower_bound(seed):
    r, _ = rows(seed, routes=int(LH))
    full = reverse_kl(r["student"], r[T]).detach()
    values = [DOPD(light=1, k=k).loss(r).detach() for k in range(1, 11)]
    for small, large in pairwise(values):
        assert (large >= small - 1e-12).all()
    assert (values[0] >= 0).all()
    assert (values[0] < full).any()
    for k in (8, 9, 10):  # V - 1 tokens and the bucket, V, and more than there are
        torch.testing.assert_close(values[k - 1], full)


def test_options_of_the_top_k():
    r, _ = rows(routes=int(LH), seed=1)
    s, t = r["student"].detach(), r[T]
    ids = t.topk(3).indices  # the target's support instead of the student's
    fold = lambda x: torch.cat([x.gather(-1, ids), (1 - x.exp().gather(-1, ids).sum(-1, keepdim=True)).log()], -1)
    torch.testing.assert_close(DOPD(light=1, k=3, support="teacher").loss(r).detach(), reverse_kl(fold(s), fold(t)))
    ids = s.topk(3).indices
    again = lambda x: x.gather(-1, ids).log_softmax(-1)
    torch.testing.assert_close(DOPD(light=1, k=3, tail="renormalize").loss(r).detach(), reverse_kl(again(s), again(t)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dropped = DOPD(light=1, k=1, support="teacher", tail="drop").loss(r).detach()
    assert (dropped < 0).any()  # what the bucket is there to prevent
    anchored, _ = rows(routes=int(LL), seed=1)
    ids = anchored[S].topk(3).indices
    torch.testing.assert_close(DOPD(weak=1, k=3, support="teacher").loss(anchored).detach(), reverse_kl(fold(s), fold(anchored[S])))


# The switches.


def test_what_hs_may_do():
    r, logits = rows(routes=int(HS))
    as_ht, _ = rows(routes=int(HT))
    torch.testing.assert_close(DOPD(hs="teacher").loss(r), DOPD().loss(as_ht))
    nothing = DOPD(hs="none").loss(r)
    assert nothing.abs().max() == 0
    (slope,) = torch.autograd.grad(nothing.sum(), logits)
    assert slope.abs().max() == 0
    mixed, _ = rows(seed=2)
    hs = mixed.route == HS
    assert 0 < hs.sum() < len(mixed)
    assert torch.equal(DOPD(hs="none").loss(mixed)[~hs], DOPD().loss(mixed)[~hs])


def test_not_adaptive_is_uniform_privileged_opd():
    r, _ = rows(seed=2)
    torch.testing.assert_close(DOPD(adaptive=False).loss(r), reverse_kl(r["student"], r[T]))
    policies = tables()
    rollout = policies["student"].sample(policies["student"].prompts, n=4)
    assert torch.equal(DOPD(adaptive=False).plan(Batch(rollout, policies))["route"], DOPD().plan(Batch(rollout, policies))["route"])


def test_weights_of_zero_are_no_loss_even_where_it_would_be_infinite():
    r, _ = rows(routes=int(LH))
    r.distributions[T] = r[T].masked_fill(torch.arange(9) == 0, -math.inf)
    assert DOPD().loss(r).isinf().all()
    assert DOPD(light=0).loss(r).abs().max() == 0


def test_the_route_sees_sampled_tokens_only():
    policies = tables(length=1)
    rollout = policies["student"].sample(policies["student"].prompts, n=8)
    token = rollout.ids[:, 0]
    before = DOPD().plan(Batch(rollout, policies))
    logits = policies[T].logp.clone()
    for x in range(2):  # rotate the teacher's probabilities of tokens that nobody sampled
        free = [i for i in range(6) if i not in token[rollout.n * x :][: rollout.n].tolist()]
        assert len(free) >= 2
        logits[x, 0, free] = logits[x, 0, free[1:] + free[:1]]
    after = DOPD().plan(Batch(rollout, policies | {T: replace(policies[T], logits=logits)}))
    assert not torch.equal(logits, policies[T].logp)
    torch.testing.assert_close(after["gap"], before["gap"])
    assert torch.equal(after["route"], before["route"])


@pytest.mark.parametrize(("settings", "says"), [
    ({"anchor": "base"}, "DOPD got anchor='base'. Use one of live, frozen, ema"),
    ({"hs": "both"}, "hs='both'. Use one of self, teacher, none"),
    ({"support": "union"}, "support='union'. Use one of student, teacher"),
    ({"gap_student": "hinted"}, "gap_student='hinted'. Use one of privileged, bare"),
    ({"tail": "cut"}, "tail='cut'"), ({"k": 0}, "k=0"), ({"light": -1}, "light=-1"), ({"weak": math.nan}, "weak=nan"),
    ({"trim": 1.0}, "trim=1.0. Use weights of at least 0 and a share to trim"),
])  # fmt: skip
def test_bad_settings_are_refused_at_once(settings, says):
    with pytest.raises(ValueError, match=says):
        DOPD(**settings)


# The tabular world: what the routes and the known error do to each type of token.

WORLD = privilege.World()
KIND, HINT, TOKEN = WORLD.tokens()
ALL = torch.ones(len(KIND), dtype=torch.bool)
SEEN = {name: WORLD.logp(name)[KIND, HINT, TOKEN] for name in privilege.POLICIES}
RIGHT, ACCEPTED, LIKED = 0.95, 0.1, 0.9 - 14 * 0.05 / 15

# Shares of LH, LL, HT and HS among the tokens of each type; in the world these are probabilities of right and wrong tokens.
LITERAL = {
    "E": (RIGHT, 1 - RIGHT, 0, 0), "C": (0, 0, 0.4, 0.6), "I": (1 / 16, 15 / 16, 0, 0), "B": (0, 0, 1 / 16, 15 / 16),
    "D": (0, 0, 0.4, 0.6), "X": (0, 1, 0, 0), "R": (0, 1 - LIKED - ACCEPTED, ACCEPTED, LIKED),
}  # fmt: skip
BARE = LITERAL | {"C": (0.4, 0, 0, 0.6), "D": (0.4, 0, 0, 0.6), "I": (0, 0, 1 / 16, 15 / 16)}


def shares(routes: torch.Tensor) -> dict[str, tuple[float, ...]]:
    return {kind: tuple((routes[i == KIND] == r).double().mean().item() for r in Route) for i, kind in enumerate(privilege.TYPES)}


@pytest.mark.parametrize(("student", "golden"), [(S, LITERAL), ("student", BARE)], ids=["literal", "bare"])
def test_routes_by_type_of_token(student, golden):
    found = shares(route(SEEN[T], SEEN[student], ALL))
    for kind, want in golden.items():
        assert found[kind] == pytest.approx(want, abs=1e-9), kind


def test_thresholds_of_the_world_by_hand():
    """Means over what is left when the largest 5 % are trimmed: all of B and most of the student's own taste are gone."""
    log = math.log
    gaps = sorted(
        [(x, p * share / 20) for share, parts in (
            (8, [(0, 1)]), (5, [(0, 1)]),  # E; I and X
            (4, [(log(0.95 / 0.4), 0.4), (log(0.04 / (0.05 / 15)), 0.6)]),  # C and D
            (1, [(log(0.95 / 0.4), 1 / 16), (log(0.04 / (0.05 / 15)), 15 / 16)]),  # B
            (2, [(log(LIKED / ACCEPTED), LIKED + ACCEPTED), (0, 1 - LIKED - ACCEPTED)]),  # R
        ) for x, p in parts])  # fmt: skip
    last = next(x for i, (x, _) in enumerate(gaps) if sum(p for _, p in gaps[: i + 1]) >= 0.95)
    kept = [(x, p) for x, p in gaps if x <= last]
    want = sum(x * p for x, p in kept) / sum(p for _, p in kept)
    assert thresholds(SEEN[T], SEEN[S], ALL)[0] == pytest.approx(want, rel=1e-9)


def auroc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """P(a positive scores higher than a negative) + half the ties, from all pairs of distinct values."""
    (a, m), (b, n) = (x.unique(return_counts=True) for x in (positive, negative))
    wins = (a[:, None] > b).double() + 0.5 * (a[:, None] == b)
    return ((wins * m[:, None] * n).sum() / (m.sum() * n.sum())).item()


@pytest.mark.parametrize(("student", "want"), [(S, 1.0), ("student", 0.0)], ids=["literal", "bare"])
def test_the_gap_tells_capability_from_information_if_both_are_told(student, want):
    a = gap(SEEN[T], SEEN[student])
    assert auroc(a[KIND == 1], a[KIND == 2]) == want


@pytest.mark.parametrize("gap_student", ["privileged", "bare"])
def test_the_switch_takes_the_gap_from_whom_it_says(gap_student):
    policies = tables()
    rollout = policies["student"].sample(policies["student"].prompts, n=8)
    batch = Batch(rollout, policies)
    where, token = policies["student"].where(rollout), batch.token[:, None]
    own = policies[S if gap_student == "privileged" else "student"]
    lt, ls = (policy.logp[where].gather(-1, token)[:, 0] for policy in (policies[T], own))
    plan = DOPD(gap_student=gap_student).plan(batch)
    torch.testing.assert_close(plan["gap"][batch.mask], (lt - ls).abs())
    assert plan["route"][batch.mask].tolist() == naive_route(lt, ls, torch.ones(len(lt), dtype=torch.bool))


@pytest.mark.parametrize("s", [0.5, 0.65, 0.8, 0.95])
def test_a_confident_error_is_nearly_blind_to_the_teacher(s):
    """V = 8, a flat teacher, a student with mass s on one token, among as many tokens on which all agree. The pull of the
    teacher at a prefix is w = sum_y S(y) [light 1_LH(y) + 1_HT(y)]; it is 1 in plain OPD, and at most 1 - s here."""
    n = 1400
    own = torch.tensor([round(n * s)] + [round(n * (1 - s) / 7)] * 7)
    assert own.sum() == n
    p = torch.tensor([s] + [(1 - s) / 7] * 7, dtype=torch.float64)
    ls = torch.cat([p.repeat_interleave(own), torch.full((n,), 0.5).double()]).log()
    lt = torch.cat([torch.full((n,), 0.125), torch.full((n,), 0.5)]).double().log()
    mean = thresholds(lt, ls, torch.ones(2 * n, dtype=torch.bool))[0]
    assert math.log(8 * s) >= mean  # the condition of the bound
    routes = route(lt, ls, torch.ones(2 * n, dtype=torch.bool))[:n]
    w = ((routes == HT).double() + 0.6 * (routes == LH)).mean().item()
    assert w <= 1 - s + 1e-12
    assert (routes[: own[0]] == HS).all()
    high = math.log(7 / (8 * (1 - s))) >= mean  # whether the other tokens are far enough from the teacher to be taught
    assert w == pytest.approx((1 - s) * high, abs=1e-9)


# Real models with hints.


def test_contexts_of_unequal_length_are_aligned_on_the_completion(student, teacher, prompts):
    """Each row alone, through the plain model on hint + prompt + completion, without batch and padding."""
    rollout = student.sample(prompts, n=2, max_new_tokens=7, seed=3)
    policies = {"student": student, T: teacher.seeing(), S: student.seeing()}
    plan = DOPD().plan(Batch(rollout, policies))
    assert len({len(policies[T].encode(p)) for p in prompts}) > 2
    for b, body in enumerate(rollout.completions()):
        logp = []
        for policy in (policies[T], policies[S]):
            start = policy.encode(rollout.prompts[b])
            with torch.no_grad():
                logits = policy.weights.model(torch.tensor([start + body])).logits[0, len(start) - 1 : -1]
            logp.append(logits[:, : len(student.tokenizer)].log_softmax(-1).gather(-1, torch.tensor(body)[:, None])[:, 0])
        torch.testing.assert_close(plan["gap"][b, : len(body)], (logp[0] - logp[1]).abs(), rtol=1e-4, atol=1e-4)


def test_a_hint_that_says_nothing_is_bitwise_no_hint(student, teacher, prompts):
    rollout = student.sample(prompts, n=2, max_new_tokens=7)
    same = {name: policy.seeing(lambda prompt: prompt) for name, policy in (("student", student), ("teacher", teacher))}
    assert torch.equal(same["student"].hidden(rollout), student.hidden(rollout))
    policies = {"student": student, T: same["student"], S: same["student"]}
    batch = Batch(rollout, policies)
    assert (DOPD().plan(batch)["route"][batch.mask] == HT).all()


def test_rollouts_never_see_a_hint(student, prompts):
    other = [replace(p, hint="lot z z z") for p in prompts]
    for one, two in zip(prompts, other, strict=True):
        assert student.encode(one) == student.encode(two)
    assert torch.equal(student.sample(prompts, seed=1).ids, student.sample(other, seed=1).ids)


def world_of(prompts) -> Task:
    return Task("hinted", lambda n, seed, split: [prompts[(seed + i) % len(prompts)] for i in range(n)], max_new_tokens=20)


@pytest.fixture
def pair(make_policy):
    """Fresh tiny models: training moves the student. Dropout would act in train mode."""
    return make_policy(0, attention_dropout=0.5), make_policy(1)


METHODS = [
    DOPD(), DOPD(anchor="frozen"), DOPD(anchor="ema"), DOPD(hs="teacher"), DOPD(hs="none", support="teacher"),
    DOPD(gap_student="bare"), DOPD(adaptive=False), DOPD(tail="renormalize", k=4),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.anchor}-{m.hs}-{m.gap_student}-{m.adaptive}-{m.k}")
def test_two_steps_on_tiny_models(pair, prompts, method):
    student, teacher = pair
    run = opd.distill(student, teacher, world_of(prompts), method=method, batch=4, n=2, steps=2, lr=1e-2, quiet=True, micro_batch=3)
    start = {name: p.detach().clone() for name, p in run.parameters.items()}
    steps = list(run)
    assert run.settings.normalize == "sequence"
    assert set(steps[0].plan["route"].tolist()) <= set(Route)
    assert steps[0].notes["thresholds"]["gap"] > 0
    assert steps[0].trace().column("route").tolist() == steps[0].plan["route"].tolist()
    assert any(not torch.equal(p, start[name]) for name, p in run.parameters.items())
    assert not student.weights.model.training


@pytest.mark.parametrize("method", [DOPD(), DOPD(anchor="ema", gap_student="bare")], ids=["literal", "bare"])
def test_two_steps_on_the_market_with_secrets(method):
    run = opd.distill(*opd.load("market", secret=True), method=method, batch=8, steps=2, quiet=True, seed=1)
    steps = list(run)
    assert all(math.isfinite(step.metrics["loss"]) and step.metrics["grad_norm"] > 0 for step in steps)
    assert all(p.hint.startswith("hint receipt") for p in steps[0].rollout.prompts)
    assert len(set(steps[0].plan["route"].tolist())) == 4


def test_the_markets_confident_mistakes_are_left_to_the_student():
    """Blind spots on shipped models: where the student forgets to carry, it is sure; the teacher has no say there."""
    student, teacher, task = opd.load("market", secret=True)
    rollout = student.sample(task.prompts(64, split="test"), max_new_tokens=task.max_new_tokens, seed=1)
    batch = Batch(rollout, {"student": student, T: teacher.seeing(), S: student.seeing()})
    routes = DOPD().plan(batch)["route"][batch.mask]
    kinds = np.array([kind for row in task.token_types(rollout, student.tokenizer) for kind in row])
    share = {kind: [(routes[kinds == kind] == r).double().mean().item() for r in Route] for kind in ("skill", "copy", "derived", "noise")}
    assert share["skill"][HS] > 0.95
    assert 0.6 * share["skill"][LH] + share["skill"][HT] < 0.05  # the teacher's pull, 1 in plain OPD
    assert share["copy"][LH] > 0.95
    assert share["derived"][LH] > 0.95
    assert share["noise"][LL] > 0.95


def test_micro_batches_change_neither_routes_nor_update(make_policy, prompts):
    found = []
    for size in (None, 3, 1):
        run = opd.distill(
            make_policy(0), make_policy(1), world_of(prompts), method=DOPD(k=8), batch=4, n=2, steps=1, quiet=True, micro_batch=size
        )
        found.append((next(run), {name: p.grad.clone() for name, p in run.parameters.items()}))
    for step, grads in found[1:]:
        assert torch.equal(step.plan["route"], found[0][0].plan["route"])
        assert step.metrics["loss"] == pytest.approx(found[0][0].metrics["loss"], rel=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, found[0][1][name], rtol=1e-3, atol=1e-6)


def test_padding_changes_neither_routes_nor_loss(student, teacher, prompts):
    policies = {"student": student, T: teacher.seeing(), S: student.seeing()}
    rollout = student.sample(prompts, n=2, max_new_tokens=7, seed=5)
    wide = lambda x: torch.nn.functional.pad(x, (0, 5), value=9)
    padded = replace(rollout, ids=wide(rollout.ids), logp=wide(rollout.logp), entropy=wide(rollout.entropy))
    one, two = (DOPD().plan(Batch(r, policies)) for r in (rollout, padded))
    assert torch.equal(two["route"][:, :-5], one["route"])
    assert (two["route"][:, -5:] == -1).all()
    assert (two["gap"][:, -5:] == 0).all()


def test_the_loss_is_a_mean_over_sequences_of_means_over_tokens(pair, prompts):
    student, teacher = pair
    step = next(opd.distill(student, teacher, world_of(prompts), method=DOPD(), batch=4, n=2, steps=1, quiet=True))
    parts = step.columns["loss"].split(step.rollout.lengths.tolist())
    assert len(set(step.rollout.lengths.tolist())) > 1
    assert step.metrics["loss"] == pytest.approx(sum(float(x.mean()) for x in parts) / len(parts), rel=1e-5)
    assert step.metrics["loss"] != pytest.approx(float(step.columns["loss"].mean()), rel=1e-4)


def test_a_batch_said_twice_is_the_same_batch(student, teacher, prompts):
    """Every token twice: the same routes (untrimmed means are the same; trimming is of the same share) and losses."""
    policies = {"student": student, T: teacher.seeing(), S: student.seeing()}
    rollout = student.sample(prompts, n=2, max_new_tokens=7, seed=5)
    twice = opd.rollout.joined([rollout, rollout])
    one, two = (DOPD(trim=0).plan(Batch(r, policies)) for r in (rollout, twice))
    assert torch.equal(two["route"], torch.cat([one["route"], one["route"]]))


def test_the_same_seed_gives_the_same_routes(make_policy, prompts):
    """No dropout in any pass, although the model has some."""
    found = []
    for _ in range(2):
        student = make_policy(0, attention_dropout=0.5)
        step = next(opd.distill(student, make_policy(1), world_of(prompts), method=DOPD(), batch=4, n=2, steps=1, quiet=True))
        found.append(step)
    assert torch.equal(found[0].plan["route"], found[1].plan["route"])
    assert torch.equal(found[0].columns["loss"], found[1].columns["loss"])


def plan_in_process(rank: int, port: int, folder) -> None:
    """One of two processes, with completions of its own; leaves what it was told and what it found."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True, backend="gloo")
    policies = tables(seed=5)
    rollout = policies["student"].sample(policies["student"].prompts, n=2 + 5 * rank, seed=rank)
    batch = Batch(rollout, policies)
    where, token = policies["student"].where(rollout), batch.token[:, None]
    seen = {name: policies[name].logp[where].gather(-1, token)[:, 0] for name in (T, S)}
    save_file({**seen, "route": DOPD().plan(batch)["route"][batch.mask]}, folder / f"{rank}.safetensors")


def test_two_processes_route_by_the_means_of_both(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=plan_in_process, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=100)
        assert worker.exitcode == 0
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert len(one["route"]) != len(two["route"])
    lt, ls = (torch.cat([one[name], two[name]]) for name in (T, S))
    whole = naive_route(lt, ls, torch.ones(len(lt), dtype=torch.bool))
    assert [*one["route"].tolist(), *two["route"].tolist()] == whole
    assert two["route"].tolist() != naive_route(two[T], two[S], torch.ones(len(two[T]), dtype=torch.bool))  # alone it would differ


# The gap of real models is capability: what the split of the diagnostics says about the same tokens.


def test_telescopes_on_real_models(student, teacher, prompts):
    rollout = student.sample(prompts, n=2, max_new_tokens=7)
    batch = Batch(rollout, {"student": student, "teacher": teacher, T: teacher.seeing(), S: student.seeing()})
    logp = {name: batch.map(lambda r, name=name: r.logp_of(name), needs=(name,))[batch.mask] for name in privilege.POLICIES}
    parts = privilege.split(logp)
    torch.testing.assert_close(parts.capability_with_hint + parts.information_of_student, parts.gap, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.information_of_teacher + parts.capability_without_hint, parts.gap, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(DOPD().plan(batch)["gap"][batch.mask], parts.capability_with_hint.abs(), rtol=1e-4, atol=1e-4)
