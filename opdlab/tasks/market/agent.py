"""The market with a price list that only a tool knows: conversations of two to five turns.

A customer names a stall and some goods; the clerk asks the tool for the price of each, then adds
them up:

    user       ana buys figs and hats at stall#47. total?
    assistant  <tool_call>{"name": "price", "arguments": {"item": "figs", "stall": 47}}</tool_call>
    tool       38
    assistant  <tool_call>{"name": "price", "arguments": {"item": "hats", "stall": 47}}</tool_call>
    tool       19
    assistant  38+19=57, total:57

Stalls sell at 90 times 12 different prices, and the models learn from made-up ones, so nobody can
know a price without asking. The type of every token (`token_types`) is ground truth. Left out on
purpose: natural language.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from opdlab.tasks.market.world import ITEMS, NAMES

CHEAPEST, DEAREST = 10, 39
STALLS = range(10, 100)
TYPES = ("call", "argument", "copied", "skill", "sum", "derived", "form", "end", "tool", "other")


def price(item: str, stall: int) -> int:
    """Look up what an item costs at a stall.

    Args:
        item: The name of the goods, in the plural.
        stall: The number of the stall, from 10 to 99.

    Returns:
        The price.
    """
    if item not in ITEMS or stall not in STALLS:
        raise ValueError("not sold here")
    digest = hashlib.sha256(f"{item}/{stall}".encode()).digest()
    return CHEAPEST + int.from_bytes(digest[:4], "big") % (DEAREST - CHEAPEST + 1)


@dataclass(frozen=True)
class Errand:
    """What a customer wants to know.

    Attributes:
        name: The customer.
        items: One to four different goods.
        stall: The stall's number, of two digits.
    """

    name: str
    items: tuple[str, ...]
    stall: int

    def prompt(self) -> str:
        """Return the question.

        Returns:
            One line.
        """
        goods = " and".join(f" {item}" for item in self.items)
        return f"{self.name} buys{goods} at stall#{self.stall}. total?"

    def prices(self) -> list[int]:
        """Look up all prices.

        Returns:
            One whole number for each of the goods.
        """
        return [price(item, self.stall) for item in self.items]


def bill(prices: Sequence[int]) -> str:
    """Add up prices in writing.

    Args:
        prices: At least one.

    Returns:
        One line that ends with the total.
    """
    sums = list(accumulate(prices))
    steps = [
        f"{before}+{added}={after}"
        for before, added, after in zip(sums, prices[1:], sums[1:], strict=False)
    ]
    return ", ".join([*steps, f"total:{sums[-1]}"])


def total(text: str) -> int | None:
    """Return the total that a text states.

    Args:
        text: Any text.

    Returns:
        The number; None if the text states none.
    """
    found = re.search(r"total:(\d{2,3})(?!\d)", text)
    return int(found[1]) if found else None


def generate(rng: random.Random, split: str = "train") -> Errand:
    """Draw an errand whose total has two digits.

    One errand in twelve is held out, by customer, goods and stall.

    Args:
        rng: Source of all choices.
        split: "train" or "test".

    Returns:
        An errand of that split.
    """
    while True:
        count = rng.choice((1, 2, 2, 2, 3, 3, 3, 4))
        errand = Errand(
            rng.choice(NAMES), tuple(rng.sample(ITEMS, count)), rng.choice(list(STALLS))
        )
        places = sum(map(ITEMS.index, errand.items)) + NAMES.index(errand.name) + errand.stall
        if (places % 12 == 0) == (split == "test") and sum(errand.prices()) <= 99:
            return errand


# The types of tokens.

_CALL = ("<tool_call>", "</tool_call>")


def token_types(pieces: Sequence[str]) -> list[str]:
    """Return the ground-truth type of every token of a conversation.

    `call`: the form of a tool call. `argument`: the goods and the stall in it. `copied`: digits of
    a price in the bill. `skill`: the tens of a sum that carries; `sum`: its other digits.
    `derived`: digits that repeat the sum before. `form`: signs and words of the bill. `end`: the
    end of a turn. `tool`: what the student did not write. `other`: everything that fits no form.

    Args:
        pieces: The tokens of a completion without their spaces.

    Returns:
        One type per token.
    """
    out: list[str] = []
    start = 0
    while start < len(pieces):
        if pieces[start] == "<tool>":  # until the assistant's next turn has begun
            stop = start + 1
            while stop < len(pieces) and pieces[stop - 1] != "<assistant>":
                stop += 1
            out += ["tool"] * (stop - start)
        else:
            stop = start
            while stop < len(pieces) and pieces[stop] != "<eos>":
                stop += 1
            turn = pieces[start:stop]
            out += _types_of_call(turn) if turn[:1] == [_CALL[0]] else _types_of_bill(turn)
            if stop < len(pieces):
                out.append("end")
                stop += 1
        start = stop
    return out


def _types_of_call(turn: Sequence[str]) -> list[str]:
    inside = ("item", "stall", "price")
    return [
        "argument" if piece.isdigit() or (piece.isalpha() and piece not in inside) else "call"
        for piece in turn
    ]


def _types_of_bill(turn: Sequence[str]) -> list[str]:
    """Type a bill's digits by the signs around their numbers."""
    out: list[str] = []
    number: list[int] = []  # places of the digits of the number that is being read
    known: list[str] = []  # left and right side of the sum that is being read
    sign = ""
    has_sum = False

    def close() -> None:
        nonlocal has_sum
        value = "".join(turn[i] for i in number)
        if sign == "=":
            kinds = ["sum"] * len(number)
            if len(known) == 2 and len(known[0]) == len(known[1]) == len(number) == 2:
                carries = int(known[0][1]) + int(known[1][1]) > 9
                kinds = ["skill" if carries else "sum", "sum"]
            has_sum = True
        elif sign == "+" or not has_sum:
            kinds = ["copied"] * len(number)
        else:
            kinds = ["derived"] * len(number)
        for place, kind in zip(number, kinds, strict=True):
            out[place] = kind
        known.append(value)
        number.clear()

    for place, piece in enumerate(turn):
        if piece.isdigit():
            number.append(place)
            out.append("other")
            continue
        if number:
            close()
        if piece in (",", ", "):
            known.clear()
        out.append("form" if piece in ("+", "=", ",", ", ", "total:") else "other")
        sign = piece.strip()
    if number:
        close()
    return out
