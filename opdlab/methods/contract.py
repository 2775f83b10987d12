"""The contract of a method, and the way to make one from a bare function.

    plan(batch) -> columns      no gradient, whole batch: what should each token be told?
    loss(rows)  -> [n]          gradient, a chunk of tokens: tell it

A method is any object with `needs` and `loss`; the rest is optional.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from opdlab.batch import Batch

if TYPE_CHECKING:
    from opdlab.rows import Rows


@runtime_checkable
class Method(Protocol):
    """`needs` names what the method looks at besides the student's own distribution (`opdlab.roles`): `teacher`, `reference`
    (the student before training), `ema`, any of them told hints (`teacher+hint`), or `teacher.text` (a teacher that only writes).

    Optional: `plan(batch) -> {name: [B, T] or [B, T, K] or [B]}`; `on_policy`, the share of prompts whose completion the
    student writes (1); `writer`, who writes the others ("teacher", "answer", a policy of `needs`, or several of them, each of
    whom writes all, in that order); `recipe`, the settings of `distill` that the
    method's paper trains with, as `{"normalize": "sequence"}` (they go before the task's own); `state_dict()` and
    `load_state_dict(state)`, for a method that keeps something from step to step (`opdlab.method_state`)."""

    @property
    def needs(self) -> tuple[str, ...]: ...

    def loss(self, rows: Rows) -> Tensor: ...


@dataclass(frozen=True)
class FunctionMethod:
    """A bare loss function as a method."""

    function: Callable[[Rows], Tensor]
    needs: tuple[str, ...]
    planner: Callable[[Batch], Mapping[str, Tensor]] | None = None

    def plan(self, batch: Batch) -> Mapping[str, Tensor]:
        return self.planner(batch) if self.planner else {}

    def loss(self, rows: Rows) -> Tensor:
        return self.function(rows)

    def __call__(self, rows: Rows) -> Tensor:
        return self.function(rows)


def method(needs: tuple[str, ...] = ("teacher",), plan: Callable[[Batch], Mapping[str, Tensor]] | None = None) -> Any:
    """Decorator: `@opdlab.method(needs=("teacher",))` over `def my_loss(rows): ... -> [n]` makes it a method."""
    return lambda function: FunctionMethod(function, tuple(needs), plan)
