"""Grade a rollout and keep the numbers of every token as a `Trace`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.data.tokens import token_bytes
from opdlab.data.trace import Trace
from opdlab.engine import signals
from opdlab.engine.batch import Batch
from opdlab.engine.passes import compute
from opdlab.errors import MissingPolicy, OpdlabError
from opdlab.models.policy import Policy
from opdlab.models.same_tokens import check_same_tokens
from opdlab.models.vocabulary import check_written_with
from opdlab.support.expect import shortened
from opdlab.support.validation import Count, validate


def score(
    rollout: Rollout, student: Policy, teacher: Any = None, k: int = 8, **others: Any
) -> Trace:
    """Grade a rollout: every per-token number of `signals.full(k)` under all policies given.

    Args:
        rollout: What was written, by a policy with the student's tokens.
        student: The first policy, with which the others are compared.
        teacher: A policy, or anything that grades a rollout, such as a LogprobServer. Of one that
            gives only some log-probs, the trace has what can be known: the log-prob of the sampled
            token, a lower bound of the reverse KL (`teacher_coarse_reverse_kl`) and the overlap of
            the favourites.
        k: Top tokens that are kept of each policy.
        others: More of them by name, `reference=…`; pass `**{"teacher+hint": …}` for such names.

    Raises:
        TokenizerMismatch: The rollout or a policy has other tokens than the student. Nothing has
            run then.
        MissingPolicy: One of them cannot grade.
        InvalidValue: k is no count.
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
    policies = {"student": student, **({} if teacher is None else {"teacher": teacher}), **others}
    check_written_with(student.tokenizer, student.weights.vocab_size, rollout, "the student")
    for name, policy in policies.items():
        _check_grades(name, policy, student, rollout)
    batch = Batch(rollout, policies)
    states = {name: batch.states(name) for name in policies}
    return record_trace(
        rollout, policies, compute(signals.full(k, allow_partial=True), states, batch.token)
    )


def _check_grades(name: str, policy: Any, student: Policy, rollout: Rollout) -> None:
    """Refuse what cannot grade the student's tokens."""
    if isinstance(policy, Policy):
        check_same_tokens(student, policy, name)
    elif not hasattr(policy, "grade"):
        raise MissingPolicy(
            f"score got {_named(policy)} for {name!r}, which has no log-probs of given tokens. Give"
            " a Policy or a LogprobServer; what only writes can be compared by its texts (OmniOPD,"
            " SequenceKD)."
        )
    elif hasattr(policy, "check"):  # a server is compared with the student before it grades
        policy.check(student, list(dict.fromkeys(rollout.prompts)), int(rollout.lengths.max()))


def record_trace(
    rollout: Rollout,
    policies: Mapping[str, Policy],
    columns: Mapping[str, Tensor],
    *,
    run: str = "",
    step: int = -1,
    plan: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, Any] | None = None,
    method: Mapping[str, str] | None = None,
) -> Trace:
    """A trace from flat columns `[tokens, ...]`; `grad_norm`, where there is one, gives each
    token's `share` too.

    notes: plain data that a plan left in `batch.notes`; kept in `meta`. method: who planned the
        columns (`planner_of`).
    """
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
    for name, value in {**columns, **(plan or {})}.items():
        array = value.detach().cpu().numpy()
        data[name] = (
            pa.array(list(array), pa.list_(pa.from_numpy_dtype(array.dtype)))
            if array.ndim > 1
            else array
        )
    if "grad_norm" in columns:
        data |= gradient_shares(data["grad_norm"])
    tokenizer = policies["student"].tokenizer
    support = columns["support"].flatten().tolist() if "support" in columns else []
    noted = [i for i in _noted_tokens(notes or {}) if i < len(tokenizer)]
    seen = sorted({*ids, *support, *noted} - {-1})
    vocab = {
        str(i): piece.decode("latin-1")
        for i, piece in zip(seen, token_bytes(tokenizer, seen), strict=True)
    }
    meta = {
        "policies": list(policies),
        "plan": list(plan or {}),
        "texts": list(rollout.texts),
        "finish": list(rollout.finish),
        "prompts": [_prompt_text(p) for p in rollout.prompts],
        "vocab": vocab,
        "notes": dict(notes or {}),
        **({} if method is None else {"method": dict(method)}),
    }
    return Trace(pa.table(data), meta)


def planner_of(method: Any) -> dict[str, str]:
    """Return which method planned, as a trace keeps it: its `name`, and the class that holds its
    `plan` as `planner`.

    So pictures give a column `route` the meaning that it has in DOPD only where DOPD's own plan
    made it, and not a method of the same name or a subclass with a plan of its own.
    """
    kind = type(method)
    planner = next((owner for owner in kind.__mro__ if "plan" in vars(owner)), kind)
    is_own = "plan" in getattr(method, "__dict__", {})  # set on this object alone
    return {
        "name": kind.__name__,
        "planner": "" if is_own else f"{planner.__module__}.{planner.__qualname__}",
    }


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


def _noted_tokens(notes: Mapping[str, Any]) -> Iterator[int]:
    """Token ids in the windows that TOPD notes; notes of the same name of somebody else's have
    another form.
    """
    windows = notes.get("windows")
    for window in windows if isinstance(windows, list) else []:
        for name in ("student", "teacher"):
            ids = window.get(name) if isinstance(window, Mapping) else None
            yield from (
                i for i in (ids if isinstance(ids, list) else []) if type(i) is int and i >= 0
            )


def gradient_shares(norm: np.ndarray) -> dict[str, np.ndarray]:
    """Gradient norms `[rows]` with each row's share of their sum."""
    return {"grad_norm": norm, "share": norm / max(float(norm.sum()), 1e-30)}
