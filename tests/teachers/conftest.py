"""Real servers for the whole session: one in vLLM's wire format on a shipped model, with faults on
demand.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from wire import Faults, Wire, served

from opdlab import Policy
from opdlab.tasks.market import data, model
from opdlab.teachers import service


@pytest.fixture(scope="session")
def market_teacher() -> Policy:
    return model("teacher")


@pytest.fixture(scope="session")
def _wire(market_teacher) -> Iterator[tuple[Wire, Faults, str]]:
    wire = Wire(market_teacher)
    faults = Faults(wire.app())
    with served(faults) as port:
        yield wire, faults, f"http://127.0.0.1:{port}/v1"


@pytest.fixture
def wire(_wire, monkeypatch) -> tuple[Wire, Faults, str]:
    """Server, its faults and its url; waits between tries are cut short."""
    monkeypatch.setattr(service, "_pause", lambda i: 0.01)
    server, faults, url = _wire
    server.requests.clear()
    server.used.clear()
    faults.clear()
    return server, faults, url


@pytest.fixture
def serve(market_teacher, monkeypatch) -> Iterator[Callable[..., tuple[Wire, str]]]:
    """Start other servers on the same model: `serve(dialect="chat", …)`."""
    monkeypatch.setattr(service, "_pause", lambda i: 0.01)
    with ExitStack() as running:

        def start(**options: Any) -> tuple[Wire, str]:
            wire = Wire(market_teacher, **options)
            return wire, f"http://127.0.0.1:{running.enter_context(served(wire.app()))}/v1"

        yield start


@pytest.fixture(scope="session")
def scribe_url(tmp_path_factory) -> Iterator[str]:
    """`transformers serve` on the shipped scribe, as a user would start it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [
        str(Path(sys.executable).with_name("transformers")),
        "serve",
        str(data() / "scribe"),
        "--port",
        str(port),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        for _ in range(2400):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=50).read()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.5)
        else:
            raise AssertionError(log.read_text())
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
