"""Texts that are written while a server grades: what stays the same, what is one update old."""

from __future__ import annotations

import threading
import time

import pandas as pd
import pytest
import torch

import opdlab as opd
from opdlab import OPD, TopK, errors
from opdlab.models.graded import TopLogprobs
from opdlab.models.policy import Policy
from opdlab.models.protocols import RemoteGrader
from opdlab.tasks.market import model
from opdlab.training import phases
from opdlab.training import run as run_module

TASK = opd.tasks.market()
SETTINGS = {"batch": 3, "n": 2, "steps": 4, "max_new_tokens": 6, "quiet": True}
TIMES = ("generate_s", "grade_s", "learn_s", "seconds")


class Elsewhere:
    """The shipped teacher, as if it graded on a server: in another thread, top log-probs alone."""

    K = 6

    def __init__(self, seconds: float = 0.0) -> None:
        self.k, self.seconds, self.faults = 6, seconds, 0
        self.policy: Policy = model("teacher")
        self.begun: list[int] = []
        self.threads: set[str] = set()

    def grade(self, rollout):
        return self.begin(rollout)()

    def begin(self, rollout):
        self.begun.append(rollout.tokens)

        def work() -> TopLogprobs:
            self.threads.add(threading.current_thread().name)
            if self.faults:
                self.faults -= 1
                raise errors.TeacherError("made to fail")
            time.sleep(self.seconds)
            with torch.no_grad():
                logp = self.policy.grade(rollout).logp()
            top = logp.topk(self.k)
            token = rollout.ids[rollout.mask]
            own = logp.gather(1, token[:, None])[:, 0]
            return TopLogprobs(top.indices, top.values, own, token, logp.shape[1])

        return work


def make(teacher: Elsewhere | None = None, **options) -> opd.Run:
    student = model("student")
    method = OPD(top_k=TopK(6, by="teacher"))
    chosen = {"lr": 1e-2, **SETTINGS, "method": method, **options}
    return opd.distill(student, teacher or Elsewhere(), TASK, **chosen)


def numbers(run: opd.Run) -> pd.DataFrame:
    return run.history.drop(columns=[*TIMES, "staleness"], errors="ignore")


def weights(run: opd.Run) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.parameters.values()]


def is_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_close(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    """Compare weights of runs whose teachers graded other batches: all moved alike.

    Products of other batches are rounded otherwise, and Adam makes whole steps of a gradient that
    is all rounding. So single weights may differ, all weights together by a hundredth of the way
    that they went.
    """
    before = weights(make())
    apart = sum((x - y).square().sum() for x, y in zip(a, b, strict=True))
    way = sum((x - y).square().sum() for x, y in zip(b, before, strict=True))
    assert way > 0
    assert apart <= 0.01**2 * way


@pytest.fixture(scope="module")
def undisturbed() -> opd.Run:
    return make(generate_ahead=True).train()


def test_a_teacher_that_begins_is_remote():
    assert isinstance(Elsewhere(), RemoteGrader)
    assert not isinstance(model("teacher"), RemoteGrader)


def test_without_staleness_a_run_is_that_without_it():
    """The first step is fresh; at a rate of 0 all weights are the same, and so are all steps."""
    plain, ahead = make(steps=1).train(), make(steps=1, generate_ahead=True).train()
    assert is_same(weights(plain), weights(ahead))
    pd.testing.assert_frame_equal(numbers(plain), numbers(ahead))
    plain, ahead = make(lr=0.0).train(), make(lr=0.0, generate_ahead=True).train()
    pd.testing.assert_frame_equal(numbers(plain), numbers(ahead))
    assert list(ahead.history["staleness"]) == [0, 1, 1, 1]
    assert "staleness" not in plain.history


def test_texts_are_those_of_the_student_before_its_latest_update(undisturbed):
    """Step t trains on what the student wrote before update t - 1, found by a run of its own."""
    run = make(generate_ahead=True)
    expected = phases.write_rollout(run, 0)
    for number in range(3):
        following = phases.write_rollout(run, number + 1)  # with the weights before the step
        step = next(run)
        assert torch.equal(step.rollout.ids, expected.ids)
        assert torch.equal(step.rollout.logp, expected.logp)
        expected = following
    assert is_same(weights(make(steps=3, generate_ahead=True).train()), weights(run))


def test_the_staleness_shows_as_a_gap_that_can_be_corrected(undisturbed):
    gaps = list(undisturbed.history["sampler_gap"])
    assert gaps[0] < 1e-5
    assert gaps[1] > 1e-3
    corrected = make(generate_ahead=True, importance_cap=float("inf"), steps=2)
    next(corrected)
    step = next(corrected)
    ratio = step.columns["importance"]
    assert (ratio - 1).abs().max() > 1e-3
    torch.testing.assert_close(ratio, step.columns["sampler_gap"].exp())


def test_the_teacher_grades_while_the_student_writes():
    teacher = Elsewhere(seconds=0.5)
    run = make(teacher, steps=2, generate_ahead=True)
    seen = []
    write = phases.write_rollout

    def watched(run, step=None):
        seen.append((step, [name for name in map(str, threading.enumerate()) if "grade_" in name]))
        return write(run, step)

    run_module.ahead.write_rollout = watched
    try:
        run.train()
    finally:
        run_module.ahead.write_rollout = write
    ((step, at_work),) = seen
    assert step == 1
    assert len(at_work) == 1
    assert all(name.startswith("grade_") for name in teacher.threads)


def test_a_run_taken_up_is_the_one_that_was_not_stopped(undisturbed, tmp_path):
    stopped = make(generate_ahead=True, save=tmp_path, save_every=1)
    for _ in range(2):
        next(stopped)
    assert (tmp_path / "step-000002" / "ahead.safetensors").exists()
    again = opd.resume(tmp_path, model("student"), Elsewhere(), TASK, quiet=True, allow="teacher")
    again.train()
    assert is_same(weights(again), weights(undisturbed))
    pd.testing.assert_frame_equal(numbers(again), numbers(undisturbed))
    assert not (tmp_path / "step-000004" / "ahead.safetensors").exists()


def test_a_step_that_fails_is_repeated_with_the_same_texts(undisturbed):
    teacher = Elsewhere()
    run = make(teacher, generate_ahead=True)
    next(run)
    teacher.faults = 1
    with pytest.raises(errors.TeacherError, match="made to fail"):
        next(run)
    run.train()
    assert is_same(weights(run), weights(undisturbed))
    assert len(teacher.begun) == 5  # four steps, and the one that failed


def test_grades_under_way_are_waited_for_and_not_asked_again(undisturbed, monkeypatch):
    """An interrupt between asking and the plan loses nothing that was paid for."""
    teacher = Elsewhere()
    run = make(teacher, generate_ahead=True)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "plan_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(run)
    run.train()
    assert is_same(weights(run), weights(undisturbed))
    assert len(teacher.begun) == 4


def test_it_is_refused_where_nothing_would_be_faster():
    student, teacher, task = opd.load("market")
    for method, taught in ((OPD(), teacher), (opd.SequenceKD(), opd.teachers.TextOnly(teacher))):
        with pytest.raises(errors.InvalidValue, match="reads grades tokens on a server"):
            opd.distill(
                student, taught, task, method=method, steps=1, generate_ahead=True, quiet=True
            )


def members(*made: Elsewhere) -> opd.MultiTeacher:
    """Teachers of about half of the prompts each."""

    def route(prompt: opd.Prompt) -> str:
        return "one" if str(prompt.messages[0]["content"]) < "f" else "other"

    return opd.MultiTeacher(dict(zip(("one", "other"), made, strict=True)), route)


def test_several_teachers_write_ahead_as_one(undisturbed):
    """Both are the same model, so all numbers are those of one teacher, up to rounding: each grades
    its own rows, and products of fewer rows are rounded otherwise.
    """
    one, other = Elsewhere(), Elsewhere()
    run = make(members(one, other), generate_ahead=True).train()
    assert_close(weights(run), weights(undisturbed))
    assert min(len(one.begun), len(other.begun)) >= 1
    assert all(name.startswith("grade_") for name in one.threads | other.threads)
    found = numbers(run)[list(numbers(undisturbed))]
    pd.testing.assert_frame_equal(found, numbers(undisturbed), rtol=1e-3, atol=1e-6)


def test_a_local_teacher_among_several_grades_in_this_thread(undisturbed):
    far, near = Elsewhere(), model("teacher")
    run = make(members(far, near), generate_ahead=True).train()
    plain = make(members(Elsewhere(), near), steps=1).train()
    assert numbers(run)["loss"].iloc[0] == numbers(plain)["loss"].iloc[0]
    assert list(run.history["staleness"]) == [0, 1, 1, 1]
    assert_close(weights(run), weights(undisturbed))


def test_texts_of_a_step_that_failed_are_saved_too(undisturbed, tmp_path):
    teacher = Elsewhere()
    run = make(teacher, generate_ahead=True, save=tmp_path)
    next(run)
    teacher.faults = 1
    with pytest.raises(errors.TeacherError, match="made to fail"):
        next(run)
    run.save()
    again = opd.resume(tmp_path, model("student"), Elsewhere(), TASK, quiet=True, allow="teacher")
    again.train()
    assert is_same(weights(again), weights(undisturbed))


def test_several_teachers_in_this_process_are_refused():
    near = model("teacher")
    with pytest.raises(errors.InvalidValue, match="reads grades tokens on a server"):
        make(members(near, near.frozen()), generate_ahead=True)


def test_more_steps_than_the_run_had_are_announced(tmp_path):
    make(generate_ahead=True, save=tmp_path, steps=1).train()
    student = model("student")
    with pytest.warns(UserWarning, match="the last step wrote no texts ahead"):
        opd.resume(tmp_path, student, Elsewhere(), TASK, steps=2, quiet=True, allow="teacher")
