"""The rules of the house that a machine can check: safety, links, names in the README."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "opdlab").rglob("*.py"))


def test_nothing_unpickles_or_runs_text():
    words = (
        r"\bimport"
        r" pickle\b|torch\.(load|save)\(|(?<!\.)\b(eval|exec)\(|trust_remote_code|yaml\.load\(|innerHTML|document\.write"
    )
    banned = re.compile(words)
    for path in [*SOURCES, *(ROOT / "opdlab").rglob("*.js")]:
        found = [
            line for line in path.read_text(encoding="utf-8").splitlines() if banned.search(line)
        ]
        assert not found, (path.name, found)


def test_links_of_the_docs_lead_somewhere():
    for page in [
        *ROOT.glob("*.md"),
        *(ROOT / "notebooks").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), (
                f"{page.name} -> {link}"
            )


def test_the_readme_names_methods_that_exist():
    import opdlab

    named = set(re.findall(r"`(\w+)\(", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"OPD", "SFT", "SequenceKD", "GRPO"} <= named
    assert all(hasattr(opdlab, name) for name in named if name[0].isupper())
