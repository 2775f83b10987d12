"""Rules of the house that a machine can check: safety, links, names in the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "opdlab").rglob("*.py"))


# What no source file may contain.
BANNED = (
    r"\bimport pickle\b",
    r"torch\.(load|save)\(",
    r"(?<!\.)\b(eval|exec)\(",
    r"trust_remote_code(?!=False\b)",  # only ever switched off by name: unset, transformers asks
    r"yaml\.load\(",
    r"innerHTML",
    r"document\.write",
)
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "notebooks").glob("*.md"),
    *(ROOT / "benchmarks").glob("*.md"),
    ROOT / "opdlab" / "viz" / "README.md",
]


def test_nothing_unpickles_or_runs_text():
    banned = re.compile("|".join(BANNED))
    for path in [*SOURCES, *(ROOT / "opdlab").rglob("*.js")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [line for line in lines if banned.search(line)]
        assert not found, (path.name, found)


def test_no_two_files_of_tests_have_one_name():
    """Pytest imports a file by its name alone, and drops the second of two from a whole run."""
    names = [path.name for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    assert not {name for name in names if names.count(name) > 1}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_docs_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_the_readme_names_methods_that_exist():
    import opdlab

    named = set(re.findall(r"`(\w+)\(", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"OPD", "SFT", "SequenceKD", "GRPO"} <= named
    assert all(hasattr(opdlab, name) for name in named if name[0].isupper())


def test_the_readme_asks_the_questions_that_the_views_answer():
    from opdlab import viz

    rows = re.findall(r"^\| `(\w+)` \| (.+\?) \|$", (ROOT / "README.md").read_text("utf-8"), re.M)
    captions = {view.__name__: view.caption for view in viz.VIEWS}
    assert len(rows) > 10
    assert dict(rows).items() <= captions.items()


def test_the_path_of_a_training_step_exists():
    """CONTRIBUTING shows a step as files and functions; each function is in its file."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    path = re.findall(r"^\| \[`(opdlab/\S+)`\]\S+ \| (.+?) \|", text, re.MULTILINE)
    assert len(path) == 6
    for file, functions in path:
        source = (ROOT / file).read_text(encoding="utf-8")
        for function in re.findall(r"`([\w.]+)`", functions):
            assert f"def {function.split('.')[-1]}(" in source, (file, function)


def test_a_step_never_goes_back_up_its_path():
    """Each file on the path imports only files further down."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    path = re.findall(r"^\| \[`(opdlab/\S+)`\]", text, re.MULTILINE)
    modules = [file.removesuffix(".py").replace("/", ".") for file in path]
    for number, file in enumerate(path):
        source = (ROOT / file).read_text(encoding="utf-8")
        imports = set(re.findall(r"^\s*from (opdlab\.\S+) import", source, re.MULTILINE))
        assert not imports & set(modules[:number]), file
