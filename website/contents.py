"""List the files of the repository that become pages of the site, chapter by chapter."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath

from website.links import ROOT
from website.notebooks import read_title

# Chapter by chapter, the files whose pages stand in it, with their titles in the list of pages.
# Pages of methods and of the reference are made of the package.
CHAPTERS: dict[str, dict[str, str]] = {
    "Start": {
        "docs/quickstart.md": "Quickstart",
        "README.md": "Overview",
        "docs/command_line.md": "One command",
        "docs/views.md": "Look closer",
        "docs/front_ends.md": "Front ends",
        "docs/glossary.md": "Glossary",
    },
    "Guides": {
        "docs/own_loss.md": "A loss of your own",
        "docs/own_task.md": "A task of your own",
        "docs/data.md": "Prompts and records",
        "docs/black_box.md": "A teacher that only writes",
        "docs/teachers.md": "Teachers on servers",
        "docs/many_teachers.md": "Many teachers, and reward",
        "docs/privileged.md": "Privileged information",
        "docs/turns.md": "Several turns and tools",
        "docs/models.md": "Real models and memory",
        "docs/scaling.md": "Several processes",
        "docs/sampling.md": "Sample with vLLM",
        "docs/doctor.md": "Before and while training",
        "docs/alarms.md": "Troubleshooting by alarm",
        "docs/controls.md": "Controls",
        "docs/conformance.md": "Certify a loss",
        "docs/from_trl.md": "Moving from TRL",
        "docs/trl.md": "Inside TRL",
        "docs/trace.md": "Ask a trace",
        "docs/testing_offline.md": "Rehearse offline",
    },
    "Methods": {"docs/maps.md": "The maps"},
    "Notebooks": {"notebooks/README.md": "The series"},
    "Reference": {
        "docs/errors.md": "What errors say",
        "docs/families.md": "Model families",
        "opdlab/viz/README.md": "How pictures work",
    },
    "Project": {
        "docs/peers.md": "Comparison with peers",
        "benchmarks/README.md": "Benchmarks",
        "docs/reliability.md": "Reliability",
        "docs/promises.md": "Promises and their tests",
        "CONTRIBUTING.md": "Contribute",
        "docs/site.md": "This site",
        "SECURITY.md": "Security",
        "CHANGELOG.md": "Changes",
        "CITATION.cff": "Cite opdlab",
    },
}
# The titles of the files in notebooks/, in their order, as "00 · Start".
CHAPTERS["Notebooks"] |= {
    f"notebooks/{path.name}": read_title(json.loads(path.read_text(encoding="utf-8")))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
}
_PLACES = {"README.md": "overview.md", "notebooks/README.md": "notebooks/index.md"}


def list_pages() -> dict[str, str]:
    """Return the page of every file that has one, both as paths."""
    return {source: find_page(source) for files in CHAPTERS.values() for source in files}


def find_page(source: str) -> str:
    """Return the page of a file.

    Args:
        source: The file, as a path in the repository.

    Returns:
        The page, as a path in the site's sources.
    """
    if source in _PLACES:
        return _PLACES[source]
    path = PurePosixPath(source)
    if path.name == "README.md":
        path = path.parent
    return path.with_suffix(".md").as_posix().lower()


def render_citation(text: str) -> str:
    """Write the page on how to cite opdlab, of the text of CITATION.cff."""
    title = re.search(r'^title: "(.+)"$', text, re.MULTILINE)
    version = re.search(r"^version: (.+)$", text, re.MULTILINE)
    author = re.search(r"^  - name: (.+)$", text, re.MULTILINE)
    if not (title and version and author):
        raise ValueError("CITATION.cff has no title, version or author.")
    bibtex = (
        f"@software{{opdlab,\n  title = {{{title[1]}}},\n  author = {{{{{author[1]}}}}},\n"
        f"  version = {{{version[1]}}}\n}}"
    )
    return (
        "# Cite opdlab\n\nPlease cite opdlab, and the papers of the methods that you use; the page"
        f" of each method names its paper.\n\n```bibtex\n{bibtex}\n```\n\nThe same as CFF:\n\n"
        f"```yaml\n{text}```\n"
    )
