"""The script of docs/scaling.md runs as the page launches it, on one machine and on two."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import opdlab as opd

PAGE = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
SCRIPT = re.search(r"```python\n(# train\.py\n.+?)```", PAGE, re.DOTALL)[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    said, wrong = process.communicate(timeout=1200)
    assert process.returncode == 0, wrong[-2000:]
    return said


@pytest.fixture(scope="module")
def alone() -> str:
    """What the script says in one process."""
    student, teacher, task = opd.load("market")
    opd.distill(student, teacher, task, steps=2, batch=5, seed=1, quiet=True).train()
    return repr(opd.evaluate(student, task, n=7, max_new_tokens=12))


def commands() -> list[list[str]]:
    """The page's commands for one machine."""
    first = re.search(r"```bash\n(accelerate.+?)```", PAGE, re.DOTALL)[1]
    return [line.split() for line in first.splitlines()]


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[0])
def test_the_script_gives_one_result_however_it_is_launched(command, tmp_path, alone):
    (tmp_path / "train.py").write_text(SCRIPT)
    launch = "accelerate.commands.launch"
    tools = {  # without a GPU, Accelerate starts several processes only where it is told to
        "accelerate": [sys.executable, "-m", launch, "--multi_gpu"],
        "torchrun": TORCHRUN,
    }
    arguments = [word for word in command[1:] if word != "launch"]
    said = finish(start([*tools[command[0]], *arguments], tmp_path))
    assert said.splitlines().count(alone) == 1
    assert (tmp_path / "runs" / "first" / "step-000002").is_dir()


def test_the_line_for_slurm_joins_two_machines(tmp_path, alone):
    """Two launchers on this machine, as `srun` starts one on each."""
    (tmp_path / "train.py").write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    line = re.search(r"^srun torchrun (.+)$", PAGE, re.MULTILINE)[1]
    line = line.replace('"$SLURM_JOB_ID"', "7").replace('"$head:29500"', f"localhost:{port}")
    command = [*TORCHRUN, *line.replace("--nproc-per-node 8", "--nproc-per-node 1").split()]
    said = "".join(finish(one) for one in [start(command, tmp_path), start(command, tmp_path)])
    assert said.splitlines().count(alone) == 1
