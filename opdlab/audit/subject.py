"""The loss that is audited, the small world that it is put in, and one observation of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdlab import exact
from opdlab.engine.batch import Batch
from opdlab.engine.needs import Access, parse_need
from opdlab.errors import OpdlabError
from opdlab.methods.contract import FunctionMethod, HasPlan, name_of, student_share, writer_names
from opdlab.methods.conversion import as_method

PAIRS, TOKENS = 8, 5  # students beside their targets, and tokens of the vocabulary
ZERO = 1e-8  # of a length, relative to the lengths that it is a mean of
ROUNDING = 1e-13  # a float64 slope of log-probs no longer than this is none


@dataclass(frozen=True)
class Subject:
    """A loss with what it needs.

    Attributes:
        method: The loss as a method.
        name: Its name for people.
        needs: The policies that it reads.
        writer: "student", or "teacher" where it learns from given texts.
        length: Tokens that texts must have to show what its plan does; one without a plan.
        texts: The texts in words, where the student does not write them. Given answers are taken
            for the teacher's.
    """

    method: Any
    name: str
    needs: tuple[str, ...]
    writer: str
    length: int
    texts: str = ""

    @property
    def targets(self) -> list[str]:
        """The policies that the student may be drawn to."""
        return ["teacher"] if self.writer == "teacher" else list(dict.fromkeys(self.needs))

    def world(
        self, seed: int = 0, same: bool = False, prompts: int = PAIRS
    ) -> dict[str, exact.Table]:
        """Make a table for every policy: all different, or all the student's.

        Args:
            seed: Seed of the tables.
            same: Whether all policies are equal.
            prompts: Number of prompts of the tables.

        Returns:
            The tables by policy, the student's first.
        """
        names = list(dict.fromkeys(["student", *self.needs, *self.targets]))
        seeds = [0 if same else i for i in range(len(names))]
        return {
            name: exact.Table.random(TOKENS, self.length, prompts, seed=1000 * seed + i, scale=1.2)
            for name, i in zip(names, seeds, strict=True)
        }


@dataclass(frozen=True)
class Observation:
    """One observation of a loss: its exact expectation, and its value at every token.

    Attributes:
        gradient: The expected gradient `[X, S, V]`.
        rms: Root mean square length of one token's gradient.
        value: The mean loss `[X, S]` at every prefix.
        losses: The loss of every token, `[tokens]`.
        slopes: The weighted gradient of every token, `[tokens, V]`.
    """

    gradient: Tensor
    rms: float
    value: Tensor
    losses: Tensor
    slopes: Tensor

    @property
    def length(self) -> float:
        """Length of the expected gradient."""
        return float(self.gradient.norm())

    @property
    def is_zero(self) -> bool:
        """Tell whether the expected gradient is zero but for rounding."""
        return self.length <= max(ZERO * self.rms, ROUNDING)


def observe(method: Any, subject: Subject, world: Mapping[str, exact.Table]) -> Observation:
    """Run plan and loss on every text, each with its exact probability.

    Args:
        method: The method to run; the subject's own or a variant of it.
        subject: Tells who writes the texts and which policies are read.
        world: A table for every policy.

    Returns:
        The expected gradient, and the loss of every token of every text.
    """
    student, by = world["student"], world[subject.writer]
    rollout = exact.everything(by.prompts, by.vocab, by.length, by=by)
    law = exact.law(by, rollout)
    policies = {name: world[name] for name in dict.fromkeys(["student", *subject.needs])}
    result = exact.loss_pass(method, policies, rollout, law)
    each, where = law.repeat_interleave(rollout.lengths), student.where(rollout)

    def spread(flat: Tensor, like: Tensor) -> Tensor:
        return torch.zeros_like(like).index_put_(where, flat, accumulate=True)

    weight = spread(each, student.logits[..., 0])
    value = spread(each * result.loss, weight) / weight
    rms = (each * result.columns["grad_norm"] ** 2).sum().sqrt().item()
    return Observation(
        spread(result.gradient, student.logits), rms, value, result.loss, result.gradient
    )


def subject_of(
    loss: Any, needs: Sequence[str] | str | None = None, where: str = "audit"
) -> Subject:
    """Make the subject of an audit from whatever `as_method` takes.

    Args:
        loss: The loss.
        needs: The policies that a bare function reads.
        where: The function that was called, for errors.

    Returns:
        The subject; its length is two tokens if the method's plan makes columns.

    Raises:
        OpdlabError: The loss has no expectation over the student's tokens.
    """
    method: Any = as_method(loss, where, needs)
    name = name_with_options(method)
    share, writers = student_share(method), writer_names(method)
    if other := [n for n in method.needs if parse_need(n).access is not Access.LOGITS]:
        raise OpdlabError(
            f"{name} needs {other[0]!r}, which does not grade the student's own tokens, so there is"
            " no expectation over them to take. Audit methods that need a teacher, a reference or"
            " an ema."
        )
    if share == 0 and writers not in (("teacher",), ("answer",)):
        raise OpdlabError(
            f"{name} learns from texts of {' and '.join(writers)} side by side. Audit losses on the"
            " texts of one writer."
        )
    if share > 0 and not method.needs:
        raise OpdlabError(
            f"{name} looks at no other distribution, so there is no divergence to name. Audit"
            " methods that need a teacher."
        )
    texts = _TEXTS[writers[0]] if share == 0 else ""
    subject = Subject(
        method, name, tuple(method.needs), "teacher" if texts else "student", 1, texts
    )
    return replace(subject, length=2) if _plans(subject) else subject


_TEXTS = {"teacher": "on the teacher's texts", "answer": "if a teacher wrote the answers"}


def _plans(subject: Subject) -> bool:
    """Tell whether there is a plan that says anything."""
    if not isinstance(subject.method, HasPlan):
        return False
    world = subject.world(prompts=1)
    student = world["student"]
    rollout = exact.everything(student.prompts, TOKENS, 1, by=student)
    names = dict.fromkeys(["student", *subject.needs])
    return bool(subject.method.plan(Batch(rollout, {name: world[name] for name in names})))


def name_with_options(method: Any) -> str:
    """Name a method by its class with what differs from the defaults, or by its function.

    Args:
        method: The method.

    Returns:
        A name such as "OPD(divergence='forward_kl')".
    """
    if is_dataclass(method) and not isinstance(method, FunctionMethod):
        given = [
            f"{f.name}={getattr(method, f.name)!r}"
            for f in fields(method)
            if getattr(method, f.name) != _default(f)
        ]
        return f"{type(method).__name__}({', '.join(given)})"
    return name_of(method)


def _default(field: Any) -> Any:
    return field.default_factory() if callable(field.default_factory) else field.default
