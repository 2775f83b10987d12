"""The blocks of docs/trace.md run in order, and the page names every field."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from warm_start import python

from opdlab.viz import questions
from opdlab.viz.made_up import make_trace

PAGE = (Path(__file__).parent.parent / "docs" / "trace.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|sh)\n(.*?)```", PAGE, re.DOTALL)


def test_the_blocks_run_in_order(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    opdlab = programs / "opdlab"
    opdlab.write_text(f'#!/bin/sh\nexec "{python()}" -m opdlab.commands.cli "$@"\n')
    opdlab.chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    assert [kind for kind, _ in BLOCKS] == ["python", "sh", "python", "python"]
    for kind, text in BLOCKS:
        command = ["sh", "-ec", text] if kind == "sh" else [python(), "-c", text]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=2500,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
        )
        assert done.returncode == 0, done.stderr


def test_the_page_names_every_field():
    trace = make_trace([b"a", b" b"]).with_columns(type=["x", "y"])
    answers = [
        questions.describe(trace),
        questions.worst(trace),
        questions.where(trace, ["type = x"]),
        questions.compare(trace, trace),
    ]
    fields = set()
    for answer in answers:
        fields |= answer.keys()
        for name in ("tokens", "channels", "completions", "means"):
            listed = answer.get(name)
            for one in listed if isinstance(listed, list) else []:
                fields |= one.keys()
    assert len(fields) > 30
    assert {name for name in fields if f"`{name}`" not in PAGE} == set()
    assert all(answer["schema"] in PAGE for answer in answers)
