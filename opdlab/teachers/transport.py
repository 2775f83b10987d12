"""The HTTP client that servers are asked through.

It bounds a reply in time and size, and follows no redirect to another origin.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from openai import DefaultHttpxClient

# The openai client is built on httpx or on its successor httpx2: take the one that it uses.
if TYPE_CHECKING:
    import httpx as _http
else:
    _http = sys.modules[DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]

LARGEST = 256 * 2**20  # bytes of a reply


class UnusableReply(_http.ReadError):
    """A reply that is not read, with the reason in words."""


class _Bounded(_http.SyncByteStream):
    """A reply's body that ends by the deadline and within `LARGEST` bytes, or raises."""

    def __init__(self, stream: Any, deadline: float) -> None:
        self._stream, self._deadline = stream, deadline

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for chunk in self._stream:
            size += len(chunk)
            if size > LARGEST:
                raise UnusableReply(f"the reply is longer than {LARGEST >> 20} MiB")
            if time.monotonic() > self._deadline:
                raise _http.ReadTimeout("the reply does not end")
            yield chunk

    def close(self) -> None:
        self._stream.close()


class _Client(DefaultHttpxClient):
    """A client that closes its connections when nobody holds it, as openai's own does."""

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()


def bounded_client(timeout: float) -> Any:
    """Make a client whose requests take at most `timeout` seconds, up to the last byte read.

    Compressed replies are not asked for and not read, since a few bytes could stand for gigabytes.

    A request raises `UnusableReply` if its reply is compressed, longer than `LARGEST` bytes, or
    redirects to another origin.

    Args:
        timeout: Seconds from sending a request to the last byte of its reply.

    Returns:
        An httpx client for `openai.OpenAI(http_client=…)`.
    """

    def start(request: Any) -> None:
        request.extensions.setdefault("opdlab_deadline", time.monotonic() + timeout)

    def check(response: Any) -> None:
        request, encoding = response.request, response.headers.get("content-encoding", "identity")
        if response.has_redirect_location and not _is_same_origin(
            request.url, request.url.join(response.headers["location"])
        ):
            raise UnusableReply(
                "it redirects to another origin, where neither prompts nor key are sent"
            )
        if encoding.strip().lower() not in ("", "identity"):
            raise UnusableReply("the reply is compressed, which was not asked for")
        response.stream = _Bounded(response.stream, request.extensions["opdlab_deadline"])

    return _Client(
        timeout=timeout,
        max_redirects=5,
        headers={"Accept-Encoding": "identity"},
        event_hooks={"request": [start], "response": [check]},
    )


def _is_same_origin(one: Any, other: Any) -> bool:
    return (one.scheme, one.host, _port(one)) == (other.scheme, other.host, _port(other))


def _port(url: Any) -> int:
    return url.port or (443 if url.scheme == "https" else 80)
