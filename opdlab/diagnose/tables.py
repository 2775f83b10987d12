"""Tables of tokens and their means, and a result as HTML for a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from opdlab.data.rollout import Rollout
from opdlab.tasks import Task

ALL = "all"  # the row of a table that counts every token, whatever its type


def make_token_table(
    rollout: Rollout,
    columns: Mapping[str, Any],
    task: Task | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> pd.DataFrame:
    """Make a table with one row per token that the student wrote.

    Args:
        rollout: The texts.
        columns: Numbers of every token, `[tokens]` each.
        task: Names the type of every token, if it knows types.
        tokenizer: The tokenizer of the rollout, for a task that knows types.

    Returns:
        `sample`, `position`, `token_id`, `type` ("all" if the task knows none), and the columns.
    """
    lengths = rollout.lengths.tolist()
    types = [[ALL] * length for length in lengths]
    if task is not None and task.types is not None and tokenizer is not None:
        types = task.token_types(rollout, tokenizer)
    table = pd.DataFrame(
        {
            "sample": np.repeat(np.arange(len(lengths)), lengths),
            "position": np.concatenate([np.arange(length) for length in lengths]),
            "token_id": rollout.ids[rollout.mask].cpu().numpy(),
            "type": [name for row in types for name in row],
            **columns,
        }
    )
    # What a tool or a user said is no token of the student.
    learned = rollout.learned.cpu().numpy()
    return table if learned.all() else table[learned].reset_index(drop=True)


def mean_by_type(tokens: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Average columns over all tokens and by type.

    Args:
        tokens: A table of tokens with the column `type`.
        columns: The columns to average.

    Returns:
        One row per type, the commonest first, with its count in `tokens`.
    """
    parts = [(ALL, tokens), *((name, part) for name, part in tokens.groupby("type") if name != ALL)]
    rows = {name: {"tokens": len(part), **part[list(columns)].mean()} for name, part in parts}
    return (
        pd.DataFrame.from_dict(rows, orient="index")
        .astype({"tokens": int})
        .sort_values("tokens", ascending=False, kind="stable")
    )


def to_html(sentence: str, table: pd.DataFrame) -> str:
    """Show a result in a notebook.

    Everything that came from a model or a file is escaped.

    Args:
        sentence: The result in words, shown above the table.
        table: The numbers; at most 40 rows are shown.

    Returns:
        HTML.
    """
    shown = table.to_html(escape=True, float_format=_show_number, max_rows=40)
    return f"<p>{html.escape(sentence)}</p>{shown}"


def _show_number(x: float) -> str:
    """Three digits, without powers of ten."""
    if abs(x) < 5e-4:
        return "0"
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"
