"""Weights by turn: what they sum to, which turns they leave out, and what one turn gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import opdlab as opd
from opdlab.engine.batch import Batch
from opdlab.engine.planned import run_plan
from opdlab.errors import InvalidValue
from opdlab.methods.turn_opd import TurnOPD


@pytest.fixture(scope="module")
def batch(student, teacher, prompts):
    """Three turns of one, two and the rest of the tokens, with one unlearned token after each."""
    rollout = student.sample(prompts[:3], n=2, max_new_tokens=9, seed=1)
    place = torch.arange(rollout.ids.shape[1]).expand_as(rollout.ids)
    turn = (place >= 2).long() + (place >= 5).long()
    learn = rollout.mask & (place != 1) & (place != 4)
    return Batch(replace(rollout, learn=learn, turn=turn), {"student": student, "teacher": teacher})


def weights(method, batch):
    """The plan's weights, `[B, T]`."""
    return method.plan(batch)["turn_weight"].values


@pytest.mark.parametrize("unit", ["turn", "token"])
@pytest.mark.parametrize("discount", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_the_weights_of_a_conversation_have_the_mean_one(batch, unit, discount, keep):
    found = weights(TurnOPD(unit, discount, keep), batch)
    assert (found[~batch.learn] == 0).all()
    means = found.sum(1) / batch.learn.sum(1)
    torch.testing.assert_close(means, torch.ones_like(means))


def test_every_turn_counts_alike_or_by_its_discount(batch):
    turn = batch.rollout.turn
    for discount in (1.0, 0.5):
        found = weights(TurnOPD(discount=discount), batch)
        sums = torch.stack([(found * (turn == k)).sum(1) for k in range(3)], 1)
        whole = sums[:, 2] > 0  # conversations that have all three turns
        assert whole.any()
        torch.testing.assert_close(sums[whole, 1], discount * sums[whole, 0])
        torch.testing.assert_close(sums[whole, 2], discount * sums[whole, 1])


def test_the_turns_of_highest_mean_kl_are_kept(batch):
    found = weights(TurnOPD("token", keep=0.3), batch)
    kl = batch.signals["teacher_reverse_kl"]
    for b in range(len(batch.rollout)):
        turn, own = batch.rollout.turn[b], batch.learn[b]
        means = {int(k): kl[b][own & (turn == k)].mean() for k in turn[own].unique()}
        kept = set(turn[found[b] > 0].tolist())
        assert kept == {max(means, key=means.get)}


def test_one_turn_is_plain_opd(student, teacher, prompts):
    rollout = student.sample(prompts[:2], max_new_tokens=8, seed=2)
    batch = Batch(rollout, {"student": student, "teacher": teacher})
    weight = torch.full((rollout.tokens,), 0.1)
    plain = run_plan(opd.OPD(), batch).gradient(weight)
    for method in (TurnOPD(), TurnOPD("token", 0.5, 0.2)):
        found = run_plan(method, batch).gradient(weight)
        torch.testing.assert_close(found.loss, plain.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.gradient, plain.gradient, rtol=1e-5, atol=1e-8)


def test_wrong_values_are_refused():
    with pytest.raises(InvalidValue, match="TurnOPD got unit='step'"):
        TurnOPD("step")
    with pytest.raises(InvalidValue, match="keep=0"):
        TurnOPD(keep=0)
    with pytest.raises(InvalidValue, match="discount=0"):
        TurnOPD(discount=0)
