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

from opdlab.errors import MissingPolicy
from opdlab.policy import Policy


def cast(student: Policy, teacher: Any, needs: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """The policies that a method needs, by name, the student first. `given` replaces what a name stands for.

    Raises MissingPolicy where the teacher lacks the ability, naming a method that can do without it.
    """
    bases: dict[str, Any] = {"student": student, "teacher": teacher, **given}
    made: dict[str, Any] = {"student": student}
    for name in needs:
        base = name.removesuffix("+hint").removesuffix(".text").removesuffix(".spans")
        if base == "reference" and base not in bases:
            bases[base] = student.frozen()
        elif base == "ema" and base not in bases:
            bases[base] = student._view(adapter=None)
        if name in given:
            made[name] = given[name]
        elif bases.get(base) is not None:
            made[name] = _view(bases[base], name)
    return made


def missing(method: object, name: str) -> MissingPolicy:
    """The error for a policy that nobody gave."""
    return MissingPolicy(
        f"{type(method).__name__} needs {name!r}, but there is no such policy. Give distill a teacher, "
        f"policies={{{name!r}: …}}, or use a method that needs none (GRPO, SFT)."
    )


def graded(policies: Mapping[str, Any]) -> list[str]:
    """Names of the policies that grade the student's own tokens."""
    return [name for name in policies if not name.endswith((".text", ".spans"))]


def start_average(student: Policy, policies: Mapping[str, Any], given: Mapping[str, Any]) -> list[Policy]:
    """Give the policy `ema` weights of its own, equal to the student's; returns it, or nothing where no method needs it.

    Its views share one adapter object, so one of them stands for all. One that was `given` stays what it is.
    """
    views = [policies[name] for name in ("ema", "ema+hint") if name in policies and not {name, "ema"} & given.keys()][:1]
    for view in views:
        if student.adapter is not None:  # in full training `distill` has copied the whole model
            view._adapter.own(student.weights, student.weights.clone_adapter(student.adapter))
    return views


def average(policy: Policy, student: Policy, rate: float) -> None:
    """Move `policy` towards the student: `w <- (1 - rate) w + rate w_student`."""
    with torch.no_grad():
        theirs = state(student)
        for name, ours in state(policy).items():
            ours.lerp_(theirs[name], rate)


def state(policy: Policy) -> dict[str, torch.Tensor]:
    """The tensors that training moves, by name: the adapter's, or the model's. Not copies."""
    if policy.adapter is None:
        return dict(policy.weights.model.named_parameters())
    return policy.weights.adapter_state(policy.adapter)


def _view(policy: Any, name: str) -> Any:
    """`policy` as the suffix of `name` says."""
    local = isinstance(policy, Policy)
    if name.endswith(".text"):
        if not local:
            return policy
        from opdlab.teachers import TextOnly

        return TextOnly(policy)
    if not (local or hasattr(policy, "grade")):
        raise MissingPolicy(
            f"{name!r} must grade tokens, but {type(policy).__name__} only writes. Use a method that learns from texts alone "
            "(OmniOPD, SequenceKD), or a teacher with log-probs."
        )
    if name.endswith("+hint"):
        if not local:
            raise MissingPolicy(f"{name!r} must be told hints, and only local models can. Load the teacher with Policy.load(…).")
        return policy.seeing()
    return policy
