"""Dual on-policy distillation: the privileged teacher or student teaches each token.

The hint p is given to both teachers (arXiv 2606.30626, equation 1 and the table of regimes), and
y_n is the token that the bare student sampled:

    A_n = | log T(y_n|x,p,y_<n) - log S(y_n|x,p,y_<n) |,      q_T, q_S the two probabilities

    LH  A <  Ā, q_S + q_T >= their mean    β_l KL( S(.|x) || T(.|x,p) )
    LL  A <  Ā, q_S + q_T <  their mean    β_w KL( S(.|x) || sg S(.|x,p) )
    HT  A >= Ā, q_T >= q_S                     JS( S(.|x),    T(.|x,p) )
    HS  A >= Ā, q_T <  q_S                 β_l KL( S(.|x) || sg S(.|x,p) )

In words: LH, only the hint is missing, so imitate lightly; LL, both are unsure, so only steady; HT,
the teacher can do more, so transfer all of it; HS, the student knows its way, so keep it.

The paper has no official code. It confirms the masks, the divergences, the weights, K and the 5 %.
Ours are: the support of the top K (the student's, with a bucket for the rest), the trimming (tokens
in the top 5 % of A leave the two means, and are still routed and trained), and that means run over
all tokens of a step. Every target sees the hint, so the pull towards what only the hint tells is
weakened and not removed. The switches `anchor`, `hs`, `gap_student` and `adaptive` are opdlab's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from opdlab.data.column import Column, Kind
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue
from opdlab.losses import TopK, jensen_shannon, reverse_kl
from opdlab.methods.self_distillation import ANCHORS, Anchor, check_anchor
from opdlab.support.validation import Count, Finite, Flag, validate_fields

TEACHER = "teacher+hint"
Regime = tuple[float, str, Callable[[Tensor, Tensor], Tensor]]  # weight, source, divergence
CHOICES = {
    "support": ("student", "teacher"),
    "hs": ("self", "teacher", "none"),
    "gap_student": ("privileged", "bare"),
}


class Route(IntEnum):
    """The four regimes: low gap (L) by confidence, high gap (H) by who leads."""

    LH = 0
    LL = 1
    HT = 2
    HS = 3


ROUTE_LABELS = ("LH agree, sure", "LL agree, unsure", "HT teacher leads", "HS student leads")
ROUTE_HUES = ("amount", "minus", "teacher", "student")


def gap(logp_teacher: Tensor, logp_student: Tensor) -> Tensor:
    """Return the privilege advantage gap A of sampled tokens, in nats.

    It is zero where both rule the token out.

    Args:
        logp_teacher: Log-probs of the tokens under the hinted teacher, any shape.
        logp_student: The same under the hinted student.

    Returns:
        Nats, in the same shape.
    """
    return (logp_teacher - logp_student).abs().nan_to_num(nan=0.0, posinf=torch.inf)


def thresholds(
    logp_teacher: Tensor, logp_student: Tensor, mask: Tensor, trim: float = 0.05
) -> tuple[float, float]:
    """Return Ā and the mean of q_S + q_T over the tokens whose gap is not among the largest.

    Args:
        logp_teacher: Log-probs of the sampled tokens under the hinted teacher, any shape.
        logp_student: The same under the hinted student.
        mask: True on the tokens that count, in the same shape.
        trim: Tokens with a gap above the quantile 1 - trim are left out.

    Returns:
        Two numbers, the first in nats; zeros where there is no token.
    """
    logp_teacher = logp_teacher.detach()[mask].double()
    logp_student = logp_student.detach()[mask].double()
    a = gap(logp_teacher, logp_student)
    if not len(a):
        return 0.0, 0.0
    kept = a <= a.kthvalue(1 + int((len(a) - 1) * (1 - trim) + 1e-9)).values
    return _mean(a[kept]), _mean((logp_teacher.exp() + logp_student.exp())[kept])


def route(
    logp_teacher: Tensor,
    logp_student: Tensor,
    mask: Tensor,
    trim: float = 0.05,
    limits: tuple[float, float] | None = None,
) -> Tensor:
    """Return the `Route` of every token, -1 outside the mask; ties go to High, to LH and to HT.

    Args:
        logp_teacher: Log-probs of the sampled tokens under the hinted teacher, any shape.
        logp_student: The same under the hinted student.
        mask: True on the tokens that count, in the same shape.
        trim: As in `thresholds`.
        limits: The two thresholds, where they are known from all tokens of a step.

    Returns:
        int64, in the shape of `mask`.
    """
    mean_gap, mean_confidence = limits or thresholds(logp_teacher, logp_student, mask, trim)
    logp_teacher, logp_student = logp_teacher.detach().double(), logp_student.detach().double()
    low = gap(logp_teacher, logp_student) < mean_gap
    sure = logp_teacher.exp() + logp_student.exp() >= mean_confidence
    out = torch.where(logp_teacher >= logp_student, int(Route.HT), int(Route.HS))
    out = torch.where(low, torch.where(sure, int(Route.LH), int(Route.LL)), out)
    return out.masked_fill(~mask, -1)


@dataclass(frozen=True)
class DOPD:
    """Route each token to the privileged teacher or the privileged student.

    The defaults are the paper's; so is the mean over sequences of the recipe.

    Attributes:
        light: β_l, of the regimes LH and HS.
        weak: β_w, of the regime LL.
        k: K, the number of tokens on which the reverse KLs are compared.
        trim: Share of tokens, those of largest gap, that leave the two means; from 0 to below 1.
        support: The policy whose top K are taken, "student" or "teacher" (the target).
        tail: The fate of the mass outside (see `TopK`).
        anchor: The privileged student of gap and targets: "live" (the paper's), "frozen" before
            training, or "ema", a moving average. A live one drifts where no token is routed to the
            teacher.
        hs: The fourth regime: "self" (the paper's), "teacher" (as HT), or "none" (no loss). "self"
            leaves a student that is confidently wrong to itself, since it never samples what the
            teacher would say.
        gap_student: "bare" takes the gap from the student without the hint, a known error of
            implementations: it counts missing information as missing capability.
        adaptive: False gives every token the top-K reverse KL to the privileged teacher at weight
            1; routes are still recorded.

    Raises:
        InvalidValue: A value is out of its range.
    """

    light: Finite = 0.6
    weak: Finite = 0.3
    k: Count = 128
    trim: Finite = 0.05
    support: Literal["student", "teacher"] = "student"
    tail: Literal["bucket", "renormalize", "drop"] = "bucket"
    anchor: Anchor = "live"
    hs: Literal["self", "teacher", "none"] = "self"
    gap_student: Literal["privileged", "bare"] = "privileged"
    adaptive: Flag = True

    recipe: ClassVar[dict[str, Any]] = {"normalize": "sequence"}

    def __post_init__(self) -> None:
        check_anchor(self, self.anchor)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise InvalidValue(
                    f"DOPD got {name}={getattr(self, name)!r}. Use one of {', '.join(known)}."
                )
        if self.tail not in ("bucket", "renormalize", "drop"):
            TopK(1, tail=self.tail)
        validate_fields(self)
        if not (self.light >= 0 and self.weak >= 0 and 0 <= self.trim < 1):
            raise InvalidValue(
                f"DOPD got light={self.light}, weak={self.weak}, trim={self.trim}. Use weights of"
                " at least 0 and a share to trim from 0 to below 1."
            )
        TopK(self.k, tail=self.tail)

    @property
    def needs(self) -> tuple[str, ...]:
        """The hinted teacher and the hinted anchor."""
        return (TEACHER, ANCHORS[self.anchor])

    def plan(self, batch: Batch) -> dict[str, Column]:
        """Route each token, and keep the two numbers that decide.

        Args:
            batch: The step's rollout under all policies.

        Returns:
            `route` (a regime), `gap` (nats) and `confidence`, `[B, T]` each.
        """
        student = ANCHORS[self.anchor] if self.gap_student == "privileged" else "student"
        logp = batch.map(
            lambda rows: torch.stack([rows.logp_of(TEACHER), rows.logp_of(student)], -1),
            needs=(TEACHER, student),
        )
        ours, theirs = logp[..., 1], logp[..., 0]
        # The means are those of the step, however many processes share it.
        everyone = batch.gather(logp)
        is_token = torch.ones(len(everyone), dtype=torch.bool, device=everyone.device)
        limits = thresholds(everyone[:, 0], everyone[:, 1], is_token, self.trim)
        sides = (TEACHER, student)
        return {
            "route": Column(
                route(theirs, ours, batch.mask, limits=limits),
                "gap low or high (L, H); then confidence high or low, or who leads",
                labels=ROUTE_LABELS,
                hues=ROUTE_HUES,
            ),
            "gap": Column(
                gap(theirs, ours),
                "|log T(y) − log S(y)|, y the sampled token",
                unit="nats",
                kind=Kind.AMOUNT,
                compares=sides,
                threshold=limits[0],
                less="agree",
                more="apart",
            ),
            "confidence": Column(
                (theirs.exp() + ours.exp()) * batch.mask,
                "T(y) + S(y), y the sampled token",
                kind=Kind.AMOUNT,
                compares=sides,
                threshold=limits[1],
                less="unsure",
                more="sure",
            ),
        }

    def loss(self, rows: Rows) -> Tensor:
        """Compute the loss of each token's regime.

        Args:
            rows: A chunk of `n` tokens, with the column `route`.

        Returns:
            `[n]`, in nats.
        """
        if not self.adaptive:
            return self._top_k_kl(rows.student, rows[TEACHER])
        # Zeros that still depend on the student.
        loss = rows.student[:0].sum() + rows.student.new_zeros(len(rows))
        for regime, (weight, policy, divergence) in self._regimes().items():
            at = (rows.route == regime).nonzero()[:, 0]
            if weight and len(at):
                value = divergence(
                    rows.student.index_select(0, at), rows[policy].index_select(0, at)
                )
                loss = loss.index_put((at,), weight * value)
        return loss

    def _regimes(self) -> dict[Route, Regime]:
        """Weight, target and divergence of each regime; one that is not here has no loss."""
        anchor = ANCHORS[self.anchor]
        table: dict[Route, Regime] = {
            Route.LH: (self.light, TEACHER, self._top_k_kl),
            Route.LL: (self.weak, anchor, self._top_k_kl),
            Route.HT: (1.0, TEACHER, jensen_shannon),
            Route.HS: (self.light, anchor, self._top_k_kl),
        }
        if self.hs == "teacher":
            table[Route.HS] = table[Route.HT]
        elif self.hs == "none":
            del table[Route.HS]
        return table

    def _top_k_kl(self, student: Tensor, target: Tensor) -> Tensor:
        top = TopK(self.k, tail=self.tail)
        ids = top.support(student if self.support == "student" else target)
        return reverse_kl(top.coarse(student, ids), top.coarse(target, ids))


def _mean(values: Tensor) -> float:
    """The mean, kept within the values: rounding must not stop equal values from tying with it."""
    return float(values.mean().clamp(values.min(), values.max()))
