"""Turns of conversations: who wrote which rows of a trace, and sums of numbers by turn."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import numpy as np
import pandas as pd

from opdlab.data.trace import Trace


def learned_rows(trace: Trace) -> np.ndarray | None:
    """Tell which rows the student wrote.

    Args:
        trace: The trace.

    Returns:
        `[n]` of booleans; None for a trace of single turns, all of which it wrote.
    """
    names = trace.table.column_names
    if "learn" not in names or "turn" not in names:
        return None
    return np.asarray(trace.column("learn"), bool)


def find_turns(trace: Trace) -> list[tuple[int, int, int, bool]]:
    """List the stretches of rows that are the student's turns, and those between them.

    Args:
        trace: The trace.

    Returns:
        `(first row, rows, turn, whether the student wrote it)`, in order; nothing for a trace of
        single turns. The turn counts from 0.
    """
    learned = learned_rows(trace)
    if learned is None:
        return []
    samples, turns = trace.column("sample").tolist(), trace.column("turn").tolist()
    out, at = [], 0
    for (_, turn, is_own), run in groupby(zip(samples, turns, learned.tolist(), strict=True)):
        size = len(list(run))
        out.append((at, size, int(turn), bool(is_own)))
        at += size
    return out


def describe_turns(table: pd.DataFrame, keys: Mapping[str, str]) -> str:
    """Say what the turns cost on average.

    Args:
        table: The table of `sum_by_turn`.
        keys: Columns of the table, and what to call them.

    Returns:
        A line of words; "" where all completions have one turn.
    """
    if not len(table) or not table["turn"].max():
        return ""
    told = []
    for turn, part in table.groupby("turn"):
        sums = ", ".join(
            f"{name} {part[key].mean():.3g}" for key, name in keys.items() if key in part
        )
        told.append(f"turn {int(turn) + 1} ({len(part)}): {sums}")
    return f"Sums by turn, mean of the rollouts that have it: {'; '.join(told)}"


def sum_by_turn(trace: Trace, numbers: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Sum numbers over the student's tokens of each turn.

    Args:
        trace: The trace.
        numbers: Numbers of every row, `[n]` each, by the names of the columns.

    Returns:
        One row per turn of each completion: `sample`, `turn` (from 0), `tokens`, and a sum for each
        of the numbers; values that are not finite add nothing. Of a trace of single turns, one row
        per completion.
    """
    learned = learned_rows(trace)
    is_own = np.ones(len(trace), bool) if learned is None else learned
    turns = np.zeros(len(trace), int) if learned is None else trace.column("turn")
    table = pd.DataFrame(
        {
            "sample": trace.column("sample"),
            "turn": turns,
            "tokens": 1,
            **{
                key: np.nan_to_num(np.asarray(one, float), nan=0.0, posinf=0.0, neginf=0.0)
                for key, one in numbers.items()
            },
        }
    )
    return table[is_own].groupby(["sample", "turn"], sort=True).sum().reset_index()
