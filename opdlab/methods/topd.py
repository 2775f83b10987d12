"""TOPD: reverse KL on all tokens, plus a target over a window where the teacher really goes
elsewhere (arXiv 2606.00305).

    H = the positions of highest loss;    T_t, S_t, D_OT(t): the windows from the same prefix and their distance (`windows`)
    D = { t ∈ H : D_OT(t) > τ }                                                              real divergent points
    ỹ_{t+i} = Σ_j γ_ij onehot(T_{t+j}),      L_traj = Σ_i KL( ỹ_{t+i} || p_S(.|q, x_{<t+i}) )
    L_TOPD = L_OPD + λ L_traj

The plan γ is a constant. With uniform marginals ỹ sums to 1/K, so the printed sum is the window's
mean of a proper cross-entropy to ȳ = Kỹ, up to a constant: what is trained here is -Σ_ij γ_ij log
p_S(T_{t+j} | x_{<t+i}), a mean over the window, then a mean over D. Not reported by the paper, and
ours: the score (teacher's NLL of the student's token; its figure 6 has that axis), ρ (its 218
points in 9688 tokens), τ, λ, ε, embeddings, the mean over D. Known traps, kept because they are the
method: the distance is blind to order, a teacher who only inserts one token gets a distance of 1/K
and targets that are the student's own tokens, and where both windows agree the loss would only
sharpen the student, hence the gate. `targets="diagonal"` is a control that in small experiments
does better. Left out: cross-entropy on the teacher's own contexts. They hold tokens that the
student never wrote, so that loss is not one on rows of the rollout; `local_correction` compares it.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from opdlab.data.column import Column, Kind
from opdlab.data.notes import Windows
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue, MissingPolicy
from opdlab.losses.divergences import reverse_kl
from opdlab.methods import futures, windows
from opdlab.methods.futures import ARMS, false_alarm_rate, forks, local_correction
from opdlab.methods.windows import Point, transport
from opdlab.support.validation import Amount, Count, Finite, PositiveShare, Share, validate_fields

__all__ = ["ARMS", "TOPD", "false_alarm_rate", "forks", "futures", "local_correction", "transport"]

DRAWN = 64  # windows whose plans a step's notes keep
CHOICES: dict[str, tuple[Any, ...]] = {
    "threshold": ("quantile", "low_loss_q3"),
    "student_window": ("rollout", "greedy"),
    "targets": ("transport", "diagonal"),
    "embedding": windows.EMBEDDINGS,
    "downweight": (None, "low_ot", "high_ot"),
    "score": windows.SCORES,
}


@dataclass(frozen=True)
class TOPD:
    """OPD with a trajectory term at real divergent points.

    window: K. The paper's 50 suits texts of thousands of tokens; 8 to 16 suit hundreds. No point is
        taken closer to the end.
    share: ρ, the part of a completion's tokens that are candidates, by highest `score`
        ("teacher_nll" = -log p_T(x_t), "log_ratio" = log p_S - log p_T of it, "reverse_kl"),
        rounded up: in short texts that is one token each, an error or not, unless min_loss asks for
        a least score (1 nat, say). max_points: most candidates in a step.
    threshold: τ, the `quantile` of the candidates' distances in the step, or "low_loss_q3": the
        upper quartile of distances at as many positions of lowest score (twice the teacher's
        writing).
    weight: λ. epsilon: of the entropic plan that makes the targets; None takes the exact plan. The
        distance is always exact.
    student_window: what is compared with the teacher's window: the rollout's own tokens, or a
        greedy text of the student from the same prefix. The targets are for the rollout's tokens in
        both cases, since only those are trained.
    targets: from the transport plan, or "diagonal": token i of the teacher for token i of the
        student.
    embedding: whose token embeddings the cost is between; "onehot" knows equal and different only.
    downweight: the paper's intervention (use weight=0 to have it alone): "low_ot" lowers the loss
        of the `quantile` of candidates with least distance to the median of their completion,
        "high_ot" that of as many drawn from the others.

    The trajectory term is exactly the mean over points and window where the loss is a mean over
    tokens (the recipe). With normalize="sequence" a point counts by mean length / own length, as
    the other losses of its completion do; with "constant" both terms shrink alike. Over several
    processes it is the mean of theirs, by tokens.
    """

    window: Count = 8
    share: PositiveShare = 0.0225
    min_loss: Finite | None = None
    max_points: Count | None = None
    threshold: Literal["quantile", "low_loss_q3"] = "quantile"
    quantile: Share = 0.30
    weight: Amount = 0.3
    epsilon: Finite | None = 0.05
    student_window: Literal["rollout", "greedy"] = "rollout"
    targets: Literal["transport", "diagonal"] = "transport"
    embedding: Literal["student", "teacher", "onehot"] = "student"
    downweight: Literal["low_ot", "high_ot"] | None = None
    score: Literal["teacher_nll", "log_ratio", "reverse_kl"] = "teacher_nll"

    needs: ClassVar[tuple[str, ...]] = ("teacher",)
    recipe: ClassVar[dict[str, Any]] = {"normalize": "token"}

    def __post_init__(self) -> None:
        if self.targets == "teacher_context":
            raise InvalidValue(
                "TOPD cannot train on the teacher's contexts: they hold tokens that are not in the"
                " student's rollout, and a loss sees rows of the rollout only. Compare that target"
                " with opdlab.topd.local_correction(…, arms=('teacher_context',))."
            )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise InvalidValue(
                    f"TOPD got {name}={getattr(self, name)!r}. Use one of"
                    f" {', '.join(map(str, known))}."
                )
        validate_fields(self)
        windows.solve([], self.epsilon)  # raises for a bad epsilon

    def plan(self, batch: Batch) -> dict[str, Tensor | Column]:
        began, rollout, policies = time.perf_counter(), batch.rollout, batch.policies
        _check_writes(policies["teacher"])
        score, room = (
            windows.scores(batch, self.score),
            windows.room(policies["student"], rollout, self.window),
        )
        if not bool(room.any()):
            _warn_no_room(batch, self.window)
        points = windows.top(
            score, room, windows.quota(rollout.lengths, self.share), self.min_loss, self.max_points
        )
        teacher = windows.write(policies["teacher"], rollout, points, self.window)
        student = self._student_windows(batch, points)
        distance, exact = windows.solve(windows.costs(student, teacher, self.embedding, policies))
        limit, more = self._limit(batch, score, room, points, distance)
        kept = distance > limit + 1e-9  # equal up to rounding is not above
        plans = self._plans(batch, points, teacher)
        drawn = plans if self.student_window == "rollout" else exact
        facts = {
            "candidates": len(points),
            "divergent": int(kept.sum()),
            "teacher_tokens": sum(map(len, teacher)) + more,
            "seconds": time.perf_counter() - began,
        }
        compared = _notes(points, student, teacher, distance, kept, drawn)
        batch.notes["windows"] = Windows(compared, threshold=limit, facts=facts)
        real = [i for i in range(len(points)) if kept[i]]
        told = windows.scatter(
            rollout, [points[i] for i in real], [teacher[i] for i in real], [plans[i] for i in real]
        )
        columns: dict[str, Tensor | Column] = {**told}
        columns["divergent"] = Column(
            _placed(batch, points, kept.long() + 1, 0),
            "whether the windows of student and teacher differ from here on",
            labels=("no candidate", "false alarm", "real fork"),
        )
        columns["window_distance"] = Column(
            _placed(batch, points, distance.float(), math.nan),
            "optimal transport cost between the windows of student and teacher",
            kind=Kind.AMOUNT,
            compares=("teacher", "student"),
            threshold=limit,
        )
        return columns | (
            {"downweight": self._downweights(batch, points, distance)} if self.downweight else {}
        )

    def loss(self, rows: Rows) -> Tensor:
        loss = reverse_kl(rows.student, rows.teacher)
        if self.downweight:
            loss = loss * rows.downweight.to(loss.dtype)
        if not self.weight or not rows.target.shape[-1]:
            return loss
        share = rows.target_weight.to(loss.dtype)
        told = rows.student.gather(-1, rows.target).masked_fill(
            share == 0, 0.0
        )  # an unused place may hold a token of -inf
        return loss - self.weight * (share * told).sum(-1)

    def _student_windows(self, batch: Batch, points: list[Point]) -> list[list[int]]:
        """What is compared with the teacher's windows."""
        if self.student_window == "greedy":
            return windows.write(batch.policies["student"], batch.rollout, points, self.window)
        return windows.slices(batch.rollout, points, self.window)

    def _plans(self, batch: Batch, points: list[Point], teacher: list[list[int]]) -> list[Tensor]:
        """The plans between the rollout's own tokens and the teacher's windows, of which the
        targets are made.
        """
        student = windows.slices(batch.rollout, points, self.window)
        if self.targets == "diagonal":
            return [windows.diagonal(s, t) for s, t in zip(student, teacher, strict=True)]
        return windows.solve(
            windows.costs(student, teacher, self.embedding, batch.policies), self.epsilon
        )[1]

    def _limit(
        self, batch: Batch, score: Tensor, room: Tensor, points: list[Point], distance: Tensor
    ) -> tuple[float, int]:
        """τ, and the tokens that the teacher wrote to find it.

        Only distances above τ are real divergences.
        """
        if not points:
            return 0.0, 0
        if self.threshold == "quantile":
            return float(distance.quantile(self.quantile)), 0
        counts = torch.tensor([b for b, _ in points]).bincount(minlength=len(batch.rollout))
        low = windows.top(-score, room, counts.tolist())
        texts = windows.write(batch.policies["teacher"], batch.rollout, low, self.window)
        costs = windows.costs(
            self._student_windows(batch, low), texts, self.embedding, batch.policies
        )
        return float(windows.solve(costs)[0].quantile(0.75)), sum(map(len, texts))

    def _downweights(self, batch: Batch, points: list[Point], distance: Tensor) -> Tensor:
        """min(1, median / ℓ_t) at the selected points, 1 elsewhere: such a token's loss counts as
        the median of its completion.
        """
        loss, order, n = (
            batch.signals["teacher_reverse_kl"],
            distance.argsort(stable=True),
            round(self.quantile * len(points)),
        )
        selected = order[:n]
        if self.downweight == "high_ot":
            shuffled = torch.randperm(
                len(points) - n, generator=torch.Generator().manual_seed(batch.step)
            )
            selected = order[n:][shuffled[:n]]
        out = torch.ones_like(loss)
        for i in selected.tolist():
            b, t = points[i]
            median = loss[b, : int(batch.rollout.lengths[b])].quantile(0.5)
            out[b, t] = (median / loss[b, t].clamp(min=1e-30)).clamp(max=1)
        return out


def _check_writes(teacher: Any) -> None:
    if not hasattr(teacher, "sample"):
        raise MissingPolicy(
            "TOPD has the teacher write on from the student's own tokens, which a"
            f" {type(teacher).__name__} cannot do. Load the teacher with Policy.load(…), or use"
            " OmniOPD, which only needs texts."
        )


def _warn_no_room(batch: Batch, window: int) -> None:
    warnings.warn(
        f"No completion of step {batch.step + 1} has room for a window of {window} tokens (the"
        f" longest has {int(batch.rollout.lengths.max())}), so TOPD trains as OPD there. Use"
        " TOPD(window=…) well below the usual length.",
        stacklevel=3,
    )


def _placed(batch: Batch, points: Sequence[Point], values: Tensor, elsewhere: float) -> Tensor:
    """Values of points as a column `[B, T]`."""
    out = torch.full(batch.mask.shape, elsewhere, dtype=values.dtype)
    for (b, t), value in zip(points, values, strict=True):
        out[b, t] = value
    return out.to(batch.mask.device)


def _notes(
    points: Sequence[Point],
    student: Sequence[list[int]],
    teacher: Sequence[list[int]],
    distance: Tensor,
    kept: Tensor,
    plans: Sequence[Tensor],
) -> list[dict[str, Any]]:
    """What pictures show: all windows of the step, the first `DRAWN` with their plans."""
    out: list[dict[str, Any]] = [
        {"sample": b, "position": t, "student": s, "teacher": w, "distance": d, "kept": k}
        for (b, t), s, w, d, k in zip(
            points, student, teacher, distance.tolist(), kept.tolist(), strict=True
        )
    ]
    for note, plan in zip(out[:DRAWN], plans, strict=False):
        note["plan"] = [[round(x, 4) for x in row] for row in plan.tolist()]
    return out
