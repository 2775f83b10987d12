"""Build the documentation site: write its pages, let Zensical render them, check the result.

    python -m website.build                                   # all pages, into build/docs/site
    python -m website.build --only docs/trl.md OPD            # some pages, into build/docs/only
    python -m website.build --methods my_loss.py --only Mine  # the page of a method of your own

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
from typing import TYPE_CHECKING, Any

import tomli_w

from website import check, contents, home, notebooks
from website.fragments import Fragments
from website.links import ROOT, Links

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
if TYPE_CHECKING:
    from website.methods import MethodPage

HERE = Path(__file__).parent
ASSETS = {"style.css": "style.css", "logo.svg": "logo.svg", "worker.js": "iframe-worker.js"}


@dataclass
class Site:
    """A site that is being written.

    Attributes:
        folder: Where sources and pieces go; the built pages are in `folder/site`.
        links: Where files of the repository are in the site.
        nav: The pages in the order in which the site lists them.
        modules: Folders, beside the repository, of files whose docstrings are read.
    """

    folder: Path
    links: Links
    nav: list[dict[str, Any]] = field(default_factory=list)
    modules: list[Path] = field(default_factory=list)

    @property
    def source(self) -> Path:
        """The folder of the Markdown that Zensical reads."""
        return self.folder / "source"

    @property
    def built(self) -> Path:
        """The folder of the built pages."""
        return self.folder / "site"

    @property
    def pages(self) -> list[str]:
        """The pages beside the home page, in order."""
        chapters = [one for entry in self.nav for one in entry.values() if isinstance(one, list)]
        return [page for chapter in chapters for entry in chapter for page in entry.values()]

    def write(self, page: str, text: str, fragments: Fragments | None = None) -> None:
        """Write the Markdown of a page, and the pieces that it has marks for."""
        path = self.source / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if fragments is not None:
            fragments.write(self.folder / "fragments")


def write_site(folder: Path, only: Sequence[str] = (), own: Sequence[Path] = ()) -> Site:
    """Write the sources of the site.

    Args:
        folder: A folder for sources and pages, which replace those of an earlier build.
        only: Files and names of methods whose pages are written; all by default. The home page is
            always there.
        own: Files with methods of a user's own, which get pages too.

    Returns:
        The site, whose links lead to pages that are written.

    Raises:
        SystemExit: `only` names no page, or a file of `own` has no method.
    """
    files = [name for name in only if name in contents.list_pages()]
    found = _find_methods([name for name in only if name not in files], only, own)
    pages = {
        source: page
        for source, page in contents.list_pages().items()
        if not only or source in files
    }
    # Only what a build writes: the folder may hold that of single pages, or a user's own files.
    for part in ("source", "site", "fragments"):
        shutil.rmtree(folder / part, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    site = Site(folder, Links(pages))
    site.modules += [method.folder for method in found if method.folder is not None]
    site.write("index.md", *home.render_home(site.links))
    site.nav.append({"Home": "index.md"})
    for title, chapters in contents.CHAPTERS.items():
        entries = [_write_file(site, source, name) for source, name in chapters.items()]
        if title == "Methods" and found:
            entries += _write_methods(site, found, has_choice=not only)
        if title == "Reference" and not only:
            entries += _write_reference(site, found)
        kept = [entry for entry in entries if entry]
        if kept:
            site.nav.append({title: kept})
    _copy_files(site)
    _write_config(site)
    return site


def _find_methods(
    names: Sequence[str], only: Sequence[str], own: Sequence[Path]
) -> list[MethodPage]:
    """The methods whose pages are written: those of these names, or all where `only` is empty."""
    if only and not names and not own:
        return []
    from website import methods  # this loads PyTorch, which other pages do not need

    found = {method.name: method for method in methods.find_methods()}
    mine = {method.name: method for file in own for method in methods.read_methods(file)}
    if twice := sorted(mine.keys() & found.keys()):
        raise SystemExit(f"opdlab: there is a method {twice[0]} already. Give yours another name.")
    found |= mine
    unknown = [name for name in names if name not in found]
    if unknown:
        raise SystemExit(
            f"opdlab: --only {unknown[0]} is no page. Name files of the site, as docs/trl.md, or"
            f" methods: {', '.join(found)}. --methods FILE adds methods of your own."
        )
    return [found[name] for name in (names if only else found)]


def _write_file(site: Site, source: str, title: str) -> dict[str, Any]:
    """Write the page of one file; return its entry in the list of pages, empty if it has none."""
    if source not in site.links.pages:
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


def _write_methods(
    site: Site, found: Sequence[MethodPage], *, has_choice: bool
) -> list[dict[str, Any]]:
    """Write the pages of methods, and with `has_choice` "which method when"; list the pages."""
    from website import methods

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    uses = methods.read_uses(readme)
    texts = {method.page: methods.render_method(method, uses) for method in found}
    for page, text in texts.items():
        site.write(page, site.links.rewrite(text, "README.md", page))
    entries = [{method.name: method.page} for method in found]
    if not has_choice:
        return entries
    choice = site.links.rewrite(methods.render_choice(readme), "README.md", "methods/index.md")
    site.write("methods/index.md", f"{choice}\n{methods.list_methods(found)}")
    return [{"Which method when": "methods/index.md"}, *entries]


def _write_reference(site: Site, found: Sequence[MethodPage]) -> list[dict[str, Any]]:
    """Write the pages of the reference; list the pages."""
    from website import reference

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
    project["plugins"]["mkdocstrings"]["handlers"]["python"]["paths"] = [
        str(path) for path in (ROOT, *site.modules)
    ]
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


def build(folder: Path, only: Sequence[str] = (), own: Sequence[Path] = ()) -> Site:
    """Write, render and check the site.

    Args:
        folder: A folder for sources and pages, which replace those of an earlier build.
        only: Files and names of methods whose pages are built; all by default.
        own: Files with methods of a user's own, which get pages too.

    Returns:
        The site.

    Raises:
        SystemExit: A page has a fault, or an argument names nothing.
    """
    site = write_site(folder, only, own)
    render(site)
    faults = check.find_faults(site.built)
    if faults:
        raise SystemExit("\n".join(["opdlab: the site has faults", *faults]))
    return site


def find_folder(only: Sequence[str]) -> Path:
    """Return the folder of a site: single pages have their own, so that the whole site stays."""
    whole = ROOT / "build" / "docs"
    return whole / "only" if only else whole


def main() -> None:
    """Build the site as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m website.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the folder; by default build/docs, and build/docs/only for single pages",
    )
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="PAGE", help="files or names of methods"
    )
    parser.add_argument(
        "--methods", nargs="+", type=Path, default=(), metavar="FILE", help="your own methods"
    )
    given = parser.parse_args()
    folder = given.out or find_folder(given.only)
    site = build(folder.resolve(), given.only, given.methods)
    count = len(list(site.built.rglob("*.html")))
    print(f"opdlab: {count} pages; open {site.built / 'index.html'}")
    for page in site.pages if given.only else []:
        print(f"opdlab: {(site.built / page).with_suffix('.html')}")


if __name__ == "__main__":
    main()
