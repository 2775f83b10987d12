"""Controls as they run: arms, the same prompts and settings, resuming, interrupts, refusals."""

from __future__ import annotations

import json

import pytest

import opdlab as opd
from opdlab.errors import InvalidValue, MissingPolicy, OpdlabError
from opdlab.evidence import running
from opdlab.evidence.arms import ARMS

SMALL = {"seeds": 1, "prompts": 8, "steps": 1, "batch": 2, "max_new_tokens": 6, "quiet": True}


@pytest.fixture(scope="module")
def world():
    return opd.load("market")


@pytest.fixture(scope="module")
def found(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("controls")
    _, teacher, _ = world
    return opd.controls(*world, weaker=teacher, folder=folder, **SMALL), folder


def test_every_arm_runs_or_says_why_not(found):
    result, _ = found
    assert {*result.arms, *result.left_out} == set(ARMS)
    assert result.left_out == {"other_hint": "the method reads no hints"}
    assert result.arms["no_teacher"].is_teacher_free
    assert not result.arms["sign"].is_teacher_free
    assert {arm.greedy.shape for arm in result.arms.values()} == {(1, 8)}
    assert all(arm.tokens[0] > 0 for arm in result.arms.values())


def test_the_student_that_is_given_stays_as_it_is(world, found):
    assert world[0].adapter is None
    assert world[0].weights.adapters == []


def test_finished_runs_are_taken_up_and_others_refused(world, found, monkeypatch):
    result, folder = found
    kept = sorted(file.name for file in (folder / "runs").iterdir())
    assert len(kept) == len(result.arms)
    arms = ["no_teacher", "sign"]

    def train(run):
        raise AssertionError("a finished run was made again")

    monkeypatch.setattr(opd.Run, "train", train)
    again = opd.controls(*world, arms=arms, folder=folder, **SMALL)
    assert again.arms["sign"].greedy.tolist() == result.arms["sign"].greedy.tolist()
    stored = json.loads((folder / "controls.json").read_text())
    assert repr(opd.Controls.from_json(stored)) == repr(again)
    with pytest.raises(InvalidValue, match="of other controls"):
        opd.controls(*world, arms=arms, folder=folder, **(SMALL | {"lr": 0.1}))


def test_an_interrupt_keeps_what_has_finished(world, monkeypatch):
    done = []
    plain = running._run_one

    def interrupted(*given):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(given[1])
        return plain(*given)

    monkeypatch.setattr(running, "_run_one", interrupted)
    arms = ["no_teacher", "own_texts", "sign"]
    with pytest.warns(UserWarning, match="after 2 of 4 runs"):
        found = opd.controls(*world, arms=arms, **SMALL)
    assert list(found.arms) == ["teacher", "no_teacher"]
    assert "interrupt" in found.left_out["sign"]


def test_arms_share_settings_but_for_the_rate(world):
    student, teacher, task = world
    subject = running.Subject(student, teacher, task, opd.OPD())
    work = running._Work(subject, {}, opd.Settings(steps=3, batch=2, lr=1e-3, max_new_tokens=6))
    for name, rate in (
        ("teacher", 1e-3),
        ("no_teacher", 1e-3),
        ("no_teacher_slow", 1e-4),
        ("lr_up", 3e-3),
    ):
        run = running._prepare(work, ARMS[name].treat(subject), student.frozen(), seed=4)
        assert (run.settings.steps, run.settings.batch, run.settings.seed) == (3, 2, 4)
        assert run.settings.lr == pytest.approx(rate)


def test_hinted_methods_get_other_hints_and_shuffled_hinted_teachers():
    student, teacher, task = opd.load("market", hint="worked")
    method = opd.SelfDistillation(anchor="frozen")
    found = opd.controls(
        student, None, task, method=method, arms=["other_hint", "shuffled", "sign"], **SMALL
    )
    assert set(found.arms) == {"teacher", "other_hint", "shuffled", "sign"}
    with pytest.raises(InvalidValue, match="no grades"):
        opd.controls(student, teacher, task, method=opd.SequenceKD(), arms=["sign"], **SMALL)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"arms": ["best"]}, InvalidValue, "no arm 'best'"),
        ({"arms": ["weaker"]}, InvalidValue, "weaker="),
        ({"seed": 3}, InvalidValue, "several seeds"),
        ({"seeds": 0}, InvalidValue, "seeds"),
        ({"task": None}, OpdlabError, "needs a task"),
        ({"teacher": None}, MissingPolicy, "teacher"),
        ({"teacher": 3}, OpdlabError, "controls"),
        ({"stepz": 3}, InvalidValue, "stepz"),
    ],
)
def test_what_cannot_be_controlled_is_refused(world, change, error, match):
    given = dict(zip(("student", "teacher", "task"), world, strict=True))
    with pytest.raises(error, match=match):
        opd.controls(**(given | SMALL | change))


def test_a_task_without_a_verifier_is_refused(world):
    student, teacher, task = world
    silent = opd.Task("silent", task.draw, None, 6)
    with pytest.raises(MissingPolicy, match="no verifier"):
        opd.controls(student, teacher, silent, **SMALL)
