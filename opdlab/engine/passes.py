"""The engine: the gradient of any loss on next-token distributions, in constant memory.

The backbone has run; what is left is `[tokens, H]`. The head is applied to a chunk of tokens at a
time, the loss (any function of `Rows`) runs on the chunk's log-probs, and its gradient is carried
back through softmax and head at once, so `[tokens, V]` never exists. One backward pass through the
backbone, from the gradients collected here, completes the step. The result is that of autograd on
full logits, whatever the chunk size.

A chunk is as large as makes the products with the head fast. What runs between them (softmax, loss,
and its gradient) runs on a block of the chunk at a time, small enough that the ten or so tensors of
a loss stay in the processor's cache (`opdlab.engine.chunking`). So a pass holds one `[chunk, V]`
tensor per policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor

from opdlab.engine.chunking import Budget, blocks, budget_of, chunks
from opdlab.engine.closed_form import Formula, check_closed_form
from opdlab.engine.loss_contract import (
    CHECKED_BYTES,
    ENOUGH_ROWS,
    check_rows_are_independent,
    gradient_of_rows,
    spread_index,
)
from opdlab.engine.not_finite import explain
from opdlab.engine.rows import LogProbs, Rows
from opdlab.errors import MissingPolicy, NonFinite
from opdlab.models.graded import Graded, States, log_softmax_in_place
from opdlab.models.head import Head

Loss = Callable[[Rows], Tensor]
Slopes = Callable[[Mapping[str, Tensor], Tensor, Tensor], dict[str, Tensor]]


@dataclass
class Pass:
    """The result of one pass over `n` tokens.

    Attributes:
        loss: The loss of each token, `[n]`.
        gradient: Gradient of the weighted sum of losses for the student's hidden states, `[n, H]`.
        columns: Further numbers of each token by name, `[n]` each: `grad_norm`, and those of
            `watch`.
        is_checked: Whether the loss was found to treat each row alone, so that later passes need
            not check it.
    """

    loss: Tensor
    gradient: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)
    is_checked: bool = False

    def spread(self, index: Tensor, tokens: int) -> Pass:
        """Make a pass over `tokens` tokens, with these numbers at `index` and zero elsewhere.

        Args:
            index: The places of this pass's tokens among all, `[n]`.
            tokens: Number of tokens of the new pass.

        Returns:
            The larger pass; `is_checked` stays as it is.
        """

        def place(values: Tensor) -> Tensor:
            out = values.new_zeros(tokens, *values.shape[1:])
            out[index] = values
            return out

        columns = {name: place(column) for name, column in self.columns.items()}
        return Pass(place(self.loss), place(self.gradient), columns, self.is_checked)


def student_states(states: Mapping[str, Graded]) -> States:
    """Return the student's states, which are a local model's.

    Args:
        states: Hidden states or top log-probs by policy.

    Returns:
        The entry "student".

    Raises:
        MissingPolicy: There are none, or they are those of a server.
    """
    student = states.get("student")
    if student is None:
        raise MissingPolicy("gradient needs the student's states. Pass states={'student': …}.")
    if not isinstance(student, States):
        raise MissingPolicy(
            "The student must be a local model. Its top log-probs alone cannot be trained."
        )
    return student


@overload
def compute(
    function: Callable[[Rows], Tensor],
    states: Mapping[str, Graded],
    token: Tensor,
    columns: Mapping[str, Tensor] | None = None,
    chunk: int | None = None,
) -> Tensor: ...
@overload
def compute(
    function: Callable[[Rows], Mapping[str, Tensor]],
    states: Mapping[str, Graded],
    token: Tensor,
    columns: Mapping[str, Tensor] | None = None,
    chunk: int | None = None,
) -> dict[str, Tensor]: ...
def compute(
    function: Callable[[Rows], Tensor | Mapping[str, Tensor]],
    states: Mapping[str, Graded],
    token: Tensor,
    columns: Mapping[str, Tensor] | None = None,
    chunk: int | None = None,
) -> Tensor | dict[str, Tensor]:
    """Run any function of rows over all tokens, without gradient.

    Args:
        function: Gives `[n, ...]`, or a dict of them, for the `n` tokens of a chunk.
        states: The policies' hidden states or top log-probs, by name.
        token: The sampled ids `[N]`.
        columns: The plan's columns, `[N, ...]` each.
        chunk: Tokens in one chunk; by default as many as keep to the memory budget.

    Returns:
        `[N, ...]`, or a dict of them.
    """
    vocab_size = next(iter(states.values())).vocab_size
    budget, results = budget_of(token.device), []
    with torch.no_grad():
        for piece in chunks(len(token), vocab_size, budget, chunk):
            rows = _rows(states, token, columns or {}, piece)
            for block in blocks(len(rows), vocab_size, budget):
                results.append(function(rows.select(block)))
    tables = [result for result in results if isinstance(result, Mapping)]
    if tables:
        return {name: torch.cat([table[name] for table in tables]) for name in tables[0]}
    return torch.cat([result for result in results if isinstance(result, Tensor)])


def gradient(
    loss: Loss,
    states: Mapping[str, Graded],
    token: Tensor,
    weight: Tensor,
    columns: Mapping[str, Tensor] | None = None,
    watch: Callable[[Rows], dict[str, Tensor]] | None = None,
    chunk: int | None = None,
    check: bool = True,
    slopes: Slopes | None = None,
    closed_form: Formula | None = None,
) -> Pass:
    """Compute the gradient of `sum(weight * loss(rows))` for the student's hidden states.

    A trainable head gets its own gradient in place. `columns["grad_norm"]` of the result is the
    length of d(loss)/d(hidden) of each token alone.

    Args:
        loss: A function of rows. It is called once for each block of a chunk, and a few times more
            where it is checked.
        states: Hidden states or top log-probs by policy; `student` is the one that learns.
        token: The sampled ids `[N]`.
        weight: Each token's share of the mean, `[N]`.
        columns: The plan's columns, `[N, ...]` each.
        watch: Numbers to compute in the same pass, from detached rows.
        chunk: Tokens in one chunk; by default as many as keep to the memory budget.
        check: Whether to compare the loss of a few rows as a whole and in parts first, so that a
            loss that reads other rows of its chunk is refused. Not needed where an earlier pass of
            the same loss `is_checked`.
        slopes: Numbers to keep of the gradient of each token's own loss: a function of what `watch`
            gave, and of the gradient in the student's log-probs and in its logits, `[n, V]` each.
        closed_form: Gives what `loss` does together with its gradient, without autograd
            (`opdlab.engine.closed_form`); None where nothing is known. `slopes` also get the
            gradient in the log-probs, for which the engine goes through autograd beside it.

    Returns:
        Loss, gradient and numbers of every token.

    Raises:
        BadLoss: The loss does not keep its contract (`opdlab.engine.loss_contract`).
        NonFinite: A loss or gradient is NaN or infinite; `row` of the error is the first such
            token.
    """
    student, columns = student_states(states), columns or {}
    budget = budget_of(token.device)
    work = _Work(loss, closed_form, watch, slopes)
    is_checked = not check or _check_loss(
        work, states, token, columns, chunks(len(token), student.vocab_size, budget, chunk)[0]
    )
    found: dict[str, Tensor] = {}
    memory: dict[str, Tensor] = {}
    out = torch.empty_like(student.hidden, dtype=student.head.precision(student.hidden))
    for piece in chunks(len(token), student.vocab_size, budget, chunk):
        part = {name: graded.part(piece) for name, graded in states.items()}
        rest = {name: column[piece] for name, column in columns.items()}
        out[piece], numbers = _one_chunk(
            work, part, token[piece], weight[piece], rest, budget, memory
        )
        _keep(found, numbers, piece, len(token))
    result = Pass(found.pop("loss"), out, found, is_checked)
    _check_finite(result, states, token, columns)
    return result


def _rows(
    states: Mapping[str, Graded],
    token: Tensor,
    columns: Mapping[str, Tensor],
    piece: slice | Tensor,
) -> Rows:
    """The rows of some tokens, without gradient."""
    with torch.no_grad():
        logp = {name: graded.part(piece).logp() for name, graded in states.items()}
    return Rows(logp, token[piece], {name: column[piece] for name, column in columns.items()})


def _check_loss(
    work: _Work,
    states: Mapping[str, Graded],
    token: Tensor,
    columns: Mapping[str, Tensor],
    first: slice,
) -> bool:
    """Check a loss on a few rows spread over the tokens, no more than are in the first chunk.

    False where they could not tell.
    """
    most = max(ENOUGH_ROWS, CHECKED_BYTES // (4 * student_states(states).vocab_size))
    index = spread_index(len(token), min(first.stop, most), token.device)
    rows = _rows(states, token, columns, index)
    if work.closed_form is not None:
        check_closed_form(work.loss, work.closed_form, rows.select(slice(0, ENOUGH_ROWS)))
    return check_rows_are_independent(work.loss, rows)


def _keep(
    found: dict[str, Tensor], numbers: Mapping[str, Tensor], piece: slice, tokens: int
) -> None:
    """Copy numbers of some tokens into tensors of all `tokens`, which are made when first needed.

    Small tensors kept between the large ones would leave holes in the heap.
    """
    for name, value in numbers.items():
        whole = found.setdefault(name, value.new_empty(tokens, *value.shape[1:]))
        whole[piece] = value


@dataclass(frozen=True)
class _Work:
    """Bundle what is computed of every block of rows: arguments of `gradient` by these names."""

    loss: Loss
    closed_form: Formula | None
    watch: Callable[[Rows], dict[str, Tensor]] | None
    slopes: Slopes | None


def _one_chunk(
    work: _Work,
    states: Mapping[str, Graded],
    token: Tensor,
    weight: Tensor,
    columns: Mapping[str, Tensor],
    budget: Budget,
    memory: dict[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient `[n, H]` and numbers of one chunk.

    Its `[n, V]` tensors, one for each policy, stay in `memory`, where the next chunk writes.
    """
    student = student_states(states)
    with torch.no_grad():
        logits = student.head(student.hidden, memory.get("student"))  # the gradient replaces them
        memory.setdefault("student", logits)
        others: dict[str, LogProbs] = {}
        for name, graded in states.items():
            if name == "student":
                continue
            if isinstance(graded, States):
                others[name] = logp = graded.logp(memory.get(name))
                memory.setdefault(name, logp)
            else:
                others[name] = graded.logp()
    rows = Rows({"student": logits, **others}, token, columns)
    found: dict[str, Tensor] = {}
    for block in blocks(len(token), student.vocab_size, budget):
        through, numbers = _one_block(work, rows.select(block), weight[block], student.head)
        # Kept first, since a number may be a view of the log-probs, whose memory is used again.
        _keep(found, numbers, block, len(token))
        logits[block] = through
    with torch.no_grad():
        out = student.head.backward(logits, student.hidden)
        share = out.norm(dim=-1) / weight.abs().clamp(min=1e-30)
    return out, {**found, "grad_norm": torch.where(weight == 0, 0.0, share)}


def _one_block(
    work: _Work, rows: Rows, weight: Tensor, head: Head
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient for the logits `[n, V]`, and the numbers of one block.

    The student's rows are logits here; without a cap they are overwritten by log-probs.
    """
    logits = rows["student"]
    with torch.no_grad():
        # A capped head reads its logits again on the way back.
        leaf = log_softmax_in_place(logits) if head.cap is None else logits.log_softmax(-1)
        rows = Rows({**rows.distributions, "student": leaf}, rows.token, rows.columns)
        numbers = work.watch(rows) if work.watch else {}
        known = work.closed_form(rows) if work.closed_form else None
        if known is not None and work.slopes is None:
            through = known.gradient.mul_(weight[:, None])
            return head.through_cap(through, logits), {"loss": known.value, **numbers}
    value, slope = gradient_of_rows(work.loss, rows, weight)
    with torch.no_grad():
        if known is not None:  # the step is the same whether somebody asks for slopes or not
            value, through = known.value, known.gradient.mul_(weight[:, None])
        else:
            # Back through the softmax. The tensors of the loss are not ours to write to.
            p = rows.probabilities("student")
            through = torch.addcmul(slope, p, -slope.sum(-1, keepdim=True), out=p)
        if work.slopes is not None:
            # Of each token's own loss, without its weight in the step; 0 where it has none.
            share = torch.where(weight == 0, 0.0, 1 / weight)[:, None].to(through.dtype)
            numbers |= work.slopes(numbers, slope * share, through * share)
        return head.through_cap(through, logits), {"loss": value, **numbers}


def _check_finite(
    result: Pass, states: Mapping[str, Graded], token: Tensor, columns: Mapping[str, Tensor]
) -> None:
    """Raise NonFinite for the first token whose loss or gradient is NaN or infinite."""
    bad = ~(torch.isfinite(result.loss) & torch.isfinite(result.gradient).all(-1))
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0, 0])
    cause = explain(_rows(states, token, columns, slice(row, row + 1)))
    value = result.loss[row].item()
    said = f"loss is {value:.4g}"
    if math.isfinite(value):
        said += " but its gradient is not finite"
    error = NonFinite(f"The {said} at token row {row}.{cause}")
    error.row, error.is_explained = row, bool(cause)
    raise error
