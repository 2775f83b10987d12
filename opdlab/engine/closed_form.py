"""The optional part of a method that gives its loss and the gradient in the logits at once.

A method has one plain function, `loss(rows)`, and autograd finds its gradient. A method that knows
the gradient of that loss may offer it as `closed_form(rows)` beside it; the engine then takes it
and leaves out autograd, which saves a third of the passes over the vocabulary. Both must be the
same to rounding: where the engine checks a loss, it compares the two on a few rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from opdlab.engine.loss_contract import gradient_of_rows
from opdlab.engine.rows import Rows
from opdlab.errors import BadLoss
from opdlab.losses.closed_forms import ClosedForm, through_softmax

# How far a formula may be from autograd. Beside large logits, float32 probabilities sum to 1 with
# an error of some 1e-5, which the two spread over the tokens in different ways.
RELATIVE, ABSOLUTE = 1e-3, 1e-4

Formula = Callable[[Rows], ClosedForm | None]


@runtime_checkable
class HasClosedForm(Protocol):
    """A method that knows the gradient of its loss in the student's logits."""

    def closed_form(self, rows: Rows) -> ClosedForm | None:
        """Compute what `loss` does, with the gradient.

        Args:
            rows: A chunk of `n` tokens, without gradient, to be read only.

        Returns:
            The loss and its gradient in the logits; None where the method knows no formula, so that
            autograd finds the gradient of `loss`.
        """
        ...


def closed_form_of(method: Any) -> Formula | None:
    """Find the formula that belongs to a method's loss.

    Args:
        method: The method.

    Returns:
        Its `closed_form`. None where it has none, or where a subclass has a `loss` of its own and
        inherits the formula of another loss.
    """
    if not isinstance(method, HasClosedForm):
        return None
    for kind in type(method).__mro__:
        if "closed_form" in vars(kind):
            return method.closed_form
        if "loss" in vars(kind):
            return None
    return None


def check_closed_form(loss: Callable[[Rows], Tensor], formula: Formula, rows: Rows) -> None:
    """Compare a formula with the loss that it stands for, value and gradient.

    Args:
        loss: The loss.
        formula: Its closed form.
        rows: A few rows, without gradient.

    Raises:
        BadLoss: They differ by more than rounding.
    """
    with torch.no_grad():
        found = formula(rows)
    if found is None:
        return
    value, slope = gradient_of_rows(loss, rows, torch.ones_like(found.value))
    expected = through_softmax(slope, rows.probabilities("student"))
    length = expected.norm(dim=-1)
    apart = (found.value - value).abs() > RELATIVE * value.abs() + ABSOLUTE
    apart |= (found.gradient - expected).norm(dim=-1) > RELATIVE * length + ABSOLUTE
    # Where the loss is infinite, the engine finds and names the row.
    if bool((apart & value.isfinite() & length.isfinite()).any()):
        row = int(apart.nonzero()[0, 0])
        raise BadLoss(
            f"closed_form gives {found.value[row]:.6g} where loss gives {value[row]:.6g}, or"
            " another gradient in the logits. Both must be the same function: mend closed_form, or"
            " leave it out, and autograd finds the gradient."
        )
