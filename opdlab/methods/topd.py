"""TOPD: reverse KL, plus a target over a window where the teacher really goes elsewhere.

    H        = the positions of highest loss
    T_t, S_t = the windows of teacher and student from the same prefix, D_OT(t) their distance
    D        = { t ∈ H : D_OT(t) > τ }                               real divergent points
    ỹ_{t+i}  = Σ_j γ_ij onehot(T_{t+j})
    L_traj   = Σ_i KL( ỹ_{t+i} || p_S(.|q, x_{<t+i}) )
    L_TOPD   = L_OPD + λ L_traj                                      (arXiv 2606.00305)

The plan γ is a constant. With uniform marginals ỹ sums to 1/K, so the printed sum is, up to a
constant, the window's mean of a proper cross-entropy to ȳ = Kỹ. What is trained here is
-Σ_ij γ_ij log p_S(T_{t+j} | x_{<t+i}), a mean over the window, then a mean over D.

Not reported by the paper, and ours: the score (the teacher's NLL of the student's token; its figure
6 has that axis), ρ (its 218 points in 9688 tokens), τ, λ, ε, embeddings, the mean over D.

Known traps, kept because they are the method: the distance is blind to order; a teacher that only
inserts one token gets a distance of 1/K and targets that are the student's own tokens; and where
both windows agree the loss would only sharpen the student, hence the gate. `targets="diagonal"` is
a control that does better in small experiments. Cross-entropy on the teacher's own contexts is left
out: they hold tokens that the student never wrote, so that loss is not one on rows of the rollout.
`local_correction` compares it.
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
from opdlab.losses import reverse_kl
from opdlab.methods import futures, windows
from opdlab.methods.futures import ARMS, false_alarm_rate, forks, local_correction
from opdlab.methods.windows import Point, transport
from opdlab.models.protocols import Sampler
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

    The trajectory term is exactly the mean over points and window where the loss is a mean over
    tokens (the recipe). With normalize="sequence" a point counts by mean length / own length, as
    the other losses of its completion do; with "constant" both terms shrink alike.

    Attributes:
        window: K, in tokens. The paper's 50 suits texts of thousands of tokens; 8 to 16 suit
            hundreds. No point is taken closer to the end.
        share: ρ, the part of a completion's tokens that are candidates, by highest `score`, rounded
            up. In short texts that is one token each, an error or not, unless `min_loss` asks for a
            least score.
        min_loss: The least score of a candidate, in nats (1, say); None for any.
        max_points: Most candidates in a step; None for any number.
        threshold: τ. "quantile" takes the `quantile` of the candidates' distances in the step,
            "low_loss_q3" the upper quartile of distances at as many positions of lowest score
            (twice the teacher's writing).
        quantile: For the threshold and for `downweight`.
        weight: λ.
        epsilon: For the entropic plan that makes the targets; None takes the exact plan. The
            distance is always exact.
        student_window: The text that is compared with the teacher's window: "rollout" for the
            rollout's own tokens, "greedy" for a greedy text of the student from the same prefix.
            The targets are for the rollout's tokens in both cases, since only those are trained.
        targets: From the "transport" plan, or "diagonal": token i of the teacher for token i of the
            student.
        embedding: The policy whose token embeddings the cost is between; "onehot" knows equal and
            different only.
        downweight: The paper's intervention (use weight=0 to have it alone). "low_ot" lowers the
            loss of the `quantile` of candidates with least distance to the median of their
            completion, "high_ot" that of as many drawn from the others.
        score: "teacher_nll" is -log p_T(x_t), "log_ratio" log p_S - log p_T of it, "reverse_kl" the
            loss of OPD; in nats.

    Raises:
        InvalidValue: A value is out of its range.
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
        targets: str = self.targets
        if targets == "teacher_context":
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
        """Find the real forks, and return their targets.

        Args:
            batch: The step's rollout under all policies.

        Returns:
            `target` and `target_weight`, `[B, T, M]`; `divergent` and `window_distance`, `[B, T]`;
            `downweight [B, T]` where it is asked for.

        Raises:
            MissingPolicy: The teacher cannot write on, or a policy has no embeddings.
        """
        began, rollout, policies = time.perf_counter(), batch.rollout, batch.policies
        _check_writes(policies["teacher"])
        score = windows.scores(batch, self.score)
        room = windows.room(policies["student"], rollout, self.window)
        if not int(batch.sum(room.sum())):
            _warn_no_room(batch, self.window)
        points = self._points(batch, score, room)
        teacher = windows.write(policies["teacher"], rollout, points, self.window)
        student = self._student_windows(batch, points)
        distance, exact = windows.solve(windows.costs(student, teacher, self.embedding, policies))
        limit, more = self._limit(batch, score, room, points, distance)
        kept = distance > limit + 1e-9  # a distance equal up to rounding is not above
        plans = self._plans(batch, points, teacher)
        drawn = plans if self.student_window == "rollout" else exact
        counts = [len(points), int(kept.sum()), sum(map(len, teacher)) + more]
        candidates, divergent, tokens = batch.sum(batch.row.new_tensor(counts)).tolist()
        facts = {
            "candidates": candidates,
            "divergent": divergent,
            "teacher_tokens": tokens,
            "seconds": time.perf_counter() - began,
        }
        compared = _notes(points, student, teacher, distance, kept)
        for i, number in enumerate(_numbers(batch, points)):
            if number < DRAWN:
                compared[i]["plan"] = [[round(x, 4) for x in row] for row in drawn[i].tolist()]
        batch.notes["windows"] = Windows(compared, threshold=limit, facts=facts)
        real = [i for i in range(len(points)) if kept[i]]
        targets = windows.scatter(
            batch, [points[i] for i in real], [teacher[i] for i in real], [plans[i] for i in real]
        )
        columns: dict[str, Tensor | Column] = {**targets}
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
        if self.downweight:
            columns["downweight"] = Column(
                self._downweights(batch, points, distance),
                "factor of the token's loss",
                kind=Kind.AMOUNT,
            )
        return columns

    def loss(self, rows: Rows) -> Tensor:
        """Compute the reverse KL and the trajectory term.

        Args:
            rows: A chunk of `n` tokens, with the columns `target`, `target_weight` and
                `downweight`.

        Returns:
            `[n]`, in nats.
        """
        loss = reverse_kl(rows.student, rows.teacher)
        if self.downweight:
            loss = loss * rows.downweight.to(loss.dtype)
        if not self.weight or not rows.target.shape[-1]:
            return loss
        share = rows.target_weight.to(loss.dtype)
        # An unused place may hold a token of -inf.
        target_logp = rows.student.gather(-1, rows.target).masked_fill(share == 0, 0.0)
        return loss - self.weight * (share * target_logp).sum(-1)

    def _points(self, batch: Batch, score: Tensor, room: Tensor) -> list[Point]:
        """The candidates of this process; `max_points` counts those of all processes."""
        counts = windows.quota(batch.learn.sum(1), self.share)
        points = windows.top(score, room, counts, self.min_loss)
        if self.max_points is None:
            return points
        where = _placed(batch, points, torch.ones(len(points), dtype=torch.bool), False)
        highest = batch.gather(score.double(), where).argsort(descending=True, stable=True)
        chosen = set(highest[: self.max_points].tolist())
        numbers = _numbers(batch, points)
        return [point for point, number in zip(points, numbers, strict=True) if number in chosen]

    def _student_windows(self, batch: Batch, points: list[Point]) -> list[list[int]]:
        """The texts that are compared with the teacher's windows."""
        if self.student_window == "greedy":
            return windows.write(batch.policies["student"], batch.rollout, points, self.window)
        return windows.slices(batch.rollout, points, self.window)

    def _plans(self, batch: Batch, points: list[Point], teacher: list[list[int]]) -> list[Tensor]:
        """The plans from the rollout's own tokens to the teacher's windows, for the targets."""
        student = windows.slices(batch.rollout, points, self.window)
        if self.targets == "diagonal":
            return [windows.diagonal(s, t) for s, t in zip(student, teacher, strict=True)]
        return windows.solve(
            windows.costs(student, teacher, self.embedding, batch.policies), self.epsilon
        )[1]

    def _limit(
        self, batch: Batch, score: Tensor, room: Tensor, points: list[Point], distance: Tensor
    ) -> tuple[float, int]:
        """τ, and the number of tokens that the teacher wrote to find it."""
        everyone = _gather(batch, points, distance)
        if not len(everyone):
            return 0.0, 0
        if self.threshold == "quantile":
            return float(everyone.quantile(self.quantile)), 0
        rows = torch.tensor([b for b, _ in points], dtype=torch.long)
        counts = rows.bincount(minlength=len(batch.rollout))
        low = windows.top(-score, room, counts.tolist())
        texts = windows.write(batch.policies["teacher"], batch.rollout, low, self.window)
        costs = windows.costs(
            self._student_windows(batch, low), texts, self.embedding, batch.policies
        )
        lowest = _gather(batch, low, windows.solve(costs)[0])
        return float(lowest.quantile(0.75)), sum(map(len, texts))

    def _downweights(self, batch: Batch, points: list[Point], distance: Tensor) -> Tensor:
        """min(1, median / ℓ_t) at the selected points, 1 elsewhere.

        The loss of such a token counts as the median of its completion.
        """
        loss = batch.signals["teacher_reverse_kl"]
        order = _gather(batch, points, distance).argsort(stable=True)  # of all processes' points
        n = round(self.quantile * len(order))
        selected = order[:n]
        if self.downweight == "high_ot":
            shuffled = torch.randperm(
                len(order) - n, generator=torch.Generator().manual_seed(batch.step)
            )
            selected = order[n:][shuffled[:n]]
        chosen = set(selected.tolist())
        out = torch.ones_like(loss)
        for (b, t), number in zip(points, _numbers(batch, points), strict=True):
            if number not in chosen:
                continue
            median = loss[b][batch.learn[b]].quantile(0.5)
            out[b, t] = (median / loss[b, t].clamp(min=1e-30)).clamp(max=1)
        return out


def _check_writes(teacher: Any) -> None:
    if not isinstance(teacher, Sampler):
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


def _gather(batch: Batch, points: Sequence[Point], values: Tensor) -> Tensor:
    """Values of points of all processes, completion by completion, on the CPU."""
    where = _placed(batch, points, torch.ones(len(points), dtype=torch.bool), False)
    return batch.gather(_placed(batch, points, values, 0.0), where).cpu()


def _numbers(batch: Batch, points: Sequence[Point]) -> list[int]:
    """The numbers of points among those of all processes, in the order of `_gather`."""
    where = _placed(batch, points, torch.ones(len(points), dtype=torch.bool), False)
    numbers = batch.number(where)
    return [int(numbers[point]) for point in points]


def _notes(
    points: Sequence[Point],
    student: Sequence[list[int]],
    teacher: Sequence[list[int]],
    distance: Tensor,
    kept: Tensor,
) -> list[dict[str, Any]]:
    """All windows of this process for pictures."""
    return [
        {"sample": b, "position": t, "student": s, "teacher": w, "distance": d, "kept": k}
        for (b, t), s, w, d, k in zip(
            points, student, teacher, distance.tolist(), kept.tolist(), strict=True
        )
    ]
