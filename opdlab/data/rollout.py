"""Rollouts: what a policy wrote, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from opdlab.data.prompt import Prompt
from opdlab.errors import InvalidValue
from opdlab.support.expect import expect, refusal

_PER_TOKEN = ("ids", "logp", "entropy", "learn", "turn")
_PER_COMPLETION = ("prompts", "finish", "texts", "writer")


@dataclass(frozen=True, eq=False)
class Rollout:
    """Hold `B` completions of at most `T` tokens after their prompts, right-padded.

    No hint is in it: every policy renders the prompts as it sees them.

    Attributes:
        prompts: The prompt of each completion.
        ids: Token ids `[B, T]`.
        lengths: Tokens of each completion `[B]`; the EOS token counts.
        logp: Log-probs of the tokens as whoever sampled them computed them, at temperature 1, in
            nats, `[B, T]`; zero in the padding and where a text was not sampled.
        entropy: Entropies of that policy in nats, `[B, T]`; zero as `logp` is, and where a sampler
            such as vLLM gives none.
        finish: Why each completion ends: "stop", or "length" where the limit cut it.
        texts: The text of each completion.
        writer: Who wrote each completion: "student", "teacher", …
        n: Completions of each prompt, which stand in groups of `n` rows; 1 where prompts have
            different numbers of them.
        vocabulary: Fingerprint of the tokenizer whose ids these are; None if it is not known.
        learn: `[B, T]`, true on the tokens that the loss sees: those that a policy wrote, without
            the text that a tool or a user put between them. All of `mask` by default.
        turn: `[B, T]`, the number of the turn that each token belongs to, from 0; all 0 by default.

    Raises:
        InvalidValue: `learn` or `turn` has another shape than `ids`, or values that it cannot have.
    """

    prompts: tuple[Prompt, ...]
    ids: Tensor
    lengths: Tensor
    logp: Tensor
    entropy: Tensor
    finish: tuple[str, ...]
    texts: tuple[str, ...]
    writer: tuple[str, ...]
    n: int = 1
    vocabulary: str | None = None
    # None stands for the defaults, which `__post_init__` makes of the other fields.
    learn: Tensor = field(default=None)  # type: ignore[assignment]
    turn: Tensor = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.learn is None:
            object.__setattr__(self, "learn", self.mask)
        if self.turn is None:
            object.__setattr__(self, "turn", torch.zeros_like(self.ids))
        for name in ("learn", "turn"):
            values = getattr(self, name)
            if values.shape != self.ids.shape:
                raise InvalidValue(
                    f"Rollout got {name} of shape {list(values.shape)} for ids of shape"
                    f" {list(self.ids.shape)}. Give one value for each token."
                )
        if self.learn.dtype != torch.bool or bool((self.learn & ~self.mask).any()):
            raise InvalidValue(
                "Rollout got a learn mask that is not boolean or is true in the padding. Use"
                " booleans [B, T], true only on tokens of the completion."
            )
        if self.turn.is_floating_point() or self.turn.dtype == torch.bool:
            raise InvalidValue(
                f"Rollout got turn of dtype {self.turn.dtype}. Use whole numbers [B, T]."
            )
        if bool((self.turn < 0).any()):
            raise InvalidValue("Rollout got a turn that is negative. Number the turns from 0.")

    @property
    def mask(self) -> Tensor:
        """`[B, T]`, true on the tokens of the completions.

        Made from the lengths, so a padding token that is also an EOS token does no harm.
        """
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    @property
    def tokens(self) -> int:
        """Number of tokens, without the padding."""
        return int(self.lengths.sum())

    @property
    def learned(self) -> Tensor:
        """`learn` without the padding, `[tokens]`, row after row."""
        return self.learn[self.mask]

    @property
    def left_in_turn(self) -> Tensor:
        """Count the tokens from each one to the end of its turn, itself among them, `[B, T]`.

        Only tokens that the loss sees count; 0 elsewhere. A window or chunk of `k` tokens stays
        within a turn where this is at least `k`.
        """
        out = torch.zeros_like(self.ids)
        behind = out[:, 0] if out.shape[1] else out
        for t in reversed(range(self.ids.shape[1])):
            if t + 1 < self.ids.shape[1]:
                behind = torch.where(self.turn[:, t] == self.turn[:, t + 1], out[:, t + 1], 0)
            out[:, t] = torch.where(self.learn[:, t], behind + 1, 0)
        return out

    def completions(self) -> list[list[int]]:
        """List the token ids of each completion, without padding.

        Returns:
            One list per row.
        """
        return [
            row[:length]
            for row, length in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)
        ]

    def select(self, which: Sequence[int]) -> Rollout:
        """Make a rollout of some rows only, in that order; it keeps `n` if groups stay whole.

        Args:
            which: Numbers of rows, from 0; a row may be taken several times.

        Returns:
            The rollout, as wide as its longest row.
        """
        pick = torch.as_tensor(list(which), dtype=torch.long, device=self.ids.device)
        width = max(1, int(self.lengths[pick].max())) if len(which) else 1
        parts: dict[str, Any] = {name: getattr(self, name)[pick][:, :width] for name in _PER_TOKEN}
        for name in _PER_COMPLETION:
            parts[name] = tuple(getattr(self, name)[i] for i in which)
        n = self.n if self._keeps_groups(which) else 1
        return replace(self, **parts, lengths=self.lengths[pick], n=n)

    def to(self, device: torch.device) -> Rollout:
        """Make the same rollout on another device.

        Args:
            device: Where the tensors shall be.

        Returns:
            The rollout; itself if it is there already.
        """
        if self.ids.device == device:
            return self
        names = ("lengths", *_PER_TOKEN)
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def _keeps_groups(self, which: Sequence[int]) -> bool:
        """Tell whether these rows are whole groups of `n`, each in its order."""
        groups = [list(which[i : i + self.n]) for i in range(0, len(which), self.n)]
        return all(
            group[0] % self.n == 0 and group == list(range(group[0], group[0] + self.n))
            for group in groups
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        cut = sum(finish == "length" for finish in self.finish)
        return (
            f"Rollout({len(self)} completions, {self.tokens} tokens, {cut} cut off at the length"
            " limit)"
        )


def concat_rollouts(parts: Sequence[Rollout]) -> Rollout:
    """Put several rollouts together, rows in order.

    Args:
        parts: At least one. `n` and `vocabulary` of the whole are theirs where they agree, else 1
            and None.

    Returns:
        One rollout, as wide as the widest part.

    Raises:
        InvalidValue: There are none, or one is no rollout.
    """
    if isinstance(parts, Rollout) or not isinstance(parts, Iterable):
        raise refusal("Rollout", parts, "concat_rollouts", "parts")
    parts = [
        expect(part, Rollout, "concat_rollouts", f"parts[{i}]") for i, part in enumerate(parts)
    ]
    if not parts:
        raise InvalidValue("concat_rollouts got no rollouts. Give at least one.")
    width = max(part.ids.shape[1] for part in parts)

    def widen(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, width - values.shape[1]))

    whole: dict[str, Any] = {}
    for name in _PER_TOKEN:
        whole[name] = torch.cat([widen(getattr(part, name)) for part in parts])
    for name in _PER_COMPLETION:
        whole[name] = tuple(value for part in parts for value in getattr(part, name))
    vocabularies = {part.vocabulary for part in parts}
    # Completions of a prompt stand side by side only if all parts have as many.
    counts = {part.n for part in parts}
    return Rollout(
        **whole,
        lengths=torch.cat([part.lengths for part in parts]),
        n=counts.pop() if len(counts) == 1 else 1,
        vocabulary=vocabularies.pop() if len(vocabularies) == 1 else None,
    )
