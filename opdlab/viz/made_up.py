"""Made-up traces for examples and tests: any tokens, any policies, seeded distributions.

Every token has a distribution over the few words that occur, drawn from a seed, so all numbers of a
trace belong together as in a real one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from opdlab.data.trace import FORMAT, Trace

SPARE_WORDS = 6  # words beyond those that occur


def make_trace(
    pieces: Sequence[bytes],
    policies: Sequence[str] = ("student", "teacher"),
    *,
    top: int = 3,
    prompt: str = "What?",
    plan: Mapping[str, np.ndarray] | None = None,
    finish: str = "stop",
    seed: int = 0,
) -> Trace:
    """Make a trace of one completion.

    Args:
        pieces: The bytes of its tokens.
        policies: The names of the policies that graded it, the student first.
        top: Top tokens that are kept of each policy; 0 keeps none, as traces of training do.
        prompt: The prompt's text.
        plan: Columns of a plan, `[tokens]` each.
        finish: The reason why the completion ended.
        seed: Seeds the distributions.

    Returns:
        The trace; the same arguments give the same one.
    """
    rng = np.random.default_rng(seed)
    spare = [f" w{i}".encode() for i in range(SPARE_WORDS)]
    words = list(dict.fromkeys([*pieces, *spare]))
    ids = np.array([words.index(piece) for piece in pieces], dtype=int)
    rows = np.arange(len(ids))
    log_probs: dict[str, np.ndarray] = {}
    for name in policies:
        logits = 2 * rng.normal(size=(len(ids), len(words)))
        log_probs[name] = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    data: dict[str, Any] = {"sample": 0 * rows, "position": rows, "token_id": ids}
    for name, log_p in log_probs.items():
        data[f"{name}_logp"] = log_p[rows, ids]
        data[f"{name}_entropy"] = -(np.exp(log_p) * log_p).sum(1)
        if name != "student":
            student = log_probs["student"]
            data[f"{name}_reverse_kl"] = (np.exp(student) * (student - log_p)).sum(1)
    if top and len(ids):
        data |= _top_columns(ids, log_probs, top)
    meta = {
        "format": FORMAT,
        "policies": list(policies),
        "plan": list(plan or {}),
        "columns": {},
        "notes": {},
        "texts": [b"".join(pieces).decode("utf-8", "replace")],
        "finish": [finish],
        "prompts": [prompt],
        "vocab": {str(i): word.decode("latin-1") for i, word in enumerate(words)},
    }
    return Trace(pa.table(data | dict(plan or {})), meta)


def _top_columns(
    ids: np.ndarray, log_probs: Mapping[str, np.ndarray], k: int
) -> dict[str, list[np.ndarray] | np.ndarray]:
    """The sampled token and the `k` likeliest of each policy, with their log-probs."""
    likeliest = [np.argsort(-log_p, 1)[:, :k] for log_p in log_probs.values()]
    support = np.concatenate([ids[:, None], *likeliest], 1)
    for row in support:
        row[[i for i, token in enumerate(row) if token in row[:i]]] = -1
    out: dict[str, list[np.ndarray] | np.ndarray] = {"support": list(support)}
    sampled = np.arange(len(ids)), ids
    for name, log_p in log_probs.items():
        kept = np.take_along_axis(log_p, support.clip(0), 1)
        top = np.where(support < 0, -np.inf, kept)
        out[f"{name}_top"] = list(top)
        out[f"{name}_tail"] = 1 - np.exp(top).sum(1)
        out[f"{name}_rank"] = (log_p > log_p[sampled][:, None]).sum(1) + 1
    return out
