"""The arms that a sceptical reader asks for, beside the run with its teacher.

Every arm makes as many updates as the run, on the same prompts, with the same settings. An arm that
does not apply (another hint, for a method that reads none) is left out with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from opdlab.engine.needs import Access, Need, parse_needs
from opdlab.errors import InvalidValue
from opdlab.evidence.placebo import OwnTexts, ShuffledTeacher, SignOnly, with_other_hints
from opdlab.methods import OPSA, Method, SequenceKD
from opdlab.methods.contract import tells_hints
from opdlab.models.policy import Policy
from opdlab.models.protocols import Grader, Sampler, TopGrader, Writer
from opdlab.tasks.task import Task
from opdlab.training.resolution import resolve_policies

DIRECTIONS = {"reverse_kl": "forward_kl", "forward_kl": "reverse_kl"}
FASTER = 3.0  # the factor of the learning rate, and what it is divided by
GENTLER = 10.0  # what it is divided by for a student that no teacher holds


@dataclass(frozen=True)
class Subject:
    """The run that is controlled.

    Attributes:
        student: The student before training.
        teacher: Its teacher, or None.
        task: The task.
        method: The method.
        weaker: A teacher that knows less, or None.
    """

    student: Policy
    teacher: Any
    task: Task
    method: Method
    weaker: Any = None


@dataclass(frozen=True)
class Treatment:
    """Describe what an arm changes.

    Attributes:
        method: The method that trains.
        teacher: The teacher.
        task: The task.
        policies: Replaces what a name in the method's `needs` stands for; a function of the student
            that trains.
        rate: A factor of the learning rate.
    """

    method: Method
    teacher: Any
    task: Task
    policies: Callable[[Policy], Mapping[str, Any]] = field(default=lambda _: {})
    rate: float = 1.0


class DoesNotApply(Exception):
    """An arm makes no sense for a run; its text says why."""


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name: Its name, as `arms=` takes it.
        label: What it does, for tables and pictures.
        is_teacher_free: Whether it trains without anything that the teacher knows.
        treat: Makes the treatment, or raises `DoesNotApply`.
    """

    name: str
    label: str
    is_teacher_free: bool
    treat: Callable[[Subject], Treatment]


def _as_it_is(subject: Subject) -> Treatment:
    return Treatment(subject.method, subject.teacher, subject.task)


def _no_teacher(subject: Subject) -> Treatment:
    return Treatment(OPSA(adaptive=False), None, subject.task)


def _no_teacher_adaptive(subject: Subject) -> Treatment:
    return Treatment(OPSA(), None, subject.task)


def _no_teacher_slow(subject: Subject) -> Treatment:
    """The method's own rate was chosen with a teacher, and may be too high without one."""
    return replace(_no_teacher(subject), rate=1 / GENTLER)


def _own_texts(subject: Subject) -> Treatment:
    return Treatment(OwnTexts(), None, subject.task)


def _shuffled(subject: Subject) -> Treatment:
    needs = _teachers_of(subject)
    if any(need.policy == "ema" for need in needs):
        raise DoesNotApply("the method's teacher is a moving average of the student")

    def policies(student: Policy) -> Mapping[str, Any]:
        names = [str(need) for need in needs]
        found = resolve_policies(student, subject.teacher, names, {})
        return {name: ShuffledTeacher(found[name]) for name in names}

    return Treatment(subject.method, subject.teacher, subject.task, policies)


def _sign(subject: Subject) -> Treatment:
    name = str(_teachers_of(subject)[0])
    return Treatment(SignOnly((name,)), subject.teacher, subject.task)


def _weaker(subject: Subject) -> Treatment:
    if subject.weaker is None:
        raise DoesNotApply("no weaker teacher was given (weaker=…)")
    return Treatment(subject.method, subject.weaker, subject.task)


def _other_hint(subject: Subject) -> Treatment:
    if tells_hints(subject.method):
        raise DoesNotApply("the method makes its hints itself")
    if not any(need.hinted for need in parse_needs(subject.method.needs)):
        raise DoesNotApply("the method reads no hints")
    return Treatment(subject.method, subject.teacher, with_other_hints(subject.task))


def _other_direction(subject: Subject) -> Treatment:
    method: Any = subject.method
    direction = getattr(method, "divergence", None)
    if direction not in DIRECTIONS or getattr(method, "estimator", "full") != "full":
        raise DoesNotApply("the method is no full KL in one of the two directions")
    try:
        other = replace(method, divergence=DIRECTIONS[direction])
    except (TypeError, InvalidValue) as error:
        raise DoesNotApply(f"the method does not take it: {error}") from None
    return Treatment(other, subject.teacher, subject.task)


def _teacher_texts(subject: Subject) -> Treatment:
    if not isinstance(subject.teacher, (Sampler, Writer)):
        raise DoesNotApply("there is no teacher that writes")
    return Treatment(SequenceKD(), subject.teacher, subject.task)


def _faster(subject: Subject) -> Treatment:
    return replace(_as_it_is(subject), rate=FASTER)


def _slower(subject: Subject) -> Treatment:
    return replace(_as_it_is(subject), rate=1 / FASTER)


TEACHER = "teacher"
ARMS = {
    arm.name: arm
    for arm in (
        Arm(TEACHER, "the method with its teacher", False, _as_it_is),
        Arm("no_teacher", "no teacher: penalty on unlikely tokens", True, _no_teacher),
        Arm(
            "no_teacher_adaptive",
            "no teacher: penalty that grows with entropy",
            True,
            _no_teacher_adaptive,
        ),
        Arm(
            "no_teacher_slow",
            "no teacher: the penalty, a tenth of the rate",
            True,
            _no_teacher_slow,
        ),
        Arm("own_texts", "no teacher: SFT on its own texts", True, _own_texts),
        Arm("shuffled", "the teacher's grades of other texts", False, _shuffled),
        Arm("sign", "only the sign of the teacher's grades", False, _sign),
        Arm("weaker", "a weaker teacher", False, _weaker),
        Arm("other_hint", "another prompt's hint", False, _other_hint),
        Arm("other_direction", "the other direction of the KL", False, _other_direction),
        Arm("teacher_texts", "SFT on the teacher's texts", False, _teacher_texts),
        Arm("lr_up", "three times the learning rate", False, _faster),
        Arm("lr_down", "a third of the learning rate", False, _slower),
    )
}


def _teachers_of(subject: Subject) -> list[Need]:
    """List what the method learns from: the names that grade tokens, but the reference alone."""
    needs = [
        need
        for need in parse_needs(subject.method.needs)
        if need.access is Access.LOGITS and (need.policy != "reference" or need.hinted)
    ]
    if not needs:
        raise DoesNotApply("the method reads no grades of a teacher")
    names = [str(need) for need in needs]
    found = resolve_policies(subject.student, subject.teacher, names, {})
    for name in names:
        if not isinstance(found.get(name), Grader):
            raise DoesNotApply(f"{name!r} gives no grades that could be changed")
        if isinstance(found[name], TopGrader):
            raise DoesNotApply(f"{name!r} gives only some log-probs")
    return needs
