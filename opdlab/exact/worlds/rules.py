"""Rules and instances: what of a hint can a student keep once the hint is gone?

Each prompt has a class. Its answer follows the rule of its class, or (an instance) is an answer of
its own that nothing but its hint tells. Training moves the logits of a prompt; those of others move
as far as they are alike: by class, and a little by chance. So a rule that is taught at some prompts
holds at fresh ones, and an instance that is memorised shows there as a confident guess.
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


@dataclass(frozen=True)
class RuleWorld:
    """Prompts whose answers follow a rule, or not.

    Attributes:
        rule: The share of prompts whose answer follows the rule of their class.
        hint: How informative the hint is: the hinted student's probability of the answer, from
            chance (0) to near certainty (1).
        prompts: Training prompts; as many fresh ones are held out.
        classes: Number of classes, with an answer each.
        vocab: Number of answers `V`.
        sharing: How much of the likeness of two prompts of a class is their class; the rest is
            their own.
        error: What a policy that knows the answer leaves to the others.
        seed: Seed of classes, rules, instances and likeness.

    Raises:
        InvalidValue: A value is out of its range.
    """

    rule: Share = 0.5
    hint: Share = 1.0
    prompts: Count = 32
    classes: Count = 4
    vocab: Count = 8
    sharing: Share = 0.5
    error: PositiveShare = 0.03
    seed: Seed = 0

    def __post_init__(self) -> None:
        validate_fields(self)

    @cached_property
    def classes_of(self) -> Tensor:
        """The class of each prompt, `[2 prompts]`; held-out prompts are last."""
        return torch.arange(2 * self.prompts) % self.classes

    @cached_property
    def follows(self) -> Tensor:
        """Mark prompts whose answer follows their rule, `[2 prompts]`."""
        half = torch.arange(self.prompts) < round(self.rule * self.prompts)
        order = [torch.randperm(self.prompts, generator=self._random(i)) for i in (0, 1)]
        return torch.cat([half[order[0]], half[order[1]]])

    @cached_property
    def answers(self) -> Tensor:
        """The answer of each prompt, `[2 prompts]`."""
        rules = torch.randint(self.vocab, (self.classes,), generator=self._random(2))
        own = torch.randint(self.vocab, self.classes_of.shape, generator=self._random(3))
        return torch.where(self.follows, rules[self.classes_of], own)

    def student(self, hinted: bool = False) -> Tensor:
        """Return the student's logits before training.

        Args:
            hinted: Whether it sees the hint.

        Returns:
            `[2 prompts, V]` in float64.
        """
        chance = 1 / self.vocab
        mass = chance + (self.hint * (1 - self.error - chance) if hinted else 0.0)
        return peaked(self.answers, mass, self.vocab).log()

    def teacher(self) -> Tensor:
        """Return the log-probs of another teacher without a hint, which knows the rules alone.

        Returns:
            `[2 prompts, V]` in float64; uniform where the answer follows no rule.
        """
        mass = torch.where(self.follows, 1 - self.error, 1 / self.vocab).double()
        return peaked(self.answers, mass, self.vocab).log()

    def kernel(self) -> Tensor:
        """Return how far a step at a training prompt moves the logits at every prompt.

        Returns:
            `[2 prompts, prompts]`, 1 with itself.
        """
        features = torch.randn(2 * self.prompts, 6, generator=self._random(4), dtype=torch.float64)
        features = features / features.norm(dim=-1, keepdim=True)
        chance = (features @ features[: self.prompts].T) ** 3
        same = self.classes_of[:, None] == self.classes_of[None, : self.prompts]
        alike: Tensor = self.sharing * same.double() + (1 - self.sharing) * chance
        return alike

    def hit_rate(self, logits: Tensor, held_out: bool, follows: bool | None = None) -> Tensor:
        """Return the mean probability of the answer, without a hint.

        Args:
            logits: Of the bare student, `[..., 2 prompts, V]`.
            held_out: Whether over the fresh prompts or over those of training.
            follows: Only prompts that follow the rule (True) or do not (False); None for all.

        Returns:
            `[...]`; NaN if there are no such prompts.
        """
        return self._logp(logits, held_out, follows).exp().mean(-1)

    def log_score(self, logits: Tensor, held_out: bool, follows: bool | None = None) -> Tensor:
        """Return the mean log-prob of the answer, without a hint.

        Args:
            logits: Of the bare student, `[..., 2 prompts, V]`.
            held_out: Whether over the fresh prompts or over those of training.
            follows: As in `hit_rate`.

        Returns:
            `[...]` in nats.
        """
        return self._logp(logits, held_out, follows).mean(-1)

    def policies(self) -> dict[str, Table]:
        """Return the policies as tables over the training prompts, with answers of one token.

        Returns:
            "student", "reference+hint" (the student's frozen hinted self) and "teacher".
        """
        prompts = tuple(Prompt(f"prompt {x}", id=str(x)) for x in range(self.prompts))
        rows = {
            "student": self.student(),
            "reference+hint": self.student(hinted=True),
            "teacher": self.teacher(),
        }
        return {
            name: Table(values[: self.prompts, None], prompts, 1) for name, values in rows.items()
        }

    def _logp(self, logits: Tensor, held_out: bool, follows: bool | None) -> Tensor:
        part = slice(self.prompts, None) if held_out else slice(0, self.prompts)
        logp = logits[..., part, :].log_softmax(-1)
        index = self.answers[part].expand(logp.shape[:-1])[..., None]
        found = logp.gather(-1, index)[..., 0]
        return found if follows is None else found[..., self.follows[part] == follows]

    def _random(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(5 * self.seed + stream)
