"""The small profile: SmolLM2 from its package, teacher and student on one set of weights."""

from __future__ import annotations

import pytest
import torch

import opdlab as opd
from opdlab.tasks import profiles

pytestmark = pytest.mark.small


@pytest.fixture(scope="module")
def small():
    return opd.load("small")


def test_one_set_of_weights_two_policies(small):
    student, teacher, task = small
    assert student.weights is teacher.weights
    prompt = task.prompts(1)[0]
    seen = student.tokenizer.decode(teacher.encode(prompt))
    assert profiles.RULE in seen
    assert seen.endswith(
        student.tokenizer.decode(student.encode(prompt)).split("<|im_end|>\n", 1)[1]
    )
    assert profiles.RULE not in student.tokenizer.decode(student.encode(prompt))


def test_it_speaks_english(small):
    student = small[0]
    text = "The capital of France is Paris, and the capital of Germany is Berlin."
    ids = student.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = student.weights.model(ids, labels=ids).loss.item()
    assert loss < 2.5  # nats a token; a wrongly unpacked file is above 8


def test_the_rule_is_what_the_verifier_checks(small):
    task = small[2]
    assert [
        task.verify(None, text)
        for text in ("42", " -7. ", "1,200", "The answer is 42", "42 apples", "")
    ] == [1, 1, 1, 0, 0, 0]


def test_two_steps_move_the_student_towards_the_rule_and_not_the_teacher(small):
    student, teacher, task = small
    rollout = student.sample(task.prompts(4, split="test"), max_new_tokens=8, seed=0)
    before = teacher.log_probs(rollout)
    kl = opd.score(rollout, student, teacher).column("teacher_reverse_kl").mean()
    run = opd.distill(
        student, teacher, task, steps=2, batch=4, max_new_tokens=8, quiet=True
    ).train()
    assert torch.equal(teacher.log_probs(rollout), before)
    assert opd.score(rollout, student, teacher).column("teacher_reverse_kl").mean() < kl
    assert run.history["loss"].notna().all()
