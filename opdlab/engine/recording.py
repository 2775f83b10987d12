"""Keep the numbers of every token of a rollout as a `Trace`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from opdlab.data.column import Description
from opdlab.data.notes import Windows, read_note
from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.data.tokens import token_bytes
from opdlab.data.trace import FORMAT, Trace
from opdlab.engine.planned import Planned
from opdlab.errors import OpdlabError


def record_trace(
    rollout: Rollout,
    policies: Mapping[str, Any],
    columns: Mapping[str, Tensor],
    *,
    run: str = "",
    step: int = -1,
    planned: Planned | None = None,
    described: Mapping[str, Description] | None = None,
    formula: str = "",
) -> Trace:
    """Make a trace of a rollout.

    Args:
        rollout: The completions.
        policies: Its graders by name; the student's tokenizer gives the bytes of the tokens.
        columns: Numbers of every token, `[tokens, ...]` each. `grad_norm`, where there is one,
            gives each token's `share` too.
        run: Names the run.
        step: The training step, from 1; -1 for none.
        planned: The rollout after a method's plan: its columns, their descriptions and its notes
            are kept.
        described: Descriptions of some of `columns`, by name.
        formula: The formula of the method's loss (`opdlab.data.formula`); "" for none.

    Returns:
        The trace, one row per completion token.
    """
    plan = {} if planned is None else planned.columns
    notes = {} if planned is None else planned.notes
    said = dict(described or {}) | ({} if planned is None else planned.descriptions)
    ids = [i for row in rollout.completions() for i in row]
    sample = np.repeat(np.arange(len(rollout)), rollout.lengths.tolist())
    data: dict[str, Any] = {
        "run": pa.array([run] * len(ids)).dictionary_encode(),
        "step": np.full(len(ids), step),
        "sample": sample,
        "prompt": pa.array([rollout.prompts[i].id for i in sample], pa.string()),
        "position": np.concatenate([np.arange(n) for n in rollout.lengths.tolist()]),
        "token_id": np.array(ids, np.int64),
    }
    if not bool(rollout.learned.all()) or bool(rollout.turn.any()):  # several turns
        data["turn"] = rollout.turn[rollout.mask].cpu().numpy()
        data["learn"] = rollout.learned.cpu().numpy()
    for name, value in {**columns, **plan}.items():
        data[name] = _table_column(value)
    if "grad_norm" in columns:
        data |= gradient_shares(data["grad_norm"])
    tokenizer = policies["student"].tokenizer
    support = columns["support"].flatten().tolist() if "support" in columns else []
    noted = [i for i in _tokens_in_notes(notes) if i < len(tokenizer)]
    seen = sorted({*ids, *support, *noted} - {-1})
    pieces = zip(seen, token_bytes(tokenizer, seen), strict=True)
    name = "" if planned is None else name_of_planner(planned.method)
    meta = {
        "format": FORMAT,
        "policies": list(policies),
        "plan": list(plan),
        "columns": {name: one.as_json() for name, one in said.items()},
        "texts": list(rollout.texts),
        "finish": list(rollout.finish),
        "prompts": [_prompt_text(prompt) for prompt in rollout.prompts],
        "vocab": {str(i): piece.decode("latin-1") for i, piece in pieces},
        "method": name,
        "notes": {name: dict(notes)} if notes else {},
        "formula": formula,
    }
    return Trace(pa.table(data), meta)


def rollout_from_trace(trace: Trace, prompts: Sequence[Prompt]) -> Rollout:
    """Make the rollout that a trace was graded from.

    Args:
        trace: The trace, with one completion for each prompt.
        prompts: The prompts, in order.

    Returns:
        The completions token by token.

    Raises:
        OpdlabError: The trace is of other prompts.
    """
    if len(trace.meta["texts"]) != len(prompts):
        raise OpdlabError(
            f"The trace has {len(trace.meta['texts'])} texts for {len(prompts)} prompts."
            " Give the prompts that it was written for."
        )
    samples = trace.column("sample")
    lengths = torch.tensor([int((samples == i).sum()) for i in range(len(prompts))])
    width = int(lengths.max())
    shape = (len(prompts), width)
    ids = torch.zeros(shape, dtype=torch.long)
    logp, entropy = torch.zeros(shape), torch.zeros(shape)
    for i, length in enumerate(lengths.tolist()):
        rows = samples == i
        ids[i, :length] = torch.tensor(trace.column("token_id")[rows])
        logp[i, :length] = torch.tensor(trace.column("student_logp")[rows])
        entropy[i, :length] = torch.tensor(trace.column("student_entropy")[rows])
    return Rollout(
        prompts=tuple(prompts),
        ids=ids,
        lengths=lengths,
        logp=logp,
        entropy=entropy,
        finish=tuple(trace.meta["finish"]),
        texts=tuple(trace.meta["texts"]),
        writer=("student",) * len(prompts),
    )


def name_of_planner(method: Any) -> str:
    """Return the name under which a trace keeps a method's notes.

    It is the method's class, or the function that the method was made of.

    Args:
        method: The method that planned.

    Returns:
        The name.
    """
    function = getattr(method, "function", None)
    return str(getattr(function, "__name__", type(method).__name__))


def _table_column(value: Tensor) -> Any:
    """A flat column as a table holds it: an array, or lists where each token has several values."""
    array = value.detach().cpu().numpy()
    if array.ndim == 1:
        return array
    return pa.array(list(array), pa.list_(pa.from_numpy_dtype(array.dtype)))


def _prompt_text(prompt: Prompt) -> str:
    """Return the user's question: the text or the last message; of one in parts, its texts."""
    content: Any = prompt.text if prompt.messages is None else prompt.messages[-1]["content"]
    if isinstance(content, (list, tuple)):
        return "".join(
            str(part.get("text", "")) if isinstance(part, Mapping) else str(part)
            for part in content
        )
    return content or ""


def _tokens_in_notes(notes: Mapping[str, Any]) -> Iterator[int]:
    """Token ids in a step's `Windows`, whose texts the pictures show."""
    for stored in notes.values():
        note = read_note(stored, Windows)
        for window in note.windows if note else []:
            for side in ("student", "teacher"):
                yield from (int(i) for i in window.get(side) or [])


def gradient_shares(norm: np.ndarray) -> dict[str, np.ndarray]:
    """Compute each row's share of the sum of gradient norms.

    Args:
        norm: Gradient norms `[rows]`.

    Returns:
        The columns `grad_norm` and `share`, `[rows]` each. The shares sum to 1, or to 0
        if no norm is above 0.
    """
    return {"grad_norm": norm, "share": norm / max(float(norm.sum()), 1e-30)}
