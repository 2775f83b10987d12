"""Rollouts: what a policy wrote, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdlab.data.prompt import Prompt


@dataclass(frozen=True, eq=False)
class Rollout:
    """`B` completions, right-padded to `T`.

    Contains no hint: every policy renders the prompts as it sees them.

    `ids [B, T]`, `lengths [B]` (the EOS token counts), `logp [B, T]` and `entropy [B, T]` of the
    policy that wrote it, at temperature 1, in nats; zero in the padding and where a text was not
    sampled. `finish[b]` is "stop" or "length". `n`: completions of each prompt, which stand in
    groups of `n` rows; 1 where the prompts have different numbers of them.
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
    vocabulary: str | None = (
        None  # fingerprint of the tokenizer whose ids these are; None: not known
    )

    @property
    def mask(self) -> Tensor:
        """`[B, T]`, true on completion tokens.

        Made from the lengths, so pad = EOS is no problem.
        """
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def completions(self) -> list[list[int]]:
        """The completion ids, a list a row."""
        return [
            row[:length]
            for row, length in zip(self.ids.tolist(), self.lengths.tolist(), strict=True)
        ]

    def rows(self, which: Sequence[int]) -> Rollout:
        """The rollout of some rows only, in that order."""
        pick = torch.as_tensor(list(which), dtype=torch.long, device=self.ids.device)
        width = max(1, int(self.lengths[pick].max())) if len(which) else 1
        parts: dict[str, Any] = {
            k: getattr(self, k)[pick][:, :width] for k in ("ids", "logp", "entropy")
        }
        parts |= {
            k: tuple(getattr(self, k)[i] for i in which)
            for k in ("prompts", "finish", "texts", "writer")
        }
        return replace(
            self, **parts, lengths=self.lengths[pick], n=self.n if self._keeps_groups(which) else 1
        )

    def _keeps_groups(self, which: Sequence[int]) -> bool:
        """Whether these rows are whole groups of `n`, each in its order."""
        groups = [list(which[i : i + self.n]) for i in range(0, len(which), self.n)]
        return all(
            group[0] % self.n == 0 and group == list(range(group[0], group[0] + self.n))
            for group in groups
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        cut = sum(f == "length" for f in self.finish)
        return (
            f"Rollout({len(self)} completions, {self.tokens} tokens, {cut} cut off at the length"
            " limit)"
        )


def concat_rollouts(parts: Sequence[Rollout]) -> Rollout:
    """Several rollouts as one, rows in order. Its `n` is theirs, or 1 where they differ."""
    width = max(part.ids.shape[1] for part in parts)
    wide = lambda x: torch.nn.functional.pad(x, (0, width - x.shape[1]))
    whole: dict[str, Any] = {
        k: torch.cat([wide(getattr(part, k)) for part in parts]) for k in ("ids", "logp", "entropy")
    }
    whole |= {
        k: sum((getattr(part, k) for part in parts), ())
        for k in ("prompts", "finish", "texts", "writer")
    }
    vocabularies = {part.vocabulary for part in parts}
    vocabulary = vocabularies.pop() if len(vocabularies) == 1 else None
    counts = {
        part.n for part in parts
    }  # samples of a prompt stand side by side only if all parts have as many
    n = counts.pop() if len(counts) == 1 else 1
    return Rollout(
        **whole, lengths=torch.cat([part.lengths for part in parts]), n=n, vocabulary=vocabulary
    )
