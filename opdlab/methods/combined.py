"""Train several methods at once: the loss of each token is a weighted sum of theirs.

    loss_t = sum_m w_m loss_t^(m)

All of them see the same completions, and each plans as it does alone. So the gradient is the same
weighted sum of their gradients. Reward and distillation together (KDRL, arXiv 2506.02208, and many
since) is `Combined(OPD(), GRPO())`.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from opdlab.data.column import Column
from opdlab.engine.batch import Batch
from opdlab.engine.needs import parse_needs
from opdlab.engine.rows import Rows
from opdlab.errors import BadLoss, BadPlan, InvalidValue
from opdlab.methods.contract import (
    HasPlan,
    Method,
    fewest_completions,
    name_of,
    needs_verifier,
    recipe_of,
    student_share,
    tells_hints,
    writer_names,
)
from opdlab.methods.conversion import as_method
from opdlab.support.expect import shortened

# Beyond, the square of a gradient, which the optimizer keeps, may leave the range of float32.
LARGEST_WEIGHT = 1e6


@dataclass(frozen=True, init=False)
class Combined:
    """Train the weighted sum of several methods' losses on the same completions.

        Combined(OPD(), GRPO(), weights=(1.0, 0.5))

    The settings are shared: where two recipes differ, that of the method named first counts. The
    columns of each plan are named after their method, as `grpo_advantage`.

    Args:
        methods: Two or more methods, classes of methods or loss functions.
        weights: The weight of each method's loss, 1 each by default; at most a million. A method
            of weight 0 is planned and measured, and trains nothing.

    Attributes:
        methods: The methods, in order.
        weights: Their weights, as many.

    Raises:
        InvalidValue: There are fewer than two methods, the weights are not one finite number each
            or all 0, or the methods want different writers of the completions.
    """

    methods: tuple[Method, ...]
    weights: tuple[float, ...]

    def __init__(self, *methods: Any, weights: Sequence[float] | None = None) -> None:
        if len(methods) < 2:
            raise InvalidValue(
                f"Combined got {len(methods)} methods. Give two or more, as"
                " Combined(OPD(), GRPO(), weights=(1, 0.5))."
            )
        made = tuple(as_method(method, "Combined") for method in methods)
        object.__setattr__(self, "methods", made)
        object.__setattr__(self, "weights", _read_weights(weights, len(made)))
        _check_writers(made)

    @property
    def parts(self) -> Mapping[str, Method]:
        """The methods by a name of each: that of its class or function in small letters."""
        names = [re.sub(r"\W+", "_", name_of(one)).strip("_").lower() for one in self.methods]
        out: dict[str, Method] = {}
        for number, (name, method) in enumerate(zip(names, self.methods, strict=True), 1):
            out[f"{name}_{number}" if names.count(name) > 1 or not name else name] = method
        return out

    @property
    def needs(self) -> tuple[str, ...]:
        """The policies that any of the methods reads, each once."""
        together = [name for method in self.methods for name in method.needs]
        return tuple(str(need) for need in parse_needs(together, "Combined"))

    @property
    def verifies(self) -> bool:
        """True if one of the methods learns from the verifier."""
        return any(map(needs_verifier, self.methods))

    @property
    def least_n(self) -> int:
        """The completions of a prompt that one of the methods compares at least."""
        return max(map(fewest_completions, self.methods))

    @property
    def tells(self) -> bool:
        """True if one of the methods gives the hints itself."""
        return any(map(tells_hints, self.methods))

    @property
    def on_policy(self) -> float:
        """The share of prompts that the student answers, which all methods agree on."""
        return student_share(self.methods[0])

    @property
    def writer(self) -> tuple[str, ...]:
        """The writers of the other completions, which all methods agree on."""
        return writer_names(self.methods[0])

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipes of all methods; the first that names a setting counts."""
        together: dict[str, Any] = {}
        for method in self.methods:
            together = {**recipe_of(method), **together}
        return together

    def plan(self, batch: Batch) -> dict[str, Any]:
        """Let each method plan for the same batch.

        Args:
            batch: The step's rollout under all policies.

        Returns:
            The columns of all methods, each named `<method>_<column>`.

        Raises:
            BadPlan: A plan gave something else than columns, or two columns get one name.
        """
        columns: dict[str, Any] = {}
        for name, method in self.parts.items():
            for column, values in _plan_alone(method, batch, name).items():
                if f"{name}_{column}" in columns:
                    raise BadPlan(
                        f"Combined has two columns {name}_{column}. Rename the function or the"
                        " column of one method."
                    )
                columns[f"{name}_{column}"] = values
        return columns

    def loss(self, rows: Rows) -> Tensor:
        """Compute the weighted sum of the methods' losses.

        Args:
            rows: A chunk of `n` tokens, with the columns of `plan`.

        Returns:
            `[n]`.

        Raises:
            BadLoss: A loss did not give one number for each token.
        """
        parts = self.parts
        owned: dict[str, dict[str, Tensor]] = {name: {} for name in parts}
        for column, values in rows.columns.items():
            # The longest name that fits: one method may be called `my`, another `my_loss`.
            owner = max((name for name in parts if column.startswith(f"{name}_")), key=len)
            owned[owner][column.removeprefix(f"{owner}_")] = values
        total = rows.logp.new_zeros(len(rows))
        for (name, method), weight in zip(parts.items(), self.weights, strict=True):
            value = method.loss(Rows(rows.distributions, rows.token, owned[name]))
            if not isinstance(value, Tensor) or value.shape != (len(rows),):
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise BadLoss(
                    f"The loss of {name} returned {got} for {len(rows)} tokens. Return one number"
                    f" per token, shape [{len(rows)}]."
                )
            if weight:  # 0 times an infinite loss is no number
                total = total + weight * value
        return total

    def __repr__(self) -> str:
        return f"Combined({', '.join(map(repr, self.methods))}, weights={self.weights})"


def _read_weights(weights: Any, count: int) -> tuple[float, ...]:
    """The weights as numbers, 1 each where there are none."""
    if weights is None:
        return (1.0,) * count
    is_sequence = isinstance(weights, Sequence) and not isinstance(weights, (str, bytes))
    numbers_given = is_sequence and all(
        isinstance(one, numbers.Real) and not isinstance(one, bool) and math.isfinite(one)
        for one in weights
    )
    advice = f"as weights={(1.0,) * (count - 1) + (0.5,)}."
    if not numbers_given or len(weights) != count or not any(weights):
        raise InvalidValue(
            f"Combined got weights={shortened(weights)} for {count} methods. Give one finite"
            f" number for each, not all of them 0, {advice}"
        )
    if max(map(abs, weights)) > LARGEST_WEIGHT:
        raise InvalidValue(
            f"Combined got weights={shortened(weights)}. Use numbers from -{LARGEST_WEIGHT:g} to"
            f" {LARGEST_WEIGHT:g}: with larger ones losses and gradients leave the range of"
            f" float32. Their ratio is what counts, since the learning rate scales all, {advice}"
        )
    return tuple(map(float, weights))


def _check_writers(methods: Sequence[Method]) -> None:
    """Raise InvalidValue unless the methods learn from completions of the same writers."""
    said = [
        (student_share(one), writer_names(one) if student_share(one) < 1 else ()) for one in methods
    ]
    for method, other in zip(methods, said, strict=True):
        if other != said[0]:
            raise InvalidValue(
                f"Combined got {name_of(methods[0])}, which wants the student to write a share of"
                f" {said[0][0]:g} of the completions{_by(said[0][1])}, and {name_of(method)},"
                f" which wants {other[0]:g}{_by(other[1])}. All methods see the same completions:"
                " give both the same on_policy, or train one after the other."
            )


def _by(writers: Sequence[str]) -> str:
    return f" and {' and '.join(map(repr, writers))} the others" if writers else ""


def _plan_alone(method: Method, batch: Batch, name: str) -> Mapping[str, Tensor | Column]:
    """A method's columns; its notes get its name where another method has left the same."""
    if not isinstance(method, HasPlan) or not callable(method.plan):
        return {}
    before, batch.notes = batch.notes, {}
    try:
        columns = method.plan(batch)
        mine = {
            note if note not in before else f"{name}_{note}": v for note, v in batch.notes.items()
        }
    finally:
        batch.notes = before
    batch.notes.update(mine)
    if not isinstance(columns, Mapping):
        raise BadPlan(
            f"The plan of {name} returned {type(columns).__name__}. Return columns by name, such"
            " as {'advantage': tensor}, or {} for none."
        )
    return columns
