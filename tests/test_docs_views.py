"""The blocks of docs/views.md run in order, in one folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "views.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.filterwarnings("ignore")
def test_the_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "docs"}
    assert len(BLOCKS) == 11
    for block in BLOCKS:
        exec(block, names)  # noqa: S102 (the page is ours)
    pages = {"equation", "update", "changed", "marks", "regimes", "branches", "board", "why"}
    assert {path.stem for path in tmp_path.glob("*.html")} == pages
    assert (tmp_path / "trace.labels.json").exists()
