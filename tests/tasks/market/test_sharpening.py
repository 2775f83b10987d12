"""The world that needs no teacher: as long as student and teacher go on, they write alike."""

from __future__ import annotations

import pytest
import torch

import opdlab as opd
from opdlab.tasks.market import model, sharpening


@pytest.fixture(scope="module")
def world():
    return opd.load("sharpening")


@pytest.fixture(scope="module")
def rollout(world):
    student, _, task = world
    prompts = task.prompts(48, split="test")
    return student.sample(prompts, max_new_tokens=task.max_new_tokens, seed=0)


def without(log_probs, token):
    """The distributions of `[n, V]` log-probs given that `token` is not drawn."""
    kept = log_probs.double()[:, [v for v in range(log_probs.shape[1]) if v != token]]
    return kept.log_softmax(1)


def test_given_that_they_go_on_they_are_the_shipped_teacher(world, rollout):
    shipped = model("teacher")
    (end,) = shipped.weights.eos
    wanted = without(shipped.log_probs(rollout), end)
    for policy in world[:2]:
        log_probs = policy.log_probs(rollout)
        assert torch.allclose(without(log_probs, end), wanted, atol=1e-4)
        assert (log_probs - shipped.log_probs(rollout)).abs().max() > 1  # it does break off


def test_only_the_row_of_the_end_is_another(world):
    shipped = model("teacher")
    (end,) = shipped.weights.eos
    others = torch.arange(shipped.head.weight.shape[0]) != end
    for policy in world[:2]:
        for name, value in shipped.weights.model.state_dict().items():
            here = policy.weights.model.state_dict()[name]
            if value.shape == shipped.head.weight.shape:
                assert not torch.equal(here[end], value[end])
                here, value = here[others], value[others]
            assert torch.equal(here, value), name


def test_texts_break_off_at_the_rates(world):
    student, teacher, task = world
    prompts = task.prompts(200, seed=7, split="test")
    for policy, rate in ((student, sharpening.STUDENT_RATE), (teacher, sharpening.TEACHER_RATE)):
        texts = opd.models.text_rollouts.rollout_from_texts(
            policy, prompts, [prompt.answer for prompt in prompts]
        )
        (end,) = policy.weights.eos
        goes_on = texts.ids[texts.mask] != end
        found = policy.log_probs(texts)[goes_on, end].exp().mean()
        assert float(found) == pytest.approx(rate, rel=0.2)


def test_the_student_can_and_is_right_in_three_samples_of_five(world):
    student, teacher, task = world
    before = opd.evaluate(student, task, n=200, k=4, seed=7)
    assert before.accuracy > 0.93
    assert 0.5 < before.sampled.mean() < 0.7
    assert 0.85 < opd.evaluate(teacher, task, n=200, k=4, seed=7).sampled.mean() < 0.97


def test_what_has_no_use_is_refused():
    with pytest.raises(opd.errors.InvalidValue, match="'sharpening' has no use for"):
        opd.load("sharpening", student="novice")
    with pytest.raises(opd.errors.InvalidValue, match="'sharpening' has no use for"):
        opd.load("sharpening", secret=True)
