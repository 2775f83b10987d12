"""Write notebooks as HTML files that fetch nothing: MathML for formulas, and no folded code."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from opdlab.errors import OpdlabError
from opdlab.notebook.freezing import read_notebook
from opdlab.support.files import write_file

# Code, which may hold dollars of its own; then formulas on lines of their own, and within lines.
_CODE = r"(?P<code>```.*?```|`[^`\n]*`)"
_DISPLAY = r"\$\$(?P<display>.+?)\$\$"
_INLINE = r"(?<![\\\w$])\$(?=\S)(?P<inline>[^$]+?)(?<=\S)\$(?![\d$])"
_FOLD = r"(?P<fold><details>(?:<summary>[^<]*</summary>)?|</details>)"
_PARTS = re.compile(f"{_CODE}|{_DISPLAY}|{_INLINE}|{_FOLD}", re.DOTALL)
_WORD = re.compile(r"opdformula\d+x")
_FETCHING = re.compile(r'<script[^>]*\bsrc="https?://[^"]*"[^>]*>\s*</script>')
_MATHJAX = re.compile(r"<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->", re.DOTALL)
_MERMAID = re.compile(
    r'<script type="module">\s*document\.addEventListener\("DOMContentLoaded".*?</script>',
    re.DOTALL,
)


def take_formulas(markdown: str, drawn: dict[str, str]) -> str:
    """Replace formulas and folds of Markdown by words that no text has, and draw the formulas.

    Formulas become MathML, which browsers draw by themselves. It is put in the words' place at the
    end, since nbconvert takes elements that it does not know out of a text.

    Args:
        markdown: Text with `$…$` and `$$…$$`; dollars within code are left alone.
        drawn: Gets the markup of each word.

    Returns:
        The text with a word for each formula.

    Raises:
        OpdlabError: latex2mathml is not installed, or cannot read a formula.
    """
    try:
        from latex2mathml.converter import convert
    except ImportError as error:
        raise OpdlabError(
            "Pages need latex2mathml. Install it: pip install 'opdlab[notebooks]'."
        ) from error

    def replace(found: re.Match[str]) -> str:
        if found["code"] is not None:
            return found[0]
        word = f"opdformula{len(drawn)}x"
        if found["fold"] is not None:  # nbconvert would close it before the code within
            drawn[word] = found[0]
            return f"\n\n{word}\n\n"
        is_display = found["display"] is not None
        latex = " ".join((found["display"] or found["inline"]).split())
        try:
            mathml = str(convert(latex, display="block" if is_display else "inline"))
        except Exception as error:  # the parser raises many kinds
            raise OpdlabError(f"The formula {latex!r} cannot be drawn: {error}.") from error
        drawn[word] = mathml
        return word

    return _PARTS.sub(replace, markdown)


def to_html(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write a notebook as one HTML file that needs no network.

    Args:
        path: An .ipynb file with its outputs.
        target: The file to write.

    Returns:
        The target's path.

    Raises:
        OpdlabError: The file is not a notebook, or a formula cannot be drawn.
    """
    import nbformat
    from nbconvert import HTMLExporter

    read_notebook(path)
    book = nbformat.read(Path(path), as_version=4)
    drawn: dict[str, str] = {}
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = take_formulas(cell.source, drawn)
        elif cell.metadata.get("jupyter", {}).get("source_hidden"):
            cell.metadata["transient"] = {"remove_source": True}
    exporter: Any = HTMLExporter(  # type: ignore[no-untyped-call]  # nbconvert has no types
        require_js_url="", mathjax_url="", embed_images=True
    )
    page, _ = exporter.from_notebook_node(book, {"metadata": {"name": Path(path).stem}})
    for fetching in (_MATHJAX, _FETCHING, _MERMAID):
        page = fetching.sub("", page)
    page = _WORD.sub(lambda found: drawn.get(found[0], found[0]), page)
    return write_file(Path(target), page.encode())
