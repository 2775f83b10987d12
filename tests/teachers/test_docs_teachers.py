"""The blocks of docs/teachers.md run, on servers of this machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("number", range(2))
def test_a_block_runs(number, serve):
    assert len(BLOCKS) == 2
    block = BLOCKS[number]
    for host in ("10.0.0.1", "10.0.0.2"):
        if host in block:
            _, url = serve()
            block = block.replace(f"http://{host}:8000/v1", url)
    exec(block, {})  # noqa: S102 (the page is ours)
