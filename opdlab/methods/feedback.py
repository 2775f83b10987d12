"""Learn from feedback on one's own attempts: the student that is told it teaches the other.

SDPO (arXiv 2601.20802) turns feedback f on an attempt y into a grade for every token of it:

    f_i    = [a right attempt of the same prompt]  +  [the environment's feedback on attempt i]
    L(θ)   = mean over tokens t of attempts with an f_i
             D( p_θ(.|x, y_<t),  sg p_anchor(.|x, f_i, y_<t) )

RLSD (arXiv 2604.03128) keeps the verifier's sign and lets the hinted student set the size:

    Δ_t    = sg( log p_anchor(y_t|x, hint, y_<t) - log p_θ(y_t|x, y_<t) )                    (13)
    w_t    = exp( sign(A) Δ_t )                                                              (14)
    A_t    = A ( 1 - λ + λ clip(w_t, 1 ± ε) ),    in GRPO's loss in the place of A           (15)

SDAR (arXiv 2605.15155) adds a gated term to GRPO's loss:

    loss_t = GRPO_t + λ g_t ( log p_anchor(y_t|x, hint, y_<t) - log p_θ(y_t|x, y_<t) )
    g_t    = sg σ( β Δ_t )

Sources, and how sure they are. [S] is second-hand: the authors' code as others ported it (TRL,
verl, ms-swift), or a translation of the paper. [O] is our reading.

- SDPO: the two kinds of feedback; attempts without any are left out of sum and count; JSD; a moving
  average as one choice of anchor [S]. The words around the feedback are ours [O].
- RLSD: equations 13 to 15 [S]. Equation 16 writes min(w A, clip(w) A), which has no gradient if Δ
  is stopped as 13 says, so A_t goes into GRPO's clipped loss [O]. λ falls in a straight line from
  0.5 to 0 over 50 steps [S, of a re-implementation]. ε = 0.2 is ours [O].
- SDAR: the gate, its stop, β = 5 and λ = 0.1 [S]. The term's gradient is that of -λ g_t log p(y_t).
  So it raises *every* sampled token: those that the hint supports by up to λ, the others by less.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from opdlab.data.column import Column, Kind
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import InvalidValue, MissingPolicy
from opdlab.losses import DIVERGENCES, TopK
from opdlab.losses.closed_forms import ClosedForm
from opdlab.methods.grpo import GRPO, clipped_loss
from opdlab.methods.opd import check_divergence, closed_form_of_divergence
from opdlab.methods.policy_gradient import advantage_column
from opdlab.methods.self_distillation import ANCHORS, Anchor, check_anchor
from opdlab.support.expect import shortened
from opdlab.support.validation import (
    Amount,
    CountOrZero,
    Flag,
    Positive,
    PositiveShare,
    Share,
    Text,
    validate_fields,
)

NOTHING_TOLD = (
    "SDPO had nothing to tell about any attempt of a step, so the step trained nothing: the task's"
    " feedback was empty, no other attempt of a prompt was right, or (attempts='failed') all were."
    " The column told says which attempts were told something. Look at task.feedback, and use more"
    " attempts (n=)."
)


@dataclass(frozen=True)
class SDPO:
    """Match the student that is told the feedback on its own attempt.

    The task judges the attempts (`verify`), and may have `feedback(prompt, text)`, a text or None.
    Attempts that nothing can be told about train nothing, and the mean is over the others. The
    prompts' own hints are not read.

    Attributes:
        divergence: A name of `opdlab.losses.DIVERGENCES`.
        options: Keywords of the divergence, as in `OPD`.
        top_k: A coarse support to compare on, as in `OPD`.
        anchor: The teacher: "ema" (which moves by `Settings.ema_rate`; the authors use 0.05),
            "frozen" or "live". On the shipped world "live" unlearns the language.
        attempts: "all" tells every attempt, "failed" only those below `threshold`.
        solutions: Whether a right attempt of the same prompt, another than the one that is told, is
            part of the feedback.
        threshold: The score from which an attempt is right.
        solution_form: The words around the right attempt, with {} for it.
        feedback_form: The words around the environment's feedback, with {} for it.

    Raises:
        UnknownOption: The divergence does not take an option.
        InvalidValue: A value is out of its range.
    """

    divergence: str = "jensen_shannon"
    options: dict[str, Any] = field(default_factory=dict)
    top_k: TopK | None = None
    anchor: Anchor = "ema"
    attempts: Literal["all", "failed"] = "all"
    solutions: Flag = True
    threshold: PositiveShare = 1.0
    solution_form: Text = "A right answer to this question:\n{}"
    feedback_form: Text = "Feedback on an earlier answer to this question:\n{}"

    verifies: ClassVar[bool] = True
    tells: ClassVar[bool] = True
    recipe: ClassVar[dict[str, Any]] = {"normalize": "token"}

    def __post_init__(self) -> None:
        check_divergence(self)
        check_anchor(self, self.anchor)
        validate_fields(self)
        if self.attempts not in ("all", "failed"):
            raise InvalidValue(f"SDPO got attempts={shortened(self.attempts)}. Use all or failed.")
        for name in ("solution_form", "feedback_form"):
            if getattr(self, name).count("{}") != 1:
                raise InvalidValue(
                    f"SDPO got {name}={shortened(getattr(self, name))}. Write {{}} once, where the"
                    " text goes."
                )

    @property
    def needs(self) -> tuple[str, ...]:
        """The anchor, which is told the feedback."""
        return (ANCHORS[self.anchor],)

    def plan(self, batch: Batch) -> dict[str, Column]:
        """Tell each attempt's feedback, and say which attempts are trained on.

        Args:
            batch: The step's rollout, with a verifier.

        Returns:
            `told` (flag, `[B]`), and `scale [B, T]`: 0 without feedback, else the number of learned
            tokens over that of learned tokens with feedback.

        Raises:
            MissingPolicy: There is no verifier, or nothing can ever be told: one attempt for each
                prompt, and no feedback in the task.
        """
        has_feedback = batch.task is not None and batch.task.feedback is not None
        if not has_feedback and (batch.rollout.n < 2 or not self.solutions):
            raise MissingPolicy(
                "SDPO has nothing to tell: the task has no feedback, and there is no other attempt"
                " of a prompt to show. Give the task feedback=, or use n=4 or more."
            )
        hints = feedback_hints(batch, self)
        batch.tell(hints)
        told = torch.tensor([hint is not None for hint in hints], device=batch.mask.device)
        by_token = told[:, None].expand(batch.mask.shape).float()
        share = batch.mean(by_token).to(by_token)
        if not share:  # in any process
            warnings.warn(NOTHING_TOLD, stacklevel=2)
        scale = torch.where(by_token > 0, 1 / share.clamp(min=1e-30), 0.0)
        return {
            "told": Column(
                told.float(), "whether there was feedback on this attempt", kind=Kind.FLAG
            ),
            "scale": Column(scale, "learned tokens over learned tokens with feedback"),
        }

    def loss(self, rows: Rows) -> Tensor:
        """Compute the divergence to the told student, 0 without feedback.

        Args:
            rows: A chunk of `n` tokens, with the columns of `plan`.

        Returns:
            `[n]`.
        """
        (teacher,) = self.needs
        pair = (rows.student, rows[teacher])
        if self.top_k is not None:
            by = teacher if self.top_k.by == "teacher" else "student"
            pair = rows.on(teacher, TopK(self.top_k.k, by, self.top_k.tail))
        return rows.scale * DIVERGENCES[self.divergence](*pair, **self.options)

    def closed_form(self, rows: Rows) -> ClosedForm | None:
        """Compute the divergence with its gradient in the logits, on the full vocabulary.

        Args:
            rows: A chunk of `n` tokens, with the columns of `plan`, without gradient.

        Returns:
            What `loss` gives, and its gradient; None with `top_k`.
        """
        if self.top_k is not None:
            return None
        found = closed_form_of_divergence(self, rows.pair(*self.needs))
        return None if found is None else found.times(rows.scale)


def feedback_hints(batch: Batch, method: SDPO) -> list[str | None]:
    """Make the feedback on every attempt of a batch.

    Args:
        batch: The step's rollout, with a verifier.
        method: Says what is told, and in which words.

    Returns:
        One hint for each attempt; None where nothing can be told.
    """
    rollout, rewards = batch.rollout, batch.rewards.tolist()
    right = [reward >= method.threshold for reward in rewards]
    hints: list[str | None] = []
    for i, (prompt, text) in enumerate(zip(rollout.prompts, rollout.texts, strict=True)):
        parts = []
        if method.attempts == "all" or not right[i]:
            group = range(i - i % rollout.n, i - i % rollout.n + rollout.n)
            shown = [j for j in group if right[j] and j != i] if method.solutions else []
            if shown:
                parts.append(method.solution_form.format(rollout.texts[shown[0]]))
            said = batch.feedback(prompt, text)
            if said is not None:
                parts.append(method.feedback_form.format(said))
        hints.append("\n".join(parts) if parts else None)
    return hints


@dataclass(frozen=True, kw_only=True)
class HintedReward:
    """Compute GRPO's advantage and what a hint says about each token; RLSD and SDAR build on it.

    Attributes:
        anchor: The student that sees each prompt's hint, as in `SelfDistillation`.
        scale: As in `GRPO`.
        clip: As in `GRPO`.

    Raises:
        InvalidValue: A value is out of its range.
    """

    anchor: Anchor = "live"
    scale: Flag = True
    clip: PositiveShare = 0.2

    verifies: ClassVar[bool] = True
    least_n: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_anchor(self, self.anchor)
        validate_fields(self)

    @property
    def needs(self) -> tuple[str, ...]:
        """The hinted student."""
        return (ANCHORS[self.anchor],)

    def plan_reward(self, batch: Batch) -> dict[str, Column]:
        """Compute the advantage of each attempt, and how far the hint supports each token.

        Args:
            batch: The step's rollout, with a verifier.

        Returns:
            `advantage [B]`; `evidence` (Δ, how much likelier the hint makes a sampled token) and
            `sampler_logp`, in nats, `[B, T]` each.
        """
        (hinted,) = self.needs
        theirs: Tensor = batch.map(lambda rows: rows.logp_of(hinted), needs=(hinted,))
        evidence = Column(
            (theirs - batch.rollout.logp) * batch.mask,
            "log-prob with the hint − without",
            unit="nats",
            kind=Kind.SIGNED,
            compares=(hinted, "student"),
            less="the hint speaks against it",
            more="the hint speaks for it",
        )
        return {**GRPO(self.scale, self.clip).plan(batch), "evidence": evidence}


@dataclass(frozen=True)
class RLSD(HintedReward):
    """Let the verifier say whether a token is pushed up or down, and the hinted student how far.

    Attributes:
        mix: λ at the first step.
        decay: Steps over which λ falls to 0, which is plain GRPO; 0 keeps it.
        weight_clip: ε, how far a weight may leave 1.
        anchor, scale, clip: See `HintedReward`.

    Raises:
        InvalidValue: A value is out of its range.
    """

    mix: Share = 0.5
    decay: CountOrZero = 50
    weight_clip: PositiveShare = 0.2

    def plan(self, batch: Batch) -> dict[str, Column]:
        """Compute GRPO's advantage, weighted token by token.

        Args:
            batch: The step's rollout, with a verifier.

        Returns:
            `advantage`, `evidence` (Δ) and `sampler_logp` (nats), `[B, T]` each.
        """
        columns = self.plan_reward(batch)
        advantage, evidence = columns["advantage"].values[:, None], columns["evidence"].values
        weight = (advantage.sign() * evidence).exp()
        mix = self.mix * max(0.0, 1 - batch.step / self.decay) if self.decay else self.mix
        clipped = weight.clamp(1 - self.weight_clip, 1 + self.weight_clip)
        formula = "GRPO's advantage × (1 − λ + λ clip(exp(sign Δ)))"
        weighted = advantage * (1 - mix + mix * clipped)
        return {**columns, "advantage": advantage_column(weighted, formula, unit="")}

    def loss(self, rows: Rows) -> Tensor:
        """Compute GRPO's clipped loss with the weighted advantage.

        Args:
            rows: A chunk of `n` tokens, with the columns of `plan`.

        Returns:
            `[n]`.
        """
        return clipped_loss(rows, self.clip)


@dataclass(frozen=True)
class SDAR(HintedReward):
    """Add a gated term to GRPO: sampled tokens that the hinted student finds likelier go up more.

    Attributes:
        weight: λ, the weight of the term.
        sharpness: β; the gate is σ(β Δ).
        anchor, scale, clip: See `HintedReward`.

    Raises:
        InvalidValue: A value is out of its range.
    """

    weight: Amount = 0.1
    sharpness: Positive = 5.0

    def plan(self, batch: Batch) -> dict[str, Column]:
        """Compute GRPO's advantage, and the gate of every token.

        Args:
            batch: The step's rollout, with a verifier.

        Returns:
            `advantage [B]`, and `gate`, `evidence` (Δ) and `sampler_logp` (nats), `[B, T]` each.
        """
        columns = self.plan_reward(batch)
        gate = (self.sharpness * columns["evidence"].values).sigmoid()
        return {**columns, "gate": Column(gate, "σ(β Δ): 1 where the hint supports the token")}

    def loss(self, rows: Rows) -> Tensor:
        """Compute GRPO's loss and the gated term.

        Args:
            rows: A chunk of `n` tokens, with the columns of `plan`.

        Returns:
            `[n]`.
        """
        gap = rows.logp_of(self.needs[0]) - rows.logp
        return clipped_loss(rows, self.clip) + self.weight * rows.gate * gap
