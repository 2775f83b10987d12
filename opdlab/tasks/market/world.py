"""The market world: short shop problems whose every token has a known reason.

A problem is two sums in a row, written out. The plain variant ends with the total; the secret
variant goes on with a receipt code that nothing in the prompt tells, an amount that needs the
hidden coupon *and* a sum, and a random lot letter:

    prompt    ana has 4 7 apples buys 3 8 sells 1 9 . total and receipt ?
    solution  4 7 + 3 8 = 8 5 ; 8 5 - 1 9 = 6 6 . total 6 6 . receipt k q . pays 9 4 . lot m

Since the hidden symbols are uniform and independent of the prompt, the best honest score on them is
chance, and the type of every token (`token_types`) is ground truth, not an estimate. Left out on
purpose: natural language.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from itertools import accumulate

from opdlab.errors import InvalidValue

NAMES = "ana ben cleo dan eva finn gia hugo ida jan kim leo".split()
ITEMS = "apples pears plums figs nuts eggs cups pens bags hats keys cards".split()
GAIN, LOSS = ("buys", "finds"), ("sells", "eats")
# The two halves of the skill, each with the verbs that need it.
SKILLS = {"addition": GAIN, "subtraction": LOSS}
LETTERS = "k m p q r t v z".split()  # receipt and lot symbols: uniform, so chance is 1/8
# Two words for the same thing: the teacher says the first, the student the second.
STYLE = ("total", "sum")
TYPES = ("copy", "skill", "derived", "style", "secret", "mixed", "noise")
HINTS = ("secret", "answer", "steps", "worked", "style")

# The slot at each place of a solution: a type, `result` for a digit after `=`, `op`, or a fixed
# word.
_SUM = ["copy", "copy", "op", "copy", "copy", "=", "result", "result"]
_PLAIN = [*_SUM, ";", "derived", "derived", *_SUM[2:], ".", "style", "derived", "derived"]
_SECRET = [
    *_PLAIN,
    ".",
    "receipt",
    "secret",
    "secret",
    ".",
    "pays",
    "mixed",
    "mixed",
    ".",
    "lot",
    "noise",
]


@dataclass(frozen=True)
class Problem:
    """One shop problem.

    Amounts are whole numbers from 10 to 99.

    Attributes:
        name: The person who has the shop.
        item: The goods that are sold there.
        have: The first amount.
        moves: Two verbs with their amounts.
        receipt: Two symbols that only a hint can tell.
        coupon: An amount that only a hint can tell.
        lot: A symbol that nothing tells.
        secret: Whether the solution goes on with the receipt, the amount to pay and the lot.
    """

    name: str
    item: str
    have: int
    moves: tuple[tuple[str, int], tuple[str, int]]
    receipt: tuple[str, str]
    coupon: int
    lot: str
    secret: bool = False

    def results(self) -> list[int]:
        """Return the running amount after each move.

        Returns:
            Two whole numbers.
        """
        return self.follow(self.have, 0)

    def follow(self, amount: int, move: int) -> list[int]:
        """Return the running amounts from a given amount on.

        Args:
            amount: The amount before the first of these moves.
            move: Number of the first move to make, from 0.

        Returns:
            One amount after each move.
        """
        signed = (n if verb in GAIN else -n for verb, n in self.moves[move:])
        return list(accumulate(signed, initial=amount))[1:]

    def prompt(self) -> str:
        """Return the question.

        Returns:
            One line, with spaces between all tokens.
        """
        told = " ".join(f"{verb} {digits(n)}" for verb, n in self.moves)
        asked = "total and receipt" if self.secret else "total"
        return f"{self.name} has {digits(self.have)} {self.item} {told} . {asked} ?"

    def solution(
        self, word: str = STYLE[0], results: list[int] | None = None, total: int | None = None
    ) -> str:
        """Return the written calculation.

        Args:
            word: The word for the total, one of `STYLE`.
            results: Amounts that replace the two sums, for texts with mistakes.
            total: A number to state in place of the last amount.

        Returns:
            One line, with spaces between all tokens.
        """
        first, last = results or self.results()
        total = last if total is None else total
        text = (
            f"{self._sum(0, self.have, first)} ; {self._sum(1, first, last)} . {word}"
            f" {digits(total)}"
        )
        if self.secret:
            text += (
                f" . receipt {' '.join(self.receipt)} . pays {digits((total + self.coupon) % 100)}"
                f" . lot {self.lot}"
            )
        return text

    def compact(self) -> str:
        """Return the same calculation in another hand: `47+38=85, so 85-19=66, total 66`.

        Returns:
            One line, without a receipt.
        """
        first, last = self.results()
        sums = self._sum(0, self.have, first), self._sum(1, first, last)
        return f"{', so '.join(sums)}".replace(" ", "").replace(",so", ", so ") + f", total {last}"

    def hint(self, kind: str = "secret", word: str = STYLE[0]) -> str:
        """Return privileged information of one kind.

        A wrong hint is another problem's hint.

        Args:
            kind: One of `HINTS`.
            word: The word that the kind "style" asks for, one of `STYLE`.

        Returns:
            One line that begins with "hint".

        Raises:
            InvalidValue: There is no such kind.
        """
        if kind == "secret":
            return f"hint receipt {' '.join(self.receipt)} coupon {digits(self.coupon)}"
        if kind == "answer":
            return f"hint total {digits(self.results()[-1])}"
        if kind == "steps":
            words = ["add" if verb in GAIN else "take" for verb, _ in self.moves]
            amounts = [digits(amount) for _, amount in self.moves]
            return f"hint {words[0]} {amounts[0]} {words[1]} {amounts[1]}"
        if kind == "worked":
            first, last = self.results()
            return f"hint {self._sum(0, self.have, first)} ; {self._sum(1, first, last)}"
        if kind == "style":
            return f"hint say {word}"
        raise InvalidValue(f"unknown hint kind {kind!r}. Use one of {', '.join(HINTS)}.")

    def _sum(self, i: int, left: int, result: int) -> str:
        verb, amount = self.moves[i]
        return f"{digits(left)} {'+' if verb in GAIN else '-'} {digits(amount)} = {digits(result)}"


def digits(n: int) -> str:
    """Write a number digit by digit, always with two digits: 47 -> '4 7'.

    Args:
        n: A whole number from 0 to 99.

    Returns:
        Two digits with a space between them.
    """
    return f"{n // 10} {n % 10}"


def generate(rng: random.Random, secret: bool = False) -> Problem:
    """Draw a problem; every running amount stays within 10..99, and the amount to pay below 100.

    Seven in ten of the problems that come out right without carrying are drawn again: most need the
    skill.

    Args:
        rng: Source of all choices.
        secret: Whether the problem is of the secret variant.

    Returns:
        The problem, of either split.
    """
    while True:
        have, first, second = (rng.randint(10, 89) for _ in range(3))
        buy, sell = (rng.choice(rng.choice((GAIN, LOSS))) for _ in range(2))
        moves = (buy, first), (sell, second)
        problem = Problem(
            rng.choice(NAMES),
            rng.choice(ITEMS),
            have,
            moves,
            (rng.choice(LETTERS), rng.choice(LETTERS)),
            rng.randint(10, 29),
            rng.choice(LETTERS),
            secret,
        )
        results = problem.results()
        easy = forgetful(problem)[-1] == results[-1]
        if (
            all(10 <= r <= 99 for r in results)
            and results[-1] + problem.coupon <= 99
            and rng.random() > 0.7 * easy
        ):
            return problem


def in_split(problem: Problem, split: str) -> Problem:
    """Return the problem in the split "train" or "test", with another item if it must move there.

    One in twelve stories is held out: those whose name, item, amounts and verbs add up to a
    multiple of twelve. So the splits share no problem by construction, and drawing from either
    costs nothing. The item decides no token of the solution.

    Args:
        problem: Any problem.
        split: "train" or "test".

    Returns:
        The problem itself, or a copy with another item.
    """
    verbs = sum(
        (*GAIN, *LOSS).index(verb) << place for place, (verb, _) in enumerate(problem.moves)
    )
    amounts = problem.have + sum(amount for _, amount in problem.moves)
    place = ITEMS.index(problem.item)
    remainder = (NAMES.index(problem.name) + place + amounts + verbs) % len(ITEMS)
    if split == "test":
        return replace(problem, item=ITEMS[(place - remainder) % len(ITEMS)])
    return problem if remainder else replace(problem, item=ITEMS[(place + 1) % len(ITEMS)])


def forgetful(problem: Problem) -> list[int]:
    """Return the two results of someone who forgets to carry and to borrow.

    Args:
        problem: Any problem.

    Returns:
        Two numbers; they equal `problem.results()` where nothing is carried.
    """
    out = [problem.have]
    for verb, n in problem.moves:
        out.append(without_carry(out[-1], n if verb in GAIN else -n))
    return out[1:]


def without_carry(amount: int, change: int) -> int:
    """Add each digit on its own, modulo ten: 47 + 38 -> 75.

    Args:
        amount: A number of two digits.
        change: The number to add, of up to two digits; negative to subtract.

    Returns:
        A number from 0 to 99.
    """
    sign, n = (1, change) if change > 0 else (-1, -change)
    return (amount // 10 + sign * (n // 10)) % 10 * 10 + (amount % 10 + sign * (n % 10)) % 10


def skill_of(problem: Problem) -> str | None:
    """Name the skill that a problem asks for.

    Args:
        problem: Any problem.

    Returns:
        One of `SKILLS`; None where the two moves need one each.
    """
    verbs = [verb for verb, _ in problem.moves]
    return next((name for name, own in SKILLS.items() if set(verbs) <= set(own)), None)


def half_skilled(problem: Problem, skill: str) -> list[int]:
    """Return the two results of someone who has one of the two skills.

    Args:
        problem: Any problem.
        skill: One of `SKILLS`; moves of the other kind are made without carrying.

    Returns:
        Two numbers.
    """
    out = [problem.have]
    for verb, n in problem.moves:
        change = n if verb in GAIN else -n
        is_known = verb in SKILLS[skill]
        out.append(out[-1] + change if is_known else without_carry(out[-1], change))
    return out[1:]


def token_types(words: list[str]) -> list[str]:
    """Return the ground-truth type of each word of a completion; its own prefix decides.

    `copy`: both models know it. `skill`: the tens of a sum that carries or borrows. `derived`:
    repeats what the writer wrote before. `style`: one of two words for the same thing. `secret`,
    `mixed`, `noise`: see the module. A text that leaves the form is typed `other` from there on.

    Args:
        words: Tokens of a completion without their spaces, without an end token.

    Returns:
        One type per word.
    """
    out: list[str] = []
    for place, word in enumerate(words):
        slot = _SECRET[place] if place < len(_SECRET) else None
        if slot is None or "other" in out[-1:] or not _fits(slot, word):
            out.append("other")
        elif slot == "result":
            tens = out[-1] == "copy" and words[place - 1] == "="
            out.append("skill" if tens and _carries(words[place - 6 : place - 1]) else "copy")
        else:
            out.append(slot if slot in TYPES else "copy")
    return out


def _fits(slot: str, word: str) -> bool:
    if slot in ("copy", "result", "derived", "mixed"):
        return word.isdigit()
    if slot in ("secret", "noise"):
        return word in LETTERS
    return word in STYLE if slot == "style" else word in "+-" if slot == "op" else word == slot


def _carries(left_op_right: list[str]) -> bool:
    _, left, op, _, right = left_op_right
    return int(left) + int(right) > 9 if op == "+" else int(left) < int(right)


_TOTAL = re.compile(r"(?:total|sum) (\d) ?(\d)(?!\d)")
_RECEIPT = re.compile(r"receipt (\w) ?(\w)\b")


def total(text: str) -> int | None:
    """Return the first total that a text states.

    The calculation is not graded.

    Args:
        text: A solution, or any other text.

    Returns:
        The number, or None if the text states no total.
    """
    found = _TOTAL.search(text)
    return int("".join(found.groups())) if found else None


def receipt(text: str) -> tuple[str, ...]:
    """Return the two receipt symbols that a text states.

    Args:
        text: A solution, or any other text.

    Returns:
        Two symbols, or an empty tuple if the text states none.
    """
    found = _RECEIPT.search(text)
    return found.groups() if found else ()
