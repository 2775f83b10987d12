"""Three teachers, one of them a server in another process, which is killed during the run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import opdlab as opd
from opdlab import MultiTeacher, TopK
from opdlab.errors import TeacherError
from opdlab.tasks.market import model
from opdlab.teachers import LogprobServer, service

NAMES = ("served", "local", "told")
SCRIPT = Path(__file__).parent / "serve_wire.py"
METHOD = opd.OPD("forward_kl", top_k=TopK(6, by="teacher"))


class Server:
    """`serve_wire.py` in a process of its own, on one port for all its lives."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), str(SCRIPT.parent)])
        command = [sys.executable, str(SCRIPT), str(self.port)]
        self.process = subprocess.Popen(command, env=environment)
        for _ in range(2400):
            try:
                socket.create_connection(("127.0.0.1", self.port), 5).close()
                return
            except OSError:
                assert self.process.poll() is None
                time.sleep(0.25)
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(service, "_pause", lambda i: 0.01)
    one = Server()
    try:
        yield one
    finally:
        one.kill()


def task() -> opd.Task:
    drawn = opd.tasks.market().prompts(12, seed=1)
    prompts = [replace(p, metadata={"subject": NAMES[i % 3]}) for i, p in enumerate(drawn)]
    return opd.tasks.from_records(
        prompts, test=0, verify=opd.tasks.market().verify, max_new_tokens=10
    )


def make(port: int) -> MultiTeacher:
    """The server, a local model, and a local model that sees the hints."""
    served = LogprobServer(
        f"http://127.0.0.1:{port}/v1", k=6, cache=None, quiet=True, retries=2, timeout=120
    )
    local = model("teacher")
    return MultiTeacher(
        {"served": served, "local": local, "told": model("novice").seeing()}, route="subject"
    )


def begin(port: int, folder: Path) -> opd.Run:
    options = {"steps": 4, "batch": 6, "seed": 3, "quiet": True, "save_every": 1}
    return opd.distill(model("student"), make(port), task(), method=METHOD, save=folder, **options)


def test_a_run_survives_the_death_of_its_server_and_is_taken_up(server, tmp_path):
    whole = begin(server.port, tmp_path / "whole").train()

    run = begin(server.port, tmp_path / "run")
    next(run)
    server.kill()
    with pytest.raises(TeacherError, match="Teacher 'served'"):
        next(run)
    assert run.done == 1  # nothing moved
    server.start()
    next(run)  # the same object goes on
    assert run.history["loss"].tolist() == whole.history["loss"].tolist()[:2]

    server.kill()
    del run
    server.start()
    again = opd.resume(
        tmp_path / "run", model("student"), make(server.port), task(), method=METHOD, quiet=True
    )
    assert again.done == 2
    again.train()
    assert again.history["loss"].tolist() == whole.history["loss"].tolist()
    report = again.teacher.report(again.history)
    assert report["rows"].tolist() == whole.teacher.report(whole.history)["rows"].tolist()
    assert report["rows"].sum() == 24
    assert report["paid"]["served"] > 0
    assert report["paid"][["local", "told"]].sum() == 0
