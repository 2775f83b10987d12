"""What goes into one HTML file with it: styles, module and data, so that nothing is fetched and no
text becomes markup.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

STYLES = ("opd.css",)  # of every view; its own come after
# Of the module of every view: what lies before and after its own files.
BEFORE = ("core.js", "payload.js", "state.js", "strip.js", "duel.js", "lines.js")
SHARED = (
    "tracks.js",
    "minimap.js",
    "tools.js",
    "dots.js",
)  # known to all files of a module, where a view lists them
AFTER = ("mount.js",)
# spaces that a style sheet can do without
_IDLE = r'(?P<quoted>"[^"]*")|(?:\s*;)?\s*(?P<sign>\}|[{;,])\s*|(?<=[a-z]): '
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
    " blob:; font-src data:"
)


@lru_cache
def asset(name: str) -> str:
    """A file of `opdlab/viz/static`, as text."""
    return (Path(__file__).parent / "static" / name).read_text(encoding="utf-8")


def style_text(*names: str) -> str:
    """Style sheets as one, comments and idle spaces left out; what stands in quotes stays."""
    text = re.sub(r"/\*.*?\*/", "", "\n".join(asset(name) for name in names), flags=re.DOTALL)
    return re.sub(_IDLE, lambda found: found["quoted"] or found["sign"] or ":", text).strip()


def style(*names: str) -> str:
    return f"<style>\n{style_text(*names)}\n</style>"


def script_text(scripts: Iterable[str]) -> str:
    """One ES module: the base, each view's file in a scope of its own, and what mounts them;
    comments and indents left out.
    """
    names = dict.fromkeys(scripts)
    own = "".join(f"{{\n{asset(name)}}}\n" for name in names if name not in SHARED)
    text = "\n".join(
        [
            *map(asset, BEFORE),
            *(asset(name) for name in SHARED if name in names),
            own,
            *map(asset, AFTER),
        ]
    )
    lines = [line.strip() for line in text.splitlines()]
    text = "\n".join(line for line in lines if line and not line.startswith("//"))
    return re.sub("</(?=script)", r"<\\/", text, flags=re.IGNORECASE)


def module(scripts: Iterable[str]) -> str:
    """`script_text` inline."""
    return f'<script type="module">\n{script_text(scripts)}</script>'


def plain_module(name: str) -> str:
    """One file of `static` alone, inline."""
    return f'<script type="module">\n{asset(name)}</script>'


def script_json(data: Any, css_class: str) -> str:
    """Data as an inert block.

    Numbers that JSON does not know are written as strings: "NaN", "Infinity", "-Infinity".
    """
    text = json.dumps(_plain(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    text = re.sub("[<>&]", lambda found: _UNSAFE[found[0]], text)
    return f'<script type="application/json" class="{css_class}">{text}</script>'


def document(title: str, head: str, body: str) -> str:
    """A whole page; `title` is markup already escaped.

    Its content policy forbids every request to the outside.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta'
        f' http-equiv="Content-Security-Policy" content="{POLICY}">\n<meta name="viewport"'
        ' content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light'
        f' dark">\n<title>{title}</title>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    )


def write(path: str | os.PathLike[str], text: str) -> Path:
    """Write UTF-8, atomically: a reader sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    return data
