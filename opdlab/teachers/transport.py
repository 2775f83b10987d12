"""The HTTP client that servers are asked through.

It bounds a request in time, up to the last byte of its reply, and a reply in size. It follows no
redirect to another origin, and uses each connection for one request, so that a server's surplus
bytes are never taken for the answer to the next question.
"""

from __future__ import annotations

import queue
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from openai import DefaultHttpxClient

# The openai client is built on httpx or on its successor httpx2: take the one that it uses.
if TYPE_CHECKING:
    import httpcore as _core
    import httpx as _http
else:
    _http = sys.modules[DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]
    _core = sys.modules[_http.HTTPTransport()._pool.__class__.__module__.partition(".")[0]]

LARGEST = 256 * 2**20  # bytes of a reply, whatever was asked
BYTES_A_VALUE = 8  # bytes per JSON value: a reply with more values than its size allows is refused
PIECE = 16 * 2**10  # bytes of a request that are sent before the clock is looked at
VALUES = re.compile(rb"[,\[{]")  # each JSON value but the first of a list or object follows one

Response = _http.Response
_request = threading.local()  # .deadline: when the request of this thread must have ended


class UnusableReply(_http.ReadError):
    """A reply that is not read, with the reason in words."""


class _Bounded(_http.SyncByteStream):
    """A reply's body that stays within `largest` bytes, or raises."""

    def __init__(self, stream: Any, largest: int) -> None:
        self._stream, self._largest = stream, largest

    def __iter__(self) -> Iterator[bytes]:
        size = values = 0
        for chunk in self._stream:
            size += len(chunk)
            values += len(VALUES.findall(chunk))
            if size > self._largest:
                raise UnusableReply(f"the reply is longer than {self._largest / 2**20:.3g} MiB")
            if values > self._largest // BYTES_A_VALUE:
                raise UnusableReply(
                    f"the reply has more than {self._largest // BYTES_A_VALUE} values"
                )
            yield chunk

    def close(self) -> None:
        self._stream.close()


class _TimedStream(_core.NetworkStream):
    """A connection whose reads and writes end by the deadline of the thread's request."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        read: bytes = self._stream.read(max_bytes, _left(timeout, _core.ReadTimeout))
        return read

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), PIECE):
            left = _left(timeout, _core.WriteTimeout)
            self._stream.write(buffer[start : start + PIECE], left)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> Any:
        left = _left(timeout, _core.ConnectTimeout)
        # A handshake reads often, each time with the whole timeout: hang up from outside.
        line = self._stream.get_extra_info("socket")
        watch = threading.Timer(left, _hang_up, [line])
        watch.daemon = True
        watch.start()
        try:
            return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, left))
        finally:
            watch.cancel()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _TimedBackend(_core.NetworkBackend):
    """Makes connections that end by the deadline of the thread's request.

    Args:
        backend: Makes the connections themselves.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> Any:
        options = {"local_address": local_address, "socket_options": socket_options}
        addresses = _resolve(host, port, _left(timeout, _core.ConnectTimeout))
        for address in addresses[:-1]:
            with suppress(_core.ConnectError):
                left = _left(timeout, _core.ConnectTimeout)
                return _TimedStream(self._backend.connect_tcp(address, port, left, **options))
        left = _left(timeout, _core.ConnectTimeout)
        return _TimedStream(self._backend.connect_tcp(addresses[-1], port, left, **options))


class _Client(DefaultHttpxClient):
    """A client that closes its connections when nobody holds it, as openai's own does."""

    def __del__(self, _suppress: type[suppress] = suppress) -> None:
        with _suppress(Exception):  # at the end of the program, this module may be gone
            self.close()


def bounded_client(timeout: float) -> Any:
    """Make a client whose requests take at most `timeout` seconds, up to the last byte read.

    Compressed replies are not asked for and not read, since a few bytes could stand for gigabytes.

    A request raises `UnusableReply` if its reply is compressed, too long (see `limit_reply`), or
    redirects to another origin.

    Args:
        timeout: Seconds from sending a request to the last byte of its reply.

    Returns:
        An httpx client for `openai.OpenAI(http_client=…)`.
    """

    def start(request: Any) -> None:
        # A redirected request inherits the extensions, and so the deadline.
        extensions = request.extensions
        _request.deadline = extensions.setdefault("opdlab_deadline", time.monotonic() + timeout)

    def check(response: Any) -> None:
        request, encoding = response.request, response.headers.get("content-encoding", "identity")
        if response.has_redirect_location and not _stays(request.url, response):
            raise UnusableReply(
                "it redirects to another origin, where neither prompts nor key are sent"
            )
        if encoding.strip().lower() not in ("", "identity"):
            raise UnusableReply("the reply is compressed, which was not asked for")
        # A charset may name a codec that is none for texts, such as bz2.
        response.encoding = "utf-8"
        response.stream = _Bounded(response.stream, getattr(_request, "largest", LARGEST))

    limits: Any = _http.Limits(max_connections=1000, max_keepalive_connections=0)
    client = _Client(
        timeout=timeout,
        max_redirects=5,
        headers={"Accept-Encoding": "identity"},
        limits=limits,
        event_hooks={"request": [start], "response": [check]},
    )
    for transport in (client._transport, *client._mounts.values()):
        pool = getattr(transport, "_pool", None)
        if pool is not None:
            pool._network_backend = _TimedBackend(pool._network_backend)
    return client


def limit_reply(largest: int) -> None:
    """Set the largest reply to the requests of this thread, in bytes.

    Args:
        largest: Bytes; `LARGEST` is the limit if this is more.
    """
    _request.largest = min(largest, LARGEST)


def _left(timeout: float | None, late: type[Exception]) -> float:
    """Seconds until the deadline, at most `timeout`; raises `late` if none are left."""
    left: float = _request.deadline - time.monotonic()
    if left <= 0:
        raise late("the deadline of the request has passed")
    return left if timeout is None else min(timeout, left)


def _resolve(host: str, port: int, timeout: float) -> list[str]:
    """The addresses of a host. The system's own look-up knows no deadline, so it has a thread."""
    answers: queue.SimpleQueue[list[str] | OSError] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put([str(entry[4][0]) for entry in found])
        except (OSError, UnicodeError) as error:
            answers.put(OSError(str(error)))

    threading.Thread(target=look_up, name="teacher-look-up", daemon=True).start()
    try:
        answer = answers.get(timeout=timeout)
    except queue.Empty:
        raise _core.ConnectTimeout("the host's name was not resolved in time") from None
    if isinstance(answer, OSError):
        raise _core.ConnectError(str(answer))
    return answer


def _hang_up(line: Any) -> None:
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)


def _stays(url: Any, response: Any) -> bool:
    """Tell whether a redirect leads to an address of the same origin."""
    try:
        return _is_same_origin(url, url.join(response.headers["location"]))
    except _http.InvalidURL:
        return False


def _is_same_origin(one: Any, other: Any) -> bool:
    return (one.scheme, one.host, _port(one)) == (other.scheme, other.host, _port(other))


def _port(url: Any) -> int:
    return url.port or (443 if url.scheme == "https" else 80)
