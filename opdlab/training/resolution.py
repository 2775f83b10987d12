"""What a name in a method's `needs` stands for.

    student, teacher   as given to `distill`
    reference          the student before training
    ema                the moving average of the student's weights (`Settings.ema_rate`); one that is given does not move
    …+hint             the same policy, told each prompt's hint
    teacher.text       the teacher reduced to what it writes: any tokenizer, any server
    teacher.spans      the teacher graded by the bytes that its tokens and the student's share: any tokenizer

Policies that are one thing share one adapter object, so that `ema` and `ema+hint` move together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from opdlab.engine.needs import KNOWN, Access, Need, did_you_mean, parse_need, parse_needs
from opdlab.errors import InvalidValue, MissingPolicy
from opdlab.models.policy import Policy
from opdlab.support.expect import shortened
from opdlab.teachers.contract import expect_teacher


def resolve_policies(
    student: Policy, teacher: Any, needs: Sequence[str], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Resolve a method's `needs` to policies, the student first.

    Entries of `given` replace the default for that name.

    Raises:
        MissingPolicy: The teacher lacks the ability. The message names a method that can do without
            it.
    """
    bases: dict[str, Any] = {"student": student, "teacher": teacher, **given}
    made: dict[str, Any] = {"student": student}
    for need in parse_needs(needs):
        base, name = need.policy, str(need)
        if base == "reference" and base not in bases:
            bases[base] = student.frozen()
        elif base == "ema" and base not in bases:
            bases[base] = student._view(adapter=None)
        if name in given:
            made[name] = _able(given[name], need)
        elif bases.get(base) is not None:
            made[name] = _view(bases[base], need)
    return made


def check_overrides(method: Any, given: Any) -> None:
    """Check the user's `policies=` before any of them is used.

    Raises:
        InvalidValue: It is no dict, names a policy that the method does not read, or holds
            something that cannot teach.
    """
    from opdlab.methods.contract import name_of

    if not isinstance(given, Mapping):
        raise InvalidValue(
            f"distill got policies={shortened(given)}. Use a dict from names to policies, as"
            " {'reference': policy}."
        )
    read = list(
        dict.fromkeys(
            name for need in parse_needs(method.needs) for name in (str(need), need.policy)
        )
    )
    for name, policy in given.items():
        if name == "student":
            raise InvalidValue(
                "distill got policies={'student': …}, but the student is what is trained. Give it"
                " as the first argument; what a hinted view of it is goes under 'student+hint'."
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
    """Make the error for a policy that nobody gave."""
    from opdlab.methods.contract import name_of

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
    """Names of the policies that grade the student's own tokens."""
    return [name for name in policies if not name.endswith((".text", ".spans"))]


def start_average(
    student: Policy, policies: Mapping[str, Any], given: Mapping[str, Any]
) -> list[Policy]:
    """Give the policy `ema` weights of its own, equal to the student's; returns it, or nothing
    where no method needs it.

    Its views share one adapter object, so one of them stands for all. One that was `given` stays
    what it is.
    """
    views = [
        policies[name]
        for name in ("ema", "ema+hint")
        if name in policies and not {name, "ema"} & given.keys()
    ][:1]
    for view in views:
        if student.adapter is not None:  # in full training `distill` has copied the whole model
            view._adapter.own(student.weights, student.weights.clone_adapter(student.adapter))
    return views


def move_average(policy: Policy, student: Policy, rate: float) -> None:
    """Move `policy` towards the student: `w <- (1 - rate) w + rate w_student`."""
    with torch.no_grad():
        theirs = trained_tensors(student)
        for name, ours in trained_tensors(policy).items():
            ours.lerp_(theirs[name], rate)


def trained_tensors(policy: Policy) -> dict[str, torch.Tensor]:
    """The tensors that training moves, by name: the adapter's, or the model's. Not copies."""
    if policy.adapter is None:
        return dict(policy.weights.model.named_parameters())
    return policy.weights.adapter_state(policy.adapter)


def _view(policy: Any, need: Need) -> Any:
    """`policy` as the suffix of a name says: told hints, or reduced to what it writes."""
    policy = _able(policy, need)
    if not need.hinted:
        return policy
    if not isinstance(policy, Policy):
        raise MissingPolicy(
            f"{str(need)!r} must be told hints, and only local models can. Load the teacher with"
            " Policy.load(…)."
        )
    return policy.seeing()


def _able(policy: Any, need: Need) -> Any:
    """`policy`, if it can do what is asked of it; a local model reduced to what it writes, where
    only texts are asked for.
    """
    local = isinstance(policy, Policy)
    if need.access is Access.TEXT:
        if local:
            from opdlab.teachers import TextOnly

            return TextOnly(policy)
        if not hasattr(policy, "write"):
            raise MissingPolicy(
                f"{str(need)!r} must write texts, but {type(policy).__name__} only grades. Use a"
                " teacher that writes."
            )
        return policy
    if not (local or hasattr(policy, "grade")):
        raise MissingPolicy(
            f"{str(need)!r} must grade tokens, but {type(policy).__name__} only writes. Use a"
            " method that learns from texts alone (OmniOPD, SequenceKD), or a teacher with"
            " log-probs."
        )
    return policy
