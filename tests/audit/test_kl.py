"""k1, k2, k3 in all their uses, and losses that users write, against exact gradients."""

from __future__ import annotations

import math

import pytest
import torch
from audit.pairs import near, pair, slope

import opdlab as opd
from opdlab import OPD, OPDPlus, TopK, audit, exact
from opdlab import losses as d
from opdlab.audit import as_loss, in_reward, k1, k2, k3
from opdlab.engine.batch import return_to_go

# k1, k2, k3 as values.


def test_values_against_their_definitions():
    u = torch.tensor([0.01, 0.5, 1.0, 3.0, 40.0], dtype=torch.float64)
    near(k1(u.log()), -u.log())
    near(k2(u.log()), 0.5 * u.log() ** 2)
    near(k3(u.log()), u - 1 - u.log())


def test_which_values_are_unbiased_and_which_are_never_negative():
    tables = pair(1)
    p, q = tables["student"].logp[:, 0], tables["teacher"].logp[:, 0]
    mean = lambda k: (p.exp() * k(q - p)).sum(-1)
    near(mean(k1), d.reverse_kl(p, q))
    near(mean(k3), d.reverse_kl(p, q))
    assert ((mean(k2) - d.reverse_kl(p, q)).abs() > 0.005).all()
    assert (k1(q - p) < 0).any()
    assert (k2(q - p) >= 0).all()
    assert (k3(q - p) >= 0).all()


def test_k3_is_the_less_noisy_value_near_equality_and_the_noisier_far_from_it():
    def deviation(k, gap: float) -> float:
        p = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64).log_softmax(-1)
        q = (p + gap * torch.tensor([0.3, -1.0, 0.5, 2.0])).log_softmax(-1)
        mean = (p.exp() * k(q - p)).sum()
        return (p.exp() * (k(q - p) - mean) ** 2).sum().sqrt().item()

    assert deviation(k3, 0.2) < 0.5 * deviation(k1, 0.2)
    assert deviation(k3, 3.0) > 2 * deviation(k1, 3.0)


# In the reward and as a loss: the nine cells.


def test_the_gradients_of_all_uses():
    tables, uses = pair(2), {"reward": in_reward, "loss": as_loss}
    got = {
        (k, use): exact.gradient(make(k), tables)
        for k in ("k1", "k2", "k3")
        for use, make in uses.items()
    }
    reverse, forward = slope(d.reverse_kl, tables), slope(d.forward_kl, tables)
    assert (reverse - forward).norm() > 0.05
    near(got["k1", "reward"], reverse)
    assert got["k1", "loss"].abs().max() < 1e-15
    near(got["k2", "loss"], reverse)
    near(got["k3", "reward"], reverse - forward)
    near(got["k3", "loss"], forward)
    for name, k in (
        ("k1", k1),
        ("k2", k2),
        ("k3", k3),
    ):  # both parts together are the gradient of the mean value
        value = lambda p, q, k=k: (p.exp() * k(q - p)).sum(-1)
        near(got[name, "reward"] + got[name, "loss"], slope(value, tables))


def test_k2_in_the_reward_has_no_first_order_signal():
    tables = pair(3)
    away = tables["student"].logits

    def share(gap: float) -> float:
        close = {"student": tables["teacher"].add(gap * away), "teacher": tables["teacher"]}
        return (
            exact.gradient(in_reward("k2"), close).norm() / exact.gradient(OPD(), close).norm()
        ).item()

    assert share(1e-4) < 1e-3
    assert share(1e-2) / share(1e-3) == pytest.approx(10, rel=0.1)


def test_plain_opd_is_opd_plus_with_the_generator_of_k3():
    tables = pair(4, length=2)
    plain, plus = OPD(estimator="sampled"), OPDPlus("reverse_kl_k3", clip=None)
    rollout = exact.everything(tables["student"].prompts, 5, 2, by=tables["student"])
    weight = exact.law(tables["student"], rollout)
    ours, theirs = (exact.loss_pass(m, tables, rollout, weight) for m in (plus, plain))
    near(ours.loss, theirs.loss)
    near(ours.gradient, theirs.gradient)


def test_estimates_refuse_what_is_none():
    with pytest.raises(
        ValueError, match=r"no estimate 'k4' as 'loss'\. Use k1, k2, k3, and 'reward' or 'loss'"
    ):
        as_loss("k4")


# Losses that users write.


def power(a: float):
    """PowerOPD (arXiv 2606.17199): the bounded reward q^a - p^a, which is no function of u."""
    return opd.method(
        plan=lambda batch: {
            "r": batch.map(lambda rows: (a * rows.logp_of("teacher")).exp() - (a * rows.logp).exp())
        }
    )(lambda rows: -(rows.logp - rows.logp.detach()).exp() * rows.r)


def ab(a: float, b: float):
    """The alpha-beta divergence of ABKD (arXiv 2505.04560)."""
    return lambda p, q: (
        -(
            (a * q + b * p).exp()
            - a / (a + b) * ((a + b) * q).exp()
            - b / (a + b) * ((a + b) * p).exp()
        ).sum(-1)
        / (a * b)
    )


def test_a_bounded_power_reward_descends_a_density_power_divergence():
    tables = pair(5)
    p, q = tables["student"].logp, tables["teacher"].logp
    near(ab(0.5, 0.5)(p, q), 4 * d.Generator("squared_hellinger").divergence(p, q))
    near(ab(1, 1)(p, q), 0.5 * ((p.exp() - q.exp()) ** 2).sum(-1))
    near(ab(1, 1e-6)(p, q), d.forward_kl(p, q), 1e-5)
    near(ab(1e-6, 1)(p, q), d.reverse_kl(p, q), 1e-5)
    for a in (0.5, 1.0, 2.0):
        near(exact.gradient(power(a), tables), a * slope(ab(a, 1), tables))
    small = exact.gradient(power(1e-6), tables) / 1e-6
    near(small, slope(d.reverse_kl, tables), 1e-5)
    reward = (0.5 * q).exp() - (0.5 * p).exp()
    assert (reward.abs() <= 1).all()
    assert (reward.sign() == (q - p).sign()).all()


def rao_blackwell(batch) -> dict[str, torch.Tensor]:
    kl = batch.map(lambda rows: d.reverse_kl(rows.student, rows.teacher))
    return {"future": return_to_go(kl, batch.mask, 1.0) - kl}


def test_the_rao_blackwellised_gradient_is_that_of_whole_texts_and_varies_less():
    """grad KL_t + (later KLs) S_t (arXiv 2504.10637), as a user's method; against the plain policy
    gradient with returns.
    """
    ours = opd.method(plan=rao_blackwell)(
        lambda rows: (
            d.reverse_kl(rows.student, rows.teacher)
            + (rows.logp - rows.logp.detach()).exp() * rows.future
        )
    )
    plain, tables = OPD(estimator="sampled", discount=1.0), pair(6, vocab=3, length=2, prompts=1)
    student = tables["student"]
    near(exact.gradient(ours, tables), exact.gradient(plain, tables))
    assert audit(ours).verdict == "This trains the reverse KL to the teacher over whole texts."
    rollout, one = (
        exact.everything(student.prompts, 3, 2, by=student),
        torch.ones(1, dtype=torch.float64),
    )
    law = exact.law(student, rollout).tolist()
    spread = lambda m: sum(
        p * exact.gradient_on(m, tables, rollout.select([i]), one).square().sum()
        for i, p in enumerate(law)
    )
    assert spread(ours) < 0.6 * spread(plain)


def test_a_divergence_of_the_prefix_as_advantage_teaches_nothing_but_through_returns():
    def told(discount: float):
        def plan(batch) -> dict[str, torch.Tensor]:
            kl = batch.map(lambda rows: d.reverse_kl(*rows.on("teacher", TopK(2))))
            return {"advantage": return_to_go(-kl, batch.mask, discount)}

        return opd.method(plan=plan)(
            lambda rows: -(rows.logp - rows.logp.detach()).exp() * rows.advantage
        )

    tables = pair(7, length=2)
    assert exact.gradient(told(0.0), tables).abs().max() < 1e-15
    assert exact.gradient(told(1.0), tables).norm() > 1e-2
    found = audit(told(0.0))
    assert found.trains is None
    assert found.noise == math.inf
    assert list(found.flags) == ["zero_gradient"]
    assert found.verdict == "Its expected gradient is zero, so it trains nothing."
