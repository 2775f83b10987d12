"""A page: what a run changed, in one file that opens anywhere, offline: a table, curves and token
strips.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from opdlab.viz import embed
from opdlab.viz.markup import number, safe
from opdlab.viz.token_lens import TokenLens
from opdlab.viz.view import View

COLUMNS = ("", "before", "after", "teacher")


def page(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: Sequence[Sequence[object]] = (),
    figures: Sequence[go.Figure] = (),
    lenses: Sequence[tuple[str, View]] = (),
    note: str = "",
    columns: Sequence[str] = COLUMNS,
) -> Path:
    """Write one HTML file that fetches nothing and follows the system's light or dark theme;
    returns its path.

    summary: rows (label, before, after, teacher), or as `columns` names them; numbers get three
        digits. lenses: (caption,
    view); TokenLenses share one colour scale a channel, so that before and after compare.
    """
    views = [
        (caption, view.scaled(_limits(lenses)) if isinstance(view, TokenLens) else view)
        for caption, view in lenses
    ]
    body = [f"<header><h1>{safe(title)}</h1>{_paragraphs(note)}</header>"]
    body += [_table(summary, columns)] if summary else []
    body += [
        "<figure"
        f' class="opd-chart"><div></div>{embed.script_json(_drawn(f), "opd-figure")}</figure>'
        for f in figures
    ]
    for caption, view in views:
        heading = f"<h2>{safe(caption)}</h2>" if caption else ""
        body.append(f"<section>{heading}{view.html(assets=False)}</section>")
    kinds = list(dict.fromkeys(type(view) for _, view in views))
    head = embed.style(
        *embed.STYLES, *dict.fromkeys(name for kind in kinds for name in kind.styles), "page.css"
    )
    scripts = embed.module([name for kind in kinds for name in kind.scripts]) if views else ""
    if figures:
        head += f"\n<script>{get_plotlyjs()}</script>"
        scripts += embed.plain_module("charts.js")
    return embed.write(
        path, embed.document(safe(title), head, f"<main>\n{chr(10).join(body)}\n</main>\n{scripts}")
    )


def _limits(lenses: Sequence[tuple[str, View]]) -> dict[str, float]:
    """The largest value that gets full colour in any of the lenses, by channel."""
    limits: dict[str, float] = {}
    for _, view in lenses:
        if isinstance(view, TokenLens):
            limits |= {key: max(limit, limits.get(key, 0.0)) for key, limit in view.limits.items()}
    return limits


def _table(rows: Sequence[Sequence[object]], columns: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{safe(name)}</th>' for name in columns)
    lines = [
        "<tr><th"
        f' scope="row">{_cell(label)}</th>{"".join(f"<td>{_cell(v)}</td>" for v in values)}</tr>'
        for label, *values in rows
    ]
    return (
        "<div"
        f' class="opd-table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _cell(value: object) -> str:
    return number(value) if isinstance(value, float) else safe("" if value is None else str(value))


def _paragraphs(note: str) -> str:
    return "".join(f"<p>{safe(part)}</p>" for part in note.split("\n\n") if part.strip())


def _drawn(figure: go.Figure) -> dict[str, object]:
    return json.loads(figure.to_json())
