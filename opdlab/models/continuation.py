"""Run unfinished texts, one token after the other.

`begin` chooses how: from a cache where the model can, which holds a prompt once for all its texts
where the model can do that too; otherwise by running every text anew for each token, which is slow
and always right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from opdlab.models.abilities import Abilities
from opdlab.models.forward import (
    count_shared,
    find_backbone,
    hidden_at,
    pick_rows,
    repeat_cache,
    run_backbone,
    run_shared,
)
from opdlab.models.growing_cache import let_grow
from opdlab.models.parted_cache import (
    FixedLayer,
    PartedLayer,
    Room,
    attention_to_parts,
    split_cache,
)
from opdlab.models.placement import input_device

ROOM = 256  # tokens, for which `InPlace` makes room at once, or fewer for shorter texts

UNLIMITED = 2**40  # tokens


class Continuation(Protocol):
    """A batch of unfinished texts.

    Attributes:
        states: The hidden state where each text's next token is predicted, `[B, H]`.
        stays_in_place: Whether `append` changes tensors in place only, without waiting for the
            device, so that its kernels can be replayed.
        layout: A number that changes when the tensors are replaced by others.
    """

    states: Tensor
    stays_in_place: bool
    layout: int

    def choose(self, going: Tensor) -> Tensor:
        """Choose the texts to keep, so that those that go on are among them.

        Args:
            going: Whether each text goes on, `[B]`.

        Returns:
            Their numbers, in order.
        """
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the texts only.

        Args:
            rows: Their numbers `[B']`, in order.
        """
        ...

    def make_room(self) -> None:
        """Make room for the next token, before `append`."""
        ...

    def append(self, tokens: Tensor) -> None:
        """Add a token to each text and compute the new `states`.

        Args:
            tokens: One token id per text, `[B]`.
        """
        ...


def begin(
    model: PreTrainedModel,
    starts: list[list[int]],
    n: int,
    abilities: Abilities,
    *,
    limits: Tensor | None = None,
    replay: bool = False,
) -> Continuation:
    """Begin `n` texts after each prompt: text `i * n + j` goes on from `starts[i]`.

    Args:
        model: The model.
        starts: Token ids of each prompt; of equal length where the model has a cache and cannot
            pad (`Abilities.pads_left`).
        n: Texts per prompt.
        abilities: The shortcuts that may be taken.
        limits: The most tokens of each text, `[len(starts) * n]`; None for no limit. A text that is
            full may get more tokens, whose states mean nothing: they lie at its last position, and
            not beyond the model's context.
        replay: Whether the texts should stay in place where the model can do that.

    Returns:
        The texts, with the `states` after their prompts computed.
    """
    if not abilities.caches:
        rows = [list(start) for start in starts for _ in range(n)]
        return Recomputed(model, rows, abilities, limits)
    read = read_prompts(model, starts, shares_prefix=abilities.shares_prefix)
    if abilities.splits_cache and (n > 1 or replay):
        layers = split_cache(read.cache, read.mask)
        if layers and replay:
            return InPlace(model, read, layers, n, limits)
        if layers:
            return Parted(model, read, layers, n, limits)
    return Cached(model, read, n, limits)


@dataclass
class PromptsRead:
    """Prompts after a pass of a model.

    Attributes:
        cache: Keys, values and recurrent states of the prompts.
        states: The hidden state at the end of each prompt, `[P, H]`.
        lengths: Tokens of each prompt, `[P]`.
        mask: 1 for tokens and 0 for padding on the left, `[P, S]`; None where nothing is padded.
    """

    cache: DynamicCache
    states: Tensor
    lengths: Tensor
    mask: Tensor | None


def read_prompts(
    model: PreTrainedModel, starts: list[list[int]], *, shares_prefix: bool = False
) -> PromptsRead:
    """Run each prompt once, left-padded.

    Where all prompts are of one length, what they begin with is run once for all.

    Args:
        model: The model, with the adapter in force that shall write.
        starts: Token ids of each prompt.
        shares_prefix: Whether the model may go on from a cache with several tokens.

    Returns:
        The prompts' cache and last states.
    """
    device, width = input_device(model), max(map(len, starts))
    ids = torch.tensor([[0] * (width - len(s)) + s for s in starts], device=device)
    lengths = torch.tensor([len(s) for s in starts], device=device)
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    is_padded = any(len(start) < width for start in starts)
    shared = count_shared(starts) if shares_prefix and not is_padded else 0
    with torch.no_grad():  # texts have no gradient
        cache = run_shared(model, starts, shared)
    cache = DynamicCache(config=model.config) if cache is None else cache
    states = run_backbone(
        model,
        ids[:, shared:],
        positions=positions[:, shared:],
        mask=mask if is_padded else None,
        cache=cache,
    )[:, -1]
    return PromptsRead(cache, states, lengths, mask if is_padded else None)


def _last_positions(read: PromptsRead, n: int, limits: Tensor | None) -> Tensor:
    """The position of the last token of each text when it is full."""
    lengths = read.lengths.repeat_interleave(n)
    return lengths + (UNLIMITED if limits is None else limits.to(lengths.device)) - 1


class Cached:
    """Go on from a cache that holds each text with its prompt, one token at a time.

    Args:
        model: The model, with the adapter in force that shall write.
        read: The prompts; their cache is used and changed.
        n: Texts per prompt.
        limits: As in `begin`.

    Attributes:
        states: The hidden state where each text's next token is predicted, `[B, H]`.
        cache: Keys, values and recurrent states of all texts.
        position: Position of the next token of each text, `[B]`.
        last: The last position of each text, `[B]`.
        mask: 1 for tokens and 0 for padding, `[B, T]`; None where nothing is padded.
    """

    stays_in_place, layout = False, 0

    def __init__(
        self, model: PreTrainedModel, read: PromptsRead, n: int, limits: Tensor | None = None
    ) -> None:
        self.model, self.cache = model, read.cache
        if n > 1:
            repeat_cache(self.cache, len(read.states), n, read.states.device)
        let_grow(self.cache)
        self.states = read.states.repeat_interleave(n, 0)
        self.last = _last_positions(read, n, limits)
        self.position = read.lengths.repeat_interleave(n).minimum(self.last)
        self.mask = None if read.mask is None else read.mask.repeat_interleave(n, 0)

    def choose(self, going: Tensor) -> Tensor:
        """Choose the texts that go on; see `Continuation`."""
        return going.nonzero()[:, 0]

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the texts only; see `Continuation`."""
        pick_rows(self.cache, rows)
        self.states, self.position = self.states[rows], self.position[rows]
        self.last = self.last[rows]
        self.mask = None if self.mask is None else self.mask[rows]

    def make_room(self) -> None:
        """Do nothing: room is made as it is needed."""

    def append(self, tokens: Tensor) -> None:
        """Add a token to each text and compute the new `states`; see `Continuation`."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], 1)
        ids, positions = tokens[:, None], self.position[:, None]
        self.states = run_backbone(
            self.model, ids, positions=positions, mask=self.mask, cache=self.cache
        )[:, -1]
        self.position = (self.position + 1).minimum(self.last)


class Parted:
    """Go on from a cache that holds each prompt once for its `n` texts, one token at a time.

    Args:
        model: The model, with the adapter in force that shall write.
        read: The prompts.
        layers: The layers of their cache, which is split (`split_cache`).
        n: Texts per prompt.
        limits: As in `begin`.

    Attributes:
        states: The hidden state where each text's next token is predicted, `[P * n, H]`.
        cache: Keys and values of prompts and texts.
        position: Position of the next token of each text, `[P * n]`.
        last: The last position of each text, `[P * n]`.
        n: Texts per prompt.
    """

    stays_in_place, layout = False, 0

    def __init__(
        self,
        model: PreTrainedModel,
        read: PromptsRead,
        layers: list[PartedLayer],
        n: int,
        limits: Tensor | None = None,
    ) -> None:
        self.model, self.cache, self.layers, self.n = model, read.cache, layers, n
        self.states = read.states.repeat_interleave(n, 0)
        self.last = _last_positions(read, n, limits)
        self.position = read.lengths.repeat_interleave(n).minimum(self.last)

    def choose(self, going: Tensor) -> Tensor:
        """Choose equally many texts of each prompt that has texts which go on.

        Args:
            going: Whether each text goes on, `[P * n]`.

        Returns:
            The numbers of the texts: all that go on, and beside them some that have ended.
        """
        by_prompt = going.view(-1, self.n)
        most = int(by_prompt.sum(1).max())
        first = by_prompt.long().sort(dim=1, descending=True, stable=True).indices[:, :most]
        chosen = torch.zeros_like(by_prompt).scatter_(1, first, value=True)
        chosen &= by_prompt.any(1, keepdim=True)
        return chosen.flatten().nonzero()[:, 0]

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the texts only, equally many of each prompt that has any left.

        Args:
            rows: Their numbers, in order, as from `choose`.
        """
        prompts = torch.unique_consecutive(rows // self.n)
        self.n = len(rows) // len(prompts)
        for layer in self.layers:
            layer.keep(prompts, rows)
        self.states, self.position = self.states[rows], self.position[rows]
        self.last = self.last[rows]

    def make_room(self) -> None:
        """Do nothing: room is made as it is needed."""

    def append(self, tokens: Tensor) -> None:
        """Add a token to each text and compute the new `states`; see `Continuation`."""
        ids, positions = tokens[:, None], self.position[:, None]
        with attention_to_parts(find_backbone(self.model)):
            self.states = run_backbone(self.model, ids, positions=positions, cache=self.cache)[
                :, -1
            ]
        self.position = (self.position + 1).minimum(self.last)


class InPlace(Parted):
    """Go on as `Parted` does, with all tensors in place.

    The keys and values of the texts have room for tokens to come, which attention leaves out. More
    room is made from time to time, since attention reads all of it.

    Args:
        model: The model, with the adapter in force that shall write.
        read: The prompts.
        layers: The layers of their cache, which is split (`split_cache`); they are replaced.
        n: Texts per prompt.
        limits: As in `begin`.

    Attributes:
        room: The room for tokens, of all layers.
    """

    stays_in_place = True

    def __init__(
        self,
        model: PreTrainedModel,
        read: PromptsRead,
        layers: list[PartedLayer],
        n: int,
        limits: Tensor | None = None,
    ) -> None:
        super().__init__(model, read, layers, n, limits)
        tokens = ROOM if limits is None else min(ROOM, int(limits.max()))
        self.room, self._tokens = Room(tokens, self.states.device), 0
        fixed = [FixedLayer(layer, self.room, len(self.states)) for layer in layers]
        self.fixed = fixed
        self.layers, self.cache.layers = [*fixed], [*fixed]

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the texts only; see `Parted`."""
        super().keep(rows)
        self.layout += 1

    def make_room(self) -> None:
        """Make room for the next token; see `Continuation`."""
        self._tokens += 1
        if self._tokens > self.room.tokens:
            self.room.grow(ROOM)
            for layer in self.fixed:
                layer.grow(ROOM)
            self.layout += 1

    def append(self, tokens: Tensor) -> None:
        """Add a token to each text and compute the new `states`; see `Continuation`."""
        self.room.begin_token()
        states, position = self.states, self.position
        super().append(tokens)
        # The new numbers go where the old ones were: a replayed kernel finds them there.
        states.copy_(self.states)
        position.copy_(self.position)
        self.states, self.position = states, position
        self.room.end_token()


class Recomputed:
    """Run all texts from the beginning for every token.

    Args:
        model: The model, with the adapter in force that shall write.
        rows: Token ids of each text so far.
        abilities: The shortcuts that may be taken within a pass.
        limits: As in `begin`.

    Attributes:
        states: The hidden state where each text's next token is predicted, `[B, H]`.
        rows: Token ids of each text, prompt included.
        most: The most tokens of each text, prompt included.
    """

    stays_in_place, layout = False, 0

    def __init__(
        self,
        model: PreTrainedModel,
        rows: list[list[int]],
        abilities: Abilities,
        limits: Tensor | None = None,
    ) -> None:
        self.model, self.rows, self.abilities = model, rows, abilities
        more = [UNLIMITED] * len(rows) if limits is None else limits.tolist()
        self.most = [len(row) + limit for row, limit in zip(rows, more, strict=True)]
        self.states = self._run()

    def choose(self, going: Tensor) -> Tensor:
        """Choose the texts that go on; see `Continuation`."""
        return going.nonzero()[:, 0]

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the texts only; see `Continuation`."""
        kept = rows.tolist()
        self.rows, self.most = [self.rows[i] for i in kept], [self.most[i] for i in kept]
        self.states = self.states[rows]

    def make_room(self) -> None:
        """Do nothing: room is made as it is needed."""

    def append(self, tokens: Tensor) -> None:
        """Add a token to each text and compute the new `states`; see `Continuation`."""
        for row, most, token in zip(self.rows, self.most, tokens.tolist(), strict=True):
            if len(row) < most:
                row.append(token)
        self.states = self._run()

    def _run(self) -> Tensor:
        ends = [range(len(row) - 1, len(row)) for row in self.rows]
        return hidden_at(self.model, self.rows, ends, self.abilities)
