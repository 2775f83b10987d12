"""Links between files of the repository become links between pages of the site."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/opdlab/opdlab"
PICTURES = (".png", ".svg", ".gif")
_CODE = r"(?P<code>^(?P<fence>`{3,}).*?^(?P=fence)|`[^`\n]*`)"
_LINK = r"(?P<before>\]\(|\b(?:src|srcset|href)=\")(?P<target>[^)\"\s]+)(?P<after>[)\"])"
_PARTS = re.compile(f"{_CODE}|{_LINK}", re.DOTALL | re.MULTILINE)


class BrokenLinkError(ValueError):
    """A page links to a file that the repository does not have."""


class Links:
    """Turn links between files of the repository into links between pages of the site.

    Args:
        pages: The page of each file, both as paths: `{"README.md": "overview.md"}`.
        root: The repository.

    Attributes:
        pictures: The pictures that pages show, as paths in the repository; the site has them under
            `pictures/`.
    """

    def __init__(self, pages: Mapping[str, str], root: Path = ROOT) -> None:
        self.pages = pages
        self.root = root
        self.pictures: set[str] = set()

    def rewrite(self, markdown: str, source: str, page: str) -> str:
        """Rewrite the links of a text; those within code stay as they are.

        Args:
            markdown: The text.
            source: The file that it stands in, in the repository. Links are relative to it.
            page: The page that it will stand in, in the site.

        Returns:
            The text with links that are relative to the page.

        Raises:
            BrokenLinkError: A link leads to no file.
        """

        def replace(found: re.Match[str]) -> str:
            if found["code"] is not None:
                return found[0]
            target = self._follow(found["target"], source, page)
            return f"{found['before']}{target}{found['after']}"

        return _PARTS.sub(replace, markdown)

    def _follow(self, target: str, source: str, page: str) -> str:
        if re.match(r"[a-z]+:|#", target):
            return target
        path, _, anchor = target.partition("#")
        anchor = f"#{anchor}" if anchor else ""
        file = os.path.normpath(PurePosixPath(source).parent / path)
        for candidate in (file, f"{file}/README.md"):
            if candidate in self.pages:
                return _relative(self.pages[candidate], page) + anchor
        if not (self.root / file).exists():
            raise BrokenLinkError(f"{source} links to {target}, but there is no {file}.")
        if file.endswith(PICTURES):
            self.pictures.add(file)
            return _relative(f"pictures/{file}", page)
        kind = "tree" if (self.root / file).is_dir() else "blob"
        return f"{REPOSITORY}/{kind}/main/{file}{anchor}"


def _relative(target: str, page: str) -> str:
    return os.path.relpath(target, PurePosixPath(page).parent)
