"""A reply ends in time and within bounds, comes from the origin that was named, and gives away
nothing of the key.
"""

from __future__ import annotations

import base64
import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from opdlab.errors import TeacherError
from opdlab.teachers import Usage, transport
from opdlab.teachers.redaction import plain, without_key
from opdlab.teachers.service import Service

GOOD = b'{"model": "m", "usage": {"prompt_tokens": 3, "completion_tokens": 2}}'
KEY = "sk-opdlab-3141592653589793"


@contextmanager
def loopback(act: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A server on a free port that does `act` with each request."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.server.seen.append(
                (self.path, {name.lower(): value for name, value in self.headers.items()})
            )
            act(self)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def url_of(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


def answer(
    handler: BaseHTTPRequestHandler, body: bytes = GOOD, status: int = 200, **headers: str
) -> None:
    handler.send_response(status)
    for name, value in {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **headers,
    }.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def ask(server: ThreadingHTTPServer, **options) -> dict:
    return Service(url_of(server), **{"retries": 0, "quiet": True, **options}).post(
        "/completions", {"prompt": "a"}, Usage(9, 9, 1), dict
    )


def test_a_reply_that_drips_ends_at_the_deadline():
    """Every byte comes well within the timeout; the whole never comes."""
    stop = threading.Event()

    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        while not stop.wait(0.05):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    with loopback(drip) as server:
        began = time.monotonic()
        with pytest.raises(TeacherError, match=r"no answer within 1 s"):
            ask(server, timeout=1.0)
        stop.set()
        assert time.monotonic() - began < 60  # without a deadline it would go on for ever


def test_a_reply_has_a_largest_size(monkeypatch):
    monkeypatch.setattr(transport, "LARGEST", 1 << 20)
    with loopback(lambda handler: answer(handler, b" " * (2 << 20) + GOOD)) as server:
        with pytest.raises(TeacherError, match="the reply is longer than 1 MiB"):
            ask(server, retries=3)
        assert len(server.seen) == 1  # asking again would bring the same


def test_a_compressed_reply_is_not_unpacked():
    with loopback(
        lambda handler: answer(handler, gzip.compress(GOOD), content_encoding="gzip")
    ) as server:
        with pytest.raises(TeacherError, match="the reply is compressed, which was not asked for"):
            ask(server)
        assert server.seen[0][1]["accept-encoding"] == "identity"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_prompts_and_key_stay_at_the_origin_that_was_named(status, monkeypatch):
    monkeypatch.setenv("OPDLAB_API_KEY", KEY)
    with loopback(answer) as other:
        elsewhere = f"{url_of(other)}/completions"
        for location in (
            elsewhere,
            elsewhere.replace("127.0.0.1", "localhost"),
            elsewhere.replace("http:", "https:"),
        ):
            with loopback(
                lambda handler, to=location: answer(handler, b"", status, location=to)
            ) as server:
                with pytest.raises(
                    TeacherError,
                    match="it redirects to another origin, where neither prompts nor key are sent",
                ):
                    ask(server, retries=2)
                assert len(server.seen) == 1
        assert not other.seen


def test_a_redirect_within_the_origin_is_followed():
    def act(handler):
        if handler.path == "/v1/completions":
            answer(handler, b"", 307, location="/v1/completions/")
        else:
            answer(handler)

    with loopback(act) as server:
        assert ask(server)["model"] == "m"
        assert [path for path, _ in server.seen] == ["/v1/completions", "/v1/completions/"]


def test_a_wait_without_end_is_not_begun():
    with loopback(lambda handler: answer(handler, b"{}", 429, retry_after="1000000000")) as server:
        with pytest.raises(
            TeacherError, match=r"answers 429: {}, and wants to be asked again in 1e\+09 s"
        ):
            ask(server, retries=3)
        assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("said", "charged"),
    [
        (b'{"prompt_tokens": 3, "completion_tokens": 2}', Usage(3, 2, 1)),
        (b'{"prompt_tokens": -3, "completion_tokens": 2}', Usage(9, 2, 1)),
        (b'{"prompt_tokens": 3, "completion_tokens": 1000000000000}', Usage(3, 9, 1)),
        (b'{"prompt_tokens": true}', Usage(9, 9, 1)),
        (b'{"prompt_tokens": "3", "completion_tokens": 1.5}', Usage(9, 9, 1)),
        (b"[]", Usage(9, 9, 1)),
        (b"null", Usage(9, 9, 1)),
    ],
)
def test_a_usage_that_cannot_be_right_is_charged_at_the_worst_case(said, charged, recwarn):
    with loopback(
        lambda handler: answer(handler, b'{"model": "m", "usage": ' + said + b"}")
    ) as server:
        service = Service(url_of(server), quiet=True)
        for _ in range(2):
            service.post("/completions", {}, Usage(9, 9, 1), dict)
        assert service.budget.spent == charged + charged
        warned = [
            str(one.message) for one in recwarn if "which cannot be right" in str(one.message)
        ]
        assert len(warned) == (charged != Usage(3, 2, 1) and said.startswith(b"{"))  # once


def test_no_piece_of_the_key_is_repeated():
    hidden = [
        KEY,
        KEY[:12],
        KEY[5:20],
        base64.b64encode(f"user:{KEY}".encode()).decode(),
        f"{KEY}{KEY}",
    ]
    for text in hidden:
        said = plain(f"bad key <{text}>, sorry", KEY)
        assert "…" in said
        assert said.endswith(">, sorry")
        assert not any(KEY[i : i + 8] in said for i in range(len(KEY) - 7))
    assert without_key(f"a {KEY} b", KEY) == "a … b"
    odd = "kEy/with+odd=signs&more"
    assert "with" not in without_key("key=kEy%2Fwith%2Bodd%3Dsigns%26more", odd)
    assert plain("x" * 295 + KEY, KEY) == "x" * 295 + "…"  # cut after it is hidden, not before
    assert without_key("nothing to hide", "") == "nothing to hide"
