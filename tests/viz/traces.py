"""Traces made by hand: any tokens, any policies, seeded distributions over their small vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from opdlab.data.trace import Trace
from opdlab.data.trace_formats import upgrade

NASTY = (
    "<script>window.broken=1</script>",
    "</script>",
    "<img src=x onerror=window.broken=1>",
    "&amp;",
    "<!--",
    "\u202eevil",
    "👩\u200d💻",
    "\u200b",
    "\x00",
    "",
    " ",
    "\n",
    "\t",
    "\r",
    " the",
    "日本",
    "شكرا",
    "\u0301",
    "<|im_end|>",
    "\"'`",
    "]]>",
    "\u2028",
)


def byte_pieces(text: str, size: int = 2) -> list[bytes]:
    """The text cut anywhere, also inside characters."""
    raw = text.encode()
    return [raw[i : i + size] for i in range(0, len(raw), size)]


def made(
    pieces: Sequence[bytes],
    policies: Sequence[str] = ("student", "teacher"),
    *,
    top: int = 3,
    prompt: str = "What?",
    plan: Mapping[str, np.ndarray] | None = None,
    finish: str = "stop",
    seed: int = 0,
) -> Trace:
    """One completion of these tokens; `top=0` leaves out the top tokens, as training traces do."""
    rng, words = (
        np.random.default_rng(seed),
        list(dict.fromkeys([*pieces, *(f" w{i}".encode() for i in range(6))])),
    )
    ids = np.array([words.index(piece) for piece in pieces], dtype=int)
    rows, logp = np.arange(len(ids)), {}
    for name in policies:
        x = 2 * rng.normal(size=(len(ids), len(words)))
        logp[name] = x - np.log(np.exp(x).sum(1, keepdims=True))
    data: dict[str, object] = {"sample": 0 * rows, "position": rows, "token_id": ids}
    for name, x in logp.items():
        data |= {f"{name}_logp": x[rows, ids], f"{name}_entropy": -(np.exp(x) * x).sum(1)}
        if name != "student":
            s = logp["student"]
            data[f"{name}_reverse_kl"] = (np.exp(s) * (s - x)).sum(1)
    text = b"".join(pieces).decode("utf-8", "replace")
    meta = {
        "policies": list(policies),
        "plan": list(plan or {}),
        "texts": [text],
        "finish": [finish],
        "prompts": [prompt],
        "vocab": {str(i): w.decode("latin-1") for i, w in enumerate(words)},
    }
    return Trace(
        pa.table(data | (_tops(ids, logp, top) if top and len(ids) else {}) | dict(plan or {})),
        meta,
    )


def _tops(ids: np.ndarray, logp: Mapping[str, np.ndarray], k: int) -> dict[str, object]:
    support = np.concatenate([ids[:, None], *(np.argsort(-x, 1)[:, :k] for x in logp.values())], 1)
    for row in support:
        row[[i for i, x in enumerate(row) if x in row[:i]]] = -1
    out: dict[str, object] = {"support": list(support)}
    for name, x in logp.items():
        top = np.where(support < 0, -np.inf, np.take_along_axis(x, support.clip(0), 1))
        rank = (x > x[np.arange(len(ids)), ids][:, None]).sum(1) + 1
        out |= {
            f"{name}_top": list(top),
            f"{name}_tail": 1 - np.exp(top).sum(1),
            f"{name}_rank": rank,
        }
    return out


def by_method(trace: Trace, method: object) -> Trace:
    """The trace as the first format kept it after a step of this method, read with the present one."""
    meta = {name: value for name, value in trace.meta.items() if name not in ("format", "columns")}
    kind = type(method)
    mark = {"name": kind.__name__, "planner": f"{kind.__module__}.{kind.__qualname__}"}
    return Trace(trace.table, upgrade({**meta, "method": mark}))


def several(*traces: Trace) -> Trace:
    """Completions of their own as one trace; their vocabularies must agree where they use the same
    ids.
    """
    tables = [
        t.table.set_column(t.table.column_names.index("sample"), "sample", pa.array([i] * len(t)))
        for i, t in enumerate(traces)
    ]
    meta = {key: [v for t in traces for v in t.meta[key]] for key in ("texts", "finish", "prompts")}
    vocab: dict[str, str] = {}
    for t in traces:
        assert all(vocab.get(i, word) == word for i, word in t.meta["vocab"].items())
        vocab |= t.meta["vocab"]
    return Trace(
        pa.concat_tables(tables, promote_options="default"),
        {**traces[0].meta, **meta, "vocab": vocab},
    )
