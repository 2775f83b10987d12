"""OVD: the teacher scores answers in words, and the student learns from the scores.

    s_i    = score from 0 to 9 that the teacher's text names for answer i,     r_i = s_i / 9
    A_i    = (r_i - mean r) / std r                        over the answers to a prompt
    loss_t = - min( ratio_t A, clip(ratio_t, 1 ± ε) A )

The abstract of arXiv 2601.21968 confirms discrete verbal scores from 0 to 9 of whole trajectories,
reinforcement learning on them, and that no tokens are aligned. Our reading: the question, the first
number from 0 to 9 in the reply, the mean over `ballots` replies, and GRPO's group-relative
advantage. The student's text stands in the question, so a student may learn to talk the grader
round.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opdlab.data.column import Column, Kind
from opdlab.data.conversation import transcript
from opdlab.data.prompt import Prompt
from opdlab.data.seeds import seed_of
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import OpdlabError
from opdlab.methods.grpo import SMALLEST_STD, clipped_loss
from opdlab.methods.policy_gradient import advantage_column, sampler_column
from opdlab.support.validation import Count, PositiveShare, Seed, Temperature, validate_fields

_SCORE = re.compile(r"(?<![\w.])[0-9](?!\w|\.\d)")
_BEST = 9
_UNSCORED = -1.0
ASK = 4002  # a use of randomness, see `seed_of`


def question(prompt: Prompt, text: str) -> Prompt:
    """Make the question that the teacher is asked about an answer.

    Args:
        prompt: The prompt that was answered; of messages, the last one is asked about.
        text: The answer; of several turns, the whole conversation is shown.

    Returns:
        A prompt with one user message and the same `id`.
    """
    asked = prompt.text if prompt.messages is None else prompt.messages[-1]["content"]
    content = (
        f"Question:\n{asked}\n\nAnswer:\n{transcript(text)}\n\nHow good is the answer, from 0"
        " (useless) to 9 (perfect)? Reply with the number."
    )
    return Prompt(messages=({"role": "user", "content": content},), id=prompt.id)


@dataclass(frozen=True)
class OVD:
    """Learn from scores in the teacher's words, compared among the samples of a prompt.

    Needs at least two samples per prompt. An answer for which no reply names a score is not trained
    on (its `score` is -1 in the trace); a batch without any score is an error.

    Attributes:
        ballots: Replies per answer, whose scores are averaged.
        clip: ε, how far the ratio may leave 1 before a token stops counting; above 0, at most 1.
        temperature: The teacher's, 0 by default.
        max_new_tokens: Length of a reply, in the teacher's tokens.
        seed: Seed of the replies.
        ask: Makes the question from a prompt and an answer; None is `question`.

    Raises:
        InvalidValue: A value is out of its range.
    """

    ballots: Count = 1
    clip: PositiveShare = 0.2
    temperature: Temperature = 0.0
    max_new_tokens: Count = 16
    seed: Seed = 0
    ask: Callable[[Prompt, str], Prompt] | None = None

    needs: ClassVar[tuple[str, ...]] = ("teacher.text",)
    least_n: ClassVar[int] = 2

    def __post_init__(self) -> None:
        validate_fields(self)

    def plan(self, batch: Batch) -> dict[str, Column]:
        """Ask the teacher for scores, and compare the samples of each prompt.

        Args:
            batch: The step's rollout under all policies.

        Returns:
            `advantage [B]`, `score [B]` (0 to 9, -1 for none) and `sampler_logp [B, T]` (nats).

        Raises:
            OpdlabError: There is one sample per prompt, replies are missing, or none has a score.
        """
        rollout = batch.rollout
        if rollout.n < 2:
            raise OpdlabError(
                "OVD compares the samples of a prompt, but there is one sample per prompt. Use n=4"
                " or more."
            )
        replies = self._ask_teacher(batch)
        score = rollout.logp.new_tensor([_mean_score(row) for row in replies])
        if not int(batch.sum((score >= 0).sum())):  # over all processes
            raise OpdlabError(
                f"No reply names a score from 0 to 9, as {replies[0][0][:60]!r}. Give OVD(ask=…) a"
                " clearer question."
            )
        batch.notes["replies"] = replies
        formula = "score / 9 − mean of the prompt's samples, over their std"
        return {
            "advantage": advantage_column(_advantage(score, rollout.n), formula, unit=""),
            "score": Column(
                score,
                "mean score in the teacher's replies, −1 for none",
                kind=Kind.AMOUNT,
                less="useless",
                more="perfect",
            ),
            "sampler_logp": sampler_column(rollout.logp),
        }

    def loss(self, rows: Rows) -> Tensor:
        """Compute the clipped policy-gradient loss.

        Args:
            rows: A chunk of `n` tokens, with the columns of `plan`.

        Returns:
            `[n]`.
        """
        return clipped_loss(rows, self.clip)

    def _ask_teacher(self, batch: Batch) -> list[list[str]]:
        """Return `ballots` replies about each completion."""
        ask = self.ask or question
        rollout = batch.rollout
        questions = [
            ask(prompt, text) for prompt, text in zip(rollout.prompts, rollout.texts, strict=True)
        ]
        replies = batch.write(
            "teacher.text",
            questions,
            self.ballots,
            range(len(questions)),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=seed_of(self.seed, batch.step, ASK),
        )
        if [len(row) for row in replies] != [self.ballots] * len(questions):
            raise OpdlabError(
                f"The teacher did not give {self.ballots} replies to each of {len(questions)}"
                " questions. Ask another one."
            )
        return [list(row) for row in replies]


def _advantage(score: Tensor, n: int) -> Tensor:
    """Group-relative advantages `[B]`; 0 for answers without a score, which do not count."""
    reward = score.masked_fill(score < 0, torch.nan).view(-1, n) / _BEST
    gap = reward - reward.nanmean(1, keepdim=True)
    others = ((~gap.isnan()).sum(1, keepdim=True) - 1).clamp(min=1)
    std = (gap.square().nansum(1, keepdim=True) / others).sqrt()
    return (gap / (std + SMALLEST_STD)).nan_to_num(0.0).flatten()


def _mean_score(replies: Sequence[str]) -> float:
    """The mean of the scores that replies name first; -1 where none does."""
    found = [int(match[0]) for match in map(_SCORE.search, replies) if match]
    return sum(found) / len(found) if found else _UNSCORED
