"""A cluster of SLURM on this machine: one controller and two nodes, without its authentication."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
FOLDERS = os.pathsep.join(["/usr/sbin", "/usr/local/sbin", os.environ.get("PATH", "")])
PATIENCE = 300  # seconds in which the nodes are ready; an idle machine needs 3

# SLURM orders nodes by name. The first one must have a name that resolves, this machine's.
CONFIG = r"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName={host},zzz NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]},{ports[2]}] \
    CPUs=1 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def find(program: str) -> str | None:
    """Find a program of SLURM, also where only root looks."""
    return shutil.which(program, path=FOLDERS)


def free_ports(count: int) -> list[int]:
    """Find ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Run the cluster, whose nodes say that they have 8 GPUs each.

    Args:
        folder: For its files.

    Yields:
        Environment variables with which SLURM's commands find it.
    """
    host = socket.gethostname().partition(".")[0]
    for name in ("state", f"spool-{host}", "spool-zzz"):
        (folder / name).mkdir()
    ports = sorted(free_ports(3))
    values = {"host": host, "user": getpass.getuser(), "folder": folder, "ports": ports}
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(**values))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-7]\n")
    env = {**os.environ, "SLURM_CONF": str(config), "PATH": FOLDERS}
    commands = [
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", host],
        ["slurmd", "-D", "-N", "zzz"],
    ]
    running = []
    try:
        for command in commands:
            with (folder / "said.log").open("ab") as said:
                running.append(subprocess.Popen(command, env=env, stdout=said, stderr=said))
        _wait(env)
        yield env
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(PATIENCE)


def _wait(env: dict[str, str]) -> None:
    """Wait until both nodes are idle."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        said = subprocess.run(
            ["sinfo", "--noheader", "--format=%D %t"],
            env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if said.stdout.split() == ["2", "idle"]:
            return
        time.sleep(0.5)
    raise RuntimeError(f"SLURM's nodes are not ready: {said.stdout} {said.stderr}")
