"""A page: a table, curves and views in one file that opens anywhere, offline."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from opdlab.viz import embed
from opdlab.viz.markup import escape, format_number

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLUMNS = ("", "before", "after", "teacher")


class Drawable(Protocol):
    """A view, as far as a page needs it.

    Attributes:
        scripts: Files of `static/` that draw it.
        styles: Its style sheets of `static/`.
    """

    scripts: ClassVar[tuple[str, ...]]
    styles: ClassVar[tuple[str, ...]]

    @property
    def limits(self) -> Mapping[str, float]:
        """The values that get full colour, by name."""
        ...

    def with_limits(self, limits: Mapping[str, float]) -> Drawable:
        """Return the view with full colour at these values, or at its own if larger.

        Args:
            limits: Values that get full colour, by name.

        Returns:
            The view, or a copy of it.
        """
        ...

    def html(self, assets: bool = True, script: bool = True) -> str:
        """Return the picture as HTML.

        Args:
            assets: False leaves styles and module to the page around it.
            script: False leaves out all scripts and data: a still picture.

        Returns:
            An HTML fragment.
        """
        ...


def page(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: Sequence[Sequence[object]] = (),
    figures: Sequence[go.Figure] = (),
    lenses: Sequence[tuple[str, Drawable]] = (),
    note: str = "",
    columns: Sequence[str] = COLUMNS,
    texts: Sequence[tuple[str, str]] = (),
    refresh: float = 0,
) -> Path:
    """Write one HTML file that fetches nothing and follows the system's light or dark theme.

    Args:
        path: The file of the page.
        title: The page's title.
        summary: Rows (label, before, after, teacher), or as `columns` names them. Numbers get three
            digits.
        figures: Plotly figures.
        lenses: (caption, view) in order. TokenLenses share one colour scale for each channel, so
            that before and after compare.
        note: Paragraphs under the title, with an empty line between them.
        columns: Heads of the summary's columns.
        texts: (caption, plain text) at the end, such as a config or code.
        refresh: Seconds after which a browser loads the page again, at the place where the reader
            is; 0 for a page that stays as it is.

    Returns:
        The path.
    """
    limits = _shared_limits([view for _, view in lenses])
    views = [(caption, view.with_limits(limits)) for caption, view in lenses]
    paragraphs = "".join(f"<p>{escape(part)}</p>" for part in note.split("\n\n") if part.strip())
    body = [f"<header><h1>{escape(title)}</h1>{paragraphs}</header>"]
    body += [_table(summary, columns)] if summary else []
    body += [_figure(figure) for figure in figures]
    for caption, view in views:
        heading = f"<h2>{escape(caption)}</h2>" if caption else ""
        body.append(f"<section>{heading}{view.html(assets=False)}</section>")
    for caption, text in texts:
        body.append(
            f'<section><h2>{escape(caption)}</h2><pre class="opd-text">{escape(text)}</pre>'
            "</section>"
        )
    kinds = list(dict.fromkeys(type(view) for _, view in views))
    styles = dict.fromkeys(name for kind in kinds for name in kind.styles)
    head = embed.style(*embed.STYLES, *styles, "page.css")
    scripts = embed.module([name for kind in kinds for name in kind.scripts]) if views else ""
    if figures:
        from plotly.offline import get_plotlyjs

        head += f"\n<script>{get_plotlyjs()}</script>"
        scripts += embed.plain_module("charts.js")
    if refresh > 0:
        head += f'\n<meta name="opd-refresh" content="{refresh:g}">'
        scripts += embed.plain_module("refresh.js")
    main = "\n".join(body)
    return embed.write(
        path, embed.document(escape(title), head, f"<main>\n{main}\n</main>\n{scripts}")
    )


def _shared_limits(views: Sequence[Drawable]) -> dict[str, float]:
    """The largest value that gets full colour in any of the views, by channel."""
    limits: dict[str, float] = {}
    for view in views:
        for key, limit in view.limits.items():
            limits[key] = max(limit, limits.get(key, 0.0))
    return limits


def _figure(figure: go.Figure) -> str:
    data: dict[str, Any] = json.loads(figure.to_json())
    block = embed.script_json(data, "opd-figure")
    return f'<figure class="opd-chart"><div></div>{block}</figure>'


def _table(rows: Sequence[Sequence[object]], columns: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    lines = []
    for label, *values in rows:
        cells = "".join(f"<td>{_cell(value)}</td>" for value in values)
        lines.append(f'<tr><th scope="row">{_cell(label)}</th>{cells}</tr>')
    body = "".join(lines)
    return (
        f'<div class="opd-table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    return (
        format_number(value)
        if isinstance(value, float)
        else escape("" if value is None else str(value))
    )
