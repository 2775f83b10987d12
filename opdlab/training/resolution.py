"""Resolve the names in a method's `needs` to policies.

    student, teacher   as given to `distill`
    reference          the student before training
    ema                the moving average of the student's weights (`Settings.ema_rate`)
    …+hint             the same policy, told each prompt's hint
    teacher.text       the teacher reduced to its texts: any tokenizer, any server
    teacher.spans      the teacher graded by the bytes of its own tokens: any tokenizer

An `ema` that the user gives does not move. Views of one policy share one adapter object, so `ema`
and `ema+hint` move together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from opdlab.engine.needs import KNOWN, Access, Need, did_you_mean, parse_need, parse_needs
from opdlab.errors import InvalidValue, MissingPolicy
from opdlab.methods.contract import name_of
from opdlab.models.policy import Policy, as_policy
from opdlab.models.protocols import Grader, Writer
from opdlab.support.expect import shortened
from opdlab.teachers.contract import expect_teacher
from opdlab.teachers.many import MultiTeacher
from opdlab.teachers.text_only import as_writer


def resolve_policies(
    student: Policy,
    teacher: Grader | Writer | None,
    needs: Sequence[str],
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    """Resolve a method's `needs` to policies, student first.

    Args:
        student: The policy being trained.
        teacher: The user's teacher, or None for methods that need none.
        needs: The names that the method reads, e.g. `("teacher+hint", "reference")`.
        overrides: The user's `policies=`; an entry replaces the default for that name.

    Returns:
        A grader or writer for each name that can be resolved; others are missing.

    Raises:
        MissingPolicy: A policy lacks the ability that is needed. The message names a method that
            can do without it.
    """
    bases: dict[str, Any] = {"student": student, "teacher": teacher, **overrides}
    resolved: dict[str, Any] = {"student": student}
    for need in parse_needs(needs):
        base, name = need.policy, str(need)
        if base == "reference" and base not in bases:
            bases[base] = student.frozen()
        elif base == "ema" and base not in bases:
            bases[base] = student.without_adapter()
        if name in overrides:
            resolved[name] = _with_access(overrides[name], need)
        elif bases.get(base) is not None:
            resolved[name] = _with_hint(_with_access(bases[base], need), need)
    return resolved


def check_overrides(method: Any, overrides: Any) -> None:
    """Check the user's `policies=` before any of them is used.

    Args:
        method: The method that reads the policies.
        overrides: As it was given to `distill`.

    Raises:
        InvalidValue: It is no dict, names a policy that the method does not read, or holds
            something that cannot teach.
    """
    if not isinstance(overrides, Mapping):
        raise InvalidValue(
            f"distill got policies={shortened(overrides)}. Use a dict from names to policies, as"
            " {'reference': policy}."
        )
    read = [name for need in parse_needs(method.needs) for name in (str(need), need.policy)]
    read = list(dict.fromkeys(read))
    for name, policy in overrides.items():
        if name == "student":
            raise InvalidValue(
                "distill got policies={'student': …}, but the student is the policy that trains."
                " Give it as the first argument; a hinted view of it goes under 'student+hint'."
            )
        if name not in read:
            reads = f"it reads {', '.join(map(repr, read))}" if read else "it reads no policy"
            raise InvalidValue(
                f"distill got policies={{{shortened(name)}: …}}, which {name_of(method)} does not"
                f" use: {reads}. {did_you_mean(str(name), read)}Leave it out, or name it in the"
                " method's `needs`."
            )
        expect_teacher(policy, "distill", f"policies[{name!r}]")


def missing_policy_error(method: object, name: str) -> MissingPolicy:
    """Make the error for a policy that nobody gave.

    Args:
        method: The method that needs it.
        name: As in the method's `needs`, e.g. "teacher+hint".

    Returns:
        The error, to be raised. Its message says what to give, or which methods do without.
    """
    base = parse_need(name).policy
    if base == "teacher":
        way = (
            f"Give distill a teacher, policies={{{name!r}: …}}, or use a method that needs none"
            " (GRPO, SFT)."
        )
    else:
        way = (
            f"{did_you_mean(base, KNOWN)}There are {', '.join(KNOWN)}; give distill any other by"
            f" name, policies={{{name!r}: …}}."
        )
    return MissingPolicy(f"{name_of(method)} needs {name!r}, but there is no such policy. {way}")


def grader_names(policies: Mapping[str, Any]) -> list[str]:
    """List the policies that grade the student's own tokens: all but `….text` and `….spans`.

    Args:
        policies: The policies by name.

    Returns:
        Their names, in order.
    """
    return [name for name in policies if parse_need(name).access is Access.LOGITS]


def start_average(
    student: Policy, policies: Mapping[str, Any], overrides: Mapping[str, Any]
) -> list[Policy]:
    """Give the policy `ema` weights of its own, equal to the student's.

    Args:
        student: The policy being trained.
        policies: The resolved policies.
        overrides: The user's `policies=`. An average that the user gives stays what it is.

    Returns:
        The average in a list, which is empty where the method reads none. Its views share one
        adapter object, so one of them stands for all.
    """
    for name in ("ema", "ema+hint"):
        if name in policies and not {name, "ema"} & overrides.keys():
            average: Policy = policies[name]
            if student.adapter is not None:  # in full training the whole model is copied
                average._adapter.own(
                    student.weights, student.weights.clone_adapter(student.adapter)
                )
            return [average]
    return []


def move_average(average: Policy, student: Policy, rate: float) -> None:
    """Move the average towards the student: `w <- (1 - rate) w + rate w_student`.

    Args:
        average: The moving average, changed in place.
        student: The student, as it is after its update.
        rate: The share of the way to move, from 0 to 1.
    """
    with torch.no_grad():
        theirs = trained_tensors(student)
        for name, ours in trained_tensors(average).items():
            ours.lerp_(theirs[name], rate)


def trained_tensors(policy: Policy) -> dict[str, torch.Tensor]:
    """Return the tensors that training moves, by name: the adapter's, or the model's.

    Args:
        policy: The policy; without an adapter all parameters of its model count.

    Returns:
        The tensors themselves, not copies.
    """
    if policy.adapter is None:
        return dict(policy.weights.model.named_parameters())
    return policy.weights.adapter_state(policy.adapter)


def _with_hint(policy: Any, need: Need) -> Any:
    """The policy, told hints where the need asks for that."""
    if not need.hinted:
        return policy
    if isinstance(policy, MultiTeacher):
        return policy.seeing()
    local = as_policy(policy)
    if local is None:
        raise MissingPolicy(
            f"{str(need)!r} must be told hints, and only local models can. Load the teacher with"
            " Policy.load(…)."
        )
    return local.seeing()


def _with_access(policy: Any, need: Need) -> Any:
    """The policy, if it can do what the need asks for.

    Where only texts are needed, a local model is reduced to its texts.
    """
    if isinstance(policy, MultiTeacher):
        view = policy.map(lambda member: _with_access(member, need))
        return view.by_bytes() if need.access is Access.SPANS else view
    if need.access is Access.TEXT:
        writer = as_writer(policy)
        if not isinstance(writer, Writer):
            raise MissingPolicy(
                f"{str(need)!r} must write texts, but {type(policy).__name__} only grades. Use a"
                " teacher that writes."
            )
        return writer
    if not isinstance(policy, Grader):
        raise MissingPolicy(
            f"{str(need)!r} must grade tokens, but {type(policy).__name__} only writes. Use a"
            " method that learns from texts alone (OmniOPD, SequenceKD), or a teacher with"
            " log-probs."
        )
    return policy
