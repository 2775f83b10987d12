"""Make foreign words fit for error messages: short, printable, and without the key."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote

LONGEST = 300  # characters of a server's words that a message repeats
WINDOW = 8  # characters of a key that may not stand anywhere together


def plain(said: object, key: str = "") -> str:
    """Return what a server said as one short printable line, without the key.

    Args:
        said: Anything that a server said.
        key: The API key to leave out; "" if there is none.

    Returns:
        At most `LONGEST` characters, then "…" if something was cut.
    """
    text = without_key(str(said), key)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def without_key(text: str, key: str) -> str:
    """Replace the key by "…", also in pieces and in other encodings.

    Pieces have `WINDOW` characters or more; the encodings are those of URLs, JSON and base64.

    Args:
        text: A text that may repeat the key.
        key: The API key; "" changes nothing.

    Returns:
        The text with "…" in each place where a part of the key stood.
    """
    if not key:
        return text
    hidden = [False] * len(text)
    for form in _forms(key):
        size = min(WINDOW, len(form))
        for piece in {form[i : i + size] for i in range(len(form) - size + 1)}:
            start = text.find(piece)
            while start >= 0:
                hidden[start : start + size] = [True] * size
                start = text.find(piece, start + 1)
    parts = []
    for i, character in enumerate(text):
        if not hidden[i]:
            parts.append(character)
        elif i == 0 or not hidden[i - 1]:
            parts.append("…")
    return "".join(parts)


def _forms(key: str) -> set[str]:
    """The key and its encodings.

    Base64 depends on how many bytes stand before the key, modulo 3.
    """
    raw = key.encode("utf-8", "surrogateescape")
    forms = {key, quote(raw, safe=""), json.dumps(key)[1:-1]}
    for before in range(3):
        coded = base64.b64encode(b"\0" * before + raw).decode().rstrip("=")
        # The first and last characters mix the key with the characters around it.
        forms.add(coded[4 if before else 0 : -1])
    return {form for form in forms if len(form) >= min(WINDOW, len(key))}
