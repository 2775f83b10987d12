"""The Python blocks of the guides, of two more pages and of the README run, page by page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import opdlab as opd
from opdlab.diagnose.health import SIGNATURES

ROOT = Path(__file__).parents[1]
# Blocks of each page.
GUIDES = {
    "quickstart": 3,
    "own_loss": 9,
    "own_task": 3,
    "black_box": 4,
    "privileged": 9,
    "alarms": 1,
    "from_trl": 1,
}


def read_blocks(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_blocks(blocks: list[str], names: dict[str, object]) -> dict[str, object]:
    for block in blocks:
        exec(block, names)  # noqa: S102 (the page is ours)
    return names


def shorten(block: str, *replacements: tuple[str, str]) -> str:
    """A block with smaller numbers; each replacement must apply."""
    for old, new in replacements:
        assert old in block, f"the page no longer has {old!r}"
        block = block.replace(old, new)
    return block


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", GUIDES)
def test_the_blocks_of_a_guide_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = read_blocks(f"docs/{page}.md")
    assert len(blocks) == GUIDES[page]
    names = run_blocks(blocks, {"__name__": "__main__"})
    if page == "quickstart":
        student, teacher, _ = opd.load("market")
        records = [{"prompt": f"{a} + 1 =", "answer": str(a + 1)} for a in range(20)]
        folders = (student.weights.source, teacher.weights.source)
        assert names["train_own"](*folders, records).done == 2
    if page == "own_loss":
        assert (tmp_path / "open.html").exists()


@pytest.mark.filterwarnings("ignore")
def test_the_tables_of_the_privileged_page_are_what_its_blocks_print(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_blocks(read_blocks("docs/privileged.md")[:6], {})
    printed = capsys.readouterr().out.splitlines()
    text = (ROOT / "docs" / "privileged.md").read_text(encoding="utf-8")
    tables = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    assert len(tables) == 5
    for line in "".join(tables).splitlines():
        words = line.split()
        assert any(is_near(one.split(), words) for one in printed), line


def is_near(words: list[str], others: list[str]) -> bool:
    """Tell whether two lines have the same words, and numbers that differ by rounding at most."""
    if len(words) != len(others):
        return False
    number = re.compile(r"-?\d+(\.\d+)?")
    return all(
        abs(float(one) - float(other)) < 0.015
        if number.fullmatch(one) and number.fullmatch(other)
        else one == other
        for one, other in zip(words, others, strict=True)
    )


def test_the_block_on_long_prompts_runs():
    student, teacher, _ = opd.load("market")
    records = [{"prompt": "1 + 1 = " * n, "answer": "2", "hint": "2"} for n in (1, 2, 3, 200)]
    task = opd.tasks.from_records(records, test=1)
    (block,) = read_blocks("docs/data.md")
    names = {"student": student, "teacher": teacher, "task": task}
    run_blocks([shorten(block, ("256", "48"))], names)
    assert max(len(one.text or "") for one in names["task"].prompts(3)) < 100


@pytest.mark.filterwarnings("ignore")
def test_the_blocks_on_controls_run_with_smaller_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    controls, credit = read_blocks("docs/controls.md")
    small = 'arms=["no_teacher"], seeds=1, prompts=4, steps=1, batch=2, quiet=True,'
    names = run_blocks(
        [
            shorten(controls, ("seeds=3,", small)),
            shorten(credit, ("task.prompts(8", "task.prompts(1"), ("n=16", "n=2")).replace(
                "max_new_tokens=task.max_new_tokens", "max_new_tokens=6"
            ),
        ],
        {},
    )
    assert (tmp_path / "runs" / "controls" / "controls.json").exists()
    assert len(names["found"].df) > 0


@pytest.mark.filterwarnings("ignore")
def test_the_blocks_of_the_readme_run_with_smaller_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = [{"prompt": f"{a} + 1 =", "answer": str(a + 1)} for a in range(20)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, records)))
    student, teacher, _ = opd.load("market")
    first, own, loss = read_blocks("README.md")
    sizes = ("steps=200, batch=16, n=2", "steps=2, batch=2, n=1, max_new_tokens=4")
    blocks = [
        shorten(first, ("steps=60", "steps=1"), ("(student, task)", "(student, task, 4)")),
        shorten(
            own,
            ("Qwen/Qwen3-0.6B", str(student.weights.source)),
            ("Qwen/Qwen3-4B", str(teacher.weights.source)),
            sizes,
        ),
        shorten(loss, ("steps=60", "steps=1, batch=2, max_new_tokens=4")),
    ]
    run = run_blocks(blocks, {})["run"]
    assert run.done == 2
    assert list((tmp_path / "runs" / "first").glob("step-*"))


def test_the_table_of_alarms_is_that_of_the_code():
    text = (ROOT / "docs" / "alarms.md").read_text(encoding="utf-8")
    for one in SIGNATURES:
        row = rf"^\| {re.escape(one.name)} \| .+ \| `{one.metric}` \| {re.escape(one.remedy)} \|$"
        assert re.search(row, text, re.MULTILINE), one.name
    table = text.partition("## The alarms")[2].partition("## ")[0]
    assert table.count("\n| ") - 2 == len(SIGNATURES)
