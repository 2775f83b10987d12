"""The scripts and commands of docs/scaling.md run as they are written.

Left out are `accelerate launch --num_processes 2`, which needs two GPUs, and SLURM's script, whose
last line is torchrun's.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HOME = Path(__file__).parent.parent
PAGE = (HOME / "docs" / "scaling.md").read_text(encoding="utf-8")
SCRIPTS = {
    name: code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for name in re.findall(r"\A# (\S+\.py)\n", code)
}  # fmt: skip
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    if not block.startswith("#!")
    for line in block.splitlines()
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the page's scripts and the examples."""
    (tmp_path / "examples").symlink_to(HOME / "examples")
    for name, code in SCRIPTS.items():
        (tmp_path / name).write_text(code)
    return tmp_path


def run(folder: Path, command: str) -> str:
    """Run a line of the page on the CPU, with the programs of this environment."""
    modules = {
        "torchrun": "torch.distributed.run",
        "accelerate": "accelerate.commands.accelerate_cli",
    }
    program, *arguments = shlex.split(command)
    start = [sys.executable] if program == "python" else [sys.executable, "-m", modules[program]]
    paths = os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths}
    done = subprocess.run(
        [*start, *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_page_has_these_commands():
    assert COMMANDS == [
        "accelerate launch --num_processes 2 train.py runs/first",
        "torchrun --standalone --nproc-per-node 2 train.py runs/first",
        "accelerate launch --config_file examples/fsdp2.yaml train.py runs/first",
        'pip install "ray[train]"',
        "python train_ray.py runs/first",
        "opdlab doctor Qwen/Qwen3-1.7B Qwen/Qwen3-235B-A22B --gpus 64 --plan --batch 512 --vllm",
    ]
    assert set(SCRIPTS) == {"train.py", "train_ray.py"}


@pytest.mark.parametrize(("number", "is_sharded"), [(1, "false"), (2, "true")])
def test_a_command_trains(folder, number, is_sharded):
    said = run(folder, COMMANDS[number])
    assert re.search(r"0\.\d+|[01]", said)  # the accuracy, once
    saved = (folder / "runs" / "first" / "step-000002" / "run.json").read_text()
    assert '"processes": 2' in saved
    assert f'"sharded": {is_sharded}' in saved


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_ray_trains(folder):
    run(folder, COMMANDS[4])
    saved = (folder / "runs" / "first" / "step-000002" / "run.json").read_text()
    assert '"processes": 2' in saved
