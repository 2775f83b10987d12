"""Follow the recipes of CONTRIBUTING.md in a copy of the repository, and run their tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from warm_start import python

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# A file in bold, the place where its code goes if the file exists, and the code.
BLOCK = re.compile(
    r"^\*\*`(?P<file>\S+)`\*\*(?:, (?P<where>before|after) `(?P<line>[^`\n]+)`[^\n]*?)?:\n\n"
    r"```\w+\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
FILES = {"divergence": 2, "teacher": 2, "task": 2, "method": 2, "alarm": 2, "view": 4}


def recipes() -> dict[str, list[re.Match[str]]]:
    """The blocks of each recipe, by the second word of its heading."""
    found = {}
    for part in TEXT.split("\n### ")[1:]:
        name = part.split()[1].strip(":")
        blocks = list(BLOCK.finditer(part.split("\n## ")[0]))
        if blocks:
            found[name] = blocks
    return found


def follow(block: re.Match[str], root: Path) -> None:
    """Write a block's code into its file, at the place that it names."""
    path = root / block["file"]
    if block["where"] is None:
        assert not path.exists(), f"{block['file']} exists; say where the code goes"
        path.write_text(block["code"], encoding="utf-8")
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    places = [i for i, line in enumerate(lines) if block["line"] in line]
    assert places, f"{block['file']} has no line with {block['line']!r}"
    at = places[0] + (block["where"] == "after")
    while block["where"] == "before" and lines[at - 1].startswith("@"):
        at -= 1  # a class begins with its decorators
    # Functions stand two lines apart.
    space = "\n\n" if block["code"].startswith(("def ", "class ")) else ""
    lines.insert(at, block["code"] + space)
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of the repository in which all recipes were followed."""
    root = tmp_path_factory.mktemp("repository")
    ignored = shutil.ignore_patterns("__pycache__", "node_modules")
    for folder in ("opdlab", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    for name in ("data", "notebooks", "pyproject.toml", "README.md"):
        (root / name).symlink_to(ROOT / name)
    for blocks in recipes().values():
        for block in blocks:
            follow(block, root)
    return root


def run(repository, *command):
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [python(), "-m", *command],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_recipe_touches_as_few_files_as_it_says():
    assert {
        name: len({block["file"] for block in blocks}) for name, blocks in recipes().items()
    } == FILES


def test_the_recipes_are_in_the_style_of_the_house(repository):
    files = sorted({block["file"] for blocks in recipes().values() for block in blocks})
    python = [file for file in files if file.endswith(".py")]
    new = [file for file in python if not (ROOT / file).exists()]
    run(repository, "ruff", "check", "--no-cache", *new)
    run(repository, "ruff", "format", "--no-cache", "--check", *python)


def test_the_tests_of_the_recipes_pass(repository):
    files = [block["file"] for blocks in recipes().values() for block in blocks]
    tests = [file for file in files if file.startswith("tests/")]
    assert len(tests) == len(FILES)
    run(repository, "pytest", "-n", "0", "-p", "no:cacheprovider", *tests)


def test_what_checks_all_entries_checks_those_of_the_recipes(repository):
    names = "symmetric_chi2 or Surprise or surprise"
    files = (
        "tests/losses/test_divergence_table.py",
        "tests/viz/test_every_view.py",
        "tests/viz/test_embed.py",
    )
    run(repository, "opdlab.viz.table")
    run(
        repository,
        "pytest",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        *files,
        "-k",
        f"{names} or registered or readme or module",
    )
