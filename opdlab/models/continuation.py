"""Run unfinished texts, one token after the other.

`begin` chooses how: from a cache where the model can, otherwise by running every text anew for each
token, which is slow and always right.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opdlab.models.abilities import Abilities
from opdlab.models.forward import (
    count_shared,
    hidden_at,
    pick_rows,
    repeat_cache,
    run_backbone,
    run_shared,
)
from opdlab.models.growing_cache import let_grow
from opdlab.models.placement import input_device


class Continuation(Protocol):
    """A batch of unfinished texts.

    Attributes:
        states: The hidden state where each text's next token is predicted, `[B, H]`.
    """

    states: Tensor

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the texts only.

        Args:
            rows: Their numbers `[B']`, in the order that they shall have.
        """
        ...

    def append(self, tokens: Tensor) -> None:
        """Add a token to each text and compute the new `states`.

        Args:
            tokens: One token id per text, `[B]`.
        """
        ...


def begin(
    model: PreTrainedModel, starts: list[list[int]], n: int, abilities: Abilities
) -> Continuation:
    """Begin `n` texts after each prompt: text `i * n + j` goes on from `starts[i]`.

    Args:
        model: The model.
        starts: Token ids of each prompt; of equal length where the model has a cache and cannot
            pad (`Abilities.pads_left`).
        n: Texts per prompt.
        abilities: The shortcuts that may be taken.

    Returns:
        The texts, with the `states` after their prompts computed.
    """
    if abilities.caches:
        return Cached(model, starts, n, shares_prefix=abilities.shares_prefix)
    return Recomputed(model, [list(start) for start in starts for _ in range(n)], abilities)


class Cached:
    """Go on from a cache, one token at a time.

    Each prompt is run once, left-padded, and its `n` texts share its cache. Where all prompts are
    of one length, what they begin with is run once for all.

    Args:
        model: The model, with the adapter in force that shall write.
        starts: Token ids of each prompt.
        n: Texts per prompt.
        shares_prefix: Whether the model may go on from a cache with several tokens.

    Attributes:
        states: The hidden state where each text's next token is predicted, `[B, H]`.
        cache: Keys, values and recurrent states of all texts.
        position: Position of the next token of each text, `[B]`.
        mask: 1 for tokens and 0 for padding, `[B, T]`; None where nothing is padded.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        starts: list[list[int]],
        n: int,
        *,
        shares_prefix: bool = False,
    ) -> None:
        self.model, device = model, input_device(model)
        width = max(map(len, starts))
        ids = torch.tensor([[0] * (width - len(s)) + s for s in starts], device=device)
        lengths = torch.tensor([len(s) for s in starts], device=device)
        mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.mask = None if bool(mask.all()) else mask
        shared = count_shared(starts) if shares_prefix and self.mask is None else 0
        with torch.no_grad():  # texts have no gradient
            cache = run_shared(model, starts, shared)
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        states = run_backbone(
            model,
            ids[:, shared:],
            positions=positions[:, shared:],
            mask=self.mask,
            cache=self.cache,
        )[:, -1]
        if n > 1:
            repeat_cache(self.cache, len(starts), n, device)
        let_grow(self.cache)
        self.states = states.repeat_interleave(n, 0)
        self.position = lengths.repeat_interleave(n)
        self.mask = None if self.mask is None else self.mask.repeat_interleave(n, 0)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the texts only.

        Args:
            rows: Their numbers `[B']`, in the order that they shall have.
        """
        pick_rows(self.cache, rows)
        self.states, self.position = self.states[rows], self.position[rows]
        self.mask = None if self.mask is None else self.mask[rows]

    def append(self, tokens: Tensor) -> None:
        """Add a token to each text and compute the new `states`.

        Args:
            tokens: One token id per text, `[B]`.
        """
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        ids, positions = tokens[:, None], self.position[:, None]
        self.states = run_backbone(
            self.model, ids, positions=positions, mask=self.mask, cache=self.cache
        )[:, -1]
        self.position = self.position + 1


class Recomputed:
    """Run all texts from the beginning for every token.

    Args:
        model: The model, with the adapter in force that shall write.
        rows: Token ids of each text so far.
        abilities: The shortcuts that may be taken within a pass.

    Attributes:
        states: The hidden state where each text's next token is predicted, `[B, H]`.
        rows: Token ids of each text, prompt included.
    """

    def __init__(self, model: PreTrainedModel, rows: list[list[int]], abilities: Abilities) -> None:
        self.model, self.rows, self.abilities = model, rows, abilities
        self.states = self._run()

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the texts only.

        Args:
            rows: Their numbers `[B']`, in the order that they shall have.
        """
        self.rows = [self.rows[i] for i in rows.tolist()]
        self.states = self.states[rows]

    def append(self, tokens: Tensor) -> None:
        """Add a token to each text and compute the new `states`.

        Args:
            tokens: One token id per text, `[B]`.
        """
        self.rows = [[*row, token] for row, token in zip(self.rows, tokens.tolist(), strict=True)]
        self.states = self._run()

    def _run(self) -> Tensor:
        ends = [range(len(row) - 1, len(row)) for row in self.rows]
        return hidden_at(self.model, self.rows, ends, self.abilities)
