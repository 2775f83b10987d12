"""Write the tables of the real pair into benchmarks/README.md, from results/pair.json.

    python -m benchmarks.pair_tables

Each table stands between two comments, `<!-- pair: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.page_tables import PAGE, fill

RESULT = Path(__file__).parent / "results" / "pair.json"

LABELS = {
    "form_forward": "form, forward KL",
    "form_reverse": "form, reverse KL",
    "skill": "skill, forward KL",
}


def runs_table(data: Mapping[str, Any]) -> str:
    """Accuracy before, after and of the teacher, by experiment."""
    lines = [
        "| | seeds | before | after | by seed | teacher | gain, paired | share of the gap |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in data.get("summary", {}).items():
        gain, share, teacher = one["gain"], one.get("share_of_gap"), one["teacher"]
        cells = [
            LABELS[name],
            str(one["seeds"]),
            _with_interval(one["before"]),
            _with_interval(one["after"]),
            ", ".join(f"{score:.2f}" for score in one["after_by_seed"]),
            "" if teacher is None else _with_interval(teacher),
            f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]",
            "" if share is None else f"{share:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_interval(score: Mapping[str, float]) -> str:
    return f"{score['accuracy']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"


def phases_table(data: Mapping[str, Any]) -> str:
    """Seconds and peak memory of each phase, measured and predicted, by precision."""
    lines = [
        "| weights | | sample | grade | learn | step | peak, GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for precision, one in data.get("phases", {}).items():
        measured = {name: one["measured"][name] for name in ("sample", "grade", "learn")}
        seconds = [phase["seconds"] for phase in measured.values()]
        peaks = [phase["peak_mib"] / 1024 for phase in measured.values()]
        said = one["predicted"]
        told = [said["seconds"][name] for name in ("write", "grade", "learn")]
        guessed = said["peak_mib"] / 1024
        lines.append(_phases_row(precision, "measured, CPU s", seconds, sum(seconds), max(peaks)))
        lines.append(_phases_row("", "predicted, CPU s", told, said["step"], guessed))
        lines.append(
            f"| | predicted / measured | | | | {said['step'] / sum(seconds):.2f}"
            f" | {guessed / max(peaks):.2f} |"
        )
        by_phase = " | ".join(f"{peak:.1f}" for peak in peaks)
        lines.append(f"| | measured, peak GiB | {by_phase} | | {max(peaks):.1f} |")
    return "\n".join(lines)


def _phases_row(name: str, kind: str, seconds: list[float], step: float, peak: float) -> str:
    cells = [name, kind, *(f"{one:.1f}" for one in seconds), f"{step:.1f}", f"{peak:.1f}"]
    return f"| {' | '.join(cells)} |"


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "runs": runs_table,
    "phases": phases_table,
}


def main() -> None:
    """Replace every table in the page."""
    data = json.loads(RESULT.read_text("utf-8"))
    PAGE.write_text(fill(PAGE.read_text("utf-8"), "pair", TABLES, data), "utf-8")


if __name__ == "__main__":
    main()
