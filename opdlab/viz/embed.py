"""Put styles, module and data into one HTML file: nothing is fetched, no text becomes markup."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Container, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from opdlab.support.files import write_file

STYLES = ("opd.css",)  # of every view; its own come after
MOUNT = "mount.js"  # the last module of every page
# spaces that a style sheet can do without
_IDLE = r'(?P<quoted>"[^"]*")|(?:\s*;)?\s*(?P<sign>\}|[{;,])\s*|(?<=[a-z]): '
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([\w.]+)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export const (\w+)", re.MULTILINE)
# An export from its first line to the last, as the formatter indents it.
_STATEMENT = re.compile(r"^export const (\w+).*\n(?:[ )\]}].*\n|\n(?= ))*", re.MULTILINE)
_SPACED = re.compile(r'(`[^`]*`|"(?:[^"\\]|\\.)*")| ?([=<>?:,;{}()\[\]&|*!]+) ?')
_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
    " blob:; font-src data:"
)


@lru_cache
def asset(name: str) -> str:
    """Read a file of `opdlab/viz/static` as text.

    Args:
        name: The file's name.

    Returns:
        Its text.
    """
    return (Path(__file__).parent / "static" / name).read_text(encoding="utf-8")


def style_text(*names: str) -> str:
    """Join style sheets into one, without comments and idle spaces.

    Text in quotes stays as it is.

    Args:
        names: Files of `static/`, in order.

    Returns:
        The CSS.
    """
    text = re.sub(r"/\*.*?\*/", "", "\n".join(asset(name) for name in names), flags=re.DOTALL)
    return re.sub(_IDLE, lambda found: found["quoted"] or found["sign"] or ":", text).strip()


def style(*names: str) -> str:
    """Return style sheets inline.

    Args:
        names: Files of `static/`, in order.

    Returns:
        A `<style>` element.
    """
    return f"<style>\n{style_text(*names)}\n</style>"


def bundle(names: Iterable[str]) -> str:
    """Join ES modules of `static/` and everything they import into one module without imports.

    Each file is included once, after the files that it imports, in a scope of its own. What files
    export lies in one scope, so these names must differ (`tests/viz/test_embed.py`). Comments,
    JSDoc types and indentation are left out. Only `import { names } from "./file.js"` and
    `export const name` are understood.

    Args:
        names: Files of `static/`, in the order in which they are to run.

    Returns:
        The module's JavaScript, safe inside a `<script>` element.
    """
    ordered: list[str] = []

    def add(name: str) -> None:
        for imported in _IMPORT.findall(asset(name)):
            add(imported)
        if name not in ordered:
            ordered.append(name)

    entries = [*names]
    for name in entries:
        add(name)
    imports = "".join(found[0] for name in ordered for found in _IMPORT.finditer(asset(name)))
    wanted = set(re.findall(r"\w+", imports)) | set(_EXPORT.findall("".join(map(asset, entries))))
    text = "\n".join(_scoped(name, wanted) for name in ordered)
    return re.sub("</(?=script)", r"<\\/", text, flags=re.IGNORECASE)


def _scoped(name: str, wanted: Container[str]) -> str:
    """Return a module as a block whose result is those of its exports that are wanted.

    Exports that neither others nor the module itself use are left out.
    """
    source = _IMPORT.sub("", asset(name))
    for found in list(_STATEMENT.finditer(source)):
        if found[1] not in wanted and len(re.findall(rf"\b{found[1]}\b", source)) == 1:
            source = source.replace(found[0], "")
    text = _shortened(source)
    if "export default" in text:
        return text
    exported = ",".join(one for one in _EXPORT.findall(text) if one in wanted)
    text = _EXPORT.sub(r"const \1", text)
    return f"const{{{exported}}}=(()=>{{{text}return{{{exported}}};}})();"


def _shortened(text: str) -> str:
    """Return a script without comments, indentation, and what a browser does not need of the rest.

    The formatter ends statements with semicolons, so a line that ends with other punctuation, or
    begins with it, goes on in the next. Lines that may have a pattern in them, or a template within
    a template, keep their spaces.
    """
    text = re.sub(r"/\*\*.*?\*/ ?", "", text, flags=re.DOTALL)
    lines = [re.sub("(^|\\s+)// .*$", "", line).strip() for line in text.splitlines()]
    lines = [line if _is_fragile(line) else _SPACED.sub(r"\1\2", line) for line in lines]
    text = re.sub(r",\n(?=[)\]}])", "", "\n".join(filter(None, lines)))
    return re.sub(r"(?<=[,;{}()\[=>&|?:])\n(?!export )|\n(?=[)\]}?:.&|])", "", text)


def _is_fragile(line: str) -> bool:
    return "/" in line or "'" in line or line.count("`") not in (0, 2)


def script_text(scripts: Iterable[str]) -> str:
    """Return one ES module that draws the views of `scripts` and mounts them.

    Args:
        scripts: Files of `static/` that define the views.

    Returns:
        The module's JavaScript.
    """
    return bundle([*scripts, MOUNT])


def module(scripts: Iterable[str]) -> str:
    """Return `script_text` as an inline script.

    Args:
        scripts: Files of `static/` that define the views.

    Returns:
        A `<script type="module">` element.
    """
    return f'<script type="module">\n{script_text(scripts)}</script>'


def plain_module(name: str) -> str:
    """Return one file of `static` alone as an inline script.

    Args:
        name: The file's name; it must import nothing.

    Returns:
        A `<script type="module">` element.
    """
    return f'<script type="module">\n{asset(name)}</script>'


def script_json(data: Any, css_class: str) -> str:
    """Return data as an inert block of JSON that the page's scripts read.

    Numbers that JSON does not know are written as strings: "NaN", "Infinity", "-Infinity".

    Args:
        data: Plain data.
        css_class: The class by which the scripts find the block.

    Returns:
        A `<script type="application/json">` element, safe against markup in the data.
    """
    text = json.dumps(_plain(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    text = re.sub("[<>&]", lambda found: _UNSAFE[found[0]], text)
    return f'<script type="application/json" class="{css_class}">{text}</script>'


def document(title: str, head: str, body: str) -> str:
    """Return a whole HTML page whose content policy forbids every request to the outside.

    Args:
        title: The title, as markup that is already escaped.
        head: Markup for the end of the head: styles and scripts.
        body: Markup of the body.

    Returns:
        The page's HTML.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta'
        f' http-equiv="Content-Security-Policy" content="{POLICY}">\n<meta name="viewport"'
        ' content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light'
        f' dark">\n<title>{title}</title>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    )


def write(path: str | os.PathLike[str], text: str) -> Path:
    """Write a UTF-8 file atomically: a reader sees the old file or the new one.

    Args:
        path: The file; missing folders are made.
        text: The text.

    Returns:
        The path.
    """
    return write_file(Path(path), text.encode())


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    return data
