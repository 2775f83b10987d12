"""The command of docs/testing_offline.md runs as it stands, and the page names what there is."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from warm_start import python

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "testing_offline.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_command_runs(tmp_path):
    """In a clone the environment is .venv; here it is the one that runs the tests."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, words in {"python": "", "opdlab": "-m opdlab.commands.cli "}.items():
        program = tmp_path / ".venv" / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{python()}" {words}"$@"\n')
        program.chmod(0o755)
    (block,) = BLOCKS
    done = subprocess.run(
        ["sh", "-ec", block],
        capture_output=True,
        text=True,
        timeout=2500,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Qwen/Qwen3-4B" in done.stdout


def test_the_page_names_what_there_is():
    for path in re.findall(r"`(tests/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
    assert "rehearse" in (ROOT / "Makefile").read_text(encoding="utf-8")
