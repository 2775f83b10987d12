"""The result of `conform`: a verdict, the answers, a table; and files for CI."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from opdlab.audit.card import BLUE, ORANGE
from opdlab.conformance.files import badge, junit
from opdlab.conformance.finding import MISTAKES, Finding, Status
from opdlab.errors import printable
from opdlab.support.files import write_file
from opdlab.support.validation import Folder, validate_arguments
from opdlab.support.version import VERSION

MARKS = {Status.PASS: "✓", Status.FAIL: "✗", Status.CAUTION: "!", Status.SKIP: "–"}
COLOURS = {Status.PASS: BLUE, Status.FAIL: ORANGE}


@dataclass(frozen=True, eq=False)
class Conformance:
    """Hold the findings about a loss.

    Attributes:
        name: The loss.
        claim: What it says that it trains, in words, or "".
        verdict: What it trains, in a sentence.
        findings: One answer per question, in the order in which they were asked.
        table: One row per known divergence, with the cosine and the ratio of lengths of the two
            expected gradients, the closest first; empty where the loss could not be called.
        seconds: How long it took.
    """

    name: str
    claim: str
    verdict: str
    findings: tuple[Finding, ...]
    table: pd.DataFrame = field(repr=False)
    seconds: float = 0.0

    @property
    def passes(self) -> bool:
        """Tell whether no question failed."""
        return not self.of(Status.FAIL)

    @property
    def mistakes(self) -> list[str]:
        """Names of the mistakes that failed, each once, in the order of the questions."""
        return list(dict.fromkeys(one.mistake for one in self.of(Status.FAIL) if one.mistake))

    @property
    def named(self) -> list[str]:
        """Names of all mistakes: those that failed, then those that are only to know."""
        known = [one.mistake for one in self.of(Status.CAUTION) if one.mistake]
        return list(dict.fromkeys([*self.mistakes, *known]))

    def of(self, status: Status) -> list[Finding]:
        """Return the findings of one status.

        Args:
            status: The status.

        Returns:
            The findings, in order.
        """
        return [one for one in self.findings if one.status is status]

    def __getitem__(self, check: str) -> Finding:
        for one in self.findings:
            if one.check == check:
                return one
        raise KeyError(f"{check!r}; there are {', '.join(one.check for one in self.findings)}")

    @property
    def summary(self) -> str:
        """Count the passed questions, in words."""
        passed, failed = len(self.of(Status.PASS)), len(self.of(Status.FAIL))
        cautions = len(self.of(Status.CAUTION))
        words = [f"{passed} passed", f"{failed} failed"]
        return ", ".join([*words, f"{cautions} to know"] if cautions else words)

    def __repr__(self) -> str:
        head = "conforms" if self.passes else "does not conform"
        lines = [f"{printable(self.name)} {head}: {self.summary}.", f"  {self.verdict}"]
        for one in self.findings:
            if one.status is Status.SKIP:
                continue
            lines.append(f"  {MARKS[one.status]} {one.check}: {one.said}")
        for mistake in self.mistakes:
            lines.append(f"  mistake {mistake}: {MISTAKES[mistake]}")
        return printable("\n".join(lines))

    def _repr_html_(self) -> str:
        """Draw the card; colours are the page's own but for the marks, and all text is escaped."""
        head = "conforms" if self.passes else "does not conform"
        rows = "".join(_row(one) for one in self.findings)
        named = "".join(
            f'<li style="margin:.15em 0"><b>{escape(name.replace("_", " "))}</b>:'
            f" {escape(MISTAKES[name])}</li>"
            for name in self.mistakes
        )
        style = f"margin:.3em 0;padding-left:1.2em;border-left:3px solid {ORANGE}"
        named = f'<ul style="{style}">{named}</ul>' if named else ""
        name = f'<code style="{_PLAIN}">{escape(self.name)}</code>'
        return (
            f'<div style="{_CARD}"><div style="opacity:.75">conformance of {name}</div>'
            f'<div style="font-size:1.05em;margin:.2em 0 .4em"><b>It {head}: {self.summary}.</b>'
            f" {escape(self.verdict)}</div>"
            f'{named}<table style="border-collapse:collapse;{_PLAIN}">'
            f"<tbody>{rows}</tbody></table></div>"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all that was found, as JSON takes it.

        Returns:
            Plain data.
        """
        return {
            "name": printable(self.name),
            "claim": self.claim,
            "passes": self.passes,
            "verdict": printable(self.verdict),
            "mistakes": self.mistakes,
            "findings": [
                {
                    "check": one.check,
                    "status": one.status.value,
                    "said": printable(one.said),
                    "mistake": one.mistake,
                }
                for one in self.findings
            ],
            "gradients": _plain(self.table),
            "seconds": round(self.seconds, 2),
            "versions": {
                "opdlab": VERSION,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }

    @validate_arguments
    def save(self, folder: Folder) -> list[Path]:
        """Write `conformance.json`, `junit.xml` and `badge.svg`.

        Args:
            folder: The folder; it is made if it is missing.

        Returns:
            The files.
        """
        return save_all([self], folder)


def save_all(reports: Sequence[Conformance], folder: Folder) -> list[Path]:
    """Write the reports of several losses: one JSON, one JUnit file, and a badge for each.

    Args:
        reports: The reports.
        folder: The folder; it is made if it is missing.

    Returns:
        The files.
    """
    import json

    place = Path(folder).expanduser()
    found = [report.to_dict() for report in reports]
    content = found[0] if len(found) == 1 else found
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    files = {"conformance.json": text + "\n", "junit.xml": junit(found)}
    for i, one in enumerate(found):
        name = "badge.svg" if len(found) == 1 else f"badge-{i + 1}.svg"
        files[name] = badge(one)
    return [write_file(place / name, data.encode()) for name, data in files.items()]


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.to_dict("records")
    for row in rows:
        for name in ("cosine", "ratio"):
            number = float(row[name])
            row[name] = number if math.isfinite(number) else None
    return rows


_PLAIN = "color:inherit;background:none"
_CARD = (
    "border:1px solid currentColor;border-radius:6px;padding:.6em .9em;max-width:52em;"
    "line-height:1.4"
)
_CELL = "padding:.1em .7em .1em 0;text-align:left;vertical-align:top;background:none"


def _row(one: Finding) -> str:
    colour = f";color:{COLOURS[one.status]}" if one.status in COLOURS else ""
    faint = ";opacity:.6" if one.status is Status.SKIP else ""
    mark = f'<span style="font-weight:bold{colour}">{MARKS[one.status]}</span>'
    cells = (
        f'<td style="{_CELL}"><span aria-label="{one.status.value}">{mark}</span></td>',
        f'<td style="{_CELL};white-space:nowrap">{escape(one.check)}</td>',
        f'<td style="{_CELL}">{escape(one.said)}</td>',
    )
    return f'<tr style="background:none{faint}">{"".join(cells)}</tr>'
