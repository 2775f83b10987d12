"""A Python for tests that start many processes: it runs programs in copies of one that is ready.

Loading torch, transformers and peft takes some ten seconds of a core. A test that runs a command of
opdlab is not about that, so `python()` names a program that is called like Python's own and loads
nothing: a server, which has loaded all, forks, and the copy runs the command in a process of its
own, with the caller's files, folder, variables, signals and exit status. Tests of what loading
itself does, of kills, and of the installed command use `sys.executable`.
"""

from __future__ import annotations

import atexit
import functools
import os
import shlex
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

HERE = Path(__file__).parent


@functools.cache
def python() -> str:
    """Start the server of this process, if none runs yet.

    Returns:
        The path of a program that takes the arguments of `python`. It is `sys.executable`, with a
        warning, where a library starts threads when it is loaded, as some old versions do: such a
        process cannot be forked.
    """
    folder = tempfile.TemporaryDirectory(prefix="opdlab-warm-")
    socket, program = Path(folder.name) / "socket", Path(folder.name) / "python"
    server = subprocess.Popen(
        [sys.executable, str(HERE / "server.py"), str(socket)],
        stdin=subprocess.PIPE,  # the server ends when this end is closed
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    said = server.stdout.readline()
    if said == b"threads\n":
        warnings.warn("A library has threads, so that processes start cold.", stacklevel=2)
        server.communicate()
        folder.cleanup()
        return sys.executable
    assert said == b"ready\n", "the server did not start"
    client = [sys.executable, "-I", "-S", str(HERE / "client.py"), str(socket), sys.executable]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n', encoding="utf-8")
    program.chmod(0o755)

    def end(owner: int = os.getpid()) -> None:
        if os.getpid() == owner and server.stdin is not None:
            server.stdin.close()
            server.wait()
            folder.cleanup()

    atexit.register(end)
    return str(program)
