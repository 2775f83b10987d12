"""Write the tables of the real model into benchmarks/README.md, from results/small.json.

    python -m benchmarks.small_tables

Each table stands between two comments, `<!-- small: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import opdlab as opd
from benchmarks.controls import describe_gain
from benchmarks.page_tables import PAGE, fill

RESULT = Path(__file__).parent / "results" / "small.json"

ARMS = {
    "teacher": "the method with its teacher",
    "no_teacher": "no teacher: penalty on unlikely tokens",
    "no_teacher_adaptive": "no teacher: penalty that grows with entropy",
    "shuffled": "the teacher's grades of other texts",
    "sign": "only the sign of the teacher's grades",
    "other_direction": "the other direction of the KL",
    "teacher_texts": "SFT on the teacher's texts",
    "own_texts": "no teacher: SFT on its own texts",
}


def methods_table(data: Mapping[str, Any]) -> str:
    """Accuracy and gain of all methods, the best first, and at as many teacher's tokens as OPD."""
    lines = [
        "| method | seeds | greedy | gain | minus OPD | samples | gain | minus OPD"
        " | teacher's tokens | CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, label in (("student", "the student before training"), ("teacher", "the teacher")):
        found = data["world"][name]
        lines.append(
            f"| {label} | | {found['accuracy']:.3f} | | | {found['sampled']:.3f} | | | | |"
        )
    plain = data["methods"]["opd"]["runs"]
    methods = sorted(data["methods"].values(), key=lambda one: -one["greedy"]["accuracy"])
    for one in methods:
        counts = {kind: one[f"teacher_{kind}"] for kind in ("graded", "written")}
        tokens = ", ".join(f"{count:.0f} {kind}" for kind, count in counts.items() if count)
        seconds = "" if one["cpu_seconds"] is None else f"{one['cpu_seconds']:.0f}"
        gaps = {kind: _difference(one["runs"], plain, kind) for kind in ("greedy", "sampled")}
        if one["runs"] == plain:
            gaps = dict.fromkeys(gaps, "")
        seeds = f"{one['greedy']['seeds']}"
        lines.append(_row(one["label"], seeds, one, gaps, tokens or "none", seconds))
        if "equal_teacher_tokens" in one:
            equal = one["equal_teacher_tokens"]
            label = f"… after {equal['updates']:.0f} updates, as many tokens as OPD"
            early = {seed: run["at_budget"] for seed, run in one["runs"].items()}
            gaps = {kind: _difference(early, plain, kind) for kind in ("greedy", "sampled")}
            lines.append(_row(label, seeds, equal, gaps, "", ""))
    return "\n".join(lines)


def _row(
    label: str,
    seeds: str,
    of: Mapping[str, Any],
    gaps: Mapping[str, str],
    tokens: str,
    seconds: str,
) -> str:
    numbers = []
    for kind in ("greedy", "sampled"):
        numbers += [f"{of[kind]['accuracy']:.3f}", _gain(of[kind]), gaps[kind]]
    return f"| {label} | {seeds} | {' | '.join(numbers)} | {tokens} | {seconds} |"


def _difference(runs: Mapping[str, Any], plain: Mapping[str, Any], kind: str) -> str:
    """Accuracy minus that of plain OPD, over the seeds that both have, prompt by prompt."""
    both = [seed for seed in runs if seed in plain]
    gaps = np.asarray([np.subtract(runs[seed][kind], plain[seed][kind]) for seed in both])
    return _gain(describe_gain(gaps, np.zeros(gaps.shape[1])))


def _gain(of: Mapping[str, Any]) -> str:
    return f"{of['gain']:+.3f} [{of['low']:+.3f}, {of['high']:+.3f}]".replace("-", "−")


def controls_table(data: Mapping[str, Any]) -> str:
    """Accuracy and gain of the controls' arms, the best first."""
    controls = opd.Controls.from_json(data["controls"])
    before = {kind: np.asarray(data["before"][kind]) for kind in ("greedy", "sampled")}
    rows = [
        (
            before["greedy"].mean(),
            f"| the student before training | | {before['greedy'].mean():.3f} | |"
            f" {before['sampled'].mean():.3f} |",
        )
    ]
    for name, arm in controls.arms.items():
        gain = describe_gain(np.asarray(arm.greedy), before["greedy"])
        rows.append(
            (
                gain["accuracy"],
                f"| {ARMS[name]} | {len(arm.seeds)} | {gain['accuracy']:.3f} | {_gain(gain)} |"
                f" {np.mean(arm.sampled):.3f} |",
            )
        )
    head = "| arm | seeds | greedy | gain | samples |\n| --- | --- | --- | --- | --- |"
    return "\n".join([head, *(row for _, row in sorted(rows, key=lambda row: -row[0]))])


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "methods": methods_table,
    "controls": controls_table,
}


def fill_page(page: str, data: Mapping[str, Any]) -> str:
    """Return benchmarks/README.md with the tables of these results."""
    return fill(page, "small", TABLES, data)


if __name__ == "__main__":
    filled = fill_page(PAGE.read_text("utf-8"), json.loads(RESULT.read_text("utf-8")))
    PAGE.write_text(filled, "utf-8")
