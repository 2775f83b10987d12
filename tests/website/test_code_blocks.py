"""Every block of Python in the documentation runs in some test; shell blocks name what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The test that runs the blocks of each page.
RUN_BY = {
    "README.md": "tests/test_docs_guides.py",
    "CONTRIBUTING.md": "tests/test_recipes.py",
    "docs/alarms.md": "tests/test_docs_guides.py",
    "docs/black_box.md": "tests/test_docs_guides.py",
    "docs/command_line.md": "tests/test_docs_command_line.py",
    "docs/conformance.md": "tests/test_docs_conformance.py",
    "docs/controls.md": "tests/test_docs_guides.py",
    "docs/data.md": "tests/test_docs_guides.py",
    "docs/doctor.md": "tests/test_docs_doctor.py",
    "docs/from_trl.md": "tests/test_docs_guides.py",
    "docs/many_teachers.md": "tests/test_docs_many_teachers.py",
    "docs/models.md": "tests/test_docs_models.py",
    "docs/own_loss.md": "tests/test_docs_guides.py",
    "docs/own_task.md": "tests/test_docs_guides.py",
    "docs/privileged.md": "tests/test_docs_guides.py",
    "docs/quickstart.md": "tests/test_docs_guides.py",
    "docs/sampling.md": "tests/test_docs_sampling.py",
    "docs/scaling.md": "tests/test_docs_scaling.py",
    "docs/teachers.md": "tests/teachers/test_docs_teachers.py",
    "docs/trace.md": "tests/test_docs_trace.py",
    "docs/trl.md": "tests/bridges/test_docs_trl.py",
    "docs/turns.md": "tests/test_docs_turns.py",
    "docs/views.md": "tests/test_docs_views.py",
}
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_every_page_with_code_is_run_by_a_test_that_reads_it():
    assert {page for page in PAGES if "```python" in read(page)} == RUN_BY.keys()
    for page, test in RUN_BY.items():
        source = read(test)
        assert Path(page).stem in source, test
        assert re.search(r"\bexec\(|subprocess|write_text\(", source), test


@pytest.mark.parametrize("page", PAGES)
def test_shell_blocks_name_commands_and_targets_that_exist(page):
    cli = read("opdlab/commands/cli.py")
    commands = set(re.findall(r"^@app\.command\ndef (\w+)", cli, re.MULTILINE))
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", read(page), re.DOTALL):
        for line in block.splitlines():
            command = line.partition("#")[0]
            for target in re.findall(r"^make (?!\.venv)([\w-]+)", command):
                assert target in targets, line
            for name in re.findall(r"^(?:\.venv/bin/)?opdlab (\w+)", command):
                assert name in commands, line
