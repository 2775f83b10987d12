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
from opdlab.data.prompt import Prompt, expect_prompts
from opdlab.data.rollout import Rollout
from opdlab.data.tokens import token_bytes
from opdlab.data.trace import FORMAT, Trace
from opdlab.data.trace_prompts import describe_rollout, read_prompts
from opdlab.engine.planned import Planned
from opdlab.errors import OpdlabError
from opdlab.support.expect import expect
from opdlab.support.validation import Unchecked, validate_arguments

_FROM_TRACE = "rollout_from_trace"


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
        "rollout": describe_rollout(rollout),
    }
    return Trace(pa.table(data), meta)


@validate_arguments
def rollout_from_trace(
    trace: Unchecked[Trace], prompts: Unchecked[Sequence[Prompt] | None] = None
) -> Rollout:
    """Make the rollout that a trace was graded from, to grade it again.

    A trace keeps its prompts as policies read them (chats with their messages and tools, hints), so
    `opdlab.score` of this rollout gives the recorded log-probs again. `trace.meta["prompts"]` holds
    only the last message of each chat, for pictures: prompts made of these texts are others.

    Args:
        trace: The trace. Of one that lacks the rows of some completions, as `trace.sample(i)`, the
            rollout has the others alone.
        prompts: A prompt for each text of the trace, in order, instead of those that it keeps.
            Needed for traces that keep none (written by opdlab before it kept them, or put together
            for a picture), and to have what a trace does not keep: answers and metadata.

    Returns:
        The completions token by token. `logp` and `entropy` are those that the trace has of the
        student, zero where it has none.

    Raises:
        OpdlabError: The trace keeps no prompts, or those given are not as many as its texts.
    """
    expect(trace, Trace, _FROM_TRACE, "trace")
    origin = _read_origin(trace, prompts)
    asked = origin["prompts"]
    columns = trace.table.column_names
    samples = trace.column("sample")
    lengths = torch.tensor([int((samples == i).sum()) for i in range(len(asked))])
    mask = torch.arange(int(lengths.max()) if len(asked) else 0) < lengths[:, None]

    def unfold(name: str, kind: torch.dtype) -> Tensor:
        """A column as `[B, T]`: the rows stand in the order of the completions."""
        out = torch.zeros(mask.shape, dtype=kind)
        if name in columns:
            order = np.argsort(samples, kind="stable")
            out[mask] = torch.from_numpy(trace.column(name)[order].copy()).to(kind)
        return out

    rollout = Rollout(
        **origin,
        ids=unfold("token_id", torch.long),
        lengths=lengths,
        logp=unfold("student_logp", torch.float32),
        entropy=unfold("student_entropy", torch.float32),
        learn=unfold("learn", torch.bool) if "learn" in columns else mask,
        turn=unfold("turn", torch.long),
    )
    present = [i for i, length in enumerate(lengths.tolist()) if length]
    return rollout if len(present) == len(asked) else rollout.select(present)


def _read_origin(trace: Trace, prompts: Sequence[Prompt] | None) -> dict[str, Any]:
    """Read the fields of a rollout that its trace keeps in the metadata."""
    described = trace.meta.get("rollout") or {}
    try:
        asked = read_prompts(described) if prompts is None else expect_prompts(prompts, _FROM_TRACE)
        texts = tuple(trace.meta["texts"])
        origin: dict[str, Any] = {
            "prompts": tuple(asked),
            "texts": texts,
            "finish": tuple(trace.meta["finish"]),
            "writer": tuple(described.get("writer") or ["student"] * len(texts)),
            "n": int(described.get("n", 1)),
            "vocabulary": described.get("vocabulary"),
        }
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, OpdlabError):
            raise
        raise OpdlabError(
            "The trace does not keep its prompts as policies read them. Give prompts=, the prompts"
            " that it was written for, in the order of its texts."
        ) from None
    if not len(texts) == len(asked) == len(origin["writer"]):
        raise OpdlabError(
            f"The trace has {len(texts)} texts for {len(asked)} prompts. Give the prompts that it"
            " was written for, one for each text."
        )
    return origin


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
