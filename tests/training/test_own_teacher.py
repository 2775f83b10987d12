"""A student that is its own teacher is told so; one that differs in any way is not."""

from __future__ import annotations

import warnings

import pytest

from opdlab import GRPO, OPD, SelfDistillation, Task, distill


@pytest.fixture
def task(prompts) -> Task:
    return Task("some", lambda n, seed, split: prompts[:n], lambda prompt, text: 0.0)


def start(student, teacher, task, method=None, **options):
    return distill(
        student,
        teacher,
        task,
        method=method,
        steps=1,
        batch=2,
        n=2,
        max_new_tokens=4,
        quiet=True,
        **options,
    )


def same_object(student):
    return student


def frozen(student):
    return student.frozen()


@pytest.mark.parametrize("teacher_of", [same_object, frozen])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("method", [None, OPD("forward_kl")])
def test_a_student_that_is_its_own_teacher_is_told(
    make_policy, task, perturb, teacher_of, adapted, method
):
    student = make_policy(0)
    if adapted:
        perturb(student.adapt(4))
    with pytest.warns(
        UserWarning, match=r"'teacher.*' is the student itself.*nothing to learn.*student\.seeing"
    ):
        start(student, teacher_of(student), task, method)


def test_it_is_told_of_policies_too(make_policy, task):
    student = make_policy(0)
    with pytest.warns(UserWarning, match="nothing to learn"):
        start(student, make_policy(1), task, policies={"teacher": student})


def test_a_teacher_that_differs_in_anything_is_not(make_policy, task, perturb):
    student, adapted = make_policy(0), make_policy(0)
    perturb(adapted.adapt(4), 1)
    before = adapted.frozen()
    perturb(adapted, 2)
    cases = [
        (student, make_policy(1), None),
        (student, student.seeing("say sum"), None),
        (adapted, before, None),
        (make_policy(0), None, SelfDistillation()),
        (make_policy(0), None, GRPO()),
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*nothing to learn")
        for learner, teacher, method in cases:
            start(learner, teacher, task, method)
