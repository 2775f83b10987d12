"""Notebooks as pages: prose as Markdown, code in fences, and frozen outputs as they stand."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opdlab.notebook.exporting import take_formulas
from website.fragments import Fragments
from website.links import Links

_DRAWN = re.compile(r"opdformula\d+x")
_TITLE = re.compile(r"^# (.+)$", re.MULTILINE)
_ESCAPES = re.compile(r"\x1b\[[\d;]*m")  # colours of a terminal
_TABLE = re.compile(r"<table\b(?:(?!<table\b).)*?</table>", re.DOTALL)
_VIEW = '<div class="opd opd-'
_NOTE = (
    '!!! note "The frozen notebook"\n    Pictures respond here. To run it, type `make lab`, or'
    " download [{name}]({name}).\n"
)


def read_title(book: Mapping[str, Any]) -> str:
    """Return the title of a notebook: the first heading of its first cell."""
    found = _TITLE.search("".join(book["cells"][0]["source"]))
    if found is None:
        raise ValueError("A notebook begins with its title.")
    return found[1]


def render_notebook(path: Path, source: str, page: str, links: Links) -> tuple[str, Fragments]:
    """Write a notebook as Markdown.

    Args:
        path: The .ipynb file.
        source: Its path in the repository.
        page: Its page in the site.
        links: Where files are in the site.

    Returns:
        The Markdown, and the outputs and formulas that it has marks for.
    """
    book = json.loads(path.read_text(encoding="utf-8"))
    fragments = Fragments(page.removesuffix(".md"))
    parts = []
    for number, cell in enumerate(book["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(links.rewrite(_draw_formulas(text, fragments), source, page))
        else:
            parts += _render_code(text, cell, fragments)
        if number == 0:
            parts.append(_NOTE.format(name=path.name))
    return "\n\n".join(parts) + "\n", fragments


def _draw_formulas(markdown: str, fragments: Fragments) -> str:
    drawn: dict[str, str] = {}
    text = take_formulas(markdown, drawn)
    return _DRAWN.sub(
        lambda found: fragments.add(_widen(drawn[found[0]])) if found[0] in drawn else found[0],
        text,
    )


def _widen(markup: str) -> str:
    """Give a formula on a line of its own an element in which it can be scrolled."""
    if not (markup.startswith("<math") and 'display="block"' in markup.partition(">")[0]):
        return markup
    return f'<span class="site-math" tabindex="0">{markup}</span>'


def _render_code(text: str, cell: Mapping[str, Any], fragments: Fragments) -> list[str]:
    fence = "`" * 4
    parts = [f"{fence}python\n{text}\n{fence}"]
    if cell["metadata"].get("jupyter", {}).get("source_hidden"):
        opened = fragments.add('<details class="site-code"><summary>Code</summary>')
        parts = [opened, *parts, fragments.add("</details>")]
    shown = "".join(_render_output(output) for output in cell["outputs"])
    if shown:
        parts.append(fragments.add(f'<div class="site-outputs">{shown}</div>'))
    return parts


def _render_output(output: Mapping[str, Any]) -> str:
    """Return an output as HTML, in the richest form that needs no other file."""
    if output["output_type"] == "stream":
        return _preformatted("".join(output["text"]))
    if output["output_type"] == "error":
        return _preformatted("\n".join(output["traceback"]))
    data = {kind: _join(value) for kind, value in output["data"].items()}
    if "text/html" in data:
        return _render_html(data["text/html"])
    words = data.get("text/plain", "")
    if "image/png" in data:
        png = base64.b64encode(base64.b64decode(data["image/png"])).decode()
        address = f"data:image/png;base64,{png}"
        return f'<div class="site-output"><img src="{address}" alt="{html.escape(words)}"></div>'
    return _preformatted(words)


def _join(value: object) -> str:
    return "".join(value) if isinstance(value, list) else str(value)


def _render_html(text: str) -> str:
    """Return HTML; a table that is no part of a view can be scrolled on a narrow screen."""
    if _VIEW not in text:
        text = _TABLE.sub(
            lambda found: f'<div class="site-table" tabindex="0">{found[0]}</div>', text
        )
    return f'<div class="site-output">{text}</div>'


def _preformatted(text: str) -> str:
    plain = html.escape(_ESCAPES.sub("", text)).rstrip("\n")
    return f'<pre class="site-output" tabindex="0">{plain}</pre>' if plain else ""
