"""Hints: skills, secrets and noise, a hinted student that can use the hint more or less.

Every prompt has three kinds of tokens, each a distribution of its own:

    skill    the same right token for all prompts; the teacher knows it, with and without a hint
    secret   a token that only the hint tells, another one for each prompt
    noise    nobody knows, nothing to learn

On half of the skills the student is wrong, more or less confidently; on the others it is unsure.
The hinted student knows the secret as far as `help` says. What training moves at one prompt moves
the others too: a skill is one for all prompts; a secret and the noise move with the likeness of the
prompts, so that what is memorised of training prompts shows on fresh ones as a confident guess.
The hinted student shares weights with the bare one: its logits move by `coupling` times as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opdlab.data.prompt import Prompt
from opdlab.exact.table import Table
from opdlab.exact.worlds.pulls import peaked
from opdlab.support.validation import Count, PositiveShare, Seed, Share, validate_fields

SKILLS = 4  # kinds of skill tokens, one right token each
SECRETS = 2


@dataclass(frozen=True)
class HintWorld:
    """Prompts with a hint each.

    Attributes:
        help: How much the hint helps the student: its probability of the secret, from chance (0)
            to as much as the teacher's (1).
        certainty: The student's probability of one wrong token, on half of the skills.
        secrets: The share of tokens that only the hint decides; the rest are skills, and as many
            noise as one skill.
        prompts: Training prompts; as many fresh ones are held out.
        vocab: Number of tokens `V`.
        error: What a policy that knows the right token leaves to the others.
        unsure: The student's probability of the right token where it is unsure.
        coupling: How far the hinted student moves with the bare one.
        seed: Seed of secrets and of the likeness of prompts.

    Raises:
        InvalidValue: A value is out of its range.
    """

    help: Share = 1.0
    certainty: PositiveShare = 0.95
    secrets: Share = 0.3
    prompts: Count = 16
    vocab: Count = 8
    error: PositiveShare = 0.05
    unsure: PositiveShare = 0.4
    coupling: Share = 0.5
    seed: Seed = 0

    def __post_init__(self) -> None:
        validate_fields(self)

    @property
    def kinds(self) -> dict[str, slice]:
        """The columns of each kind of token: "stuck" and "unsure" skills, secrets and noise."""
        return {
            "stuck": slice(0, SKILLS // 2),
            "unsure": slice(SKILLS // 2, SKILLS),
            "secret": slice(SKILLS, SKILLS + SECRETS),
            "noise": slice(SKILLS + SECRETS, SKILLS + SECRETS + 1),
        }

    @cached_property
    def shares(self) -> Tensor:
        """Return the share of each kind of token, `[tokens]`; they sum to 1."""
        skill = (1 - self.secrets) / (SKILLS + 1)
        each = [skill] * SKILLS + [self.secrets / SECRETS] * SECRETS + [skill]
        return torch.tensor(each, dtype=torch.float64)

    @cached_property
    def right(self) -> Tensor:
        """The right tokens `[2 prompts, tokens]`, held-out prompts last; noise has any."""
        count = 2 * self.prompts
        skills = torch.arange(SKILLS).expand(count, SKILLS) % self.vocab
        hidden = torch.randint(self.vocab, (count, SECRETS + 1), generator=self._random(0))
        return torch.cat([skills, hidden], -1)

    def teacher(self, hinted: bool = True) -> Tensor:
        """Return the teacher's log-probs.

        Args:
            hinted: Whether it is told the secrets.

        Returns:
            `[2 prompts, tokens, V]` in float64.
        """
        mass = torch.full(self.right.shape, 1 - self.error, dtype=torch.float64)
        mass[:, self.kinds["noise"]] = 1 / self.vocab
        if not hinted:
            mass[:, self.kinds["secret"]] = 1 / self.vocab
        return peaked(self.right, mass, self.vocab).log()

    def student(self, hinted: bool = False) -> Tensor:
        """Return the student's logits before training.

        Args:
            hinted: Whether it is told the secrets.

        Returns:
            `[2 prompts, tokens, V]` in float64.
        """
        kinds, token = self.kinds, self.right.clone()
        mass = torch.full(token.shape, 1 / self.vocab, dtype=torch.float64)
        mass[:, kinds["unsure"]] = self.unsure
        mass[:, kinds["stuck"]] = self.certainty
        token[:, kinds["stuck"]] = (token[:, kinds["stuck"]] + 1) % self.vocab
        if hinted:
            knows = 1 / self.vocab + self.help * (1 - self.error - 1 / self.vocab)
            mass[:, kinds["secret"]] = knows
        return peaked(token, mass, self.vocab).log()

    def kernel(self) -> Tensor:
        """Return how far a step at a training prompt moves the logits at every prompt.

        Returns:
            `[tokens, 2 prompts, prompts]`: for skills 1/prompts everywhere, so that training on all
            prompts is one step on the skill; for others the likeness of prompts, 1 with itself.
        """
        features = torch.randn(2 * self.prompts, 4, generator=self._random(1), dtype=torch.float64)
        features = features / features.norm(dim=-1, keepdim=True)
        alike = (features @ features[: self.prompts].T) ** 3  # near 0 unless much alike
        same = torch.full_like(alike, 1 / self.prompts)
        tokens = len(self.shares)
        return torch.stack([same if i < SKILLS else alike for i in range(tokens)])

    def log_score(self, logits: Tensor, kind: str) -> Tensor:
        """Return the mean log-prob of the right token on held-out prompts, without a hint.

        Args:
            logits: Of the bare student, `[..., 2 prompts, tokens, V]`.
            kind: A key of `kinds`; the mean over its tokens.

        Returns:
            `[...]` in nats. Of secrets and noise none can do better than -log V in expectation.
        """
        return self._held_out(logits, kind).mean((-1, -2))

    def hit_rate(self, logits: Tensor, kind: str) -> Tensor:
        """Return the mean probability of the right token on held-out prompts, without a hint.

        Args:
            logits: Of the bare student, `[..., 2 prompts, tokens, V]`.
            kind: A key of `kinds`.

        Returns:
            `[...]`, from 0 to 1.
        """
        return self._held_out(logits, kind).exp().mean((-1, -2))

    def policies(self) -> dict[str, Table]:
        """Return all policies as tables: each token of each training prompt is a prompt of its own.

        Returns:
            "student", "student+hint", "teacher" and "teacher+hint".
        """
        rows = {
            "student": self.student(),
            "student+hint": self.student(hinted=True),
            "teacher": self.teacher(hinted=False),
            "teacher+hint": self.teacher(),
        }
        tokens = len(self.shares)
        prompts = tuple(
            Prompt(f"prompt {x}, token {i}", id=f"{x}-{i}")
            for x in range(self.prompts)
            for i in range(tokens)
        )
        return {
            name: Table(values[: self.prompts].reshape(-1, 1, self.vocab), prompts, 1)
            for name, values in rows.items()
        }

    def _held_out(self, logits: Tensor, kind: str) -> Tensor:
        part = self.kinds[kind]
        logp = logits[..., self.prompts :, part, :].log_softmax(-1)
        index = self.right[self.prompts :, part].expand(logp.shape[:-1])[..., None]
        return logp.gather(-1, index)[..., 0]

    def _random(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(2 * self.seed + stream)
