"""The blocks of docs/conformance.md run, and its tables are those of the results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from opdlab.conformance.conforming import QUESTIONS
from opdlab.conformance.contract import Kind
from opdlab.conformance.zoo import CASES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
RESULTS = ROOT / "benchmarks" / "results" / "conformance.json"


def test_the_blocks_run_in_order(capsys):
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(block, names)  # noqa: S102 (the page is ours)
    assert capsys.readouterr().out.startswith("my_loss conforms: ")


def test_every_kind_and_every_question_is_in_a_table():
    for kind in Kind:
        assert f"| `{kind.value}` |" in PAGE
    rows = re.findall(r"^\| ([a-z, ]+) \| .+ \|$", PAGE, re.MULTILINE)
    named = {name for row in rows for name in row.split(", ")}
    assert set(QUESTIONS) <= named


def test_the_tables_are_those_of_the_results():
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    for group in ("peers", "own", "zoo"):
        table = PAGE.split(f"<!-- {group}: begin -->")[1].split(f"<!-- {group}: end -->")[0]
        rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
        assert len(rows) == len(found[group])
        for row, one in zip(rows, found[group], strict=True):
            assert f"| {one['name']} |" in row
            shown = [one["known mistake"]] if group == "zoo" else one["named"]
            assert set(shown) <= set(one["named"])
            assert all(name.replace("_", " ") in row for name in shown)
    assert [one["name"] for one in found["zoo"]] == [case.name for case in CASES]
    assert all(one["passes"] for one in found["own"])
    assert {"trl", "torch", "opdlab"} <= set(found["versions"])
