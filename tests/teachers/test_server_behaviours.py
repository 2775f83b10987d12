"""What servers do wrong, each with its outcome: an answer, or an error that says what happened.

Every behaviour is met twice, from the first request on and after a server has introduced itself
well. After each, the same is checked: the call ended in time, memory did not grow, prompt and key
went to the named origin alone, and the key stands nowhere: not in the error and what hangs on it,
not in logs, not in the cache, not in the objects.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from hostile import Act, Asked, Hostile, hostile, http, reset

from opdlab.data.prompt import Prompt
from opdlab.errors import OpdlabError, TeacherError
from opdlab.teachers import Budget, TextServer, service

KEY = 'sk-opd"lab/3141+5926=5358&9793'
PROMPTS = [Prompt(text="What is 3 + 4? (a secret question)", id="1")]
ANSWERED = "answered"


@dataclass(frozen=True)
class Row:
    """A behaviour and its outcome.

    Attributes:
        name: Of the behaviour.
        act: What the server does with a request.
        outcome: `ANSWERED`, or a regular expression for the error.
        phases: When it is met: "greeting", "answer", or both.
        timeout: Seconds for a request; short only where the server never answers.
        tries: Requests that may be sent where the behaviour is met; 2 if trying again may help.
    """

    name: str
    act: Act
    outcome: str
    phases: tuple[str, ...] = ("greeting", "answer")
    timeout: float = 30.0
    tries: int = 2


def sends(*args: Any, **options: Any) -> Act:
    """The act of sending one fixed reply."""
    return lambda line, asked: line.sendall(http(*args, **options))


def raw(data: bytes) -> Act:
    """The act of sending these bytes."""
    return lambda line, asked: line.sendall(data)


def changes(change: Callable[[dict[str, Any]], Any], **options: Any) -> Act:
    """The act of sending a good reply after a change."""

    def act(line: Any, asked: Asked) -> None:
        reply = asked.answer()
        change(reply)
        line.sendall(http(reply, **options))

    return act


def choices(**fields: Any) -> Act:
    """A good reply whose choices have these fields."""
    return changes(lambda reply: [choice.update(fields) for choice in reply["choices"]])


def forever(piece: bytes, pause: float, first: bytes = b"") -> Act:
    """The act of sending one piece after the other until the client hangs up."""

    def act(line: Any, asked: Asked) -> None:
        line.sendall(first)
        while True:
            line.sendall(piece)
            if pause:
                time.sleep(pause)

    return act


def waits(line: Any, asked: Asked) -> None:
    """Say nothing until the client hangs up."""
    while line.recv(1):
        pass


def resets(line: Any, asked: Asked) -> None:
    line.sendall(b"HTTP/1.1 200 OK\r\n")
    reset(line)


def replies_with_two(line: Any, asked: Asked) -> None:
    """Send a second reply behind the first one, which an open line would take for the next."""
    other = asked.answer()
    for choice in other["choices"]:
        choice["text"] = "an answer to another question"
    line.sendall(http(asked.answer()) + http(other))


def truncated(line: Any, asked: Asked) -> None:
    body = json.dumps(asked.answer()).encode()
    line.sendall(http(body[:-5], length=len(body)))


def chunk(size: bytes, data: bytes) -> Act:
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    return raw(head + size + b"\r\n" + data + b"\r\n")


def chunked_well(line: Any, asked: Asked) -> None:
    body = json.dumps(asked.answer()).encode()
    chunk(f"{len(body):x}".encode(), body + b"\r\n0\r\n")(line, asked)


def redirects(status: str, to: Callable[[Asked], str]) -> Act:
    return lambda line, asked: line.sendall(http(b"", status, location=to(asked)))


def redirects_once(line: Any, asked: Asked) -> None:
    if asked.path.endswith("/again"):
        line.sendall(http(asked.answer()))
    else:
        line.sendall(http(b"", "307 Temporary Redirect", location=asked.path + "/again"))


def as_utf16(line: Any, asked: Asked) -> None:
    line.sendall(http(json.dumps(asked.answer()).encode("utf-16")))


def repeats_key(disguise: Callable[[str], str], status: str = "401 Unauthorized") -> Act:
    """Repeat in a refusal the key that came."""

    def act(line: Any, asked: Asked) -> None:
        said = f"bad key <<{disguise(asked.headers['authorization'][7:])}>>"
        line.sendall(http(said.encode(), status, content_type="text/plain"))

    return act


def of_key(send: Callable[[str, Asked], bytes]) -> Act:
    return lambda line, asked: line.sendall(send(asked.headers["authorization"][7:], asked))


def names_model_by_key(key: str, asked: Asked) -> bytes:
    return http(asked.answer() | {"model": f"model-{key[:12]}"})


def writes_key(key: str, asked: Asked) -> bytes:
    reply = asked.answer()
    for choice in reply["choices"]:
        choice["text"] = f"my key is {quote(key)}"
    return http(reply)


SSE = b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n'
DEEP = b"[" * 100_000 + b"]" * 100_000
NESTED = json.loads("[" * 70 + "]" * 70)
BOMB = zlib.compress(b"0" * 2**20)
NO_JSON, NO_OBJECT = "the reply is not JSON", "the reply is not a JSON object"
NO_LINE, NO_ANSWER = r"no connection \(\w+\)", "no answer within 1 s"
ELSEWHERE = "it redirects to another origin, where neither prompts nor key are sent"
HIDDEN = r"it answers 401: bad key <<[^0-9a-zA-Z]*…"
SLOW = {"timeout": 1.0, "tries": 2}
ONCE = {"tries": 1}
LATER = {"phases": ("answer",)}  # nobody reads texts in a greeting

BEHAVIOURS = [
    # In order, or near enough.
    Row("in order", changes(lambda reply: None), ANSWERED),
    Row("no length, closes at the end", lambda line, asked: line.sendall(
        http(asked.answer()).replace(b"content-length", b"x-was-length")), ANSWERED),
    Row("chunked", chunked_well, ANSWERED),
    Row("UTF-16", as_utf16, ANSWERED),
    Row("two replies for one request", replies_with_two, ANSWERED),
    Row("redirect within the origin", redirects_once, ANSWERED),
    Row("no content type", lambda line, asked: line.sendall(
        http(asked.answer()).replace(b"content-type", b"x-type")), ANSWERED),
    Row("a charset that unpacks", changes(lambda reply: None,
        content_type="application/json; charset=bz2"), ANSWERED),
    Row("one 100 Continue", lambda line, asked: line.sendall(
        b"HTTP/1.1 100 Continue\r\n\r\n" + http(asked.answer())), ANSWERED),
    Row("null error", changes(lambda reply: reply.update(error=None)), ANSWERED),
    Row("special tokens in a text", choices(text="<|im_end|><s>[INST]"), ANSWERED),
    Row("NUL, escape codes and right-to-left marks", choices(text="a\0b\x1b[31m\u202eb"), ANSWERED),
    Row("fields that nobody knows",
        changes(lambda reply: reply.update(x=NESTED[0:0], y={})), ANSWERED),
    # The clock.
    Row("no word", waits, NO_ANSWER, **SLOW),
    Row("slow headers", forever(b"x: y\r\n", 0.05, b"HTTP/1.1 200 OK\r\n"), NO_ANSWER, **SLOW),
    Row("a status line by drips", forever(b"H", 0.05), f"{NO_ANSWER}|{NO_LINE}", **SLOW),
    Row("100 Continue for ever",
        forever(b"HTTP/1.1 100 Continue\r\n\r\n", 0.01), NO_ANSWER, **SLOW),
    Row("102 Processing for ever",
        forever(b"HTTP/1.1 102 Processing\r\n\r\n", 0), NO_ANSWER, **SLOW),
    Row("a body by drips", forever(b" ", 0.05, http(length=10**6)), NO_ANSWER, **SLOW),
    Row("chunks by drips", forever(b"1\r\n \r\n", 0.05,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"), NO_ANSWER, **SLOW),
    Row("half a body, then nothing", forever(b"", 1.0, http(b"{", length=100)), NO_ANSWER, **SLOW),
    Row("a refusal by drips", forever(b"x", 0.05, http(status="500 No", length=10**6)),
        NO_ANSWER, **SLOW),
    Row("Retry-After of 31 years", sends({}, "429 Too Many", retry_after="1e9"),
        r"answers 429: \{\}, and wants to be asked again in 1e\+09 s", **ONCE),
    Row("Retry-After of infinity", sends({}, "503 No", retry_after="inf"),
        "answers 503.*wants to be asked again in inf s", **ONCE),
    Row("Retry-After is no number", sends({}, "429 Too Many", retry_after="nan"), "answers 429"),
    Row("Retry-After is a date", sends({}, "429 Too Many",
        retry_after="Wed, 21 Oct 2065 07:28:00 GMT"), "answers 429"),
    Row("Retry-After is negative", sends({}, "503 No", retry_after="-9"), "answers 503"),
    # Size.
    Row("a body without end", forever(b" " * 2**20, 0, http(length=10**12)),
        "the reply is longer than 8.* MiB", **ONCE),
    Row("chunks without end", forever(b"100000\r\n" + b" " * 2**20 + b"\r\n", 0,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"),
        "the reply is longer than 8.* MiB", **ONCE),
    Row("a refusal without end", forever(b"x" * 2**20, 0, http(status="400 No", length=10**12)),
        "the reply is longer than 8.* MiB", **ONCE),
    Row("a header of 100 MB", forever(b"x" * 2**20, 0, b"HTTP/1.1 200 OK\r\nx: "), NO_LINE),
    Row("headers without end", forever(b"x: y\r\n" * 9999, 0, b"HTTP/1.1 200 OK\r\n"), NO_LINE),
    Row("a compressed bomb", sends(BOMB, content_encoding="deflate"),
        "the reply is compressed, which was not asked for", **ONCE),
    Row("a compression that nobody knows", sends(b"x", content_encoding="br, gzip"),
        "the reply is compressed", **ONCE),
    Row("seven million empty lists", sends(b"[" + b"[]," * 2_600_000 + b"0]"),
        r"the reply has more than \d+ values", **ONCE),
    Row("nested 100,000 deep", sends(DEEP), "the reply is nested deeper than 64"),
    Row("nested 70 deep in a field", changes(lambda reply: reply.update(usage={"a": NESTED})),
        "the reply is nested deeper than 64"),
    Row("a text of 4 MB",
        choices(text="x" * 2**21), "a text has 2,097,152 characters where", **LATER),
    Row("a million choices", changes(lambda reply: reply.update(
        choices=reply["choices"] * 10_000)), "texts came where"),
    Row("a model's name of 1 MB", changes(lambda reply: reply.update(model="m" * 2**20)),
        "the model's name is none|another model answered"),
    # No HTTP.
    Row("SSH instead of HTTP", raw(b"SSH-2.0-OpenSSH_9.6\r\n"), NO_LINE),
    Row("nothing, and closes", lambda line, asked: None, NO_LINE),
    Row("resets the connection", resets, NO_LINE),
    Row("a length too long", truncated, f"{NO_LINE}|{NO_JSON}"),
    Row("a length too short", sends(b'{"model": "m"}', length=5), NO_JSON),
    Row("a negative length", sends(b"{}", length=-5), NO_LINE),
    Row("two lengths", raw(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}"),
        NO_LINE),
    Row("length and chunks", raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n"
        b"transfer-encoding: chunked\r\n\r\nzz\r\n"), NO_LINE),
    Row("a chunk of no size", chunk(b"zz", b"{}"), NO_LINE),
    Row("a chunk of negative size", chunk(b"-1", b"{}"), NO_LINE),
    Row("a chunk of 2^60 bytes", chunk(b"1000000000000000", b"{}"), NO_LINE),
    Row("status 101", raw(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: ws\r\n\r\n"),
        f"{NO_LINE}|{NO_JSON}"),
    Row("status 204", raw(b"HTTP/1.1 204 No Content\r\n\r\n"), NO_JSON),
    Row("status 600", sends({}, "600 What"), f"answers 600|{NO_LINE}"),
    Row("status 99999", sends({}, "99999 What"), NO_LINE),
    # Other origins.
    Row("redirect to another host", redirects("307 Moved", lambda asked: "http://localhost:9/v1"),
        ELSEWHERE, **ONCE),
    Row("redirect to another port", redirects("308 Moved", lambda asked: "http://127.0.0.1:9/v1"),
        ELSEWHERE, **ONCE),
    Row("redirect without scheme", redirects("302 Moved", lambda asked: "//example.invalid/v1"),
        ELSEWHERE, **ONCE),
    Row("redirect to https", redirects("301 Moved",
        lambda asked: f"https://{asked.headers['host']}/v1"), ELSEWHERE, **ONCE),
    Row("redirect to a file", redirects("307 Moved", lambda asked: "file:///etc/passwd"),
        ELSEWHERE, **ONCE),
    Row("redirect to nonsense",
        redirects("307 Moved", lambda asked: "http://[::1"), ELSEWHERE, **ONCE),
    Row("redirect in circles", redirects("307 Moved", lambda asked: asked.path), NO_LINE, tries=99),
    # JSON.
    Row("a page with status 200", sends(b"<html>hello</html>", content_type="text/html"), NO_JSON),
    Row("a page with status 500", sends(b"<h1>\x1b[31mInternal\x1b[0m</h1>" + b"x" * 9999,
        "500 No", content_type="text/html"), r"answers 500: <h1> \[31mInternal \[0m</h1>x+…"),
    Row("bytes that are no text", sends(b"\xff\xfe\xfa{}"), NO_JSON),
    Row("a list", sends([]), NO_OBJECT),
    Row("null", sends(b"null"), NO_OBJECT),
    Row("a number of 10,000 digits", sends(b'{"model": ' + b"9" * 10_000 + b"}"), NO_JSON),
    Row("two replies in one body", sends(b"{}{}"), NO_JSON),
    Row("one name twice", sends(b'{"model": "m", "model": "n"}'), "says one name twice"),
    Row("a stream of events", sends(SSE, content_type="text/event-stream"), NO_JSON),
    Row("an error with status 200", sends({"error": {"message": "no\x1b[2J more", "code": 503}}),
        r"answers with an error \(503\): no \[2J more"),
    # The answer itself.
    Row("the model is a dict", changes(lambda reply: reply.update(model={})),
        r"the reply has no model|another model answered: '\{\}'"),
    Row("a model's name of escape codes", changes(lambda reply: reply.update(model="\x1b]0;m\7")),
        r"the model's name is none: '\]0;m'|another model answered"),
    Row("another model", changes(lambda reply: reply.update(model="cheaper")),
        "another model answered: 'cheaper' and not 'm'", **LATER),
    Row("no choices", changes(lambda reply: reply.update(choices=[])), "no choices"),
    Row("choices by name", changes(lambda reply: reply.update(choices={"0": 1})), "no choices"),
    Row("more choices than asked for", changes(lambda reply: reply.update(
        choices=reply["choices"] * 3)), "texts came where"),
    Row("a choice is a text", changes(lambda reply: reply.update(choices=["a"])),
        "a text is missing", **LATER),
    Row("a text of numbers", choices(text=[1, 2]), "a text is missing", **LATER),
    Row("half of a character", choices(text="a\ud800"), "half of a character", **LATER),
    Row("broken off", choices(finish_reason="abort"), "broke the text off", **LATER),
    Row("a finish of another kind",
        choices(finish_reason={"a": []}), "broke the text off", **LATER),
    Row("withheld", choices(finish_reason="content_filter"), "withheld the text", **LATER),
    Row("tools instead of text", choices(text=None, finish_reason="tool_calls"),
        "a text is missing", **LATER),
    # The bill.
    Row("more tokens than asked for", changes(lambda reply: reply["usage"].update(
        completion_tokens=10**12)), r"wrote 1000000000000 tokens where 8 were asked for", **LATER),
    Row("negative usage", changes(lambda reply: reply["usage"].update(
        prompt_tokens=-10**9, completion_tokens=-1)), ANSWERED),
    Row("usage of words", changes(lambda reply: reply.update(usage={"prompt_tokens": "3",
        "completion_tokens": True})), ANSWERED),
    Row("usage of infinity", changes(lambda reply: reply["usage"].update(
        prompt_tokens=float("inf"))), ANSWERED),
    Row("usage is a list", changes(lambda reply: reply.update(usage=[1, 2])), ANSWERED),
    # The key.
    Row("repeats the key", repeats_key(str), HIDDEN, **ONCE),
    Row("repeats half of the key", repeats_key(lambda key: key[:14]), HIDDEN, **ONCE),
    Row("repeats the end of the key", repeats_key(lambda key: "***" + key[-12:]), HIDDEN, **ONCE),
    Row("the key in JSON", repeats_key(json.dumps), HIDDEN, **ONCE),
    Row("the key in JSON in JSON", repeats_key(lambda key: json.dumps(json.dumps(key))),
        HIDDEN, **ONCE),
    Row("the key in \\u escapes", repeats_key(
        lambda key: "".join(f"\\u{ord(c):04x}" for c in key)), HIDDEN, **ONCE),
    Row("the key as Python shows it", repeats_key(lambda key: ascii(key + "'")), HIDDEN, **ONCE),
    Row("the key in a URL", repeats_key(lambda key: quote(key, safe="")), HIDDEN, **ONCE),
    Row("the key in a URL, all of it", repeats_key(
        lambda key: "".join(f"%{ord(c):02X}" for c in key)), HIDDEN, **ONCE),
    Row("the key in a URL, twice", repeats_key(lambda key: quote(quote(key, safe=""))),
        HIDDEN, **ONCE),
    Row("the key in HTML", repeats_key(html.escape), HIDDEN, **ONCE),
    Row("the key in HTML, all of it", repeats_key(
        lambda key: "".join(f"&#{ord(c)};" for c in key)), HIDDEN, **ONCE),
    Row("the key in base64", repeats_key(lambda key: base64.b64encode(key.encode()).decode()),
        HIDDEN, **ONCE),
    Row("the key in a base64 header", repeats_key(
        lambda key: base64.urlsafe_b64encode(f"Bearer {key}".encode()).decode()),
        r"it answers 401: bad key <<\w+…", **ONCE),
    Row("the key in hexadecimal", repeats_key(lambda key: key.encode().hex(":").upper()),
        HIDDEN, **ONCE),
    Row("the key in bytes", repeats_key(lambda key: str(list(key.encode()))), HIDDEN, **ONCE),
    Row("the key with line breaks", repeats_key(
        lambda key: "\n".join(key[i : i + 5] for i in range(0, len(key), 5))), HIDDEN, **ONCE),
    Row("the key in capitals", repeats_key(str.upper), HIDDEN, **ONCE),
    Row("the key backwards", repeats_key(lambda key: key[::-1]), HIDDEN, **ONCE),
    Row("the key in the reason", of_key(lambda key, asked: http({}, f"401 bad {key}")),
        "answers 401", **ONCE),
    Row("the key in a header",
        of_key(lambda key, asked: http(asked.answer(), x_key=key)), ANSWERED),
    Row("the key in a redirect", of_key(
        lambda key, asked: http(b"", "307 No", location=f"{asked.path}?k={quote(key)}")),
        NO_LINE, tries=99),
    Row("the key as the model's name", of_key(names_model_by_key),
        "the model's name holds the key|another model answered: 'model-…'"),
    Row("the key in a text",
        of_key(writes_key), "a text holds the key", phases=("answer",), tries=1),
    Row("the key in an error with status 200", of_key(
        lambda key, asked: http({"error": f"{key} may not"})), "answers with an error: … may not"),
]  # fmt: skip
MEETINGS = [(row, phase) for row in BEHAVIOURS for phase in row.phases]


def test_there_are_many():
    assert len(BEHAVIOURS) >= 60
    assert len({row.name for row in BEHAVIOURS}) == len(BEHAVIOURS)


@pytest.fixture
def _quick(monkeypatch):
    monkeypatch.setenv("OPDLAB_API_KEY", KEY)
    monkeypatch.setattr(service, "_pause", lambda i: 0.01)


@pytest.mark.usefixtures("_quick")
@pytest.mark.filterwarnings("ignore:.*which cannot be right")
@pytest.mark.parametrize(
    ("row", "phase"), MEETINGS, ids=[f"{row.name}-{phase}" for row, phase in MEETINGS]
)
def test_every_behaviour_has_its_outcome(row, phase, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)

    def act(line: Any, asked: Asked) -> None:
        if phase == "answer" and asked.is_greeting:
            line.sendall(http(asked.answer()))
        else:
            row.act(line, asked)

    with hostile(act) as server:
        one = TextServer(
            server.url,
            cache=tmp_path / "c.sqlite",
            budget=Budget(tokens=10**6),
            timeout=row.timeout,
            retries=1,
            quiet=True,
        )
        before, began = psutil.Process().memory_info().rss, time.monotonic()
        said = outcome_of(one, row)
        spent, grown = time.monotonic() - began, psutil.Process().memory_info().rss - before
        met = len(server.seen) - (phase == "answer" and row.outcome != ANSWERED)
    assert spent < 2 * row.timeout + 20
    assert grown < 200 * 2**20
    assert row.outcome == ANSWERED or 1 <= met <= row.tries
    assert 0 < one.service.budget.spent.tokens < 10**5 or "it answers" in said
    check_no_key([said, caplog.text, repr(one), repr(vars(one)), repr(vars(one.service))], tmp_path)


def outcome_of(one: TextServer, row: Row) -> str:
    """Ask for texts, check what comes of it, and return all that a user could see of it."""
    if row.outcome == ANSWERED:
        first = one.write(PROMPTS, 2, max_new_tokens=4, temperature=1.0)
        assert all(first[0])
        second = one.write(PROMPTS, 1, max_new_tokens=3, temperature=1.0)
        assert "another question" not in second[0][0]
        return repr(first)
    with pytest.raises(TeacherError, match=row.outcome) as caught:
        one.write(PROMPTS, 2, max_new_tokens=4, temperature=1.0)
    error = caught.value
    assert error.__cause__ is None
    assert error.__context__ is None
    assert "Nothing was trained on it" in str(error)
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    return str(error) + "".join(shown.format())


def check_no_key(texts: list[str], folder: Path) -> None:
    files = [path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file()]
    forms = {KEY, quote(KEY, safe=""), quote(KEY), json.dumps(KEY)[1:-1], html.escape(KEY)}
    forms |= {KEY.encode().hex(), base64.b64encode(KEY.encode()).decode()[:-4]}
    forms |= {form[:12] for form in forms} | {KEY[8:20], KEY[-12:]}
    for text in [*texts, *files]:
        for form in forms:
            # The test's own locals in a traceback are not what is looked for.
            assert form not in "\n".join(line for line in text.split("\n") if "KEY" not in line), (
                form
            )


@pytest.mark.usefixtures("_quick")
def test_a_request_ends_in_time_among_many_threads():
    """Thirty threads wait for one server that never answers; each ends at its own deadline."""
    prompts = [Prompt(text=f"question {i}", id=str(i)) for i in range(30)]

    def act(line: Any, asked: Asked) -> None:
        if asked.is_greeting:
            line.sendall(http(asked.answer()))
        else:
            forever(b"HTTP/1.1 100 Continue\r\n\r\n", 0.05)(line, asked)

    with hostile(act) as server:
        one = TextServer(server.url, cache=None, timeout=1.5, retries=0, concurrency=30, quiet=True)
        one.meet(prompts)
        began = time.monotonic()
        with pytest.raises(TeacherError, match=r"no answer within 1.5 s"):
            one.write(prompts, max_new_tokens=2)
        assert time.monotonic() - began < 20


@pytest.mark.usefixtures("_quick")
def test_a_name_that_is_not_resolved_in_time(monkeypatch):
    import socket

    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(5) or [])
    one = TextServer("http://teacher.invalid/v1", cache=None, timeout=0.5, retries=0, quiet=True)
    began = time.monotonic()
    with pytest.raises(TeacherError, match=r"no answer within 0.5 s"):
        one.write(PROMPTS)
    assert time.monotonic() - began < 4


@pytest.mark.usefixtures("_quick")
def test_an_interrupt_shows_no_key(monkeypatch):
    def act(line: Any, asked: Asked) -> None:
        raise OSError

    with hostile(act) as server:
        one = TextServer(server.url, cache=None, retries=0, quiet=True)
        client = one.service._connect(one.service.servers.all[0])
        monkeypatch.setattr(client, "post", interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            one.meet(PROMPTS)
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    text = "".join(line for line in shown.format(chain=True) if "KEY" not in line)
    assert KEY not in text
    assert repr(KEY)[1:-1] not in text


def interrupt(*args: Any, **options: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("key", ["sk-1234\n", "sk 12345678", "sk-ключ-12345", "\tsk-12345678"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key, monkeypatch):
    monkeypatch.setenv("OPDLAB_API_KEY", key)
    with pytest.raises(OpdlabError, match="OPDLAB_API_KEY holds a space, a line break") as caught:
        TextServer("http://127.0.0.1:9/v1", cache=None, retries=0).meet(PROMPTS)
    assert key not in str(caught.value)


@pytest.mark.usefixtures("_quick")
def test_nothing_paid_for_is_asked_twice_after_a_fault(tmp_path):
    """The answers before a fault are in the cache, and asking again brings the others alone."""
    prompts = [Prompt(text=f"question {i}", id=str(i)) for i in range(6)]
    server: Hostile

    def act(line: Any, asked: Asked) -> None:
        line.sendall(http(asked.answer() if asked.number < 4 else b"<html>"))

    with hostile(act) as server:
        one = TextServer(
            server.url, cache=tmp_path / "c", retries=0, concurrency=1, quiet=True, timeout=30
        )
        with pytest.raises(TeacherError, match="not JSON"):
            one.write(prompts, max_new_tokens=2)
        server.act = None
        one.write(prompts, max_new_tokens=2)
        asked = [one.body["prompt"] for one in server.seen if not one.is_greeting]
    assert set(asked) == {f"question {i}" for i in range(6)}
    assert all(asked.count(f"question {i}") == 1 for i in range(3))
