"""Dual on-policy distillation: each token is taught by the privileged teacher or by the privileged
student (arXiv 2606.30626).

With a hint p that both sides are told, and y_n the token that the bare student sampled (equation 1
and the table of regimes):

    A_n = | log T(y_n|x,p,y_<n) - log S(y_n|x,p,y_<n) |,      q_T, q_S the two probabilities

    LH  A <  Ā, q_S + q_T >= their mean    β_l KL( S(.|x) || T(.|x,p) )        the hint is what is missing: imitate lightly
    LL  A <  Ā, q_S + q_T <  their mean    β_w KL( S(.|x) || sg S(.|x,p) )     both are unsure: only steady
    HT  A >= Ā, q_T >= q_S                     JS( S(.|x),    T(.|x,p) )       the teacher can do more: transfer all of it
    HS  A >= Ā, q_T <  q_S                 β_l KL( S(.|x) || sg S(.|x,p) )     the student knows its way: keep it

The paper has no official code. It confirms the masks, the divergences, the weights, K and the 5 %.
Ours are: the support of the top K (the student's, with a bucket for the rest), the trimming (tokens
in the top 5 % of A leave the two means, and are still routed and trained), and that means run over
all tokens of a step. Every target sees the hint, so the pull towards what only the hint tells is
weakened and not removed. `anchor`, `hs`, `gap_student` and `adaptive` are switches of opdlab's, not
the paper's.
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
from opdlab.losses.divergences import TopK, jensen_shannon, reverse_kl
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
    """The four regimes: low or high gap; high or low confidence (L), teacher's or student's lead
    (H).
    """

    LH = 0
    LL = 1
    HT = 2
    HS = 3


ROUTE_LABELS = ("LH agree, sure", "LL agree, unsure", "HT teacher leads", "HS student leads")
ROUTE_HUES = ("amount", "minus", "teacher", "student")


def gap(logp_teacher: Tensor, logp_student: Tensor) -> Tensor:
    """The privilege advantage gap A of sampled tokens, in nats: zero where both rule the token out."""
    return (logp_teacher - logp_student).abs().nan_to_num(nan=0.0, posinf=torch.inf)


def thresholds(
    logp_teacher: Tensor, logp_student: Tensor, mask: Tensor, trim: float = 0.05
) -> tuple[float, float]:
    """Ā and the mean of q_S + q_T over the tokens in `mask` whose gap is not above the quantile 1 -
    trim; zeros for no tokens.
    """
    logp_teacher, logp_student = (
        logp_teacher.detach()[mask].double(),
        logp_student.detach()[mask].double(),
    )
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
    """The `Route` of every token, and -1 outside the mask: int64, in the shape of `mask`.

    logp_teacher, logp_student: log-probs of the sampled tokens, both told the hint. limits:
        `thresholds` from elsewhere, as of
    all processes. Ties go to High, to LH and to HT.
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
    """Route each token to the privileged teacher or student.

    Defaults are the paper's; loss a mean over sequences, as there.

    light, weak: β_l and β_w. k, trim: the top K of the reverse KLs, and the share of gaps that
        leave the means.
    support, tail: whose top K, and what becomes of the rest (see `TopK`). Switches of ours:
    anchor: the privileged student of gap and targets: live (the paper's), frozen before training,
        or a moving average. A live one drifts where no token is sent to the teacher.
    hs: what the fourth regime does: "self" (the paper's), "teacher" (as HT), or "none" (no loss).
        "self" leaves a student that is confidently wrong to itself, since it never samples what the
        teacher would say.
    gap_student: "bare" takes the gap from the student without the hint, a known error of
        implementations: it counts missing information as missing capability.
    adaptive: False gives every token the top-K reverse KL to the privileged teacher at weight 1;
        routes are still recorded.
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
        return (TEACHER, ANCHORS[self.anchor])

    def plan(self, batch: Batch) -> dict[str, Column]:
        student = ANCHORS[self.anchor] if self.gap_student == "privileged" else "student"
        logp = batch.map(
            lambda rows: torch.stack([rows.logp_of(TEACHER), rows.logp_of(student)], -1),
            needs=(TEACHER, student),
        )
        ours, theirs = logp[..., 1], logp[..., 0]
        everyone = batch.gather(
            logp
        )  # the means are those of the step, however many processes share it
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
        if not self.adaptive:
            return self._top_k_kl(rows.student, rows[TEACHER])
        loss = rows.student[:0].sum() + rows.student.new_zeros(
            len(rows)
        )  # zeros that still depend on the student
        for regime, (weight, policy, divergence) in self._regimes().items():
            at = (rows.route == regime).nonzero()[:, 0]
            if weight and len(at):
                value = divergence(
                    rows.student.index_select(0, at), rows[policy].index_select(0, at)
                )
                loss = loss.index_put((at,), weight * value)
        return loss

    def _regimes(self) -> dict[Route, Regime]:
        """What each regime trains; one that is not here has no loss."""
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
    """The mean, kept from rounding past the least or the greatest: equal values must tie with it."""
    return float(values.mean().clamp(values.min(), values.max()))
