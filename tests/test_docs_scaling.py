"""The scripts and commands of docs/scaling.md run as they are written.

Left out is `accelerate launch --num_processes 2`, which needs two GPUs. The script for SLURM runs
with one process on each of two nodes, and not with eight: with programs that stand in for those of
SLURM, and, where SLURM is installed (slurm-wlm of Debian), in a cluster of its own.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import slurm
from warm_start import python

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


(JOB,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", PAGE, re.DOTALL)

# SLURM's `srun COMMAND` runs it once on each node.
STANDS_IN = {
    "scontrol": """#!/bin/sh
[ "$1 $2 $3" = "show hostnames localhost,node2" ] || exit 1
echo localhost
echo node2
""",
    "srun": """#!/bin/sh
"$@" &
first=$!
"$@" || exit 1
wait $first
""",
}


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
    start = [python()] if program == "python" else [python(), "-m", modules[program]]
    paths = os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths}
    env["PYTHON_EXEC"] = python()  # what torchrun and accelerate start
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
@pytest.mark.parametrize("is_sharded", ["false", "true"])
def test_ray_trains(folder, is_sharded):
    if is_sharded == "true":
        (block,) = re.findall(r"```python\n(import os\n.*?)```", PAGE, re.DOTALL)
        begin = "def train(config):\n"
        assert SCRIPTS["train_ray.py"].count(begin) == 1
        script = SCRIPTS["train_ray.py"].replace(begin, begin + textwrap.indent(block, "    "))
        (folder / "train_ray.py").write_text(script)
    run(folder, COMMANDS[4])
    saved = (folder / "runs" / "first" / "step-000002" / "run.json").read_text()
    assert '"processes": 2' in saved
    assert f'"sharded": {is_sharded}' in saved


@pytest.fixture
def job(folder) -> Path:
    """SLURM's script, for one process on each node and a port that is free."""
    (port,) = slurm.free_ports(1)
    text = JOB.replace("--nproc-per-node 8", "--nproc-per-node 1").replace("29500", str(port))
    assert text.count(str(port)) == text.count("--nproc-per-node 1") == 1
    (folder / "job.sh").write_text(text)
    (folder / "job.sh").chmod(0o755)
    (folder / "bin").mkdir()
    torchrun = f'#!/bin/sh\nexec "{python()}" -m torch.distributed.run "$@"\n'
    for name, program in {"torchrun": torchrun}.items():
        (folder / "bin" / name).write_text(program)
        (folder / "bin" / name).chmod(0o755)
    return folder / "job.sh"


def environment(folder: Path, variables: dict[str, str]) -> dict[str, str]:
    """The environment of a job: this one, on the CPU, with the programs in `bin`."""
    env = {**os.environ, **variables, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    env["PATH"] = os.pathsep.join([str(folder / "bin"), env["PATH"]])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")]))
    return env


def assert_trained_by_two(folder: Path) -> None:
    saved = (folder / "runs" / "first" / "step-000002" / "run.json").read_text()
    assert '"processes": 2' in saved


def test_the_lines_of_slurms_script_start_a_run(job):
    folder = job.parent
    for name, program in STANDS_IN.items():
        (folder / "bin" / name).write_text(program)
        (folder / "bin" / name).chmod(0o755)
    env = environment(folder, {"SLURM_JOB_NODELIST": "localhost,node2", "SLURM_JOB_ID": "17"})
    done = subprocess.run(
        [job], cwd=folder, env=env, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_trained_by_two(folder)


@pytest.mark.skipif(
    not all(map(slurm.find, slurm.PROGRAMS)), reason="SLURM is not installed (slurm-wlm)"
)
def test_slurm_trains_on_two_nodes(job, tmp_path_factory):
    folder = job.parent
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as variables:
        done = subprocess.run(
            ["sbatch", "--wait", "--output=job.out", "job.sh"],
            cwd=folder,
            env=environment(folder, variables),
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
    said = (folder / "job.out").read_text() if (folder / "job.out").exists() else ""
    assert done.returncode == 0, (done.stderr, said[-3000:])
    assert_trained_by_two(folder)
