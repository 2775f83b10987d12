"""Pieces of HTML that a page shows as they stand: frozen outputs of notebooks, formulas, views.

Markdown would change such HTML, so a page holds a mark in its place, and the pieces of all pages
lie in one folder. The mark is replaced when Python-Markdown reads the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor

_MARK = re.compile("⟦([^⟦⟧:]+):(\\d+)⟧")
# After fenced code was taken out (25), and before Markdown looks for HTML of its own (20).
_PRIORITY = 22


class Fragments:
    """The pieces of one page.

    Args:
        page: The page's name, which is the name of the file that keeps the pieces.
    """

    def __init__(self, page: str) -> None:
        self.page = page
        self.pieces: list[str] = []

    def add(self, html: str) -> str:
        """Keep a piece.

        Args:
            html: The HTML.

        Returns:
            The mark that stands for it in the page's Markdown.
        """
        self.pieces.append(html)
        return f"⟦{self.page}:{len(self.pieces) - 1}⟧"

    def write(self, folder: Path) -> None:
        """Write the pieces to the folder that the Markdown extension reads."""
        path = _find_file(folder, self.page)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.pieces), encoding="utf-8")


def _find_file(folder: Path, page: str) -> Path:
    return folder / f"{page}.json"


@lru_cache
def _read(path: Path) -> list[str]:
    pieces: list[str] = json.loads(path.read_text(encoding="utf-8"))
    return pieces


class _Replace(Preprocessor):
    """Replace the marks of a page by what Python-Markdown leaves as it stands."""

    def __init__(self, md: Markdown, folder: Path) -> None:
        super().__init__(md)
        self.folder = folder

    def run(self, lines: list[str]) -> list[str]:
        """Replace the marks in the lines of a page."""
        return [_MARK.sub(self._keep, line) for line in lines]

    def _keep(self, mark: re.Match[str]) -> str:
        html = _read(_find_file(self.folder, mark[1]))[int(mark[2])]
        return self.md.htmlStash.store(html)


class FragmentsExtension(Extension):
    """The extension; its option `folder` is where the pieces lie."""

    def __init__(self, **options: Any) -> None:
        self.config = {"folder": ["", "folder of the pieces"]}
        super().__init__(**options)

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802  # Python-Markdown's name
        """Register the extension."""
        md.preprocessors.register(
            _Replace(md, Path(self.getConfig("folder"))), "fragments", _PRIORITY
        )


def makeExtension(**options: Mapping[str, Any]) -> FragmentsExtension:  # noqa: N802
    """Make the extension; Python-Markdown looks for this name."""
    return FragmentsExtension(**options)
