"""DOPD's plan and loss through the engine, against a naive float64 copy of its definition and
closed forms; its switches.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive_dopd import HS, HT, LH, LL, S, T, naive_dopd, naive_loss, naive_route, tables
from plans import plan_values

import opdlab as opd
from opdlab import DOPD, exact
from opdlab.engine.batch import Batch
from opdlab.engine.columns import flatten
from opdlab.engine.passes import compute, gradient
from opdlab.engine.rows import Rows
from opdlab.losses.divergences import reverse_kl
from opdlab.methods.dopd import Route, thresholds
from opdlab.models.graded import States

LN2 = math.log(2)


@pytest.mark.parametrize("k", [2, 5, 6, 128])
@pytest.mark.parametrize("seed", range(3))
def test_plan_and_loss_through_the_engine_are_the_definition(seed, k):
    """Values and gradients on sampled completions of toy tables, with all four regimes at once."""
    policies = tables(seed=seed)
    rollout = policies["student"].sample(policies["student"].prompts, n=8, seed=seed)
    weight = torch.rand(
        len(rollout), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    where = policies["student"].where(rollout)
    lt, ls = (
        policies[name].logp[where].gather(-1, rollout.ids[rollout.mask][:, None])[:, 0]
        for name in (T, S)
    )
    routes = naive_route(lt, ls, torch.ones(len(lt), dtype=torch.bool))
    assert set(routes) == set(Route)

    batch = Batch(rollout, policies)
    plan = plan_values(DOPD(k=k), batch)
    assert plan["route"][batch.mask].tolist() == routes
    torch.testing.assert_close(plan["gap"][batch.mask], (lt - ls).abs())
    assert DOPD(k=k).plan(batch)["gap"].description.threshold == pytest.approx(
        thresholds(lt, ls, torch.ones(len(lt), dtype=torch.bool))[0]
    )

    logits = policies["student"].logits.clone().requires_grad_()
    value = naive_dopd(policies, rollout, logits, k, routes)
    (want,) = torch.autograd.grad((value * weight.repeat_interleave(rollout.lengths)).sum(), logits)
    got = exact.gradient_on(DOPD(k=k), policies, rollout, weight)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    states = {name: batch.states(name) for name in policies}
    columns = {name: flatten(batch, name, column) for name, column in plan.items()}
    torch.testing.assert_close(
        compute(DOPD(k=k).loss, states, batch.token, columns), value.detach(), rtol=1e-6, atol=1e-8
    )


def rows(
    seed: int = 0, n: int = 12, vocab: int = 9, scale: float = 1.5, routes=None
) -> tuple[Rows, torch.Tensor]:
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
        assert got[i].item() == pytest.approx(
            naive_loss(kind, s, t, a, 4, weights).item(), rel=1e-9
        )
    paper = DOPD(k=4).loss(r) / got
    torch.testing.assert_close(
        paper, torch.full_like(paper, (0.6 / 0.125, 0.3 / 0.75, 1.0, 0.6 / 0.125)[kind])
    )


def test_the_defaults_are_the_papers():
    m = DOPD()
    assert (m.light, m.weak, m.k, m.trim, m.adaptive, m.hs, m.gap_student) == (
        0.6,
        0.3,
        128,
        0.05,
        True,
        "self",
        "privileged",
    )
    assert m.needs == ("teacher+hint", "student+hint")
    assert m.recipe == {"normalize": "sequence"}
    assert [DOPD(anchor=a).needs[1] for a in ("live", "frozen", "ema")] == [
        "student+hint",
        "reference+hint",
        "ema+hint",
    ]


@pytest.mark.parametrize("kind", list(Route))
def test_gradients_in_closed_form(kind):
    r, logits = rows(routes=int(kind))
    (got,) = torch.autograd.grad(DOPD(light=1, weak=1).loss(r).sum(), logits)
    s, target = r["student"].exp().detach(), r[T if kind in (LH, HT) else S]
    other = ((s + target.exp()) / 2).log() if kind == HT else target
    kl = (s * (s.log() - other)).sum(-1, keepdim=True)
    torch.testing.assert_close(got, (0.5 if kind == HT else 1) * s * (s.log() - other - kl))


def test_no_gradient_reaches_a_target_or_a_route(make_policy, make_tokenizer):
    """Teacher, student and hinted student on trainable float64 weights, the last two on the same
    ones.
    """
    student, teacher = (make_policy(seed, make_tokenizer(), dtype=torch.float64) for seed in (0, 1))
    for policy in (student, teacher):
        policy.weights.model.requires_grad_(True)
    prompts = [opd.Prompt("a b", hint="c"), opd.Prompt("b c", hint="d e f a a")]
    rollout = opd.rollout_from_texts(student, prompts * 2, ["c d e f", "b a", "f f", "a e c"])
    policies = {"student": student, T: teacher.seeing(), S: student.seeing()}
    batch = Batch(rollout, policies)
    columns = {name: flatten(batch, name, c) for name, c in DOPD(k=4).plan(batch).items()}
    hidden = student.hidden(rollout)
    states = {
        "student": States(hidden, student.weights.head),
        T: batch.states(T),
        S: batch.states(S),
    }
    hidden.backward(
        gradient(DOPD(k=4).loss, states, batch.token, torch.ones(rollout.tokens), columns).gradient
    )
    got = [p.grad.clone() for p in student.weights.model.parameters()]
    assert all(p.grad is None for p in teacher.weights.model.parameters())

    head = student.weights.head
    p = head(student.hidden(rollout)).softmax(-1)
    with torch.no_grad():
        t, still = policies[T].log_probs(rollout).exp(), policies[S].log_probs(rollout).exp()
    moving = head(policies[S].hidden(rollout)).softmax(-1)
    value = lambda anchor: torch.stack(
        [naive_loss(k, p[i], t[i], anchor[i], 4) for i, k in enumerate(columns["route"].tolist())]
    ).sum()
    assert set(columns["route"].tolist()) == set(Route)
    want, wrong = (
        torch.autograd.grad(value(a), list(student.weights.model.parameters()), retain_graph=True)
        for a in (still, moving)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert any(
        (a - b).norm() > 0.1 * b.norm() for a, b in zip(wrong, want, strict=True)
    )  # the test can tell


def test_without_a_hint_the_student_has_nothing_to_tell_itself():
    """p changes nothing: the student's own regimes have no value and no gradient."""
    policies = tables()
    policies[S] = policies["student"]
    rollout = policies["student"].sample(policies["student"].prompts, n=8)
    routes = plan_values(DOPD(), Batch(rollout, policies))["route"]
    own = (routes == LL) | (routes == HS)
    assert own.any(1).any()
    for method in (DOPD(), DOPD(k=3)):
        batch = Batch(rollout, policies)
        states, columns = {n: batch.states(n) for n in policies}, {"route": routes[batch.mask]}
        result = gradient(
            method.loss,
            states,
            batch.token,
            torch.ones(rollout.tokens, dtype=torch.float64),
            columns,
        )
        assert result.loss[own[batch.mask]].abs().max() < 1e-12
        assert result.gradient[own[batch.mask]].abs().max() < 1e-12
        assert (result.loss[~own[batch.mask]] > 1e-3).all()


def test_a_student_as_its_own_teacher_is_all_ht():
    policies = tables()
    policies[T] = policies[S]
    rollout = policies["student"].sample(policies["student"].prompts, n=8)
    batch = Batch(rollout, policies)
    plan = plan_values(DOPD(), batch)
    assert (plan["route"][batch.mask] == HT).all()
    got = exact.gradient_on(
        DOPD(), policies, rollout, torch.ones(len(rollout), dtype=torch.float64)
    )
    opsd = {"student": policies["student"], "reference+hint": policies[S]}
    want = exact.gradient_on(
        opd.SelfDistillation.opsd(), opsd, rollout, torch.ones(len(rollout), dtype=torch.float64)
    )
    torch.testing.assert_close(got, want)
    assert want.norm() > 0.1


@pytest.mark.parametrize("kind", list(Route))
def test_extreme_logits_stay_finite(kind):
    big = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    s = big.clone().requires_grad_()
    target = big.flip(0).log_softmax(-1)
    value = DOPD(k=2).loss(
        Rows(
            {"student": s.log_softmax(-1), T: target, S: target},
            torch.zeros(2).long(),
            {"route": torch.full((2,), kind)},
        )
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
    fold = lambda x: torch.cat(
        [x.gather(-1, ids), (1 - x.exp().gather(-1, ids).sum(-1, keepdim=True)).log()], -1
    )
    torch.testing.assert_close(
        DOPD(light=1, k=3, support="teacher").loss(r).detach(), reverse_kl(fold(s), fold(t))
    )
    ids = s.topk(3).indices
    again = lambda x: x.gather(-1, ids).log_softmax(-1)
    torch.testing.assert_close(
        DOPD(light=1, k=3, tail="renormalize").loss(r).detach(), reverse_kl(again(s), again(t))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dropped = DOPD(light=1, k=1, support="teacher", tail="drop").loss(r).detach()
    assert (dropped < 0).any()  # what the bucket is there to prevent
    anchored, _ = rows(routes=int(LL), seed=1)
    ids = anchored[S].topk(3).indices
    torch.testing.assert_close(
        DOPD(weak=1, k=3, support="teacher").loss(anchored).detach(),
        reverse_kl(fold(s), fold(anchored[S])),
    )


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
    assert torch.equal(
        plan_values(DOPD(adaptive=False), Batch(rollout, policies))["route"],
        plan_values(DOPD(), Batch(rollout, policies))["route"],
    )


def test_weights_of_zero_are_no_loss_even_where_it_would_be_infinite():
    r, _ = rows(routes=int(LH))
    r.distributions[T] = r[T].masked_fill(torch.arange(9) == 0, -math.inf)
    assert DOPD().loss(r).isinf().all()
    assert DOPD(light=0).loss(r).abs().max() == 0


def test_the_route_sees_sampled_tokens_only():
    policies = tables(length=1)
    rollout = policies["student"].sample(policies["student"].prompts, n=8)
    token = rollout.ids[:, 0]
    before = plan_values(DOPD(), Batch(rollout, policies))
    logits = policies[T].logp.clone()
    for x in range(2):  # rotate the teacher's probabilities of tokens that nobody sampled
        free = [i for i in range(6) if i not in token[rollout.n * x :][: rollout.n].tolist()]
        assert len(free) >= 2
        logits[x, 0, free] = logits[x, 0, free[1:] + free[:1]]
    after = plan_values(DOPD(), Batch(rollout, policies | {T: replace(policies[T], logits=logits)}))
    assert not torch.equal(logits, policies[T].logp)
    torch.testing.assert_close(after["gap"], before["gap"])
    assert torch.equal(after["route"], before["route"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"anchor": "base"}, "DOPD got anchor='base'. Use one of live, frozen, ema"),
        ({"hs": "both"}, "hs='both'. Use one of self, teacher, none"),
        ({"support": "union"}, "support='union'. Use one of student, teacher"),
        ({"gap_student": "hinted"}, "gap_student='hinted'. Use one of privileged, bare"),
        ({"tail": "cut"}, "tail='cut'"),
        ({"k": 0}, "k=0"),
        ({"light": -1}, "light=-1"),
        ({"weak": math.nan}, "weak=nan"),
        ({"trim": 1.0}, "trim=1.0. Use weights of at least 0 and a share to trim"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, says):
    with pytest.raises(ValueError, match=says):
        DOPD(**settings)


@pytest.mark.parametrize("gap_student", ["privileged", "bare"])
def test_the_switch_takes_the_gap_from_whom_it_says(gap_student):
    policies = tables()
    rollout = policies["student"].sample(policies["student"].prompts, n=8)
    batch = Batch(rollout, policies)
    where, token = policies["student"].where(rollout), batch.token[:, None]
    own = policies[S if gap_student == "privileged" else "student"]
    lt, ls = (policy.logp[where].gather(-1, token)[:, 0] for policy in (policies[T], own))
    plan = plan_values(DOPD(gap_student=gap_student), batch)
    torch.testing.assert_close(plan["gap"][batch.mask], (lt - ls).abs())
    assert plan["route"][batch.mask].tolist() == naive_route(
        lt, ls, torch.ones(len(lt), dtype=torch.bool)
    )
