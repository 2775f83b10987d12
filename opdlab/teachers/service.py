"""Talk to OpenAI-compatible servers: send a request until it is answered well, and many at once.

The `openai` client sends the requests. The loop around it is ours, because here a reply with broken
JSON, another model's name or a missing text is as good as none: it is asked for again, with
back-off, and each time is charged to the budget before it is sent. Where several servers hold the
same model, `opdlab.teachers.servers` chooses the one that is asked. The key is read from the
environment for the time of a request and kept nowhere.
"""

from __future__ import annotations

import os
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from pydantic import InstanceOf

from opdlab.errors import InvalidValue, OpdlabError, TeacherError, TokenizerMismatch
from opdlab.support.expect import shortened
from opdlab.support.progress import Progress, in_notebook
from opdlab.support.validation import Count, CountOrZero, Flag, Positive, Text, validate_fields
from opdlab.teachers.budget import Budget, Usage
from opdlab.teachers.cache import Cache
from opdlab.teachers.redaction import guard_logs, holds_key, plain, without_key
from opdlab.teachers.reply import Fault, is_final, raise_error_of, read_reply
from opdlab.teachers.servers import Server, Servers

T = TypeVar("T")
LONGEST_WAIT = 120.0  # seconds to wait at most before a request is sent again
ABSURD_WAIT = 3600.0  # seconds: if a server asks us to wait longer, we give up instead
USUAL = 8 * 2**20  # bytes of a reply besides its tokens
BYTES_A_TOKEN = 2**10  # of a reply: a long token, each of its characters escaped
ABSURD_USAGE = 16  # times the worst case of a request: a server's count beyond is not believed


@dataclass(frozen=True)
class _Request:
    """A request, whichever server it goes to; see `Service.post`."""

    path: str
    body: Mapping[str, Any]
    largest: int
    is_text: bool
    at_root: bool

    def address(self, url: str) -> str:
        """Where the server of this url gets it."""
        return f"{url.removesuffix('/v1') if self.at_root else url}{self.path}"


@dataclass(eq=False)
class Service:
    """The server or servers of one model, and how to talk to them.

    Attributes:
        url: The address, with its /v1. It stands for the model in the cache.
        key_env: The environment variable that holds the key. If it is not set, no key is sent.
        timeout: Seconds from a request to the end of its reply.
        retries: Most times that a request is sent again.
        concurrency: Requests in flight at each server.
        budget: Limits on what may be spent.
        cache: A file or a `Cache`; None keeps answers as long as this object lives.
        quiet: Whether to show no progress bar.
        who: Who is behind the server, for errors: "teacher" or "sampler".
        replicas: Addresses of further servers of the same model.
        compare: Compares a server with what is known of the model, by `post`, which then asks that
            server alone; called before its first request where there are several servers.
        servers: The servers and how they fare.

    Raises:
        InvalidValue: A value cannot be right.
    """

    url: Text
    key_env: Text = "OPDLAB_API_KEY"
    timeout: Positive = 120.0
    retries: CountOrZero = 5
    concurrency: Count = 8
    budget: InstanceOf[Budget] = field(default_factory=Budget)
    cache: Any = None
    quiet: Flag = False
    who: Text = "teacher"
    replicas: tuple[Text, ...] = ()

    def __post_init__(self) -> None:
        validate_fields(self)
        if not isinstance(self.cache, (str, os.PathLike, Cache, type(None))):
            raise InvalidValue(
                f"The cache of a {self.who} is {shortened(self.cache)}. Use the path of a file, a"
                " Cache, or None."
            )
        if not all(_is_address(url) for url in (self.url, *self.replicas)):
            raise InvalidValue(
                f"The url of a {self.who} must look like http://127.0.0.1:8000/v1, without a name,"
                " password or query in it. Put the key into the environment variable"
                f" {self.key_env}."
            )
        self.url = self.url.rstrip("/")
        self.replicas = tuple(url.rstrip("/") for url in self.replicas)
        urls = (self.url, *self.replicas)
        if twice := next((url for url in urls if urls.count(url) > 1), None):
            raise InvalidValue(
                f"A {self.who} got the address {twice} twice. Give each server once."
            )
        self.servers = Servers(urls, self.concurrency)
        self.cache = self.cache if isinstance(self.cache, Cache) else Cache(self.cache)
        self._progress, self._done = Progress(0, self.who, "text", self.quiet, leave=False), 0
        self.compare: Callable[[], object] | None = None
        self._stop = threading.Event()
        self._only = threading.local()  # .server: the one that this thread's requests go to
        self._has_warned = False  # of a usage that cannot be right

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        worst: Usage,
        accept: Callable[[dict[str, Any]], T],
        retries: int | None = None,
        largest: int | None = None,
        is_text: bool = False,
        at_root: bool = False,
    ) -> T:
        """Send a request until its reply can be used.

        A try asks one server after the other until one of them answers well.

        Args:
            path: Behind the server's url.
            body: The request.
            worst: The most that it can use.
            accept: Reads the reply; raises Fault for a reply that cannot be used.
            retries: Most times to try it again; by default the service's own number.
            largest: Most bytes of the reply; by default enough for the tokens of `worst`.
            is_text: Whether a good reply is a plain text, which `accept` gets as `{"text": …}`.
            at_root: Whether `path` lies beside the /v1 of the url and not behind it.

        Returns:
            The value that `accept` returns.

        Raises:
            BudgetSpent: The request may not fit the budget; it was not sent.
            TeacherError: No usable reply came.
        """
        most = USUAL + worst.completion * BYTES_A_TOKEN if largest is None else largest
        tries = 1 + (self.retries if retries is None else retries)
        request = _Request(path, body, most, is_text, at_root)
        answer, faults, asked = self._try(request, worst, accept, tries)
        if not faults:
            return cast(T, answer)
        # Raised here, where no reply is at hand that a traceback with local variables would show.
        times = f" (asked {asked} times)" if asked > 1 else ""
        reasons = [f"{request.address(url)}: {fault}" for url, fault in faults.items()]
        said = reasons[0]
        if len(reasons) > 1:
            said = f"None of {len(reasons)} servers gives a usable answer. {'; '.join(reasons)}"
        status = list(faults.values())[-1].status
        error = TeacherError(
            f"{said}{times}. Nothing was trained on it and nothing paid for is lost."
            f" {_advice(status, self.key_env)}"
        )
        error.status = status
        raise error

    def _try(
        self,
        request: _Request,
        worst: Usage,
        accept: Callable[[dict[str, Any]], T],
        tries: int,
    ) -> tuple[T | None, dict[str, Fault], int]:
        """Send a request until its reply can be used.

        Returns:
            The accepted value and no fault, or no value and the faults by server, without the key;
            and the number of requests.
        """
        asked, faults = 0, dict[str, Fault]()
        fault = Fault("no server is left", status=None, final=True)
        for i in range(tries):
            tried: list[Server] = []
            faults.clear()
            while (server := self._take(tried)) is not None:
                answer, found = self._ask(server, request, worst, accept)
                asked += 1
                if found is None:
                    return answer, {}, asked
                fault, faults[server.url] = found, self._plain(found)
                if fault.final:  # the fault of the request: other servers would say the same
                    return None, {server.url: faults[server.url]}, asked
                tried.append(server)
                if self._stop.is_set():
                    break
            wait = _pause(i) if fault.wait is None else fault.wait
            if fault.final or i + 1 == tries or self._stop.wait(wait):
                break
        if self._chosen() is None:
            for server in self.servers.all:  # those that were not asked now say why they left
                faults.setdefault(server.url, Fault(server.reason, status=None))
        return None, faults, asked

    def _ask(
        self,
        server: Server,
        request: _Request,
        worst: Usage,
        accept: Callable[[dict[str, Any]], T],
    ) -> tuple[T | None, Fault | None]:
        """Ask a server that was taken, and give it back with what came of it."""
        began, answer, fault = time.perf_counter(), None, None
        try:
            with self.budget.hold(worst) as hold:
                began = time.perf_counter()
                reply = self._once(server, request)
                hold.used = self._usage(server, reply, worst)
            try:
                if isinstance(reply, dict):
                    raise_error_of(reply)
                    answer = accept(reply)
                else:
                    fault = reply
            except Fault as refused:
                fault = refused
        except BaseException:
            self.servers.give_back(server, 0.0, Fault("interrupted", final=True))
            raise
        shown = None if fault is None else self._plain(fault)
        leaves = self.servers.give_back(server, time.perf_counter() - began, shown)
        if leaves and len(self.servers.all) > 1 and shown is not None:
            warnings.warn(
                f"{server.url} does not answer as it should: {shown}. The other servers of this"
                f" {self.who} are asked in its place, and it is tried again after a while.",
                stacklevel=2,
            )
        return answer, fault

    def _plain(self, fault: Fault) -> Fault:
        """The same fault without the key in its words."""
        return Fault(
            self.without_key(str(fault)), wait=fault.wait, status=fault.status, final=fault.final
        )

    # Several servers.

    @property
    def asked_url(self) -> str:
        """The address of the server that this thread compares, or the first."""
        chosen = self._chosen()
        return self.url if chosen is None else chosen.url

    @property
    def shown_url(self) -> str:
        """The address, or the list of addresses, as Python writes it."""
        return repr([self.url, *self.replicas] if self.replicas else self.url)

    def compare_servers(self) -> None:
        """Compare every server with what is known of the model, before a run.

        A server that does not answer is left out with a warning, and compared when it returns.

        Raises:
            OpdlabError: No server answers, or one of them holds another model.
        """
        lost: list[TeacherError] = []
        for server in self.servers.all:
            server.is_known = False
            try:
                self._compare(server)
            except TeacherError as error:
                if error.status is not None and error.status < 500:
                    raise
                lost.append(error)
        if len(lost) == len(self.servers.all):
            raise lost[-1]
        for missing in lost:
            warnings.warn(f"A server of this {self.who} is left out: {missing}", stacklevel=2)

    def _compare(self, server: Server) -> None:
        """Compare one server, once; other threads wait until it is done."""
        with server.lock:
            if server.is_known or self.compare is None:
                return
            with self._asking_only(server):
                self.compare()
            server.is_known = True

    @contextmanager
    def _asking_only(self, server: Server) -> Iterator[None]:
        """Send the requests of this thread to one server."""
        self._only.server = server
        try:
            yield
        finally:
            self._only.server = None

    def _chosen(self) -> Server | None:
        """The server that this thread's requests go to, where it is comparing one."""
        chosen: Server | None = getattr(self._only, "server", None)
        return chosen

    def _take(self, tried: list[Server]) -> Server | None:
        """Choose the server for a request; one that was not asked before is compared first."""
        only = self._chosen()
        if only is not None:
            if only in tried:
                return None
            self.servers.take_this(only)
            return only
        while (server := self.servers.take(tried)) is not None:
            if server.is_known or self.compare is None or len(self.servers.all) == 1:
                return server
            found: TeacherError | TokenizerMismatch
            try:
                self._compare(server)
                return server
            except TeacherError as lost:
                found, is_lost = lost, lost.status is None or lost.status >= 500
            except TokenizerMismatch as other:
                found, is_lost = other, False
            except BaseException:
                self.servers.give_back(server, 0.0, Fault("interrupted", final=True))
                raise
            self.servers.give_back(server, 0.0, Fault("not compared", final=True))
            tried.append(server)
            if not is_lost:
                self.servers.refuse(server, str(found))
                warnings.warn(
                    f"{server.url} is not asked, since it is not the {self.who}: {found}",
                    stacklevel=2,
                )
        return None

    def without_key(self, text: str) -> str:
        """Return a text without the key that is in the environment at this moment.

        Args:
            text: Any text.

        Returns:
            The text with "…" where the key or a piece of it stood.
        """
        return without_key(text, os.environ.get(self.key_env, ""))

    def holds_key(self, text: str) -> bool:
        """Tell whether a text holds the key that is in the environment at this moment.

        Args:
            text: A text that is to be kept.

        Returns:
            Whether it does, as it stands or encoded.
        """
        return holds_key(text, os.environ.get(self.key_env, ""))

    def many(self, jobs: Sequence[Callable[[], T]], unit: int = 1) -> list[T]:
        """Run all jobs, several at once.

        The first error stops the jobs that have not begun, and is raised.

        Args:
            jobs: Functions without arguments.
            unit: Texts per job, for the progress bar.

        Returns:
            The results in the order of the jobs.
        """
        if not jobs:
            return []
        self._stop.clear()
        self._progress.total, self._done = unit * len(jobs), 0
        workers = min(self.concurrency * len(self.servers.all), len(jobs))
        pool = ThreadPoolExecutor(workers, thread_name_prefix=self.who)
        futures: list[Future[T]] = [pool.submit(job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
                self._show(unit)
        except BaseException as error:
            self._stop.set()
            # Requests under way are paid for: let them reach the cache, unless Ctrl-C is pressed.
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

    def _once(self, server: Server, request: _Request) -> dict[str, Any] | Fault:
        """Send one request.

        A fault is returned and not raised, so that no traceback leads to the request and its key.
        """
        client = self._connect(server)
        key = self._key()
        is_interrupted = False
        try:
            return self._send(client, request.address(server.url), request, key)
        except KeyboardInterrupt:
            is_interrupted = True
        except Fault as fault:
            return fault
        except Exception as error:
            # No known one, but its traceback would lead to the key.
            return Fault(f"the request failed ({type(error).__name__})", status=None)
        finally:
            del key
        assert is_interrupted
        raise KeyboardInterrupt

    def _send(
        self, client: Any, address: str, request: _Request, key: str
    ) -> dict[str, Any] | Fault:
        from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

        from opdlab.teachers.transport import Response, UnusableReply, limit_reply

        limit_reply(request.largest)
        headers = {"headers": {"Authorization": f"Bearer {key}"}} if key else {}
        try:
            body = dict(request.body)
            reply = client.post(address, cast_to=Response, body=body, options=headers)
        except APITimeoutError:
            return Fault(f"no answer within {self.timeout:g} s", status=None)
        except APIConnectionError as error:
            if isinstance(error.__cause__, UnusableReply):
                return Fault(str(error.__cause__), status=None, final=True)
            why = type(error.__cause__).__name__
            return Fault(f"no connection ({why})", status=None, paid=why != "ConnectError")
        except APIStatusError as error:
            return _refusal(error, key)
        except (OpenAIError, ValueError):
            return Fault("the reply cannot be read")
        if request.is_text:
            return {"text": reply.content.decode("utf-8", "replace")}
        return read_reply(reply.content)

    def _key(self) -> str:
        """The key at this moment; "" if there is none.

        Raises:
            InvalidValue: It cannot be sent as a header.
        """
        key = os.environ.get(self.key_env, "")
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise InvalidValue(
                f"The key in the environment variable {self.key_env} holds a space, a line break"
                " or another character that no key has. Set it again, without what stands around"
                " the key."
            )
        return key

    def _connect(self, server: Server) -> Any:
        """Return the client, made once. It knows no key: each request brings the key along."""
        with server.lock:
            if server.client is None:
                try:
                    from openai import OpenAI
                except ImportError:
                    raise OpdlabError(
                        f"A {self.who} behind a server needs the openai client. Install it: pip"
                        " install 'opdlab[servers]'."
                    ) from None
                from opdlab.teachers.transport import bounded_client

                guard_logs(self.key_env)
                server.client = OpenAI(
                    base_url=server.url,
                    api_key="none",
                    timeout=self.timeout,
                    max_retries=0,
                    http_client=bounded_client(self.timeout),
                )
            return server.client

    def _usage(self, server: Server, reply: dict[str, Any] | Fault, worst: Usage) -> Usage:
        """The charge for a request: the server's count if it can be right, else the worst case."""
        if isinstance(reply, Fault):
            return worst if reply.paid else Usage(requests=1)
        said = reply.get("usage")
        said = said if isinstance(said, dict) else {}
        counts: list[int] = []
        for name, most in (
            ("prompt_tokens", worst.prompt),
            ("completion_tokens", worst.completion),
        ):
            count = said.get(name)
            is_right = type(count) is int and 0 <= count <= ABSURD_USAGE * max(most, 1)
            counts.append(int(count) if is_right and count is not None else most)
            if count is not None and not is_right and not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"{server.url} says that a request used {name}={plain(count)}, which cannot be"
                    f" right. The budget is charged {most} instead, the most that the request can"
                    " use; so are further ones of this kind.",
                    stacklevel=2,
                )
        prompt, completion = counts
        return Usage(prompt, completion, requests=1)


def _refusal(error: Any, key: str) -> Fault:
    """The fault of a reply whose status says that there is no answer."""
    wait, status = _retry_after(error), error.status_code
    said = f"it answers {status}: {plain(error.response.text, key)}"
    if wait is not None and wait > ABSURD_WAIT:
        said += f", and wants to be asked again in {wait:.3g} s"
        return Fault(said, status=status, final=True, paid=False)
    wait = None if wait is None else min(wait, LONGEST_WAIT)
    return Fault(said, wait=wait, status=status, final=is_final(status), paid=False)


def _pause(i: int) -> float:
    """Seconds before try `i + 2`: half a second, doubling up to 8.

    They are somewhat random, so that many requests do not come back at once.
    """
    return min(8.0, 0.5 * 2.0**i) * random.uniform(0.75, 1.0)


def split_urls(url: str | Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Split what a user gives as `url` into the fields `url` and `replicas` of a `Service`.

    Args:
        url: The address of a server, or those of several that hold the same model.

    Returns:
        The first address, and the others.

    Raises:
        InvalidValue: There is none.
    """
    urls = (url,) if isinstance(url, str) else tuple(url)
    if not urls:
        raise InvalidValue("url got no address. Give the server's, as http://127.0.0.1:8000/v1.")
    return urls[0], urls[1:]


def _is_address(url: str) -> bool:
    """Tell whether this is an http(s) address of a host without parts that may hold a key.

    Those are user, password, query and fragment.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    secrets = "@" in parts.netloc or "?" in url or "#" in url
    return (
        parts.scheme in ("http", "https")
        and bool(parts.hostname)
        and port != 0
        and not secrets
        and url.isprintable()
        and " " not in url
    )


def _retry_after(error: Any) -> float | None:
    """Seconds that the server asks us to wait, if it says so in a number."""
    try:
        return max(0.0, float(error.response.headers.get("retry-after")))
    except (TypeError, ValueError):
        return None


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
