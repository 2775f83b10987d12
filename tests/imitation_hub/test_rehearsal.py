"""Rehearse what a user with a GPU runs, demo and notebook, on tiny models under the real names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rehearse(hub, folder: Path, *words: str) -> str:
    """Run Python with the imitation as its Hub, and return what it prints."""
    given = os.environ.get("PYTHONPATH", "")
    paths = os.pathsep.join(path for path in (str(ROOT), given) if path)
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=2500,
        check=False,
        cwd=folder,
        env=hub.environment(OPDLAB_PROFILE="gpu", PYTHONPATH=paths, COLUMNS="200"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_demo_of_the_gpu_profile(hub, tmp_path):
    words = ("-m", "opdlab.commands.cli", "demo", "--profile", "gpu", "--steps", "1")
    said = rehearse(hub, tmp_path, *words, "--out", str(tmp_path / "demo"))
    assert (tmp_path / "demo" / "index.html").exists()
    assert "accuracy" in said


def test_the_notebook_on_real_models(hub, tmp_path):
    """All paths of a GPU, with a few texts, tokens and steps in place of as many as on one.

    The other notebooks train the shipped models on a GPU too; `make rehearse` runs them all, with
    the numbers of a GPU.
    """
    text = (ROOT / "notebooks" / "51_real_models.ipynb").read_text(encoding="utf-8")
    text, sizes = re.subn(r"gpu=(\d+)\b", lambda found: f"gpu={min(int(found[1]), 8)}", text)
    assert sizes >= 5
    (tmp_path / "51_real_models.ipynb").write_text(text, encoding="utf-8")
    (tmp_path / "data").symlink_to(ROOT / "notebooks" / "data")
    options = ("--nbmake", "--nbmake-timeout=1800", "-p", "no:cacheprovider")
    assert "1 passed" in rehearse(hub, tmp_path, "-m", "pytest", *options, "51_real_models.ipynb")
