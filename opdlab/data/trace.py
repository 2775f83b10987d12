"""Traces: the permanent record of a rollout and its grades, one row per token, in Parquet.

A trace opens in pandas, polars and DuckDB. The file's metadata hold the prompts, the texts and the
bytes of every token id that occurs, so a trace can be drawn without the tokenizer, and describe the
columns of the plan. `opdlab.what_if` asks again under another loss without running a model.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from opdlab.data.column import Column, Description
from opdlab.data.notes import AnyNote, read_note
from opdlab.data.trace_checksum import checksum_of
from opdlab.data.trace_formats import upgrade
from opdlab.errors import (
    DamagedFile,
    InvalidValue,
    OpdlabError,
    UnknownName,
)
from opdlab.support.expect import shortened
from opdlab.support.files import replacing
from opdlab.support.validation import FilePath, Text, validate_arguments

_META = b"opdlab"
_CHECKSUM = b"opdlab.sha256"  # of metadata and table, in files from format 3 on
FORMAT = 3  # of the metadata; files without a number are of the first format
# What reading a damaged file may raise, besides what this module raises itself.
_DAMAGE = (
    pa.ArrowException,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RecursionError,
    MemoryError,
    OverflowError,
)


@dataclass(frozen=True, eq=False)
class Trace:
    """Hold the grades of a rollout, token by token.

    Attributes:
        table: One row per token. `sample` counts the completions, `position` their tokens.
        meta: Plain data beside the table: `format`; by sample `prompts` (the text, or the last
            message of a chat, as pictures show it), `texts` and `finish`; `rollout` (the prompts as
            policies read them: `opdlab.rollout_from_trace` makes a rollout of it, to grade the
            texts again); `vocab` (the bytes of each token id, as Latin-1 text); `policies`; `plan`
            (names of the plan's columns); `columns` (their descriptions); `method` and `notes` (by
            method).
    """

    table: pa.Table
    meta: dict[str, Any]

    def to_pandas(self) -> pd.DataFrame:
        """Copy the table to a data frame; list columns hold numpy arrays.

        Returns:
            One row per token, columns in the table's order.
        """
        return self.table.to_pandas()

    @property
    def policies(self) -> list[str]:
        """Names of the policies that graded, the student first."""
        return list(self.meta["policies"])

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def describe(self, name: str) -> Description:
        """Look up what a plan says about its column; empty for columns that nobody described.

        Args:
            name: The column's name; it need not be in the table.

        Returns:
            The description.
        """
        return Description.from_json(self.meta.get("columns", {}).get(name, {}))

    def note(self, kind: type[AnyNote]) -> AnyNote | None:
        """Look up the plan's note of a type, such as `Windows`; None where there is none.

        Args:
            kind: The note's class.

        Returns:
            The first note of that type.
        """
        for notes in self.meta.get("notes", {}).values():
            for stored in notes.values():
                if (found := read_note(stored, kind)) is not None:
                    return found
        return None

    def sample(self, i: int) -> Trace:
        """Select the rows of completion `i`.

        Args:
            i: Number of the completion, from 0.

        Returns:
            A trace of these rows with the whole trace's metadata.

        Raises:
            OpdlabError: The trace has no such completion.
        """
        texts = len(self.meta["texts"])
        if isinstance(i, bool) or not isinstance(i, (int, np.integer)) or not 0 <= i < texts:
            raise OpdlabError(
                f"The trace has no completion {shortened(i)}; it has {texts}. Use a number from 0"
                f" to {texts - 1}."
            )
        return Trace(self.table.filter(pa.compute.equal(self.table["sample"], i)), self.meta)

    def tokens(self) -> list[bytes]:
        """List the exact bytes of every token, in row order.

        Returns:
            One entry per row, as `piece` gives it.
        """
        return [self.piece(i) for i in self.table["token_id"].to_pylist()]

    def piece(self, token_id: int) -> bytes:
        """Look up the exact bytes of a token id that occurs in the trace.

        Args:
            token_id: An id of the trace's column `token_id`.

        Returns:
            The bytes as `token_bytes` gives them; a special token is spelled out.
        """
        return str(self.meta["vocab"][str(token_id)]).encode("latin-1")

    @validate_arguments
    def column(self, name: Text) -> np.ndarray:
        """Take a column as an array `[rows]` or `[rows, K]`.

        Args:
            name: The column's name.

        Returns:
            The values in row order, as numpy reads the table's type.

        Raises:
            UnknownName: There is no such column. It is a KeyError, and lists what there is.
        """
        if name not in self.table.column_names:
            raise UnknownName(
                f"The trace has no column {name!r}; it has {', '.join(self.table.column_names)}."
            )
        values = self.table[name]
        array: np.ndarray = values.to_numpy()
        if not pa.types.is_list(values.type):
            return array
        return np.stack(list(array)) if len(array) else np.zeros((0, 0), np.float32)

    def with_columns(self, **columns: Any) -> Trace:
        """Make a trace with columns added or replaced.

        Args:
            columns: By name: a list, array or tensor `[rows]`, or a `Column` of them that
                describes itself.

        Returns:
            A new trace; this one stays as it is.

        Raises:
            InvalidValue: A column has not one value for each row, or values that no table holds.
        """
        table, described = self.table, dict(self.meta.get("columns", {}))
        for name, given in columns.items():
            described.pop(name, None)
            values = given
            if isinstance(given, Column):
                values, described[name] = given.values, given.description.as_json()
            column = _column(name, values, len(self))
            table = table.drop_columns([name]) if name in table.column_names else table
            table = table.append_column(name, column)
        return Trace(table, {**self.meta, "columns": described})

    @validate_arguments
    def save(self, path: FilePath) -> Path:
        """Write Parquet, atomically: a reader sees the old file or the new one.

        Args:
            path: The file; folders that are missing are made.

        Returns:
            The path.
        """
        path = Path(path)
        meta = json.dumps(self.meta).encode()
        checksum = checksum_of(self.table, meta).encode()
        table = self.table.replace_schema_metadata({_META: meta, _CHECKSUM: checksum})
        with replacing(path) as partial:
            pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read what `save` wrote.

        Args:
            path: A file that `save` wrote, also with an earlier format.

        Returns:
            The trace, in the present format.

        Raises:
            DamagedFile: The file is something else, or is not whole.
            FileNotFoundError: There is no such file.
            OpdlabError: `path` is no path.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise OpdlabError(
                f"Trace.load got {shortened(path)}. Give the path of a file that trace.save()"
                " wrote."
            )
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            meta = _read_meta(table)
            _check_meta(meta, table)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
        except _DAMAGE as error:
            raise DamagedFile(
                f"{path} is not an opdlab trace ({error}). It may be cut short: write it again with"
                " trace.save()."
            ) from error
        return cls(table, meta)

    def __repr__(self) -> str:
        return (
            f"Trace({len(self)} tokens of {len(self.meta['texts'])} completions under"
            f" {', '.join(self.policies)})"
        )


def _column(name: str, values: Any, rows: int) -> pa.Array | pa.ChunkedArray:
    """Make values a column of a table; raises InvalidValue where they cannot be one."""
    wanted = f"Give a list, an array or a tensor of {rows} numbers, flags or texts."
    # Arrays and tensors of any library have a shape, lists have none.
    shape = getattr(values, "shape", (0,))
    if (
        isinstance(values, (str, bytes, Mapping, set, frozenset))
        or not hasattr(values, "__len__")
        or len(shape) not in (1, 2)
    ):
        raise InvalidValue(
            f"with_columns got {name}={shortened(values)}, which is no column. {wanted}"
        )
    values = _to_numpy(values)
    if isinstance(values, np.ndarray) and values.ndim > 1:
        values = list(values)
    try:
        column = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise InvalidValue(
            f"with_columns got {name}={shortened(values)}, which a table cannot hold ({error})."
            f" {wanted}"
        ) from None
    if len(column) != rows:
        raise InvalidValue(
            f"with_columns got {len(column)} values for {name!r}, and the trace has {rows} rows."
            f" {wanted}"
        )
    return column


def _to_numpy(values: Any) -> Any:
    """Turn tensors of PyTorch into arrays, without importing it; leave everything else."""
    if not type(values).__module__.startswith("torch"):
        return values
    values = values.detach().cpu()
    return (values.float() if str(values.dtype) == "torch.bfloat16" else values).numpy()


def _read_meta(table: pa.Table) -> Any:
    """Read a file's metadata in the present format.

    Raises KeyError where the file has none, and ValueError where the checksum that files have from
    format 3 on is missing or not that of metadata and table.
    """
    stored = table.schema.metadata or {}
    meta = json.loads(stored[_META])
    upgraded = upgrade(meta)
    checksum = stored.get(_CHECKSUM, b"").decode("latin-1")
    is_guarded = checksum or (isinstance(meta, dict) and meta.get("format", 1) == FORMAT)
    if is_guarded and checksum != checksum_of(table, stored[_META]):
        raise ValueError("its checksum is not that of its table and its metadata")
    return upgraded


def _check_described(meta: dict[str, Any]) -> None:
    """Raise ValueError unless descriptions and notes are such."""
    for name in ("columns", "notes"):
        entries = meta.get(name, {})
        if not isinstance(entries, dict) or not all(
            isinstance(one, dict) for one in entries.values()
        ):
            raise ValueError(f"its {name} are no mapping of mappings")
    for name, stored in meta.get("columns", {}).items():
        try:
            Description.from_json(stored)
        except InvalidValue as error:
            raise ValueError(f"its description of {name}: {error}") from None


def _check_meta(meta: Any, table: pa.Table) -> None:
    """Raise ValueError unless a file's metadata describe its rows."""
    if not isinstance(meta, dict):
        raise ValueError("its metadata are no mapping")
    for name in ("policies", "texts", "finish", "prompts"):
        if not isinstance(meta.get(name), list) or not all(
            isinstance(item, str) for item in meta[name]
        ):
            raise ValueError(f"its metadata have no list of {name}")
    if not isinstance(meta.get("vocab"), dict):
        raise ValueError("its metadata have no vocab")
    if missing := {"sample", "position", "token_id"} - set(table.column_names):
        raise ValueError(f"it has no column {', '.join(sorted(missing))}")
    _check_described(meta)
    completions = {len(meta[name]) for name in ("texts", "finish", "prompts")}
    samples = [
        i
        for i in pa.compute.unique(table["sample"]).to_pylist()
        if i is None or not 0 <= i < min(completions)
    ]
    if len(completions) > 1 or samples:
        raise ValueError("its rows and its texts do not belong together")
    if (
        unknown := {str(i) for i in pa.compute.unique(table["token_id"]).to_pylist()}
        - meta["vocab"].keys()
    ):
        raise ValueError(f"it has no text for token {min(unknown)}")
