"""The block of docs/trl.md runs, and the page names the versions that the package asks for."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")


def test_the_block_runs():
    pytest.importorskip("trl")
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(block, {})  # noqa: S102 (the page is ours)


def test_the_versions_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest, beyond = re.search(
        r'^trl = \["trl>=1\.(\d+),<1\.(\d+)"\]', project, re.MULTILINE
    ).groups()
    newest = int(beyond) - 1
    assert f"TRL 1.{oldest} to 1.{newest}" in PAGE
    assert f"TRL 1.{oldest} to 1.{newest}" in (ROOT / "opdlab/bridges/trl.py").read_text()
    assert f"trl==1.{newest}." in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"trl==1.{oldest}.0" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_names_on_the_page_about_moving_are_those_of_trl():
    pytest.importorskip("trl")
    text = (ROOT / "docs" / "from_trl.md").read_text(encoding="utf-8")
    (described,) = re.findall(r"`trl.DistillationTrainer` \((.+?)\)", text)
    if version("trl") != described:
        pytest.skip(f"the page is about TRL {described}")
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig

    rows = re.findall(r"^\| (`(?!DistillationConfig).+?`) \| ", text, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    known = {field.name for field in dataclasses.fields(DistillationConfig)}
    known |= set(inspect.signature(DistillationTrainer).parameters)
    known |= set(inspect.signature(DistillationTrainer.train).parameters)
    assert len(named) > 25
    assert named <= known
    assert {"lmbda", "seq_kd"} <= {field.name for field in dataclasses.fields(GKDConfig)}
