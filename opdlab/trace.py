"""Traces: the permanent record of what was written and how it was graded, one row a token, in Parquet.

Opens in pandas, polars and DuckDB. The file's metadata holds the prompts, the texts and the bytes of every token id that
occurs, so a trace can be drawn without the tokenizer. `what_if` asks again under another loss without running a model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from opdlab import signals
from opdlab.batch import Batch
from opdlab.errors import DamagedFile, InvalidValue, OpdlabError
from opdlab.policy import Policy, check_same_tokens
from opdlab.rollout import Rollout
from opdlab.rows import Rows, compute
from opdlab.tokens import token_bytes
from opdlab.validation import shortened

_META = b"opdlab"


@dataclass(frozen=True, eq=False)
class Trace:
    """`table`: one row a token. `meta`: `prompts`, `texts`, `finish` (a list each, by `sample`), `vocab`, `policies`."""

    table: pa.Table
    meta: dict[str, Any]

    def to_pandas(self) -> pd.DataFrame:
        """A copy as a data frame; list columns hold numpy arrays."""
        return self.table.to_pandas()

    @property
    def policies(self) -> list[str]:
        return list(self.meta["policies"])

    def __len__(self) -> int:
        return self.table.num_rows

    def sample(self, i: int) -> Trace:
        """The rows of completion `i`."""
        return Trace(self.table.filter(pa.compute.equal(self.table["sample"], i)), self.meta)

    def tokens(self) -> list[bytes]:
        """The exact bytes of every token, in row order."""
        return [self.piece(i) for i in self.table["token_id"].to_pylist()]

    def piece(self, token_id: int) -> bytes:
        """The exact bytes of a token id that occurs in the trace."""
        return self.meta["vocab"][str(token_id)].encode("latin-1")

    def column(self, name: str) -> np.ndarray:
        """A column `[rows]` or `[rows, K]`; raises KeyError with what there is."""
        if name not in self.table.column_names:
            raise KeyError(f"The trace has no column {name!r}; it has {', '.join(self.table.column_names)}.")
        values = self.table[name]
        if not pa.types.is_list(values.type):
            return values.to_numpy()
        return np.stack(values.to_numpy()) if len(values) else np.zeros((0, 0), np.float32)

    def what_if(self, loss: Callable[[Rows], Tensor]) -> Trace:
        """The same rollout under another loss: new columns `loss`, `grad_norm` and `share`.

        Runs on the kept top tokens plus one bucket for the tail, so an f-divergence reads as a lower bound of the full
        one (exact where the tails are empty). `grad_norm` is with respect to the logits of that support.
        """
        if "support" not in self.table.column_names:
            raise OpdlabError("This trace kept no top tokens. Make it with opdlab.score(…, k=8), which does.")
        logp = {name: _with_tail(self.column(f"{name}_top"), self.column(f"{name}_tail")) for name in self.policies}
        logits = logp["student"].requires_grad_()
        plan = {k: torch.tensor(self.column(k)) for k in self.meta.get("plan", []) if self.column(k).dtype != object}
        rows = Rows({**logp, "student": logits.log_softmax(-1)}, torch.zeros(len(self), dtype=torch.long), plan)
        value = loss(rows)
        (slope,) = torch.autograd.grad(value.sum(), logits)
        return self.with_columns(loss=value.detach().numpy(), **_shares(slope.norm(dim=-1).numpy()))

    def with_columns(self, **columns: Any) -> Trace:
        """This trace with columns added or replaced, `[rows]` each.

        Raises InvalidValue for a column that has not one value for each row, or values that no table holds.
        """
        table = self.table
        for name, values in columns.items():
            column = _column(name, values, len(self))
            table = table.drop_columns([name]) if name in table.column_names else table
            table = table.append_column(name, column)
        return Trace(table, self.meta)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write Parquet, atomically: a reader sees the old file or the new one."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            table = self.table.replace_schema_metadata({_META: json.dumps(self.meta).encode()})
            pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read what `save` wrote; raises DamagedFile for anything else."""
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            meta = json.loads((table.schema.metadata or {})[_META])
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise DamagedFile(f"{path} is not an opdlab trace ({error}). It may be cut short: write it again with trace.save().") from error
        return cls(table, meta)

    def __repr__(self) -> str:
        return f"Trace({len(self)} tokens of {len(self.meta['texts'])} completions under {', '.join(self.policies)})"


def score(rollout: Rollout, student: Policy, teacher: Policy | None = None, k: int = 8, **others: Policy) -> Trace:
    """Grade a rollout: every per-token number of `signals.full(k)` under all policies given.

    `others` by name: `score(rollout, student, teacher, reference=…)`; pass `**{"teacher+hint": …}` for such names. Raises
    TokenizerMismatch before any model runs.
    """
    policies = {"student": student, **({"teacher": teacher} if teacher else {}), **others}
    for name, policy in policies.items():
        check_same_tokens(student, policy, name)
    batch = Batch(rollout, policies)
    states = {name: batch.states(name) for name in policies}
    return record(rollout, policies, compute(signals.full(k), states, batch.token))


def record(rollout: Rollout, policies: Mapping[str, Policy], columns: Mapping[str, Tensor], *, run: str = "", step: int = -1,
           plan: Mapping[str, Tensor] | None = None, notes: Mapping[str, Any] | None = None,
           method: Mapping[str, str] | None = None) -> Trace:  # fmt: skip
    """A trace from flat columns `[tokens, ...]`; `grad_norm`, where there is one, gives each token's `share` too.

    notes: plain data that a plan left in `batch.notes`; kept in `meta`. method: who planned the columns (`planner_of`).
    """
    ids = [i for row in rollout.completions() for i in row]
    sample = np.repeat(np.arange(len(rollout)), rollout.lengths.tolist())
    data: dict[str, Any] = {
        "run": pa.array([run] * len(ids)).dictionary_encode(), "step": np.full(len(ids), step), "sample": sample,
        "prompt": pa.array([rollout.prompts[i].id for i in sample], pa.string()),
        "position": np.concatenate([np.arange(n) for n in rollout.lengths.tolist()]), "token_id": np.array(ids, np.int64),
    }  # fmt: skip
    for name, value in {**columns, **(plan or {})}.items():
        array = value.detach().cpu().numpy()
        data[name] = pa.array(list(array), pa.list_(pa.from_numpy_dtype(array.dtype))) if array.ndim > 1 else array
    if "grad_norm" in columns:
        data |= _shares(data["grad_norm"])
    tokenizer = policies["student"].tokenizer
    support = columns["support"].flatten().tolist() if "support" in columns else []
    noted = [i for window in (notes or {}).get("windows", []) for name in ("student", "teacher") for i in window[name]]
    seen = sorted({*ids, *support, *noted} - {-1})
    vocab = {str(i): piece.decode("latin-1") for i, piece in zip(seen, token_bytes(tokenizer, seen), strict=True)}
    meta = {
        "policies": list(policies), "plan": list(plan or {}), "texts": list(rollout.texts), "finish": list(rollout.finish),
        "prompts": [_plain(p.text if p.messages is None else p.messages[-1]["content"]) for p in rollout.prompts], "vocab": vocab,
        "notes": dict(notes or {}), **({} if method is None else {"method": dict(method)}),
    }  # fmt: skip
    return Trace(pa.table(data), meta)


def planner_of(method: Any) -> dict[str, str]:
    """Return which method planned, as a trace keeps it: its `name`, and the class that holds its `plan` as `planner`.

    So pictures give a column `route` the meaning that it has in DOPD only where DOPD's own plan made it, and not a method of
    the same name or a subclass with a plan of its own.
    """
    kind = type(method)
    planner = next((owner for owner in kind.__mro__ if "plan" in vars(owner)), kind)
    is_own = "plan" in getattr(method, "__dict__", {})  # set on this object alone
    return {"name": kind.__name__, "planner": "" if is_own else f"{planner.__module__}.{planner.__qualname__}"}


def _column(name: str, values: Any, rows: int) -> pa.Array | pa.ChunkedArray:
    """Values as a column of a table; raises InvalidValue where they are none."""
    wanted = f"Give a list, an array or a tensor of {rows} numbers, flags or texts."
    shape = getattr(values, "shape", (0,))
    if isinstance(values, (str, bytes, Mapping, set, frozenset)) or not hasattr(values, "__len__") or len(shape) not in (1, 2):
        raise InvalidValue(f"with_columns got {name}={shortened(values)}, which is no column. {wanted}")
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if isinstance(values, np.ndarray) and values.ndim > 1:
        values = list(values)
    try:
        column = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise InvalidValue(f"with_columns got {name}={shortened(values)}, which a table cannot hold ({error}). {wanted}") from None
    if len(column) != rows:
        raise InvalidValue(f"with_columns got {len(column)} values for {name!r}, and the trace has {rows} rows. {wanted}")
    return column


def _plain(text: str | None) -> str:
    return text or ""


def _with_tail(top: np.ndarray, tail: np.ndarray) -> Tensor:
    """Log-probs on the kept tokens and the tail, `[n, S + 1]`. Finite, as a policy's are: a repeat or an empty tail has e^-200."""
    return torch.cat([torch.tensor(top), torch.tensor(tail).log()[:, None]], -1).clamp_min(-200.0)


def _shares(norm: np.ndarray) -> dict[str, np.ndarray]:
    return {"grad_norm": norm, "share": norm / max(float(norm.sum()), 1e-30)}
