"""Servers of models as processes that can be killed and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
MARKET = HERE.parents[1] / "data" / "market"
START = 900  # seconds that a server may take: ten times what an idle machine needs


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Server:
    """A process that serves one model, and can be killed and started again."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str], health: str) -> None:
        self.port = free_port()
        self.command = [part.replace("PORT", str(self.port)) for part in command]
        self.log, self.env, self.health = log, env, health
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self, wait: bool = True) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                stdout=out,
                stderr=out,
                env={**os.environ, **self.env},
                start_new_session=True,
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        end = time.monotonic() + START
        while time.monotonic() < end:
            assert self.process is not None
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{self.port}{self.health}", timeout=5
                ):
                    return
            except OSError:
                time.sleep(0.5)
        self.kill()
        raise RuntimeError(f"The server did not start:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its engine is a process of its own
            self.process.wait()
            self.process = None


def vllm_server(model: str, folder: Path, *options: str, **env: str) -> Server:
    """vLLM's server on one of the market's models, in float32 and without compiling."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(MARKET / model), "--served-model-name", model]
    command += ["--host", "127.0.0.1", "--port", "PORT", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "256", "--kv-cache-memory-bytes", str(1 << 28)]
    settings = {
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",  # compiling two small functions takes longer than all else
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return Server([*command, *options], folder / f"{model}.log", {**settings, **env}, "/health")
