"""A server on a real socket that does whatever it is told with each request, HTTP or not."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Asked:
    """A request as it came.

    Attributes:
        path: Behind the host.
        headers: By name in lower case.
        body: The JSON in it.
        number: Which request to this server it is, from 0 on.
    """

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    number: int

    def answer(self) -> dict[str, Any]:
        """The reply of a server in order, with as many texts as were asked for."""
        n = self.body.get("n", 1)
        return {
            "id": "a",
            "object": "text_completion",
            "model": "m",
            "choices": [
                {"index": i, "text": f"text {i}", "finish_reason": "stop"} for i in range(n)
            ],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2 * n, "total_tokens": 3 + 2 * n},
        }

    @property
    def is_greeting(self) -> bool:
        return self.body.get("max_tokens") == 1


Act = Callable[[socket.socket, Asked], None]


@dataclass
class Hostile:
    """The server; `act` may be changed at any time.

    Attributes:
        act: Gets the connection and the request, and sends what it likes.
        seen: All requests.
        stop: Is set when the test has ended, for acts that go on for ever.
    """

    act: Act | None = None
    seen: list[Asked] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def serve(self, listening: socket.socket) -> None:
        while not self.stop.is_set():
            with suppress(TimeoutError):
                try:
                    line, _ = listening.accept()
                except TimeoutError:
                    continue
                except OSError:
                    return
                threading.Thread(target=self.handle, args=(line,), daemon=True).start()

    def handle(self, line: socket.socket) -> None:
        line.settimeout(30)
        with line, suppress(OSError, ValueError):
            while True:
                asked = self.read(line)
                if asked is None:
                    return
                self.seen.append(asked)
                if self.act is None:
                    line.sendall(http(asked.answer()))
                else:
                    self.act(line, asked)
                    return

    def read(self, line: socket.socket) -> Asked | None:
        got = b""
        while b"\r\n\r\n" not in got:
            piece = line.recv(65536)
            if not piece:
                return None
            got += piece
        head, _, body = got.partition(b"\r\n\r\n")
        first, *rest = head.decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (r.partition(":") for r in rest)
        }
        while len(body) < int(headers.get("content-length", 0)):
            body += line.recv(65536)
        said = json.loads(body) if body else {}
        return Asked(first.split(" ")[1], headers, said, len(self.seen))


def http(
    body: Any = b"", status: str = "200 OK", length: int | None = None, **headers: str
) -> bytes:
    """A whole HTTP reply. Names of headers are written with _ for -."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {
        "content-type": "application/json",
        "content-length": str(len(raw) if length is None else length),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items() if value is not None)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode("utf-8", "surrogateescape") + raw


def reset(line: socket.socket) -> None:
    """End a connection by a reset rather than by a goodbye."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.close()


@contextmanager
def hostile(act: Act | None = None) -> Iterator[Hostile]:
    """Run a server."""
    server = Hostile(act)
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        listening.settimeout(0.2)
        server.port = listening.getsockname()[1]
        thread = threading.Thread(target=server.serve, args=(listening,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.stop.set()
            thread.join(5)
