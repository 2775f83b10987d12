"""The engine: any loss on next-token distributions, its gradient and per-token numbers, in constant memory.

The backbone has run; what is left is `[tokens, H]`. The head is applied to a chunk of tokens at a time, the loss (any
function of `Rows`) runs on the chunk's log-probs, and its gradient is carried back through softmax and head at once, so
`[tokens, V]` never exists. One backward pass through the backbone, from the gradients collected here, completes the step.
The result is that of autograd on full logits, whatever the chunk size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opdlab.divergence import TopK
from opdlab.errors import MissingPolicy, NonFinite, UnknownColumn
from opdlab.head import Head
from opdlab.loss_contract import call_loss, check_rows_are_independent, gradient_of_loss, spread_index
from opdlab.not_finite import explain
from opdlab.partial import Partial, whole

CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}  # one [chunk, V] float32 buffer: rows enough for a fast product, few enough for a laptop


class Rows:
    """A chunk of `n` tokens as a loss sees it.

    `rows.student`, `rows.teacher`, `rows["teacher+hint"]`: aligned log-probs `[n, V]`, float32; the student's carry the
    gradient. `rows.token [n]`: the sampled ids. `rows.logp [n]`: the student's log-prob of them. `rows.<column>`: what the
    method's plan returned. An unknown name raises UnknownColumn and lists what there is.

    A loss treats each row alone and writes to none of them: chunks have any size, and what needs several tokens (a mean, a
    quantile, a softmax over tokens) belongs in plan. It draws no random numbers and may be called more than once on a chunk.
    """

    def __init__(self, logp: Mapping[str, Any], token: Tensor, columns: Mapping[str, Tensor] | None = None) -> None:
        self.distributions, self.token, self.columns = dict(logp), token, dict(columns or {})

    @property
    def logp(self) -> Tensor:
        """The student's log-prob of the sampled token, `[n]`."""
        return self.logp_of("student")

    def logp_of(self, policy: str) -> Tensor:
        """A policy's log-prob of the sampled token, `[n]`."""
        some = self.distributions.get(policy)
        return some.sampled if isinstance(some, Partial) else self[policy].gather(-1, self.token[:, None])[:, 0]

    def on(self, policy: str, support: TopK) -> tuple[Tensor, Tensor]:
        """Student and `policy` on a coarse support, `[n, k + 1]` each: `reverse_kl(*rows.on("teacher", TopK(64)))`."""
        by, theirs = self.distributions.get(support.by), self.distributions.get(policy)
        ids = by.support(support) if isinstance(by, Partial) else support.support(self[support.by])
        coarse = theirs.coarse(support) if theirs is by and isinstance(theirs, Partial) else support.coarse(self[policy], ids)
        return support.coarse(self["student"], ids), coarse

    def __getitem__(self, name: str) -> Tensor:
        for place in (self.distributions, self.columns):
            if name in place:
                return _all_of(name, place[name])
        known = ", ".join([*self.distributions, "token", "logp", *self.columns])
        raise UnknownColumn(f"rows has no {name!r}; there are {known}. Name the policy in `needs`, or return the column from plan.")

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __contains__(self, name: object) -> bool:
        return name in self.distributions or name in self.columns

    def __iter__(self) -> Iterator[str]:
        return iter([*self.distributions, *self.columns])

    def __len__(self) -> int:
        return len(self.token)


def _all_of(name: str, logp: Any) -> Tensor:
    if isinstance(logp, Partial):
        raise whole(name, logp)
    return logp


@dataclass(frozen=True)
class States:
    """A policy's hidden states `[tokens, H]` on some rollout, with the head that reads them."""

    hidden: Tensor
    head: Head

    @property
    def rows(self) -> int:
        """How many tokens the distribution is over."""
        return self.head.rows

    def part(self, piece: slice | Tensor) -> States:
        """The same for some tokens, without gradient. `piece`: a slice or indices."""
        return States(self.hidden[piece].detach(), self.head)

    def logp(self) -> Tensor:
        """Log-probs `[n, V]`."""
        return _log_softmax(self.head(self.hidden))


@dataclass
class Pass:
    """What one pass over the tokens gives: `loss [n]`, `gradient [n, H]` (of the weighted sum), and named columns `[n]`.

    `is_checked`: whether the loss was found to treat each row alone, so that later passes need not ask again.
    """

    loss: Tensor
    gradient: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)
    is_checked: bool = False


def chunks(tokens: int, vocab: int, device: torch.device, chunk: int | None = None) -> list[slice]:
    """Slices of tokens such that one `[chunk, V]` buffer keeps to the memory budget; no tokens give one empty slice."""
    size = chunk or max(32, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocab))
    return [slice(i, min(i + size, tokens)) for i in range(0, max(tokens, 1), size)]


def compute(fn: Callable[[Rows], Any], states: Mapping[str, States], token: Tensor,
            columns: Mapping[str, Tensor] | None = None, chunk: int | None = None) -> Any:  # fmt: skip
    """Run any function of `Rows` over all tokens without gradient: a tensor `[n, ...]`, or a dict of them."""
    first = next(iter(states.values()))
    results = []
    with torch.no_grad():
        for piece in chunks(len(token), first.rows, token.device, chunk):
            logp = {name: s.part(piece).logp() for name, s in states.items()}
            results.append(fn(Rows(logp, token[piece], {k: v[piece] for k, v in (columns or {}).items()})))
    if isinstance(results[0], Mapping):
        return {key: torch.cat([r[key] for r in results]) for key in results[0]}
    return torch.cat(results)


def gradient(loss: Callable[[Rows], Tensor], states: Mapping[str, States], token: Tensor, weight: Tensor,
             columns: Mapping[str, Tensor] | None = None, watch: Callable[[Rows], dict[str, Tensor]] | None = None,
             chunk: int | None = None, check: bool = True) -> Pass:  # fmt: skip
    """Gradient of `sum(weight * loss(rows))` with respect to the student's hidden states; a trainable head gets its own.

    Also notes `grad_norm [n]`: the length of d(loss)/d(hidden) of each token alone.

    Args:
        loss: A function of rows; it is called once per chunk, and a few times more where it is checked.
        states: Hidden states (or top log-probs) by policy; `student` is the one that learns.
        token: The sampled ids, `[n]`.
        weight: Each token's share of the mean, `[n]`.
        columns: Of the plan, `[n, ...]` each.
        watch: Numbers to note in the same pass, on detached rows.
        chunk: Tokens in one chunk; by default as many as keep to the memory budget.
        check: Compare the loss of a few rows whole and in parts first, so that a loss that reads other rows of its chunk is
            refused. Leave it out where an earlier pass of the same loss was `is_checked`.

    Raises:
        BadLoss: The loss does not keep its contract (`opdlab.loss_contract`).
        NonFinite: A loss or gradient is NaN or infinite; its `row` is the first such token.
    """
    if "student" not in states:
        raise MissingPolicy("gradient needs the student's states. Pass states={'student': …}.")
    student = states["student"]
    is_checked = not check or _check_loss(loss, states, token, columns or {}, chunk)
    noted: dict[str, Tensor] = {}
    out = torch.empty_like(student.hidden, dtype=student.head.precision(student.hidden))
    for piece in chunks(len(token), student.head.rows, token.device, chunk):
        part = {name: s.part(piece) for name, s in states.items()}
        rest = {k: v[piece] for k, v in (columns or {}).items()}
        out[piece], numbers = _one_chunk(loss, part, token[piece], weight[piece], rest, watch)
        for key, value in numbers.items():  # copied: small tensors kept between the large ones would keep holes in the heap
            noted.setdefault(key, value.new_empty(len(token), *value.shape[1:]))[piece] = value
    result = Pass(noted.pop("loss"), out, noted, is_checked)
    _check_finite(result, states, token, columns or {})
    return result


def _check_loss(loss: Callable[[Rows], Tensor], states: Mapping[str, States], token: Tensor, columns: Mapping[str, Tensor],
                chunk: int | None) -> bool:  # fmt: skip
    """Check a loss on a few rows, evenly spread over the tokens; False where that could not tell."""
    first = chunks(len(token), states["student"].rows, token.device, chunk)[0]
    index = spread_index(len(token), first.stop, token.device)
    with torch.no_grad():
        logp = {name: s.part(index).logp() for name, s in states.items()}
    rows = Rows(logp, token[index], {name: column[index] for name, column in columns.items()})
    return check_rows_are_independent(loss, rows)


def _one_chunk(loss: Callable[[Rows], Tensor], states: Mapping[str, States], token: Tensor, weight: Tensor,
               columns: Mapping[str, Tensor], watch: Callable[[Rows], Mapping[str, Tensor]] | None,
               ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Gradient `[n, H]` and columns of one chunk. A function of its own, so that its `[n, V]` buffers die before the next."""
    student = states["student"]
    with torch.no_grad():
        fixed = {name: s.logp() for name, s in states.items() if name != "student"}
        logits = student.head(student.hidden)
        leaf = _log_softmax(logits) if student.head.cap is None else logits.log_softmax(-1)  # backward reads capped logits only
        seen = watch(Rows({"student": leaf, **fixed}, token, columns)) if watch else {}
    leaf = leaf.detach().requires_grad_()
    with torch.enable_grad():
        value = call_loss(loss, Rows({"student": leaf, **fixed}, token, columns))
        slope = gradient_of_loss(value, weight, leaf)
    with torch.no_grad():
        p = leaf.exp()  # through the softmax, in memory of our own: the loss's tensors are not ours to write to
        slope = torch.addcmul(slope, p, -slope.sum(-1, keepdim=True), out=p)
        out = student.head.backward(slope, logits, student.hidden)
        share = out.norm(dim=-1) / weight.abs().clamp(min=1e-30)
    return out, {"loss": value.detach(), "grad_norm": torch.where(weight == 0, 0.0, share), **seen}


def _log_softmax(logits: Tensor) -> Tensor:
    """In the logits' own memory, which a head makes anew at every call."""
    return torch.log_softmax(logits, -1, out=logits)


def _check_finite(result: Pass, states: Mapping[str, States], token: Tensor, columns: Mapping[str, Tensor]) -> None:
    bad = ~(torch.isfinite(result.loss) & torch.isfinite(result.gradient).all(-1))
    if not bool(bad.any()):
        return
    where = int(bad.nonzero()[0, 0])
    piece = slice(where, where + 1)
    with torch.no_grad():
        logp = {name: s.part(piece).logp() for name, s in states.items()}
    cause = explain(Rows(logp, token[piece], {name: column[piece] for name, column in columns.items()}))
    value = result.loss[where].item()
    what = f"loss is {value:.4g}" if value - value != 0 else f"loss is {value:.4g} but its gradient is not finite"
    error = NonFinite(f"The {what} at token row {where}.{cause}")
    error.row, error.is_explained = where, bool(cause)
    raise error
