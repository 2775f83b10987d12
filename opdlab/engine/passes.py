"""The engine: any loss on next-token distributions, its gradient and per-token numbers, in constant
memory.

The backbone has run; what is left is `[tokens, H]`. The head is applied to a chunk of tokens at a
time, the loss (any function of `Rows`) runs on the chunk's log-probs, and its gradient is carried
back through softmax and head at once, so `[tokens, V]` never exists. One backward pass through the
backbone, from the gradients collected here, completes the step. The result is that of autograd on
full logits, whatever the chunk size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opdlab.engine.loss_contract import (
    call_loss,
    check_rows_are_independent,
    gradient_of_loss,
    spread_index,
)
from opdlab.engine.not_finite import explain
from opdlab.engine.rows import Rows
from opdlab.errors import MissingPolicy, NonFinite
from opdlab.models.graded import Graded, States, log_softmax_in_place

CHUNK_BYTES = {
    "cpu": 16 << 20,
    "cuda": 256 << 20,
}  # one [chunk, V] float32 buffer: rows enough for a fast product, few enough for a laptop


@dataclass
class Pass:
    """What one pass over the tokens gives: `loss [n]`, `gradient [n, H]` (of the weighted sum), and
    named columns `[n]`.

    `is_checked`: whether the loss was found to treat each row alone, so that later passes need not
    ask again.
    """

    loss: Tensor
    gradient: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)
    is_checked: bool = False

    def spread(self, index: Tensor, tokens: int) -> Pass:
        """The same for `tokens` tokens, of which these are the numbers at `index`; zero elsewhere."""

        def placed(values: Tensor) -> Tensor:
            out = values.new_zeros(tokens, *values.shape[1:])
            out[index] = values
            return out

        columns = {name: placed(column) for name, column in self.columns.items()}
        return Pass(placed(self.loss), placed(self.gradient), columns, self.is_checked)


def student_states(states: Mapping[str, Graded]) -> States:
    """The student's states, which are always a local model's."""
    student = states["student"]
    if not isinstance(student, States):
        raise MissingPolicy(
            "The student must be a local model. Its top log-probs alone cannot be trained."
        )
    return student


def chunks(tokens: int, vocab: int, device: torch.device, chunk: int | None = None) -> list[slice]:
    """Slices of tokens such that one `[chunk, V]` buffer keeps to the memory budget; no tokens give
    one empty slice.
    """
    size = chunk or max(32, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocab))
    return [slice(i, min(i + size, tokens)) for i in range(0, max(tokens, 1), size)]


def compute(
    fn: Callable[[Rows], Any],
    states: Mapping[str, Graded],
    token: Tensor,
    columns: Mapping[str, Tensor] | None = None,
    chunk: int | None = None,
) -> Any:
    """Run any function of `Rows` over all tokens without gradient: a tensor `[n, ...]`, or a dict
    of them.
    """
    first = next(iter(states.values()))
    results = []
    with torch.no_grad():
        for piece in chunks(len(token), first.vocab_size, token.device, chunk):
            logp = {name: s.part(piece).logp() for name, s in states.items()}
            results.append(
                fn(Rows(logp, token[piece], {k: v[piece] for k, v in (columns or {}).items()}))
            )
    if isinstance(results[0], Mapping):
        return {key: torch.cat([r[key] for r in results]) for key in results[0]}
    return torch.cat(results)


def gradient(
    loss: Callable[[Rows], Tensor],
    states: Mapping[str, Graded],
    token: Tensor,
    weight: Tensor,
    columns: Mapping[str, Tensor] | None = None,
    watch: Callable[[Rows], dict[str, Tensor]] | None = None,
    chunk: int | None = None,
    check: bool = True,
) -> Pass:
    """Gradient of `sum(weight * loss(rows))` with respect to the student's hidden states; a
    trainable head gets its own.

    Also notes `grad_norm [n]`: the length of d(loss)/d(hidden) of each token alone.

    Args:
        loss: A function of rows; it is called once per chunk, and a few times more where it is
            checked.
        states: Hidden states (or top log-probs) by policy; `student` is the one that learns.
        token: The sampled ids, `[n]`.
        weight: Each token's share of the mean, `[n]`.
        columns: Of the plan, `[n, ...]` each.
        watch: Numbers to note in the same pass, on detached rows.
        chunk: Tokens in one chunk; by default as many as keep to the memory budget.
        check: Compare the loss of a few rows whole_distribution_error and in parts first, so that a
            loss that reads other rows of its chunk is refused. Leave it out where an earlier pass
            of the same loss was `is_checked`.

    Raises:
        BadLoss: The loss does not keep its contract (`opdlab.engine.loss_contract`).
        NonFinite: A loss or gradient is NaN or infinite; its `row` is the first such token.
    """
    if "student" not in states:
        raise MissingPolicy("gradient needs the student's states. Pass states={'student': …}.")
    student = student_states(states)
    is_checked = not check or _check_loss(loss, states, token, columns or {}, chunk)
    noted: dict[str, Tensor] = {}
    out = torch.empty_like(student.hidden, dtype=student.head.precision(student.hidden))
    for piece in chunks(len(token), student.vocab_size, token.device, chunk):
        part = {name: s.part(piece) for name, s in states.items()}
        rest = {k: v[piece] for k, v in (columns or {}).items()}
        out[piece], numbers = _one_chunk(loss, part, token[piece], weight[piece], rest, watch)
        for (
            key,
            value,
        ) in (
            numbers.items()
        ):  # copied: small tensors kept between the large ones would keep holes in the heap
            noted.setdefault(key, value.new_empty(len(token), *value.shape[1:]))[piece] = value
    result = Pass(noted.pop("loss"), out, noted, is_checked)
    _check_finite(result, states, token, columns or {})
    return result


def _check_loss(
    loss: Callable[[Rows], Tensor],
    states: Mapping[str, Graded],
    token: Tensor,
    columns: Mapping[str, Tensor],
    chunk: int | None,
) -> bool:
    """Check a loss on a few rows, evenly spread over the tokens; False where that could not tell."""
    first = chunks(len(token), states["student"].vocab_size, token.device, chunk)[0]
    index = spread_index(len(token), first.stop, token.device)
    with torch.no_grad():
        logp = {name: s.part(index).logp() for name, s in states.items()}
    rows = Rows(logp, token[index], {name: column[index] for name, column in columns.items()})
    return check_rows_are_independent(loss, rows)


def _one_chunk(
    loss: Callable[[Rows], Tensor],
    states: Mapping[str, Graded],
    token: Tensor,
    weight: Tensor,
    columns: Mapping[str, Tensor],
    watch: Callable[[Rows], Mapping[str, Tensor]] | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient `[n, H]` and columns of one chunk.

    A function of its own, so that its `[n, V]` buffers die before the next.
    """
    student = student_states(states)
    with torch.no_grad():
        fixed = {name: s.logp() for name, s in states.items() if name != "student"}
        logits = student.head(student.hidden)
        leaf = (
            log_softmax_in_place(logits) if student.head.cap is None else logits.log_softmax(-1)
        )  # backward reads capped logits only
        seen = watch(Rows({"student": leaf, **fixed}, token, columns)) if watch else {}
    leaf = leaf.detach().requires_grad_()
    with torch.enable_grad():
        value = call_loss(loss, Rows({"student": leaf, **fixed}, token, columns))
        slope = gradient_of_loss(value, weight, leaf)
    with torch.no_grad():
        p = (
            leaf.exp()
        )  # through the softmax, in memory of our own: the loss's tensors are not ours to write to
        slope = torch.addcmul(slope, p, -slope.sum(-1, keepdim=True), out=p)
        out = student.head.backward(slope, logits, student.hidden)
        share = out.norm(dim=-1) / weight.abs().clamp(min=1e-30)
    return out, {"loss": value.detach(), "grad_norm": torch.where(weight == 0, 0.0, share), **seen}


def _check_finite(
    result: Pass, states: Mapping[str, Graded], token: Tensor, columns: Mapping[str, Tensor]
) -> None:
    bad = ~(torch.isfinite(result.loss) & torch.isfinite(result.gradient).all(-1))
    if not bool(bad.any()):
        return
    where = int(bad.nonzero()[0, 0])
    piece = slice(where, where + 1)
    with torch.no_grad():
        logp = {name: s.part(piece).logp() for name, s in states.items()}
    cause = explain(
        Rows(logp, token[piece], {name: column[piece] for name, column in columns.items()})
    )
    value = result.loss[where].item()
    what = (
        f"loss is {value:.4g}"
        if value - value != 0
        else f"loss is {value:.4g} but its gradient is not finite"
    )
    error = NonFinite(f"The {what} at token row {where}.{cause}")
    error.row, error.is_explained = where, bool(cause)
    raise error
