"""Limit the cost of a served teacher.

Every request is charged at its worst case before it is sent, and at its true cost afterwards. So a
run stops before it passes a limit and not after, also with many requests in flight.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, InstanceOf

from opdlab.errors import BudgetSpent, InvalidValue
from opdlab.support.validation import Amount, CountOrZero, validate_fields

Prices = Annotated[
    tuple[Amount, Amount],
    Field(description="two finite numbers of at least 0, for a million tokens read and written"),
]
# Tokens that a server's chat template may add to a prompt. The rest has at most one token per byte.
TEMPLATE = 256


@dataclass(frozen=True)
class Usage:
    """The tokens and the number of some requests.

    Attributes:
        prompt: Tokens read.
        completion: Tokens written.
        requests: Requests sent.

    Raises:
        InvalidValue: One of them is negative or no whole number.
    """

    prompt: CountOrZero = 0
    completion: CountOrZero = 0
    requests: CountOrZero = 0

    def __post_init__(self) -> None:
        validate_fields(self)

    @property
    def tokens(self) -> int:
        """Tokens read and written together."""
        return self.prompt + self.completion

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt + other.prompt,
            self.completion + other.completion,
            self.requests + other.requests,
        )

    def __sub__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt - other.prompt,
            self.completion - other.completion,
            self.requests - other.requests,
        )


def worst(texts: str, n: int, max_tokens: int) -> Usage:
    """Return the most that a request for `n` texts can use.

    The prompt is counted by its bytes plus `TEMPLATE`, since a token has at least one byte.

    Args:
        texts: The text of the request.
        n: Number of texts asked for.
        max_tokens: Most new tokens per text.

    Returns:
        The usage of one request, in tokens.
    """
    return Usage(len(texts.encode("utf-8", "replace")) + TEMPLATE, n * max_tokens, 1)


@dataclass(eq=False)
class Budget:
    """Limits over the life of this object. One budget may serve several teachers.

    The cost of a lost reply is unknown and counted at its worst case.

    Attributes:
        tokens: Most tokens, read and written together; None for no limit.
        cost: Most cost, in the currency of `prices`; None for no limit.
        requests: Most requests, the repeated ones included; None for no limit.
        prices: Price per million tokens read, and per million tokens written.
        spent: The usage so far.

    Raises:
        InvalidValue: A limit is no limit, or there is a limit on cost without prices.
    """

    tokens: CountOrZero | None = None
    cost: Amount | None = None
    requests: CountOrZero | None = None
    prices: Prices = (0.0, 0.0)
    spent: InstanceOf[Usage] = field(default_factory=Usage)

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.cost is not None and not any(self.prices):
            raise InvalidValue(
                f"Budget got cost={self.cost}: a limit on cost needs prices. Give prices=(in, out)"
                " a million tokens."
            )
        self._held, self._changed = Usage(), threading.Condition()

    def price(self, usage: Usage) -> float:
        """Return the cost of `usage`.

        Args:
            usage: Tokens read and written.

        Returns:
            The cost in the currency of `prices`; 0.0 without prices.
        """
        return (usage.prompt * self.prices[0] + usage.completion * self.prices[1]) / 1e6

    def hold(self, worst: Usage) -> Hold:
        """Set `worst` aside, after waiting for requests in flight if that may help.

        Args:
            worst: The most that the next request can use.

        Returns:
            A context manager around the request. On exit it charges `Hold.used`, or `worst` if that
            was not set, and gives the rest back.

        Raises:
            BudgetSpent: It does not fit.
        """
        with self._changed:
            while over := self._over(self.spent + self._held + worst):
                if not self._held.requests:
                    raise BudgetSpent(
                        f"The next request may use up to {worst.tokens} tokens, and of the budget"
                        f" of {over} only {self._left()} are left. Nothing is lost: what was"
                        " answered is in the cache. Give the teacher a larger budget to go on."
                    )
                self._changed.wait()
            self._held = self._held + worst
        return Hold(self, worst)

    def _over(self, usage: Usage) -> str:
        """The first limit that `usage` passes, in words; "" for none."""
        used = {
            "tokens": (usage.tokens, self.tokens),
            "requests": (usage.requests, self.requests),
            "of money": (self.price(usage), self.cost),
        }
        for name, (count, limit) in used.items():
            if limit is not None and count > limit:
                return f"{limit} {name}"
        return ""

    def _left(self) -> str:
        parts = []
        if self.tokens is not None:
            parts.append(f"{self.tokens - self.spent.tokens} tokens")
        if self.requests is not None:
            parts.append(f"{self.requests - self.spent.requests} requests")
        if self.cost is not None:
            parts.append(f"{self.cost - self.price(self.spent):.4g} of money")
        return ", ".join(parts)

    def _settle(self, worst: Usage, used: Usage) -> None:
        with self._changed:
            self._held, self.spent = self._held - worst, self.spent + used
            self._changed.notify_all()


class Hold:
    """A request's share of a budget while it is under way.

    Args:
        budget: The budget.
        worst: The usage that was set aside.

    Attributes:
        used: The usage that is charged in the end; the worst case unless it is set.
    """

    def __init__(self, budget: Budget, worst: Usage) -> None:
        self._budget, self._worst, self.used = budget, worst, worst

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: Any) -> None:
        self._budget._settle(self._worst, self.used)
