"""A diagnosis for the terminal: the verdict, a table of what was looked at, and two templates side
by side if they differ.

Everything that comes from a model, a tokenizer or a file is shown as text: no console markup, no
control characters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from opdlab.diagnose.doctor import Diagnosis
    from opdlab.diagnose.identity import Sides

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
