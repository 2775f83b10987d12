"""Spread the requests of one teacher over the servers that hold it.

    server = servers.take(tried)                  the one that should answer first
    …                                             one request
    servers.give_back(server, seconds, fault)     what came of it

A request goes to the server at which it should be answered first: the one with the least
(requests in flight + 1) x (seconds per request, measured). A server that fails leaves: it rests,
and what it was asked goes to the others. After the rest it is tried with one request; it returns if
that is answered, and rests twice as long if it is not. A server that rests is asked only where all
of them rest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from opdlab.teachers.reply import Fault

FIRST_REST = 0.5  # seconds, doubled with each failed trial
LONGEST_REST = 60.0
NEWEST = 0.2  # share of the newest request in the running mean of seconds


@dataclass(eq=False)
class Server:
    """One address of a teacher, and how it fares.

    Attributes:
        url: The address, with its /v1.
        in_flight: Requests that it has not answered yet.
        seconds: Running mean of the seconds per request; None before its first answer.
        failures: Failed trials in a row; 0 for a server that takes part.
        until: The end of its rest, by `time.monotonic`.
        reason: Why it left last, in words without the key; "" if it never did.
        is_refused: Whether it is never asked again, since it holds another model.
        is_known: Whether it was compared with what is known of the teacher.
        client: The HTTP client, once it is made.
    """

    url: str
    in_flight: int = 0
    seconds: float | None = None
    failures: int = 0
    until: float = 0.0
    reason: str = ""
    is_refused: bool = False
    is_known: bool = False
    client: Any = None

    def __post_init__(self) -> None:
        self.lock = threading.RLock()  # held while it is compared, or its client is made
        self.turn = 0  # when it was taken last, to take turns where all else is equal

    @property
    def is_resting(self) -> bool:
        """Whether it has failed and is not to be tried yet; a trial is one request alone."""
        return self.failures > 0 and (self.until > time.monotonic() or self.in_flight > 0)


class Servers:
    """The servers of one teacher.

    Args:
        urls: Their addresses.
        concurrency: Most requests in flight at each.

    Attributes:
        all: The servers, in the order of their addresses.
    """

    def __init__(self, urls: Sequence[str], concurrency: int) -> None:
        self.all = tuple(Server(url) for url in urls)
        self._concurrency = concurrency
        self._changed = threading.Condition()
        self._turn = 0

    def take(self, tried: Collection[Server] = ()) -> Server | None:
        """Choose a server for a request, after waiting where each has as many as it may have.

        Args:
            tried: Servers that have failed this request.

        Returns:
            The server, with one more request in flight; None if all were tried or refused.
        """
        with self._changed:
            while left := [s for s in self.all if s not in tried and not s.is_refused]:
                awake = [server for server in left if not server.is_resting] or left
                free = [server for server in awake if server.in_flight < self._concurrency]
                if free:
                    server = min(free, key=self._expected_seconds)
                    self._count(server)
                    return server
                self._changed.wait()
        return None

    def take_this(self, server: Server) -> None:
        """Count one more request at a server that was chosen already.

        Args:
            server: The server.
        """
        with self._changed:
            self._count(server)

    def give_back(self, server: Server, seconds: float, fault: Fault | None) -> bool:
        """Note what came of a request.

        Args:
            server: The server that `take` gave.
            seconds: How long the request took.
            fault: Why the answer cannot be used; None for a good answer. A final fault is the
                request's own and says nothing about the server.

        Returns:
            Whether the server leaves with this fault, having taken part before.
        """
        with self._changed:
            server.in_flight -= 1
            leaves = False
            if fault is None:
                mean = server.seconds
                server.seconds = seconds if mean is None else mean + NEWEST * (seconds - mean)
                server.failures = 0
            elif not fault.final:
                leaves = self._rest(server, seconds, fault)
            self._changed.notify_all()
        return leaves

    def refuse(self, server: Server, reason: str) -> None:
        """Never ask this server again.

        Args:
            server: The server.
            reason: Why, in words.
        """
        with self._changed:
            server.is_refused, server.reason = True, reason
            self._changed.notify_all()

    def _count(self, server: Server) -> None:
        self._turn += 1
        server.turn = self._turn
        server.in_flight += 1

    def _rest(self, server: Server, seconds: float, fault: Fault) -> bool:
        """Let a server rest; requests that were in flight when it left make it rest no longer."""
        server.reason = str(fault)
        now = time.monotonic()
        if server.failures and server.until > now:
            return False
        rest = FIRST_REST * 2.0 ** min(server.failures, 16)
        # A server that answers nothing costs its time-out: it rests as long as that at least.
        rest = min(LONGEST_REST, max(rest, seconds, fault.wait or 0.0))
        leaves = server.failures == 0
        server.failures += 1
        server.until = now + rest
        return leaves

    def _expected_seconds(self, server: Server) -> tuple[float, int]:
        """Seconds until a further request would be answered; a trial comes first."""
        if server.failures:
            return (server.until, server.turn) if server.is_resting else (0.0, server.turn)
        known = [one.seconds for one in self.all if one.seconds is not None]
        usual = sum(known) / len(known) if known else 1.0
        each = usual if server.seconds is None else server.seconds
        return (server.in_flight + 1) * each, server.turn
