"""Loads what opdlab's commands load, then forks a process for every program that it is sent."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from protocol import at_loading

LOADED = (
    "torch.distributed.run",
    "transformers.models.llama.modeling_llama",
    "peft",
    "accelerate",
    "pandas",
    "pyarrow.parquet",
    "scipy.stats",
)


class Server:
    """Forks for its callers, and tells each how its process ended.

    Attributes:
        running: The connection of each caller whose process runs, by the process's number.
    """

    def __init__(self, address: str) -> None:
        self.running: dict[int, socket.socket] = {}
        self.loading = at_loading(dict(os.environ))
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address)
        self.listener.listen(64)
        self.wake, self.waker = os.pipe()  # written to when a process ends
        os.set_blocking(self.waker, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.waker)

    def serve(self) -> dict[str, Any]:
        """Serve until the tests end. Returns only in a forked process: the program to run."""
        while True:
            watched = [0, self.listener, self.wake, *self.running.values()]
            ready, _, _ = select.select(watched, [], [])
            if 0 in ready:
                self.end()
            for process, client in self.running.items():
                if client in ready:  # the caller was killed
                    os.killpg(process, signal.SIGKILL)
            if self.wake in ready:
                os.read(self.wake, 4096)
            self.report()
            if self.listener in ready and (request := self.accept()):
                return request

    def end(self) -> None:
        """End with all processes."""
        for process in self.running:
            os.killpg(process, signal.SIGKILL)
        os._exit(0)

    def report(self) -> None:
        """Tell the callers of processes that have ended."""
        while self.running:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                return
            client = self.running.pop(process)
            with contextlib.suppress(OSError):  # the caller is gone
                client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            client.close()

    def accept(self) -> dict[str, Any] | None:
        """Fork for one caller. Returns its request in the new process, None in this one."""
        client, _ = self.listener.accept()
        request, files = receive(client)
        process = 0
        if request["at_loading"] != self.loading:
            client.sendall(b"other variables\n")
            client.close()
        elif process := os.fork():
            with contextlib.suppress(PermissionError):  # the new process was faster
                os.setpgid(process, process)
            self.running[process] = client
            client.sendall(f"{process}\n".encode())
        else:
            os.setpgid(0, 0)
            self.leave(client, files)
            # The server ignores Ctrl-C where the tests run in the background; its callers need not.
            ignores = request["ignores_interrupts"]
            signal.signal(signal.SIGINT, signal.SIG_IGN if ignores else signal.default_int_handler)
            return request
        for file in files:
            os.close(file)
        return None

    def leave(self, client: socket.socket, files: list[int]) -> None:
        """Drop, in a new process, what belongs to the server, and take the caller's files."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for one in (self.listener, client, *self.running.values()):
            one.close()
        for target, file in enumerate(files):
            os.dup2(file, target)
        for file in (self.wake, self.waker, *files):
            os.close(file)


def receive(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Read a request and the caller's standard input, output and error."""
    head, files, _, _ = socket.recv_fds(client, 8, 3)
    length, body = int.from_bytes(head, "big"), b""
    while len(body) < length:
        body += client.recv(length - len(body))
    return json.loads(body), files


def run(request: dict[str, Any]) -> None:
    """Run a program in this process as Python would."""
    os.environ.clear()
    os.environ.update(request["variables"])
    os.chdir(request["folder"])
    arguments = request["arguments"]
    is_unbuffered = arguments[0] == "-u" or bool(os.environ.get("PYTHONUNBUFFERED"))
    kind, *rest = arguments[1:] if arguments[0] == "-u" else arguments
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = stream(1, is_unbuffered, "strict")
    sys.stderr = sys.__stderr__ = stream(2, True, "backslashreplace")
    if kind == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        program = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(program))  # noqa: S102  # what -c is
    elif kind == "-m":
        sys.path[0], sys.argv = os.getcwd(), list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(kind)), [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


def stream(file: int, is_unbuffered: bool, errors: str) -> io.TextIOWrapper:
    """Open standard output or error anew."""
    coding, _, given = os.environ.get("PYTHONIOENCODING", "").partition(":")
    return os.fdopen(
        file,
        "w",
        buffering=1 if is_unbuffered or os.isatty(file) else -1,
        encoding=coding or "utf-8",
        errors=given or errors,
        closefd=False,
    )


def run_and_end(request: dict[str, Any]) -> None:
    """Run a program and end this process as Python would, but for freeing every object."""
    status: object = 0
    is_interrupted = False
    try:
        run(request)
    except SystemExit as end:
        status = end.code
    except BaseException as error:  # printed, as Python does
        is_interrupted, status = isinstance(error, KeyboardInterrupt), 1
        sys.excepthook(type(error), error, error.__traceback__)
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # waits for threads; Python calls both
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            file.flush()
    if is_interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(int(status or 0) & 0xFF)


def other_threads() -> set[str]:
    """The names of threads of this process that a fork would lose, beside this one."""
    others = [task for task in os.scandir("/proc/self/task") if int(task.name) != os.getpid()]
    names = {Path(task, "comm").read_text().strip() for task in others}
    return names - {"jemalloc_bg_thd"}  # pyarrow's allocator starts its thread again after a fork


def main() -> dict[str, Any]:
    """Load the libraries and serve.

    Says "ready" first, or "threads" and ends where a library has started threads of its own.
    """
    # Without this PyTorch 2.6 starts threads for compiling when it is loaded.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    for name in LOADED:
        importlib.import_module(name)
    import opdlab

    for name in opdlab.__all__:
        getattr(opdlab, name)
    server = Server(sys.argv[1])
    if other_threads():
        print("threads", flush=True)
        sys.exit()
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    return server.serve()


if __name__ == "__main__":
    run_and_end(main())
