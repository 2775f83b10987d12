"""Make foreign words fit for error messages and logs: short, printable, and without the key.

A key is looked for in pieces and in disguise: a text is read as it stands and with its escapes
decoded (URL, JSON, Python, HTML, quoted-printable), without separators and line breaks, in upper
and lower case, forwards and backwards, and in base64, base32, hexadecimal and decimal.
"""

from __future__ import annotations

import base64
import html
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

LONGEST = 300  # characters of a server's words that a message repeats
READ = 2**16  # characters of a server's words that are looked at
WINDOW = 8  # characters of a key that may not stand anywhere together
WRITTEN = 16  # characters of a key that may not stand together in a text that is kept
LAYERS = 3  # escapes within escapes that are decoded
ESCAPES = re.compile(
    r"%u(?P<url>[0-9a-f]{4})|%(?P<percent>[0-9a-f]{2})|=(?P<quoted>[0-9a-f]{2})"
    r"|\\u\{?(?P<json>[0-9a-f]{4,6})\}?|\\x(?P<python>[0-9a-f]{2})|\\(?P<octal>[0-7]{3})"
    r"|(?P<html>&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z]{2,31});)",
    re.IGNORECASE,
)
HEX_PREFIX = re.compile(r"\\x|0x|%", re.IGNORECASE)
# Loggers of the clients under us. Their records hold headers and reasons as the server said them.
LOGGERS = (
    "openai",
    "openai._base_client",
    "openai._legacy_response",
    "openai._response",
    *(
        f"{name}{part}"
        for name in ("httpx", "httpx2", "httpcore", "httpcore2")
        for part in ("", ".connection", ".http11", ".http2", ".proxy", ".socks")
    ),
)


def plain(said: object, key: str = "") -> str:
    """Return what a server said as one short printable line, without the key.

    Args:
        said: Anything that a server said.
        key: The API key to leave out; "" if there is none.

    Returns:
        At most `LONGEST` characters, then "…" if something was cut.
    """
    text = without_key(str(said)[:READ], key)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def without_key(text: str, key: str) -> str:
    """Replace the key by "…", also in pieces, escaped and encoded.

    Pieces have `WINDOW` characters or more.

    Args:
        text: A text that may repeat the key.
        key: The API key; "" changes nothing.

    Returns:
        The text with "…" in each place where a part of the key stood.
    """
    hidden = bytearray(len(text))
    for start, end in _find(text, key, WINDOW):
        hidden[start:end] = b"\1" * (end - start)
    parts = []
    for i, character in enumerate(text):
        if not hidden[i]:
            parts.append(character)
        elif i == 0 or not hidden[i - 1]:
            parts.append("…")
    return "".join(parts)


def holds_key(text: str, key: str) -> bool:
    """Tell whether a text holds the key, or `WRITTEN` characters of it, in any of its forms.

    Keys shorter than `WINDOW` are no secrets but words such as "EMPTY", and are not looked for.

    Args:
        text: A text that is to be kept.
        key: The API key; "" if there is none.

    Returns:
        Whether it does.
    """
    return len(key) >= WINDOW and next(_find(text, key, WRITTEN), None) is not None


class WithoutKey(logging.Filter):
    """Takes the key out of log records.

    Args:
        key_env: The environment variable that holds the key.
    """

    def __init__(self, key_env: str) -> None:
        super().__init__()
        self.key_env = key_env

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace the record's message by one without the key.

        Args:
            record: A record that is about to be written.

        Returns:
            True: the record is written.
        """
        key = os.environ.get(self.key_env, "")
        if key:
            record.msg, record.args = without_key(record.getMessage(), key), ()
        return True


def guard_logs(key_env: str) -> None:
    """Take the key out of the log records of the HTTP clients, from now on.

    Args:
        key_env: The environment variable that holds the key.
    """
    for name in LOGGERS:
        logger = logging.getLogger(name)
        filters = [one for one in logger.filters if isinstance(one, WithoutKey)]
        if not any(one.key_env == key_env for one in filters):
            logger.addFilter(WithoutKey(key_env))


# A text as it can be read: its characters, and for each the place where it stands in the text.
Reading = tuple[str, list[tuple[int, int]]]


def _find(text: str, key: str, window: int) -> Iterator[tuple[int, int]]:
    """Yield the places of the key's pieces in a text, as start and end."""
    if not key:
        return
    if len(key) < WINDOW:  # too short for anything but the word itself
        yield from ((m.start(), m.end()) for m in re.finditer(re.escape(key), text))
        return
    pieces = _pieces(key, window)
    for characters, places in _readings(text):
        for piece in pieces:
            start = characters.find(piece)
            while start >= 0:
                yield places[start][0], places[start + len(piece) - 1][1]
                start = characters.find(piece, start + 1)


def _readings(text: str) -> Iterator[Reading]:
    """The ways to read a text: in lower case, whole and with letters and digits only."""
    reading: Reading = (text, [(i, i + 1) for i in range(len(text))])
    yield _select(reading, lambda character: True)
    yield _select(reading, str.isalnum)
    if HEX_PREFIX.search(text):
        yield _select(_replace(reading, HEX_PREFIX, lambda match: ""), str.isalnum)
    for _ in range(LAYERS):
        decoded = _replace(reading, ESCAPES, _decode)
        if decoded[0] == reading[0]:
            return
        reading = decoded
        yield _select(reading, lambda character: True)
        yield _select(reading, str.isalnum)


def _replace(
    reading: Reading, pattern: re.Pattern[str], by: Callable[[re.Match[str]], str]
) -> Reading:
    """A reading with every match replaced; its characters stand where the match stood."""
    text, places = reading
    characters: list[str] = []
    found: list[tuple[int, int]] = []
    last = 0
    for match in pattern.finditer(text):
        characters.append(text[last : match.start()])
        found += places[last : match.start()]
        new = by(match)
        characters.append(new)
        found += [(places[match.start()][0], places[match.end() - 1][1])] * len(new)
        last = match.end()
    return "".join([*characters, text[last:]]), found + places[last:]


def _decode(match: re.Match[str]) -> str:
    kind = str(match.lastgroup)
    if kind == "html":
        return html.unescape(match[0])
    number = int(match[kind], 8 if kind == "octal" else 16)
    return chr(number) if number < 0x110000 else ""


def _select(reading: Reading, is_kept: Callable[[str], bool]) -> Reading:
    """A reading in lower case, with some of its characters only."""
    kept = [(c, place) for c, place in zip(*reading, strict=True) if is_kept(c)]
    lower = [(low, place) for c, place in kept for low in c.lower()]
    return "".join(c for c, _ in lower), [place for _, place in lower]


@lru_cache(maxsize=16)
def _pieces(key: str, window: int) -> frozenset[str]:
    """The pieces that may not stand anywhere: of the key and of its encodings."""
    raw = key.encode("utf-8", "surrogateescape")
    pieces: set[str] = set()
    for form in (key, key[::-1], *_base64_and_base32(raw)):
        for read in (form.lower(), "".join(c.lower() for c in form if c.isalnum())):
            size = min(window, len(read))
            if size >= WINDOW:
                pieces |= {read[i : i + size] for i in range(len(read) - size + 1)}
    size = min(window, len(raw))
    for i in range(len(raw) - size + 1):
        part = raw[i : i + size]
        pieces |= {part.hex(), "".join(map(str, part)), "".join(f"{byte:o}" for byte in part)}
    return frozenset(pieces)


def _base64_and_base32(raw: bytes) -> Iterable[str]:
    """The key in base64 and base32, for every number of bytes that may stand before it."""
    for coder, whole, bits in ((base64.b64encode, 3, 6), (base64.b32encode, 5, 5)):
        for before in range(whole):
            coded = coder(b"\0" * before + raw).decode().rstrip("=")
            # The first and last characters mix the key with the bytes around it.
            yield coded[-(-before * 8 // bits) : -1]
