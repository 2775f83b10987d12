"""Called in place of Python: hands a program to the server, passes signals on, ends as it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from protocol import at_loading, can_run

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Run the program of the command line."""
    address, real, *arguments = sys.argv[1:]
    variables = dict(os.environ)
    if not can_run(arguments):
        os.execv(real, [real, *arguments])
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    request = {"arguments": arguments, "folder": os.getcwd(), "variables": variables}
    request["at_loading"] = at_loading(variables)
    request["ignores_interrupts"] = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    line = json.dumps(request).encode()
    socket.send_fds(server, [len(line).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(line)
    answers = server.makefile("r")
    first = answers.readline().strip()
    if first == "other variables":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        os.execv(real, [real, *arguments])
    process = int(first)
    for number in FORWARDED:
        signal.signal(number, lambda number, _: os.kill(process, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    status = int(answers.readline() or -signal.SIGKILL)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


main()
