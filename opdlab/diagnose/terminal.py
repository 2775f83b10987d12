"""Draw a diagnosis in a terminal: the verdict, a table of checks, and two templates if they differ.

Everything that comes from a model, a tokenizer or a file is shown as text: no console markup, no
control characters.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from opdlab.diagnose.checks import Check, State
from opdlab.models.same_tokens import RenderedChat
from opdlab.support.consoles import make_console

Verdict = Literal["go", "prepare", "stop"]

MARKS: dict[State, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "note": ("note", "cyan"),
    "warn": ("warn", "yellow"),
    "stop": ("STOP", "bold red"),
    "none": ("-", "dim"),
}
# Of middling lightness, to be read on white and on black.
COLOURS: dict[State, str] = {
    "ok": "#2e9e5b",
    "note": "#2a8fbd",
    "warn": "#c77f00",
    "stop": "#e0483e",
    "none": "#888888",
}
VERDICTS: dict[Verdict, tuple[str, str, str]] = {
    "go": ("GO", "bold green", "on-policy distillation can work on this pair."),
    "prepare": ("PREPARE", "bold yellow", "it would run, but do what is said below first."),
    "stop": ("STOP", "bold red", "on-policy distillation cannot work on this pair as it is."),
}

VERDICT_STATES: dict[Verdict, State] = {"go": "ok", "prepare": "warn", "stop": "stop"}


def draw_diagnosis(
    verdict: Verdict,
    names: tuple[str, str],
    checks: Sequence[Check],
    chat: RenderedChat | None,
    method: str = "",
) -> Group:
    """Draw a diagnosis for a console of rich.

    Args:
        verdict: The verdict.
        names: The names of the student and of the teacher.
        checks: The checks, in order.
        chat: A chat as both read it; shown if they differ.
        method: The argument `method=…` that is advised; "" for none.

    Returns:
        A drawing for `rich.console.Console.print`.
    """
    word, style, meaning = VERDICTS[verdict]
    student, teacher = (show_plain(name) for name in names)
    head = Text.assemble((word, style), " ", student, " <- ", teacher, ": ", meaning)
    table = Table(show_header=False, box=None, padding=(0, 1), pad_edge=False)
    table.add_column(width=4)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        finding = Text(show_plain(check.finding))
        if check.remedy:
            finding.append(f"\n-> {show_plain(check.remedy)}", style="italic")
        table.add_row(Text(*MARKS[check.state]), Text(check.name), finding)
    parts: list[RenderableType] = [head, Text(), table]
    if method:
        parts += [Text(), Text.assemble("begin with  ", (method, "bold"))]
    if chat is not None and chat.at is not None:
        parts += [Text(), draw_templates(chat, chat.at)]
    return Group(*parts)


def draw_html(
    verdict: Verdict, names: tuple[str, str], checks: Sequence[Check], method: str = ""
) -> str:
    """Draw a diagnosis for a notebook, in the page's own colours, so it suits light and dark.

    Args:
        verdict: The verdict.
        names: The names of the student and of the teacher.
        checks: The checks, in order.
        method: The argument `method=…` that is advised; "" for none.

    Returns:
        HTML; everything that comes from a model or a file is escaped.
    """
    word, _, meaning = VERDICTS[verdict]
    student, teacher = (html.escape(show_plain(name)) for name in names)
    cell = "padding:2px 10px 2px 0;text-align:left;vertical-align:top"
    rows = []
    for check in checks:
        colour = COLOURS[check.state]
        said = html.escape(show_plain(check.finding))
        if check.remedy:
            said += f"<br><i>→ {html.escape(show_plain(check.remedy))}</i>"
        mark = f'<b style="color:{colour}">{MARKS[check.state][0]}</b>'
        name = f"<b>{html.escape(check.name)}</b>"
        rows.append(
            f'<tr><td style="{cell}">{mark}</td><td style="{cell};white-space:nowrap">{name}</td>'
            f'<td style="{cell};max-width:60em">{said}</td></tr>'
        )
    advice = f"<p>Begin with <code>{html.escape(method)}</code></p>" if method else ""
    return (
        f'<p><b style="color:{COLOURS[VERDICT_STATES[verdict]]}">{word}</b> {student} ← {teacher}:'
        f' {html.escape(meaning)}</p><table style="border-collapse:collapse">{"".join(rows)}'
        f"</table>{advice}"
    )


def draw_templates(chat: RenderedChat, at: int) -> Table:
    """Draw one chat under both templates, with the first difference marked.

    Everything after the difference is dimmed.

    Args:
        chat: The chat as both read it.
        at: The character at which they begin to differ, from 0.

    Returns:
        A table with one column for each policy.
    """
    table = Table(
        title="the same chat as each of them reads it", title_justify="left", expand=False
    )
    cells = []
    for name, text in (("student", chat.student), ("teacher", chat.teacher)):
        table.add_column(name, overflow="fold", ratio=1)
        first = show_plain(text[at : at + 1]) or "(ends)"
        rest = (show_plain(text[at + 1 :]), "dim")
        cells.append(Text.assemble(show_plain(text[:at]), (first, "bold reverse"), rest))
    table.add_row(*cells)
    return table


def render_text(drawing: RenderableType, width: int = 100) -> str:
    """Render a drawing as text without colours.

    Args:
        drawing: Anything that rich can draw.
        width: Characters per line.

    Returns:
        The text, without spaces or empty lines at its end.
    """
    console = make_console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(drawing)
    return captured.get().rstrip()


def show_plain(value: str) -> str:
    """Replace characters that do not print.

    Args:
        value: A text from a model, a tokenizer or a file.

    Returns:
        The text on one line, with ⏎ for the end of a line and a space for other such characters.
    """
    return "".join("\u23ce" if c == "\n" else c if c.isprintable() else " " for c in value)
