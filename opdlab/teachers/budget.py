"""What a served teacher may cost.

Every request is held back from the budget at its worst case before it is sent, so that the limit
stops a run before it is passed and not after, also with many requests in flight.
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
# tokens that a server's chat template may add to a prompt; the rest of a prompt has at most one a
# byte
TEMPLATE = 256


@dataclass(frozen=True)
class Usage:
    """What requests used: tokens read, tokens written, how many requests.

    Raises InvalidValue for less than nothing.
    """

    prompt: CountOrZero = 0
    completion: CountOrZero = 0
    requests: CountOrZero = 0

    def __post_init__(self) -> None:
        validate_fields(self)

    @property
    def tokens(self) -> int:
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
    """The most that a request for `n` texts can use: a token has at least one byte."""
    return Usage(len(texts.encode("utf-8", "replace")) + TEMPLATE, n * max_tokens, 1)


@dataclass(eq=False)
class Budget:
    """Limits over the life of this object; None is no limit. One budget may serve several teachers.

    tokens: read and written together. cost: in the currency of `prices`, which are for a million
        tokens read and written.
    requests: sent, the repeated ones too. What a lost reply has cost is unknown and counted at its
        worst case. Raises
    InvalidValue for limits that are none.
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
        """What `usage` costs."""
        return (usage.prompt * self.prices[0] + usage.completion * self.prices[1]) / 1e6

    def hold(self, worst: Usage) -> Hold:
        """Set `worst` aside, waiting for requests in flight where that may help; raises BudgetSpent
        where it does not fit.
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
        used = {
            "tokens": (usage.tokens, self.tokens),
            "requests": (usage.requests, self.requests),
            "of money": (self.price(usage), self.cost),
        }
        return next(
            (
                f"{limit} {name}"
                for name, (n, limit) in used.items()
                if limit is not None and n > limit
            ),
            "",
        )

    def _left(self) -> str:
        left = {"tokens": self.tokens, "requests": self.requests}
        parts = [
            f"{limit - getattr(self.spent, name)} {name}"
            for name, limit in left.items()
            if limit is not None
        ]
        return ", ".join(
            parts
            + ([] if self.cost is None else [f"{self.cost - self.price(self.spent):.4g} of money"])
        )

    def _settle(self, worst: Usage, used: Usage) -> None:
        with self._changed:
            self._held, self.spent = self._held - worst, self.spent + used
            self._changed.notify_all()


class Hold:
    """A request's share of a budget while it is under way: at the end, `used` is charged, or the
    worst case.
    """

    def __init__(self, budget: Budget, worst: Usage) -> None:
        self._budget, self._worst, self.used = budget, worst, worst

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: Any) -> None:
        self._budget._settle(self._worst, self.used)
