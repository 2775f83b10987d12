"""A diagnosis for the terminal: the verdict, a table of what was looked at, and two templates side
by side if they differ.

Everything that comes from a model, a tokenizer or a file is shown as text: no console markup, no
control characters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from opdlab.diagnose.cost import Cost
from opdlab.diagnose.identity import Check, Sides
from opdlab.diagnose.overlap import Overlap
from opdlab.diagnose.probe import render

MARKS = {
    "ok": ("ok", "green"),
    "note": ("note", "cyan"),
    "warn": ("warn", "yellow"),
    "stop": ("STOP", "bold red"),
    "none": ("-", "dim"),
}
VERDICTS = {
    "go": ("GO", "bold green", "on-policy distillation can work on this pair."),
    "prepare": ("PREPARE", "bold yellow", "it would run, but do what is said below first."),
    "stop": ("STOP", "bold red", "on-policy distillation cannot work on this pair as it is."),
}


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """`verdict`: go, prepare (do what the warnings say first) or stop.

    `checks` in order, and what they were read from.
    """

    checks: tuple[Check, ...]
    templates: Sides | None = None
    overlap: Overlap | None = None
    probe: pd.DataFrame | None = None
    cost: Cost | None = None
    names: tuple[str, str] = ("student", "teacher")

    @property
    def verdict(self) -> Literal["go", "prepare", "stop"]:
        states = {check.state for check in self.checks}
        return "stop" if "stop" in states else "prepare" if "warn" in states else "go"

    @property
    def reasons(self) -> tuple[str, ...]:
        """What decided: every stop and warning, or else what speaks for it."""
        bad = [check for check in self.checks if check.state in ("stop", "warn")]
        return tuple(
            f"{check.name}: {check.finding}"
            for check in bad
            or [c for c in self.checks if c.name in ("overlap", "student", "teacher")]
        )

    @property
    def table(self) -> pd.DataFrame:
        return pd.DataFrame([vars(check) for check in self.checks]).set_index("name")

    @property
    def sentence(self) -> str:
        remedies = list(
            dict.fromkeys(c.remedy for c in self.checks if c.state in ("stop", "warn") and c.remedy)
        )
        return f"{self.verdict}: {'; '.join(self.reasons)}." + "".join(
            f" {remedy}" for remedy in remedies
        )

    def __str__(self) -> str:
        return text(self)

    def __repr__(self) -> str:
        bad = [
            f"{check.name} {check.state}"
            for check in self.checks
            if check.state in ("stop", "warn")
        ]
        return f"Diagnosis({self.verdict}{': ' * bool(bad)}{', '.join(bad)})"

    def _repr_html_(self) -> str:
        return render(self.sentence, self.table)


def report(diagnosis: Diagnosis) -> Group:
    """What a console prints."""
    word, style, meaning = VERDICTS[diagnosis.verdict]
    head = Text.assemble(
        (word, style),
        " ",
        plain(diagnosis.names[0]),
        " <- ",
        plain(diagnosis.names[1]),
        ": ",
        meaning,
    )
    table = Table(show_header=False, box=None, padding=(0, 1), pad_edge=False)
    table.add_column(width=4)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for check in diagnosis.checks:
        finding = Text(plain(check.finding))
        if check.remedy:
            finding.append(f"\n-> {plain(check.remedy)}", style="italic")
        table.add_row(Text(*MARKS[check.state]), Text(check.name), finding)
    parts: list[RenderableType] = [head, Text(), table]
    both = diagnosis.templates
    if both is not None and both.at is not None:
        parts += [Text(), side_by_side(both)]
    return Group(*parts)


def side_by_side(both: Sides) -> Table:
    """The same chat under both templates, the first difference marked and everything after it
    dimmed.
    """
    table = Table(
        title="the same chat as each of them reads it", title_justify="left", expand=False
    )
    for name in ("student", "teacher"):
        table.add_column(name, overflow="fold", ratio=1)
    at = both.at or 0
    cells = [
        Text.assemble(
            plain(t[:at]),
            (plain(t[at : at + 1]) or "(ends)", "bold reverse"),
            (plain(t[at + 1 :]), "dim"),
        )
        for t in (both.student, both.teacher)
    ]
    table.add_row(*cells)
    return table


def text(diagnosis: Diagnosis, width: int = 100) -> str:
    """The report without colours."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(report(diagnosis))
    return captured.get().rstrip()


def plain(value: str) -> str:
    """Printable characters only: a line's end is shown as one, anything else that does not print as
    a space.
    """
    return "".join("\u23ce" if c == "\n" else c if c.isprintable() else " " for c in value)
