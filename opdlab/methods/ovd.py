"""OVD: the teacher says how good an answer is, in words, and the student learns from the score
(arXiv 2601.21968).

    s_i = score from 0 to 9 that the teacher's text names for answer i,   r_i = s_i / 9
    A_i = (r_i - mean r) / std r   over the answers to a prompt,          loss_t = - min(ratio A, clip(ratio, 1 ± eps) A)

Confirmed by the abstract: discrete verbal scores from 0 to 9 of whole trajectories, reinforcement
learning on them, no tokens aligned. Our reading: the question, the first number from 0 to 9 in the
reply, the mean over `ballots` replies, and GRPO's group-relative advantage. The student's text
stands in the question, so a student may learn to talk the grader round.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opdlab.data.prompt import Prompt
from opdlab.data.seeds import seed_of
from opdlab.engine.batch import Batch
from opdlab.engine.rows import Rows
from opdlab.errors import OpdlabError
from opdlab.methods.grpo import GRPO
from opdlab.support.validation import Count, PositiveShare, Seed, Temperature, validate_fields

_SCORE = re.compile(r"(?<![\w.])[0-9](?!\w|\.\d)")
ASK = 4002  # a use of randomness, see `seed_of`


def question(prompt: Prompt, text: str) -> Prompt:
    """What the teacher is asked about an answer."""
    asked = prompt.text if prompt.messages is None else prompt.messages[-1]["content"]
    told = (
        f"Question:\n{asked}\n\nAnswer:\n{text}\n\nHow good is the answer, from 0 (useless) to 9"
        " (perfect)? Reply with the number."
    )
    return Prompt(messages=({"role": "user", "content": told},), id=prompt.id)


@dataclass(frozen=True)
class OVD:
    """Needs n >= 2.

    An answer for which no reply names a score is not trained on (`score` -1 in the trace); a batch
    without any is an error. ask: makes the question from a prompt and an answer (`question` by
    default).
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

    def plan(self, batch: Batch) -> dict[str, Tensor]:
        rollout, ask = batch.rollout, self.ask or question
        if rollout.n < 2:
            raise OpdlabError(
                "OVD compares the samples of a prompt, but there is one sample a prompt. Use n=4 or"
                " more."
            )
        asked = [
            ask(prompt, text) for prompt, text in zip(rollout.prompts, rollout.texts, strict=True)
        ]
        options = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": seed_of(self.seed, batch.step, ASK),
        }
        replies = batch.policies["teacher.text"].write(asked, self.ballots, **options)
        if [len(row) for row in replies] != [self.ballots] * len(asked):
            raise OpdlabError(
                f"The teacher did not give {self.ballots} replies to each of {len(asked)}"
                " questions. Ask another one."
            )
        score = rollout.logp.new_tensor([_mean(row) for row in replies])
        if not bool((score >= 0).any()):
            raise OpdlabError(
                f"No reply names a score from 0 to 9, as {replies[0][0][:60]!r}. Give OVD(ask=…) a"
                " clearer question."
            )
        batch.notes["replies"] = replies
        gap = score.masked_fill(score < 0, torch.nan).view(-1, rollout.n) / 9
        gap = gap - gap.nanmean(1, keepdim=True)
        others = ((~gap.isnan()).sum(1, keepdim=True) - 1).clamp(min=1)
        advantage = gap / ((gap.square().nansum(1, keepdim=True) / others).sqrt() + 1e-4)
        return {
            "advantage": advantage.nan_to_num(0.0).flatten(),
            "score": score,
            "sampler_logp": rollout.logp,
        }

    def loss(self, rows: Rows) -> Tensor:
        return GRPO(clip=self.clip).loss(rows)


def _mean(replies: list[str]) -> float:
    """The mean of the scores that replies name first; -1 where none does."""
    found = [int(match[0]) for match in map(_SCORE.search, replies) if match]
    return sum(found) / len(found) if found else -1.0
