"""The code of docs/models.md runs, in its order, on shipped models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import opdlab as opd

PAGE = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_blocks_run(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    student, teacher, _ = opd.load("market")
    names = {
        "folder": student.weights.source,
        "teacher_folder": teacher.weights.source,
        "out": tmp_path,
    }
    assert len(BLOCKS) == 6
    for block in BLOCKS:
        exec(block, names)  # noqa: S102 (the page is ours)
    assert names["run"].done == 2
    assert (tmp_path / "adapter" / "README.md").exists()
    assert names["again"].adapter == "default"
