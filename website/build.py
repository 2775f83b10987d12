"""Build the documentation site: write its pages, let Zensical render them, check the result.

    python -m website.build                       # all pages, into build/site
    python -m website.build --only docs/trl.md    # some pages, faster

Nothing is fetched. A link that leads nowhere, a page that would fetch something, or any warning of
Zensical ends the build.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from website import check, contents, home, notebooks
from website.fragments import Fragments
from website.links import ROOT, Links

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
ASSETS = {"style.css": "style.css", "logo.svg": "logo.svg", "worker.js": "iframe-worker.js"}


@dataclass
class Site:
    """A site that is being written.

    Attributes:
        folder: Where sources and pieces go; the built pages are in `folder/site`.
        links: Where files of the repository are in the site.
        wanted: The files whose pages are written, or None for all.
        nav: The pages in the order in which the site lists them.
    """

    folder: Path
    links: Links
    wanted: frozenset[str] | None = None
    nav: list[dict[str, Any]] = field(default_factory=list)

    @property
    def source(self) -> Path:
        """The folder of the Markdown that Zensical reads."""
        return self.folder / "source"

    @property
    def built(self) -> Path:
        """The folder of the built pages."""
        return self.folder / "site"

    def wants(self, source: str) -> bool:
        """Return whether the page of a file is written."""
        return self.wanted is None or source in self.wanted

    def write(self, page: str, text: str, fragments: Fragments | None = None) -> None:
        """Write the Markdown of a page, and the pieces that it has marks for."""
        path = self.source / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if fragments is not None:
            fragments.write(self.folder / "fragments")


def write_site(folder: Path, only: Sequence[str] = ()) -> Site:
    """Write the sources of the site.

    Args:
        folder: An empty folder.
        only: Files whose pages are written; all by default. The home page is always there.

    Returns:
        The site, whose links lead to pages that are written.
    """
    pages = {source: page for source, page in contents.list_pages().items() if wants(source, only)}
    site = Site(folder, Links(pages), frozenset(only) if only else None)
    site.write("index.md", *home.render_home(site.links))
    site.nav.append({"Home": "index.md"})
    for title, chapters in contents.CHAPTERS.items():
        entries = [_write_file(site, source, name) for source, name in chapters.items()]
        if title in ("Methods", "Reference") and not only:
            entries += _write_generated(site, title)
        kept = [entry for entry in entries if entry]
        if kept:
            site.nav.append({title: kept})
    _copy_files(site)
    _write_config(site)
    return site


def wants(source: str, only: Sequence[str]) -> bool:
    """Return whether a file is among those whose pages are written."""
    return not only or source in only


def _write_file(site: Site, source: str, title: str) -> dict[str, Any]:
    """Write the page of one file; return its entry in the list of pages, empty if it has none."""
    if not site.wants(source):
        return {}
    page, path = site.links.pages[source], ROOT / source
    if source.endswith(".ipynb"):
        text, fragments = notebooks.render_notebook(path, source, page, site.links)
        site.write(page, text, fragments)
        shutil.copy(path, site.source / Path(page).parent)
    elif source.endswith(".cff"):
        site.write(page, contents.render_citation(path.read_text(encoding="utf-8")))
    else:
        text = path.read_text(encoding="utf-8")
        site.write(page, site.links.rewrite(text, source, page))
    return {title: page}


def _write_generated(site: Site, title: str) -> list[dict[str, Any]]:
    """Write the pages that are made of the package; return their entries in the list of pages."""
    from website import methods, reference  # these load PyTorch, which other pages do not need

    found = methods.find_methods()
    if title == "Reference":
        names = reference.find_names()
        elsewhere = {method.path: method.page for method in found}
        site.write("reference/index.md", reference.render_index(names, elsewhere))
        entries = []
        for folder in sorted({name.folder for name in names}):
            own = [name for name in names if name.folder == folder]
            page = f"reference/{folder}.md"
            site.write(page, reference.render_folder(folder, own, elsewhere))
            entries.append({f"opdlab.{folder}": page})
        return [{"All names": "reference/index.md"}, *entries]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    uses = methods.read_uses(readme)
    texts = {method.page: methods.render_method(method, uses) for method in found}
    for page, text in texts.items():
        site.write(page, site.links.rewrite(text, "README.md", page))
    choice = site.links.rewrite(methods.render_choice(readme), "README.md", "methods/index.md")
    site.write("methods/index.md", f"{choice}\n{methods.list_methods(found)}")
    entries = [{method.name: method.page} for method in found]
    return [{"Which method when": "methods/index.md"}, *entries]


def _copy_files(site: Site) -> None:
    for name, page_name in ASSETS.items():
        shutil.copy(HERE / name, site.source / page_name)
    for picture in sorted(site.links.pictures):
        target = site.source / "pictures" / picture
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / picture, target)


def _write_config(site: Site) -> None:
    config: dict[str, Any] = tomllib.loads((HERE / "zensical.toml").read_text(encoding="utf-8"))
    project = config["project"]
    project |= {"docs_dir": "source", "site_dir": "site", "nav": site.nav}
    extensions: dict[str, Mapping[str, Any]] = project["markdown_extensions"]
    extensions["website.fragments"] = {"folder": str(site.folder / "fragments")}
    project["plugins"]["mkdocstrings"]["handlers"]["python"]["paths"] = [str(ROOT)]
    (site.folder / "zensical.toml").write_text(tomli_w.dumps(config), encoding="utf-8")


def render(site: Site) -> None:
    """Let Zensical render the sources; any warning is an error.

    Raises:
        SystemExit: Zensical found fault with a page.
    """
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=site.folder, env=environment, check=False)
    if done.returncode:
        raise SystemExit("opdlab: the site was not built; see the warnings above")


def build(folder: Path, only: Sequence[str] = ()) -> Site:
    """Write, render and check the site.

    Args:
        folder: A folder for sources and pages; what is in it is removed.
        only: Files whose pages are built; all by default.

    Returns:
        The site.

    Raises:
        SystemExit: A page has a fault.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    site = write_site(folder, only)
    render(site)
    faults = check.find_faults(site.built)
    if faults:
        raise SystemExit("\n".join(["opdlab: the site has faults", *faults]))
    return site


def main() -> None:
    """Build the site as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m website.build", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs")
    parser.add_argument("--only", nargs="*", default=(), metavar="FILE")
    given = parser.parse_args()
    site = build(given.out.resolve(), given.only)
    count = len(list(site.built.rglob("*.html")))
    print(f"opdlab: {count} pages; open {site.built / 'index.html'}")


if __name__ == "__main__":
    main()
