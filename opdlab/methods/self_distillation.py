"""Privileged self-distillation: the teacher is the student itself, told a hint that nobody has
after training.

    L(theta) = E_{y ~ p_theta(.|x)} sum_t D( p_theta(.|x, y_<t),  sg p_anchor(.|x, hint, y_<t) )

The anchor is the student before training ("frozen"), a moving average of it ("ema") or its present
self ("live"). A hint brings information, not skill: what the student cannot work out without it is
imitated, not learnt (see `dopd.py` for a method that tells the two apart). Left out: feedback from
a verifier as a hint, and reward terms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue
from opdlab.losses import DIVERGENCES, TopK
from opdlab.methods.opd import check_divergence
from opdlab.support.expect import shortened
from opdlab.support.validation import Finite, validate_fields

Anchor = Literal["live", "frozen", "ema"]
ANCHORS: dict[str, str] = {"live": "student+hint", "frozen": "reference+hint", "ema": "ema+hint"}


@dataclass(frozen=True)
class SelfDistillation:
    """Match the student told its hint, on the student's own tokens; `opsd`, `sdft` and
    `context_distillation` are settings.

    divergence, options, top_k: as in `OPD`. anchor: whose hinted self teaches; "ema" moves by
        `Settings.ema_rate`. clip: the
    most that one entry of the vocabulary adds to a forward KL, in nats (the loss may then be
    negative). Each prompt needs a `hint`; for one context for all prompts give distill
    `policies={"reference+hint": student.frozen().seeing("…")}`.
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
        """On-policy self-distillation (OPSD, arXiv 2601.18734): the hint is a worked solution, the
        teacher the initial weights.

        Generalised JSD at ½ on the full vocabulary, as in the authors' first scripts. `clip=0.05`
        gives the clipped forward KL of later runs; that it is clipped an entry at a time, and this
        value, are taken from a re-implementation by others. They sample at temperature 1.1, here 1
        unless told otherwise.
        """
        return cls() if clip is None else cls("forward_kl", clip=clip)

    @classmethod
    def sdft(cls, divergence: str = "reverse_kl") -> SelfDistillation:
        """Self-distillation fine-tuning (SDFT, arXiv 2601.19897): the hint is a demonstration, the
        teacher a moving average.

        Reverse KL is the objective that the paper states. Its authors have since said that their
        reported runs used the forward KL on the same on-policy samples: `sdft("forward_kl")`. Their
        code averages with `ema_rate=0.01`.
        """
        return cls(divergence, anchor="ema")

    @classmethod
    def context_distillation(cls, k: int | None = None) -> SelfDistillation:
        """On-policy context distillation (OPCD, arXiv 2602.12275): reverse KL to the frozen model
        that sees the context.

        The paper's code keeps the student's top 256 tokens and drops the rest; the full vocabulary
        is the default here, and `k=256` keeps the rest as one bucket, so that mass cannot hide in
        it.
        """
        return cls("reverse_kl", top_k=None if k is None else TopK(k))

    @property
    def needs(self) -> tuple[str, ...]:
        return (ANCHORS[self.anchor],)

    def loss(self, rows: Rows) -> Tensor:
        (teacher,) = self.needs
        support = self.top_k and TopK(
            self.top_k.k, teacher if self.top_k.by == "teacher" else "student", self.top_k.tail
        )
        return self._divergence()(
            *(rows.on(teacher, support) if support else (rows.student, rows[teacher]))
        )

    def _divergence(self) -> Callable[..., Tensor]:
        if self.clip is not None:
            return partial(clipped_forward_kl, clip=self.clip)
        return partial(DIVERGENCES[self.divergence], **self.options)


def clipped_forward_kl(student: Tensor, teacher: Tensor, clip: float) -> Tensor:
    """sum over the vocabulary of min(q (log q - log p), clip):

    `[..., V] -> [...]`, nats. Below the forward KL, may be negative.
    """
    q = teacher.exp()
    terms = torch.where(q > 0, q * (teacher - student), 0.0)  # 0 * -inf is 0 here
    return terms.clamp(max=clip).sum(-1)


def check_anchor(method: object, anchor: str) -> None:
    """Raise InvalidValue unless `anchor` is one of `ANCHORS`."""
    if not isinstance(anchor, str) or anchor not in ANCHORS:
        raise InvalidValue(
            f"{type(method).__name__} got anchor={shortened(anchor)}. Use one of"
            f" {', '.join(ANCHORS)}."
        )
