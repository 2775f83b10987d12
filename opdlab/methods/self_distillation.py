"""Privileged self-distillation: the teacher is the student itself, given a hint.

    L(θ) = E_{y ~ p_θ(.|x)} sum_t D( p_θ(.|x, y_<t),  sg p_anchor(.|x, hint, y_<t) )

Nobody has the hint after training. The anchor is the student before training ("frozen"), a moving
average of it ("ema") or its present self ("live"). A hint brings information, not skill: the
student imitates what it cannot work out without the hint, and does not learn it. `DOPD` tells the
two apart. `SDPO` makes the hint of feedback on the student's own attempt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue
from opdlab.losses import DIVERGENCES, TopK
from opdlab.losses.closed_forms import ClosedForm
from opdlab.methods.opd import check_divergence, closed_form_of_divergence
from opdlab.support.expect import shortened
from opdlab.support.validation import Finite, validate_fields

Anchor = Literal["live", "frozen", "ema"]
ANCHORS: dict[str, str] = {"live": "student+hint", "frozen": "reference+hint", "ema": "ema+hint"}


@dataclass(frozen=True)
class SelfDistillation:
    """Match the student that sees its hint, on the student's own tokens.

    `opsd`, `sdft` and `context_distillation` make it as three papers have it. Each prompt needs a
    `hint`; for one context for all prompts give distill
    `policies={"reference+hint": student.frozen().seeing("…")}`.

    Attributes:
        divergence: A name of `opdlab.losses.DIVERGENCES`.
        options: Keywords of the divergence, as in `OPD`.
        top_k: A coarse support to compare on, as in `OPD`.
        anchor: The teacher: "frozen", "ema" (which moves by `Settings.ema_rate`) or "live".
        clip: The most that one entry of the vocabulary adds to a forward KL, in nats; the loss may
            then be negative. None for no limit.

    Raises:
        UnknownOption: The divergence does not take an option.
        InvalidValue: A value is out of its range, or two do not go together.
    """

    divergence: str = "jensen_shannon"
    options: dict[str, Any] = field(default_factory=dict)
    top_k: TopK | None = None
    anchor: Anchor = "frozen"
    clip: Finite | None = None

    def __post_init__(self) -> None:
        check_divergence(self)
        check_anchor(self, self.anchor)
        validate_fields(self)
        if self.clip is not None and (
            self.divergence != "forward_kl" or self.options or not self.clip > 0
        ):
            raise InvalidValue(
                f"SelfDistillation got clip={self.clip} with {self.divergence!r}. Clipping is for"
                " the forward KL, at a number of nats above 0: use divergence='forward_kl', or"
                " leave clip out."
            )

    @classmethod
    def opsd(cls, clip: float | None = None) -> SelfDistillation:
        """Make OPSD (arXiv 2601.18734): the hint is a worked solution, the teacher is frozen.

        The divergence is the Jensen-Shannon one on the full vocabulary, as in the authors' first
        scripts. They sample at temperature 1.1; here it is 1 unless `distill` gets another.

        Args:
            clip: Use a forward KL clipped at this number of nats instead. 0.05 is that of their
                later runs; that value, and clipping entry by entry, are taken from a
                re-implementation by others.

        Returns:
            The method.
        """
        return cls() if clip is None else cls("forward_kl", clip=clip)

    @classmethod
    def sdft(cls, divergence: str = "reverse_kl") -> SelfDistillation:
        """Make SDFT (arXiv 2601.19897): the hint is a demonstration, the teacher a moving average.

        The authors' code averages with `ema_rate=0.01`.

        Args:
            divergence: The paper states the reverse KL. Its authors have since said that their
                reported runs used the forward KL on the same on-policy samples, "forward_kl".

        Returns:
            The method.
        """
        return cls(divergence, anchor="ema")

    @classmethod
    def context_distillation(cls, k: int | None = None) -> SelfDistillation:
        """Make OPCD (arXiv 2602.12275): reverse KL to the frozen model that sees the context.

        Args:
            k: Compare on the student's top k tokens, with the rest as one bucket. The paper's code
                keeps the top 256 and drops the rest, in which mass can hide. None is the full
                vocabulary.

        Returns:
            The method.
        """
        return cls("reverse_kl", top_k=None if k is None else TopK(k))

    @property
    def needs(self) -> tuple[str, ...]:
        """The anchor with its hint."""
        return (ANCHORS[self.anchor],)

    def loss(self, rows: Rows) -> Tensor:
        """Compute the divergence to the anchor.

        Args:
            rows: A chunk of `n` tokens under the student and the anchor.

        Returns:
            `[n]`.
        """
        (teacher,) = self.needs
        pair = (rows.student, rows[teacher])
        if self.top_k is not None:
            by = teacher if self.top_k.by == "teacher" else "student"
            pair = rows.on(teacher, TopK(self.top_k.k, by, self.top_k.tail))
        if self.clip is not None:
            return clipped_forward_kl(*pair, clip=self.clip)
        return DIVERGENCES[self.divergence](*pair, **self.options)

    def closed_form(self, rows: Rows) -> ClosedForm | None:
        """Compute the divergence with its gradient in the logits, on the full vocabulary.

        Args:
            rows: A chunk of `n` tokens, without gradient.

        Returns:
            What `loss` gives, and its gradient; None with `top_k` or `clip`.
        """
        if self.top_k is not None or self.clip is not None:
            return None
        return closed_form_of_divergence(self, rows.pair(*self.needs))


def clipped_forward_kl(student: Tensor, teacher: Tensor, clip: float) -> Tensor:
    """Return sum over the vocabulary of min(q (log q - log p), clip).

    It is at most the forward KL, and may be negative.

    Args:
        student: Log-probs `[..., V]`.
        teacher: Log-probs `[..., V]`.
        clip: The most that one entry adds, in nats.

    Returns:
        `[...]`, nats.
    """
    q = teacher.exp()
    terms = torch.where(q > 0, q * (teacher - student), 0.0)  # 0 * -inf is 0 here
    return terms.clamp(max=clip).sum(-1)


def check_anchor(method: object, anchor: str) -> None:
    """Check that a method's anchor is one of `ANCHORS`.

    Args:
        method: The method, for the error.
        anchor: The anchor's name.

    Raises:
        InvalidValue: It is not.
    """
    if not isinstance(anchor, str) or anchor not in ANCHORS:
        raise InvalidValue(
            f"{type(method).__name__} got anchor={shortened(anchor)}. Use one of"
            f" {', '.join(ANCHORS)}."
        )
