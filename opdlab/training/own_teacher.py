"""Warn of a teacher that is the student itself, from which nothing can be learned."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from opdlab.models.policy import Policy, as_policy

# A hinted teacher knows more than the student, so it is not among these.
PLAIN = ("teacher", "teacher.text", "teacher.spans")


def warn_of_own_teacher(
    student: Policy, teacher: Any, needs: Sequence[str], policies: Mapping[str, Any]
) -> None:
    """Warn where the student is to learn from a policy with its own weights, adapter and context.

    Args:
        student: The student before training.
        teacher: As given to `distill`.
        needs: The method's needs. A method that reads no plain teacher is not looked at.
        policies: The user's `policies=`, which replace what a name stands for.
    """
    for name in PLAIN:
        plain = policies.get(name, policies.get("teacher", teacher))
        if name in needs and is_same_distribution(student, plain):
            warnings.warn(
                f"The {name!r} is the student itself (same weights, adapter and context), so there"
                " is nothing to learn from it: any divergence between the two is zero. Give another"
                " teacher, let the teacher see more (student.seeing('…'), SelfDistillation()), or"
                " train on rewards (GRPO).",
                stacklevel=4,
            )
            return


def is_same_distribution(one: Policy, other: Any) -> bool:
    """Tell whether two policies are one distribution.

    They share weights and context, and have the same adapter or equal copies of it.

    Args:
        one: A policy.
        other: Another grader; one that is no `Policy` is never the same.

    Returns:
        True if they are the same.
    """
    two = as_policy(other)
    if two is None:
        return False
    if one.weights is not two.weights or one.context is not two.context:
        return False
    if one.adapter is None or two.adapter is None or one.adapter == two.adapter:
        return one.adapter == two.adapter
    ours, theirs = (one.weights.adapter_state(adapter) for adapter in (one.adapter, two.adapter))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
