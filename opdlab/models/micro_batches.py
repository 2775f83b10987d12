"""Arrange rows into passes: little padding, and what prompts share run once.

Everything here is arithmetic on lists of token ids. The unit of cost is a token that is run; a pass
costs as much as `PASS_COST` of them, for what every pass takes however small it is.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

# A pass takes as long as so many tokens in a larger one, however few it has. On a CPU 21 to 25 were
# measured, with models of 5 and 8 layers, with and without gradient; for a GPU it is an estimate.
PASS_COST = {"cpu": 32, "cuda": 2048}


def pass_cost(device: str) -> int:
    """Return the cost of a pass in tokens.

    Args:
        device: The kind of device, such as "cpu" or "cuda".

    Returns:
        The number of tokens.
    """
    return PASS_COST.get(device, PASS_COST["cuda"])


@dataclass(frozen=True)
class Level:
    """Beginnings of one length that are run before the rows that go on from them.

    Attributes:
        length: Tokens of each beginning, from the first token of the text.
        rows: A row of the batch for each distinct beginning.
        places: The beginning of each row of the batch, as a number in `rows`.
    """

    length: int
    rows: tuple[int, ...]
    places: tuple[int, ...]


def make_level(starts: Sequence[list[int]], length: int) -> Level:
    """Find the distinct beginnings of some prompts.

    Args:
        starts: Token ids of each prompt, of at least `length` tokens.
        length: Tokens of a beginning.

    Returns:
        The beginnings, in the order of the rows.
    """
    numbers: dict[tuple[int, ...], int] = {}
    rows, places = [], []
    for i, start in enumerate(starts):
        beginning = tuple(start[:length])
        if beginning not in numbers:
            numbers[beginning] = len(numbers)
            rows.append(i)
        places.append(numbers[beginning])
    return Level(length, tuple(rows), tuple(places))


def find_levels(starts: Sequence[list[int]], cost: int) -> list[Level]:
    """Find the beginnings of prompts that are worth running once for several rows.

    Prompts of a chat share the system message, and samples of one prompt share the prompt: then
    there are two levels. At least one token of each prompt is left, whose state predicts the first
    token of its completion.

    Args:
        starts: Token ids of each row's prompt.
        cost: The cost of a pass in tokens.

    Returns:
        The levels that make the batch cheapest, shortest first; none where nothing is saved.
    """
    room = min(map(len, starts)) - 1
    if len(starts) < 2 or room < 1:
        return []
    in_order = sorted({tuple(start) for start in starts})
    alike = sorted(min(count_alike(a, b), room) for a, b in pairwise(in_order))
    # Beginnings of `length` tokens: neighbours that agree on fewer tokens are distinct.
    ends = sorted({*alike, room} - {0})
    distinct = [1 + bisect.bisect_left(alike, length) for length in ends]
    # cheapest[j]: tokens up to ends[j], as the last level so far; before[j]: the level before.
    cheapest: list[int] = []
    before: list[int] = []
    for j, end in enumerate(ends):
        options = [cost + distinct[j] * end]
        options += [cheapest[i] + cost + distinct[j] * (end - ends[i]) for i in range(j)]
        cheapest.append(min(options))
        before.append(options.index(cheapest[j]) - 1)
    # The rows themselves are run from the last level on.
    totals = [spent - len(starts) * end for spent, end in zip(cheapest, ends, strict=True)]
    if min(totals) >= 0:
        return []
    chosen, j = [], totals.index(min(totals))
    while j >= 0:
        chosen.append(make_level(starts, ends[j]))
        j = before[j]
    return chosen[::-1]


def count_alike(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the tokens that two texts begin with.

    Args:
        a: Token ids.
        b: Token ids of the same type of sequence.

    Returns:
        Their number; by halving, since comparing slices is faster than comparing tokens.
    """
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class Limits:
    """The limits of a pass.

    Attributes:
        tokens: The most tokens that are run beside one prompt that rows share; None for no limit. A
            row that has more is run alone.
        rows: The rows of each pass but the last, whatever they have; `tokens` does not count then.
        cost: The cost of a pass in tokens.
        shares: Whether beginnings may be run once.
    """

    tokens: int | None
    rows: int | None
    cost: int
    shares: bool


def arrange(starts: Sequence[list[int]], lengths: Sequence[int], limits: Limits) -> list[list[int]]:
    """Choose which rows are run together.

    Rows are taken by length, which saves padding, or prompt by prompt, which lets samples of a
    prompt share it: whichever runs fewer tokens. A new pass begins where the padding would cost
    more than the pass, and where a pass would have too many tokens.

    Args:
        starts: Token ids of each row's prompt; at least one row.
        lengths: Tokens of each row, with its prompt.
        limits: The limits of a pass.

    Returns:
        Row numbers of each pass, ascending, the passes by their first row.
    """
    texts = [tuple(start) for start in starts]
    common = 0
    if limits.shares:
        low, high = min(texts), max(texts)  # all others lie between them
        common = min(count_alike(low, high), min(map(len, texts)) - 1)
    rows = range(len(texts))
    orders = [
        sorted(rows, key=lambda i: (-lengths[i], texts[i])),
        sorted(rows, key=lambda i: (-len(texts[i]), texts[i], -lengths[i])),
    ]
    plans = [_cut(order, texts, lengths, common, limits) for order in orders]
    best = min(plans, key=lambda plan: plan.tokens)
    return sorted(sorted(one) for one in best.passes)


@dataclass(frozen=True)
class _Load:
    """Add up the cost of the rows of a pass.

    Attributes:
        common: Tokens that all rows of the step begin with, if beginnings are shared.
        rows: Number of rows.
        texts: Number of distinct prompts.
        room: Tokens of the shortest prompt but its last.
        width: Tokens of the longest row.
        real: Tokens of all rows, without padding.
    """

    common: int
    rows: int = 0
    texts: int = 0
    room: int = 0
    width: int = 0
    real: int = 0

    def with_row(self, prompt: int, length: int, *, is_new: bool) -> _Load:
        """Add a row of `length` tokens, whose prompt has `prompt` of them."""
        room = prompt - 1
        return _Load(
            common=self.common,
            rows=self.rows + 1,
            texts=self.texts + is_new,
            room=min(self.room, room) if self.rows else room,
            width=max(self.width, length),
            real=self.real + length,
        )

    @property
    def padding(self) -> int:
        return self.rows * self.width - self.real

    def count(self, shares: bool) -> tuple[int, int]:
        """Count the tokens that are run, and those of them beside one prompt."""
        if self.rows == 1 or not shares:
            return self.rows * self.width, self.rows * self.width
        by_common = self.common + self.rows * (self.width - self.common)
        by_prompt = self.common + self.texts * (self.room - self.common)
        by_prompt += self.rows * (self.width - self.room)
        if by_prompt < by_common:
            # The last token of each prompt is run with its completion.
            return by_prompt, by_prompt - self.room - self.rows
        return by_common, by_common - self.common


@dataclass(frozen=True)
class _Plan:
    """Rows of each pass, and the tokens that are run in all, with the cost of the passes."""

    passes: list[list[int]]
    tokens: int


def in_order(
    parts: Sequence[Tensor], passes: Sequence[Sequence[int]], lengths: Sequence[int]
) -> Tensor:
    """Put the tokens of several passes back into the order of the rows.

    Args:
        parts: `[tokens, ...]` of each pass, its rows one after the other.
        passes: The rows of each pass; each row is in one of them.
        lengths: Tokens of each row in `parts`.

    Returns:
        `[tokens, ...]` of all rows in order.
    """
    if len(parts) == 1:
        return parts[0]
    pieces: dict[int, Tensor] = {}
    for part, rows in zip(parts, passes, strict=True):
        pieces |= zip(rows, part.split([lengths[i] for i in rows]), strict=True)
    return torch.cat([pieces[i] for i in range(len(lengths))])


def _cut(
    order: list[int],
    texts: list[tuple[int, ...]],
    lengths: Sequence[int],
    common: int,
    limits: Limits,
) -> _Plan:
    """Cut ordered rows into passes that are about equally large."""
    plan = _fill(order, texts, lengths, common, limits)
    if limits.rows is not None or limits.tokens is None or len(plan.passes) == 1:
        return plan
    # The smallest limit that needs no more passes: equal ones hold less at once.
    low, high = 1, limits.tokens
    while low < high:
        middle = (low + high) // 2
        tried = _fill(order, texts, lengths, common, replace(limits, tokens=middle))
        if len(tried.passes) <= len(plan.passes):
            plan, high = tried, middle
        else:
            low = middle + 1
    return plan


def _fill(
    order: list[int],
    texts: list[tuple[int, ...]],
    lengths: Sequence[int],
    common: int,
    limits: Limits,
) -> _Plan:
    """Take rows in order into a pass until the next one does not belong there."""
    passes: list[list[int]] = []
    loads: list[_Load] = []
    seen: set[tuple[int, ...]] = set()
    for row in order:
        text = texts[row]
        if passes:
            longer = loads[-1].with_row(len(text), lengths[row], is_new=text not in seen)
        if passes and _fits(longer, limits):
            passes[-1].append(row)
            loads[-1] = longer
        else:
            passes.append([row])
            loads.append(_Load(common).with_row(len(text), lengths[row], is_new=True))
            seen.clear()
        seen.add(text)
    tokens = sum(load.count(limits.shares)[0] + limits.cost for load in loads)
    return _Plan(passes, tokens)


def _fits(load: _Load, limits: Limits) -> bool:
    if limits.rows is not None:
        return load.rows <= limits.rows
    fresh = load.count(limits.shares)[1]
    return load.padding <= limits.cost and (limits.tokens is None or fresh <= limits.tokens)
