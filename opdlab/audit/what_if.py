"""Ask a kept trace again under another loss, without running a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdlab.data.trace import Trace
from opdlab.engine.loss_contract import (
    CHECKED_ROWS,
    call_loss,
    check_rows_are_independent,
    gradient_of_loss,
    spread_index,
)
from opdlab.engine.not_finite import explain
from opdlab.engine.recording import gradient_shares
from opdlab.engine.rows import Rows
from opdlab.errors import NonFinite, OpdlabError, PartialDistribution, UnknownColumn
from opdlab.methods.conversion import as_method
from opdlab.support.validation import Unchecked, validate_arguments


@validate_arguments
def what_if(trace: Trace, loss: Unchecked[Callable[[Rows], Tensor]]) -> Trace:
    """Compute the columns `loss`, `grad_norm` and `share` of a trace under another loss.

    Runs on the kept top tokens plus one bucket for the tail, so an f-divergence reads as a lower
    bound of the full one (exact where the tails are empty). `grad_norm` is the length of the
    gradient with respect to the logits of that support; in a trace of training it is with respect
    to the hidden state, so the two do not compare. `rows.token` is 0 everywhere: the sampled token
    stands first in the support.

    Args:
        trace: A trace with the top tokens of the student and of the policies that the loss reads.
        loss: A function of rows, a method or the class of one. Its plan does not run: rows have the
            trace's plan columns.

    Returns:
        The trace with these columns.

    Raises:
        OpdlabError: The trace kept no top tokens, or none of the student.
        InvalidValue: It is neither a loss nor a method.
        BadLoss: The loss does not keep its contract, as in training.
        NonFinite: It is NaN or infinite at a token.
        PartialDistribution: It reads a policy whose top tokens the trace does not have.
    """
    value, _, slope = _differentiate(trace, loss)
    norm = slope.norm(dim=-1).numpy()
    return trace.with_columns(loss=value.numpy(), **gradient_shares(norm))


@validate_arguments
def with_gradients(trace: Trace, loss: Unchecked[Callable[[Rows], Tensor]]) -> Trace:
    """Add the gradient of each token's loss on the kept top tokens, before and after the softmax.

    Runs as `what_if` does, on the kept top tokens plus one bucket for all others. The sums of
    `logit_gradient` over a row are 0, since a constant on all logits changes nothing.

    Args:
        trace: A trace with the top tokens of the student and of the policies that the loss reads.
        loss: A function of rows, a method or the class of one.

    Returns:
        The trace with `logit_gradient` (in the student's logits, before the softmax) and
        `logp_gradient` (in its log-probs, after the softmax), `[n, S + 1]` each: a value for each
        id of `support`, and the bucket last.

    Raises:
        OpdlabError: As for `what_if`.
    """
    _, after, before = _differentiate(trace, loss)
    return trace.with_columns(logit_gradient=before.numpy(), logp_gradient=after.numpy())


def _differentiate(trace: Trace, loss: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The loss `[n]`, and its gradient in the student's log-probs and logits, `[n, S + 1]` each."""
    function = as_method(loss, "what_if").loss
    if "support" not in trace.table.column_names:
        raise OpdlabError(
            "This trace kept no top tokens. Make it with opdlab.score(…, k=8), which does."
        )
    if "student_top" not in trace.table.column_names:
        raise OpdlabError(
            "This trace kept no top tokens of the student. Make it with opdlab.score(rollout,"
            " student, …)."
        )
    known = [name for name in trace.policies if f"{name}_top" in trace.table.column_names]
    logp = {
        name: _with_tail(trace.column(f"{name}_top"), trace.column(f"{name}_tail"))
        for name in known
    }
    logits = logp["student"]
    plan = {
        k: torch.tensor(trace.column(k))
        for k in trace.meta.get("plan", [])
        if trace.column(k).dtype != object
    }
    if "target" in plan and "target_weight" in plan:  # token ids of soft targets
        plan["target"] = _place_on(torch.tensor(trace.column("support")), plan["target"])
    token = torch.zeros(len(trace), dtype=torch.long)
    rows = Rows({**logp, "student": logits.log_softmax(-1)}, token, plan)
    try:
        check_rows_are_independent(
            function, rows.select(spread_index(len(rows), CHECKED_ROWS, token.device))
        )
        student = logits.log_softmax(-1).requires_grad_()
        value = call_loss(function, Rows({**logp, "student": student}, token, plan))
        after = gradient_of_loss(value, torch.ones_like(value), student)
        # Through the softmax: a logit moves its own log-prob, and all others by its probability.
        slope = after - student.detach().exp() * after.sum(-1, keepdim=True)
    except UnknownColumn as error:
        if missing := sorted(set(trace.policies) - set(known)):
            raise PartialDistribution(
                f"{error} The trace has no top tokens of {', '.join(map(repr, missing))}, which"
                " gave only some log-probs."
            ) from None
        raise
    bad = ~(torch.isfinite(value) & torch.isfinite(slope).all(-1))
    if bool(bad.any()):
        at = int(bad.nonzero()[0, 0])
        cause = explain(rows.select(torch.tensor([at])))
        raise NonFinite(
            f"The loss is {value[at].item():.4g} at row {at} of the trace, or its gradient is not"
            f" finite.{cause}"
        )
    return value.detach(), after, slope


def _place_on(support: Tensor, ids: Tensor) -> Tensor:
    """Places of token ids `[n, M]` among the kept tokens, and the tail's for others."""
    is_here = support[:, None, :] == ids[:, :, None]  # [n, M, S]
    place = is_here.int().argmax(-1)
    return torch.where(is_here.any(-1), place, support.shape[1])


def _with_tail(top: np.ndarray, tail: np.ndarray) -> Tensor:
    """Log-probs on the kept tokens and the tail, `[n, S + 1]`.

    Finite, as a policy's are: a repeat or an empty tail has e^-200. Rounding may leave a tail just
    below 0, which is empty, too.
    """
    others = torch.tensor(tail).clamp_min(0.0).log()[:, None]
    return torch.cat([torch.tensor(top), others], -1).clamp_min(-200.0)
