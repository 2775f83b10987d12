"""The blocks of docs/command_line.md run as they stand, in order, in one folder."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from warm_start import python

from opdlab.methods.by_name import find_method
from opdlab.samplers import VLLMServer
from opdlab.tasks.verifiers import VERIFIERS
from opdlab.training.config import (
    ModelTable,
    RunTable,
    ServerTable,
    TaskTable,
    read_config,
    read_toml,
)
from opdlab.training.configured import make_sampler

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(toml|sh|python)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))


def test_the_blocks_run_in_order(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    opdlab = programs / "opdlab"
    opdlab.write_text(f'#!/bin/sh\nexec "{python()}" -m opdlab.commands.cli "$@"\n')
    opdlab.chmod(0o755)
    surroundings = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    printed = []
    for kind, text in BLOCKS:
        if kind == "toml":
            (tmp_path / "first.toml").write_text(text, encoding="utf-8")
            continue
        command = ["sh", "-ec", text] if kind == "sh" else [python(), "-c", text]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=2500,
            check=False,
            cwd=tmp_path,
            env=surroundings,
        )
        assert done.returncode == 0, f"{text}\n{done.stderr}"
        printed.append(done.stdout)
    assert "resuming after step 4 of 6" in "".join(printed)
    numbers = json.loads(next(text for text in printed if text.startswith("{")))
    assert numbers["evaluations"].keys() == {"distilled"}
    assert (tmp_path / "runs" / "first" / "step-000006").is_dir()
    assert (tmp_path / "runs" / "first" / "report.html").exists()
    assert (tmp_path / "runs" / "trace.html").exists()


@pytest.mark.parametrize("table", [ModelTable, ServerTable, TaskTable, RunTable])
def test_the_page_names_every_key(table):
    missing = {one.name for one in fields(table) if not re.search(f"`{one.name}[` ]", PAGE)}
    in_other_words = {"kind", "options", "name", "source", "records"}
    assert missing <= in_other_words


def test_the_page_names_every_option_of_a_sampler():
    row = next(line for line in PAGE.splitlines() if line.startswith("| `[sampler]`"))
    assert "`base`" in row
    assert all(f"`{name}`" in row for name in inspect.signature(VLLMServer).parameters)


def test_the_page_names_every_verifier():
    assert all(f"`{name}`" in PAGE for name in VERIFIERS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_config(path):
    config = read_config(read_toml(path), path.parent, str(path))
    assert config.run.folder == str(ROOT / "examples" / ".." / "runs" / path.stem)
    if config.method is not None:
        kind = find_method(config.method.name)
        assert config.method.options.keys() <= {one.name for one in fields(kind)}
    if config.sampler is not None:
        make_sampler(config.sampler)


def test_there_are_examples():
    names = {path.stem for path in EXAMPLES}
    assert {"market", "jsonl", "small", "qlora", "server", "vllm"} <= names
