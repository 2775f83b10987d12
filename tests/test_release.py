"""The built wheel works without the repository: its command, its models and its pages."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WHERE = "import opdlab, opdlab.commands.cli; print(opdlab.__file__)"


def run(*words: str, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(words),
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=2900,
        env=environment | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """The folder of the commands of an environment that has the wheel and no repository.

    The dependencies are those of this environment. It has no opdlab of its own there: an editable
    install is a `.pth` file, and those are read in the new environment only.
    """
    folder = tmp_path_factory.mktemp("clean")
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist")]
    run(sys.executable, *build, str(ROOT), cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    variables = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    packages = Path(sysconfig.get_path("purelib", "venv", variables))
    options = ["--quiet", "--no-deps", "--no-index", "--python", str(folder / "venv")]
    run(sys.executable, "-m", "pip", *options[-2:], "install", *options[:3], str(wheel), cwd=folder)
    rest = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "rest.pth").write_text("\n".join(rest) + "\n", encoding="utf-8")
    return folder / "venv" / "bin"


def test_the_command_of_the_wheel_runs_the_demo(clean, tmp_path):
    place = Path(run(str(clean / "python"), "-c", WHERE, cwd=tmp_path).strip())
    assert place.is_relative_to(clean.parent), place
    said = run(str(clean / "opdlab"), "demo", "--steps", "2", cwd=tmp_path)
    assert "demo: accuracy 0.31 -> " in said
    page = (tmp_path / "runs" / "demo" / "index.html").read_text(encoding="utf-8")
    assert str(ROOT) not in page
    assert (tmp_path / "runs" / "demo" / "adapter" / "adapter_model.safetensors").exists()
