"""Grade a rollout and keep the numbers of every token as a `Trace`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from opdlab.data.notes import Windows, read_note
from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.data.tokens import token_bytes
from opdlab.data.trace import FORMAT, Trace
from opdlab.engine import signals
from opdlab.engine.batch import Batch
from opdlab.engine.passes import compute
from opdlab.engine.planned import Planned
from opdlab.errors import MissingPolicy, OpdlabError
from opdlab.models.policy import Policy
from opdlab.models.protocols import Checked, Grader
from opdlab.models.same_tokens import check_same_tokens
from opdlab.models.vocabulary import check_written_with
from opdlab.support.expect import shortened
from opdlab.support.validation import Count, validate


def score(
    rollout: Rollout,
    student: Policy,
    teacher: Grader | None = None,
    k: int = 8,
    **others: Grader,
) -> Trace:
    """Grade a rollout: every number of `signals.full(k)` per token, under all policies given.

    Args:
        rollout: Texts in the student's tokens.
        student: The first policy, with which the others are compared.
        teacher: Anything that grades a rollout, such as a policy or a LogprobServer. A server that
            gives only some log-probs contributes what can be known: the log-prob of the sampled
            token, a lower bound of the reverse KL (`teacher_coarse_reverse_kl`), and the overlap of
            the top tokens.
        k: Top tokens that are kept of each policy.
        others: More graders by name, such as `reference=…`; pass `**{"teacher+hint": …}` for names
            that are no identifiers.

    Returns:
        A trace with one row for each token.

    Raises:
        TokenizerMismatch: The rollout or a policy has other tokens than the student. Nothing has
            run then.
        MissingPolicy: One of them cannot grade.
        InvalidValue: `k` is no count.
    """
    if not isinstance(rollout, Rollout):
        raise OpdlabError(
            f"score got {_named(rollout)} for a rollout. Write one with student.sample(prompts) or"
            " opdlab.rollout_from_texts(…)."
        )
    if not isinstance(student, Policy):
        raise MissingPolicy(
            f"score got {_named(student)} for the student. Give a Policy: opdlab.score(rollout,"
            " student, teacher)."
        )
    k = validate("score", {"k": k}, {"k": Count})["k"]
    graders: dict[str, Any] = {"student": student}
    if teacher is not None:
        graders["teacher"] = teacher
    graders |= others
    check_written_with(student.tokenizer, student.weights.vocab_size, rollout, "the student")
    for name, grader in graders.items():
        _check_grader(name, grader, student, rollout)
    batch = Batch(rollout, graders)
    states = {name: batch.states(name) for name in graders}
    numbers = compute(signals.full(k, allow_partial=True), states, batch.token)
    return record_trace(rollout, graders, numbers)


def _check_grader(name: str, grader: Any, student: Policy, rollout: Rollout) -> None:
    """Refuse a grader that cannot grade the student's tokens."""
    if isinstance(grader, Policy):
        check_same_tokens(student, grader, name)
    elif not isinstance(grader, Grader):
        raise MissingPolicy(
            f"score got {_named(grader)} for {name!r}, which has no log-probs of given tokens. Give"
            " a Policy or a LogprobServer; a teacher that only writes can be compared by its texts"
            " (OmniOPD, SequenceKD)."
        )
    elif isinstance(grader, Checked):  # a server is compared with the student before it grades
        grader.check(student, list(rollout.prompts), int(rollout.lengths.max()))


def record_trace(
    rollout: Rollout,
    policies: Mapping[str, Any],
    columns: Mapping[str, Tensor],
    *,
    run: str = "",
    step: int = -1,
    planned: Planned | None = None,
) -> Trace:
    """Make a trace of a rollout.

    Args:
        rollout: What was written.
        policies: Who graded it, by name; the student's tokenizer gives the bytes of the tokens.
        columns: Numbers of every token, `[tokens, ...]` each. `grad_norm`, where there is one,
            gives each token's `share` too.
        run: Names the run.
        step: The training step, from 1; -1 for none.
        planned: What a method planned for the rollout: its columns, their descriptions and its
            notes are kept.
    """
    plan = {} if planned is None else planned.columns
    notes = {} if planned is None else planned.notes
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
        "columns": {}
        if planned is None
        else {k: d.as_json() for k, d in planned.descriptions.items()},
        "texts": list(rollout.texts),
        "finish": list(rollout.finish),
        "prompts": [_prompt_text(prompt) for prompt in rollout.prompts],
        "vocab": {str(i): piece.decode("latin-1") for i, piece in pieces},
        "method": name,
        "notes": {name: dict(notes)} if notes else {},
    }
    return Trace(pa.table(data), meta)


def name_of_planner(method: Any) -> str:
    """Return the name under which a trace keeps a method's notes.

    It is the method's class, or the function that the method was made of.
    """
    function = getattr(method, "function", None)
    return str(getattr(function, "__name__", type(method).__name__))


def _table_column(value: Tensor) -> Any:
    """A flat column as a table holds it: an array, or lists where each token has several values."""
    array = value.detach().cpu().numpy()
    if array.ndim == 1:
        return array
    return pa.array(list(array), pa.list_(pa.from_numpy_dtype(array.dtype)))


def _named(value: Any) -> str:
    return (
        shortened(value)
        if isinstance(value, (str, int, float, list, dict, type(None)))
        else f"a {type(value).__name__}"
    )


def _prompt_text(prompt: Prompt) -> str:
    """What the user asked: the text, or the last message; of a message in parts, its texts."""
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
    """Gradient norms `[rows]` with each row's share of their sum."""
    return {"grad_norm": norm, "share": norm / max(float(norm.sum()), 1e-30)}
