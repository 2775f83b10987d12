"""Check built pages: nothing is fetched from elsewhere, and every link leads somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes by which a page fetches something, whatever the element.
_FETCHING = ("src", "srcset", "poster", "data", "action", "formaction", "background", "ping")
# The same of an element that fetches its address, unlike a link that a reader may follow.
_LINKED = ("link", "use", "image")
_STYLE = re.compile(r"@import\s+[\"']?([^\"';)]+)|url\(\s*[\"']?([^\"')]+)")


class Page(HTMLParser):
    """Read what a built page fetches, links to, and can be linked to.

    Attributes:
        fetched: The addresses that a browser fetches by itself.
        followed: The addresses of its links.
        anchors: The places in it that have a name.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.followed: list[str] = []
        self.anchors: set[str] = set()
        self._element = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of an element."""
        self._element = tag
        for name, value in attrs:
            if value is None:
                continue
            if name in ("id", "name"):
                self.anchors.add(value)
            elif name == "srcset":
                self.fetched += [part.split()[0] for part in _split_srcset(value)]
            elif (name in _FETCHING and tag != "object") or (name == "href" and tag in _LINKED):
                self.fetched.append(value)
            elif name == "href":
                self.followed.append(value)
            elif name == "style":
                self.fetched += find_in_style(value)

    def handle_data(self, data: str) -> None:
        """Take note of what a style sheet in the page fetches."""
        if self._element == "style":
            self.fetched += find_in_style(data)

    def handle_endtag(self, tag: str) -> None:
        """Leave an element."""
        self._element = ""


def _split_srcset(value: str) -> list[str]:
    """Split the addresses of a `srcset`; an address that holds its data has commas of its own."""
    return [value] if value.startswith("data:") else [part for part in value.split(",") if part]


def find_in_style(text: str) -> list[str]:
    """Return the addresses that a style sheet fetches."""
    return [first or second for first, second in _STYLE.findall(text)]


def find_faults(folder: Path) -> list[str]:
    """Look for requests to the outside and for links that lead nowhere.

    Args:
        folder: The built site.

    Returns:
        One line per fault.
    """
    pages = {
        path: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))
    }
    faults = []
    for path, page in pages.items():
        name = path.relative_to(folder)
        if name.name == "404.html":
            continue  # its links are those of the site's root
        faults += [f"{name} fetches {one}" for one in page.fetched if _is_elsewhere(one)]
        inside = [one for one in page.fetched if not _is_elsewhere(one)]
        faults += list(_find_dead(path, name, [*page.followed, *inside], pages))
    for path in sorted(folder.rglob("*.css")):
        fetched = find_in_style(path.read_text(encoding="utf-8"))
        faults += [
            f"{path.relative_to(folder)} fetches {one}" for one in fetched if _is_elsewhere(one)
        ]
    return faults


def _find_dead(
    path: Path, name: Path, addresses: list[str], pages: dict[Path, Page]
) -> Iterator[str]:
    for address in addresses:
        parts = urlsplit(address)
        if parts.scheme or address.startswith("//"):
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if not target.is_file():
            yield f"{name} links to {address}, which is not there"
        elif parts.fragment and target in pages:
            anchor = unquote(parts.fragment)
            if anchor not in pages[target].anchors and not anchor.startswith("__"):
                yield f"{name} links to {address}, but the page has no such place"


def _is_elsewhere(address: str) -> bool:
    return address.startswith("//") or urlsplit(address).scheme not in ("", "data", "blob")
