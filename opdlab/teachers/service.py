"""Talking to an OpenAI-compatible server: one request until it is answered well, many at once, nothing else.

The `openai` client does the talking. The loop around it is ours, because here a reply with broken JSON, another model's
name or a missing text is as good as none: it is asked for again, with back-off, and each time is charged to the budget
before it is sent. The key is read from the environment for the time of a request and kept nowhere.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from opdlab.errors import OpdlabError, TeacherError
from opdlab.progress import Progress, in_notebook
from opdlab.teachers.budget import Budget, Usage
from opdlab.teachers.cache import Cache

T = TypeVar("T")
AGAIN = (408, 409, 425, 429)  # and 5xx: asking again may help
LONGEST_WAIT = 120.0  # seconds that a server may ask us to wait


class Fault(Exception):
    """A reply that cannot be used; unless `final`, asking again may bring a better one. `paid`: the server did the work."""

    def __init__(self, what: str, *, wait: float | None = None, status: int | None = 200, final: bool = False, paid: bool = True) -> None:
        super().__init__(what)
        self.wait, self.status, self.final, self.paid = wait, status, final, paid


@dataclass(eq=False)
class Service:
    """A server at `url` (with its /v1). timeout: seconds without a byte. retries: of one request. concurrency: requests in flight.

    key_env names the environment variable that holds the key; where it is not set, none is sent. cache: a file, or a
    `Cache`; None remembers answers as long as this object lives.
    """

    url: str
    key_env: str = "OPDLAB_API_KEY"
    timeout: float = 120.0
    retries: int = 5
    concurrency: int = 8
    budget: Budget = field(default_factory=Budget)
    cache: Any = None
    quiet: bool = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password or parts.query:
            raise OpdlabError(
                "The url of a teacher must look like http://127.0.0.1:8000/v1, without a name, password or query in it. "
                f"Put the key into the environment variable {self.key_env}."
            )
        self.url = self.url.rstrip("/")
        self.cache = self.cache if isinstance(self.cache, Cache) else Cache(self.cache)
        self._progress, self._done = Progress(0, "teacher", "text", self.quiet, leave=False), 0
        self._client: Any = None
        self._lock, self._stop = threading.Lock(), threading.Event()

    def post(self, path: str, body: Mapping[str, Any], worst: Usage, accept: Callable[[dict[str, Any]], T],
             retries: int | None = None) -> T:  # fmt: skip
        """The answer to one request as `accept` reads it (it raises Fault for what cannot be used). `path` may be a whole url.

        Raises BudgetSpent before sending, TeacherError where no usable reply came.
        """
        tries = 1 + (self.retries if retries is None else retries)
        for i in range(tries):
            with self.budget.hold(worst) as hold:
                reply = self._once(path, body)
                hold.used = _usage(reply, worst)
            try:
                if isinstance(reply, dict):
                    return accept(reply)
                fault = reply
            except Fault as refused:
                fault = refused
            if fault.final or i + 1 == tries or self._stop.wait(_pause(i) if fault.wait is None else fault.wait):
                break
        times = f" (asked {i + 1} times)" if i else ""
        error = TeacherError(
            f"{self.url}{'' if '://' in path else path}: {fault}{times}. Nothing was trained on it and nothing paid for is lost. "
            f"{_advice(fault.status, self.key_env)}"
        )
        error.status = fault.status
        raise error

    def many(self, jobs: Sequence[Callable[[], T]], unit: int = 1) -> list[T]:
        """Run all jobs, some at once, and give their results in order; the first error stops those that have not begun.

        unit: texts a job, for the progress bar.
        """
        if not jobs:
            return []
        self._stop.clear()
        self._progress.total, self._done = unit * len(jobs), 0
        pool = ThreadPoolExecutor(min(self.concurrency, len(jobs)), thread_name_prefix="teacher")
        futures: list[Future[T]] = [pool.submit(job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                self._show(unit)
        except BaseException as error:
            self._stop.set()
            # what is under way is paid for: let it reach the cache, unless somebody presses Ctrl-C
            pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
            raise
        finally:
            pool.shutdown(wait=False)
            if not in_notebook():
                self._progress.close()
        return [future.result() for future in futures]

    def _show(self, unit: int) -> None:
        self._done += unit
        spent, cost = self.budget.spent, {}
        if any(self.budget.prices):
            cost["cost"] = f"{self.budget.price(spent):.4f}"
        self._progress.update(self._done, tokens=f"{spent.tokens:,}", **cost)

    def _once(self, path: str, body: Mapping[str, Any]) -> dict[str, Any] | Fault:
        """Send one request. A fault is returned and not raised, so that no traceback leads to the request and its key."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

        key = os.environ.get(self.key_env, "")
        headers = {"headers": {"Authorization": f"Bearer {key}"}} if key else {}
        try:
            reply = self._talk().post(path, cast_to=object, body=dict(body), options=headers)
        except APITimeoutError:
            return Fault(f"no answer within {self.timeout:g} s", status=None)
        except APIConnectionError as error:
            why = type(error.__cause__).__name__
            return Fault(f"no connection ({why})", status=None, paid=why != "ConnectError")
        except APIStatusError as error:
            final = error.status_code < 500 and error.status_code not in AGAIN
            said = f"it answers {error.status_code}: {plain(error.response.text, key)}"
            return Fault(said, wait=_retry_after(error), status=error.status_code, final=final, paid=False)
        except (OpenAIError, ValueError, RecursionError):
            return Fault("the reply is not JSON")
        return reply if isinstance(reply, dict) else Fault("the reply is not a JSON object")

    def _talk(self) -> Any:
        """The client, made once. It knows no key: each request brings it along."""
        with self._lock:
            if self._client is None:
                try:
                    from openai import OpenAI
                except ImportError:
                    raise OpdlabError(
                        "Teachers behind a server need the openai client. Install it: pip install 'opdlab[servers]'."
                    ) from None
                self._client = OpenAI(base_url=self.url, api_key="none", timeout=self.timeout, max_retries=0)
            return self._client


def plain(said: Any, key: str = "") -> str:
    """What a server said, fit for an error message: short, printable, without the key."""
    text = str(said).replace(key, "…") if key else str(said)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 300 else text[:300] + "…"


def _pause(i: int) -> float:
    """Seconds before try `i + 2`: half a second, doubling up to 8, and somewhat random so that many do not come back at once."""
    return min(8.0, 0.5 * 2**i) * random.uniform(0.75, 1.0)


def _retry_after(error: Any) -> float | None:
    try:
        return min(LONGEST_WAIT, max(0.0, float(error.response.headers.get("retry-after"))))
    except (TypeError, ValueError):
        return None


def _usage(reply: dict[str, Any] | Fault, worst: Usage) -> Usage:
    """What the server says the request used; where it does not say, the worst case."""
    if isinstance(reply, Fault):
        return worst if reply.paid else Usage(requests=1)
    said = reply.get("usage")
    counts = [said.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(said, dict) else [None, None]
    prompt, completion = (
        n if type(n) is int and n >= 0 else most for n, most in zip(counts, (worst.prompt, worst.completion), strict=True)
    )
    return Usage(prompt, completion, requests=1)


def _advice(status: int | None, key_env: str) -> str:
    if status is None or status >= 500:
        return "Start the server or wait for it (its log may say more), then go on with the run."
    if status in (401, 403):
        return f"Put the right key into the environment variable {key_env}."
    if status == 404:
        return "Check the address (it ends in /v1) and the model's name."
    if status == 429:
        return "Wait, lower concurrency=, then go on with the run."
    return "Mend the server or what it is asked for, then go on with the run."
