"""What a user with a GPU runs, rehearsed on tiny models under the real names: demo and notebook."""

from __future__ import annotations

import os
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
    """The others train the shipped models on a GPU too; `make rehearse` runs them all."""
    notebook = str(ROOT / "notebooks" / "51_real_models.ipynb")
    options = ("--nbmake", "--nbmake-timeout=1800", "-p", "no:cacheprovider")
    assert "1 passed" in rehearse(hub, tmp_path, "-m", "pytest", *options, notebook)
