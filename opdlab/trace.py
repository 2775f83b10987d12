"""Traces: the permanent record of what was written and how it was graded, one row a token, in Parquet.

Opens in pandas, polars and DuckDB. The file's metadata holds the prompts, the texts and the bytes of every token id that
occurs, so a trace can be drawn without the tokenizer. `what_if` asks again under another loss without running a model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
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
from opdlab.errors import DamagedFile, InvalidValue, MissingPolicy, NonFinite, OpdlabError, PartialDistribution, UnknownColumn, UnknownName
from opdlab.loss_contract import CHECKED_ROWS, call_loss, check_rows_are_independent, gradient_of_loss, select_rows, spread_index
from opdlab.not_finite import explain
from opdlab.policy import Policy, Prompt, check_same_tokens
from opdlab.rollout import Rollout
from opdlab.rows import Rows, compute
from opdlab.same_tokens import check_written_with
from opdlab.tokens import token_bytes
from opdlab.validation import Count, shortened, validate

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
        """The rows of completion `i`; raises OpdlabError for one that the trace does not have."""
        texts = len(self.meta["texts"])
        if isinstance(i, bool) or not isinstance(i, (int, np.integer)) or not 0 <= i < texts:
            raise OpdlabError(f"The trace has no completion {shortened(i)}; it has {texts}. Use a number from 0 to {texts - 1}.")
        return Trace(self.table.filter(pa.compute.equal(self.table["sample"], i)), self.meta)

    def tokens(self) -> list[bytes]:
        """The exact bytes of every token, in row order."""
        return [self.piece(i) for i in self.table["token_id"].to_pylist()]

    def piece(self, token_id: int) -> bytes:
        """The exact bytes of a token id that occurs in the trace."""
        return self.meta["vocab"][str(token_id)].encode("latin-1")

    def column(self, name: str) -> np.ndarray:
        """A column `[rows]` or `[rows, K]`; raises UnknownName (a KeyError) with what there is."""
        if name not in self.table.column_names:
            raise UnknownName(f"The trace has no column {name!r}; it has {', '.join(self.table.column_names)}.")
        values = self.table[name]
        if not pa.types.is_list(values.type):
            return values.to_numpy()
        return np.stack(values.to_numpy()) if len(values) else np.zeros((0, 0), np.float32)

    def what_if(self, loss: Callable[[Rows], Tensor]) -> Trace:
        """The same rollout under another loss: new columns `loss`, `grad_norm` and `share`.

        Runs on the kept top tokens plus one bucket for the tail, so an f-divergence reads as a lower bound of the full
        one (exact where the tails are empty). `grad_norm` is with respect to the logits of that support. `rows.token` is 0
        everywhere: the sampled token stands first in the support.

        Args:
            loss: A function of rows, a method or the class of one. Its plan does not run: rows have the trace's plan columns.

        Raises:
            InvalidValue: It is neither a loss nor a method.
            BadLoss: The loss does not keep its contract, as in training.
            NonFinite: It is NaN or infinite at a token.
            PartialDistribution: It reads a policy whose top tokens the trace does not have.
        """
        from opdlab.methods.contract import as_method  # methods stand above traces

        function = as_method(loss, "what_if").loss
        if "support" not in self.table.column_names:
            raise OpdlabError("This trace kept no top tokens. Make it with opdlab.score(…, k=8), which does.")
        if "student_top" not in self.table.column_names:
            raise OpdlabError("This trace kept no top tokens of the student. Make it with opdlab.score(rollout, student, …).")
        known = [name for name in self.policies if f"{name}_top" in self.table.column_names]
        logp = {name: _with_tail(self.column(f"{name}_top"), self.column(f"{name}_tail")) for name in known}
        logits = logp["student"].requires_grad_()
        plan = {k: torch.tensor(self.column(k)) for k in self.meta.get("plan", []) if self.column(k).dtype != object}
        token = torch.zeros(len(self), dtype=torch.long)
        rows = Rows({**logp, "student": logits.detach().log_softmax(-1)}, token, plan)
        try:
            check_rows_are_independent(function, select_rows(rows, spread_index(len(rows), CHECKED_ROWS, token.device)))
            student = logits.log_softmax(-1)
            value = call_loss(function, Rows({**logp, "student": student}, token, plan))
            slope = gradient_of_loss(value, torch.ones_like(value), logits)
        except UnknownColumn as error:
            if missing := sorted(set(self.policies) - set(known)):
                raise PartialDistribution(
                    f"{error} The trace has no top tokens of {', '.join(map(repr, missing))}, which gave only some log-probs."
                ) from None
            raise
        bad = ~(torch.isfinite(value) & torch.isfinite(slope).all(-1))
        if bool(bad.any()):
            at = int(bad.nonzero()[0, 0])
            cause = explain(select_rows(rows, torch.tensor([at])))
            raise NonFinite(f"The loss is {value[at].item():.4g} at row {at} of the trace, or its gradient is not finite.{cause}")
        norm = slope.norm(dim=-1).numpy()
        return self.with_columns(loss=value.detach().numpy(), **_shares(norm))

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
        """Read what `save` wrote.

        Raises:
            DamagedFile: The file is something else, or is not whole.
            FileNotFoundError: There is no such file.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise OpdlabError(f"Trace.load got {shortened(path)}. Give the path of a file that trace.save() wrote.")
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            meta = json.loads((table.schema.metadata or {})[_META])
            _check_meta(meta, table)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, KeyError, ValueError, RecursionError) as error:
            raise DamagedFile(f"{path} is not an opdlab trace ({error}). It may be cut short: write it again with trace.save().") from error
        return cls(table, meta)

    def __repr__(self) -> str:
        return f"Trace({len(self)} tokens of {len(self.meta['texts'])} completions under {', '.join(self.policies)})"


def score(rollout: Rollout, student: Policy, teacher: Any = None, k: int = 8, **others: Any) -> Trace:
    """Grade a rollout: every per-token number of `signals.full(k)` under all policies given.

    Args:
        rollout: What was written, by a policy with the student's tokens.
        student: The first policy, with which the others are compared.
        teacher: A policy, or anything that grades a rollout, such as a LogprobServer. Of one that gives only some log-probs,
            the trace has what can be known: the log-prob of the sampled token, a lower bound of the reverse KL
            (`teacher_coarse_reverse_kl`) and the overlap of the favourites.
        k: Top tokens that are kept of each policy.
        others: More of them by name, `reference=…`; pass `**{"teacher+hint": …}` for such names.

    Raises:
        TokenizerMismatch: The rollout or a policy has other tokens than the student. Nothing has run then.
        MissingPolicy: One of them cannot grade.
        InvalidValue: k is no count.
    """
    if not isinstance(rollout, Rollout):
        raise OpdlabError(f"score got {_named(rollout)} for a rollout. Write one with student.sample(prompts) or rollout.written(…).")
    if not isinstance(student, Policy):
        raise MissingPolicy(f"score got {_named(student)} for the student. Give a Policy: opdlab.score(rollout, student, teacher).")
    k = validate("score", {"k": k}, {"k": Count})["k"]
    policies = {"student": student, **({} if teacher is None else {"teacher": teacher}), **others}
    check_written_with(student, rollout)
    for name, policy in policies.items():
        _check_grades(name, policy, student, rollout)
    batch = Batch(rollout, policies)
    states = {name: batch.states(name) for name in policies}
    return record(rollout, policies, compute(signals.full(k, allow_partial=True), states, batch.token))


def _check_grades(name: str, policy: Any, student: Policy, rollout: Rollout) -> None:
    """Refuse what cannot grade the student's tokens."""
    if isinstance(policy, Policy):
        check_same_tokens(student, policy, name)
    elif not hasattr(policy, "grade"):
        raise MissingPolicy(
            f"score got {_named(policy)} for {name!r}, which has no log-probs of given tokens. Give a Policy or a LogprobServer; "
            "what only writes can be compared by its texts (OmniOPD, SequenceKD)."
        )
    elif hasattr(policy, "check"):  # a server is compared with the student before it grades
        policy.check(student, list(dict.fromkeys(rollout.prompts)), int(rollout.lengths.max()))


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
    noted = [i for i in _noted_tokens(notes or {}) if i < len(tokenizer)]
    seen = sorted({*ids, *support, *noted} - {-1})
    vocab = {str(i): piece.decode("latin-1") for i, piece in zip(seen, token_bytes(tokenizer, seen), strict=True)}
    meta = {
        "policies": list(policies), "plan": list(plan or {}), "texts": list(rollout.texts), "finish": list(rollout.finish),
        "prompts": [_prompt_text(p) for p in rollout.prompts], "vocab": vocab,
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


def _named(value: Any) -> str:
    return shortened(value) if isinstance(value, (str, int, float, list, dict, type(None))) else f"a {type(value).__name__}"


def _prompt_text(prompt: Prompt) -> str:
    """What the user asked: the text, or the last message; of a message in parts, its texts."""
    content: Any = prompt.text if prompt.messages is None else prompt.messages[-1]["content"]
    if isinstance(content, (list, tuple)):
        return "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content)
    return content or ""


def _noted_tokens(notes: Mapping[str, Any]) -> Iterator[int]:
    """Token ids in the windows that TOPD notes; notes of the same name of somebody else's have another form."""
    windows = notes.get("windows")
    for window in windows if isinstance(windows, list) else []:
        for name in ("student", "teacher"):
            ids = window.get(name) if isinstance(window, Mapping) else None
            yield from (i for i in (ids if isinstance(ids, list) else []) if type(i) is int and i >= 0)


def _check_meta(meta: Any, table: pa.Table) -> None:
    """Raise ValueError unless a file's metadata describe its rows."""
    if not isinstance(meta, dict):
        raise ValueError("its metadata are no mapping")
    for name in ("policies", "texts", "finish", "prompts"):
        if not isinstance(meta.get(name), list) or not all(isinstance(item, str) for item in meta[name]):
            raise ValueError(f"its metadata have no list of {name}")
    if not isinstance(meta.get("vocab"), dict):
        raise ValueError("its metadata have no vocab")
    if missing := {"sample", "position", "token_id"} - set(table.column_names):
        raise ValueError(f"it has no column {', '.join(sorted(missing))}")
    completions = {len(meta[name]) for name in ("texts", "finish", "prompts")}
    samples = [i for i in pa.compute.unique(table["sample"]).to_pylist() if i is None or not 0 <= i < min(completions)]
    if len(completions) > 1 or samples:
        raise ValueError("its rows and its texts do not belong together")
    if unknown := {str(i) for i in pa.compute.unique(table["token_id"]).to_pylist()} - meta["vocab"].keys():
        raise ValueError(f"it has no text for token {min(unknown)}")


def _with_tail(top: np.ndarray, tail: np.ndarray) -> Tensor:
    """Log-probs on the kept tokens and the tail, `[n, S + 1]`. Finite, as a policy's are: a repeat or an empty tail has e^-200."""
    return torch.cat([torch.tensor(top), torch.tensor(tail).log()[:, None]], -1).clamp_min(-200.0)


def _shares(norm: np.ndarray) -> dict[str, np.ndarray]:
    return {"grad_norm": norm, "share": norm / max(float(norm.sum()), 1e-30)}
