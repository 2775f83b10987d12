"""Tokens as they are drawn: byte-exact groups that decode, with what cannot be seen made visible.

A piece of UTF-8 is no text, so tokens are joined until their bytes decode; the group is one glyph
and its tokens lie under it. Nothing is stripped or replaced: a mark (`⏎`) stands beside the text
that it shows, so the parts always re-join.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

_NAMED = {"\n": "⏎", "\t": "⇥"}
# They shape their neighbours, so they are drawn only where they stand alone.
_JOINERS = "\u200c\u200d"
_SPECIAL = re.compile(
    r"<\|[^<>|\s]+\|>|</?s>|<(?:bos|eos|pad|unk|system|user|assistant|start_of_turn|end_of_turn)>|\[(?:CLS|SEP|PAD|UNK|EOS|BOS)\]"
)
Part = tuple[str, str]  # a shown text, and the text that it stands for


@dataclass(frozen=True)
class Group:
    """Neighbouring tokens whose bytes decode together.

    Attributes:
        lead: Leading spaces.
        parts: The rest: each shown text with the text that it stands for.
        tokens: The number of tokens in the group.
        special: Whether it is a special token such as `<eos>`.
    """

    lead: str
    parts: tuple[Part, ...]
    tokens: int
    special: bool = False

    @property
    def text(self) -> str:
        """The text itself, without any mark."""
        return self.lead + "".join(raw for _, raw in self.parts)


def group_pieces(pieces: Iterable[bytes]) -> list[Group]:
    """Return the pieces of a text as groups whose texts re-join to the whole, decoded.

    Bytes that are no UTF-8 give U+FFFD.

    Args:
        pieces: The bytes of each token.

    Returns:
        Groups in order; the sum of their `tokens` is the number of pieces.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    out: list[Group] = []
    raw, text, count = b"", "", 0
    for piece in [*pieces, None]:
        if count and (
            piece is None or (piece[:1] and piece[0] & 0xC0 != 0x80)
        ):  # no continuation comes: close what is open
            out.append(_group(raw, text + decoder.decode(b"", final=True), count))
            raw, text, count = b"", "", 0
        if piece is None:
            break
        if not count and (alone := _group_alone(piece)):
            out.append(alone)
            continue
        raw, text, count = raw + piece, text + decoder.decode(piece), count + 1
        if not decoder.getstate()[0]:
            out.append(_group(raw, text, count))
            raw, text, count = b"", "", 0
    return out


@lru_cache(maxsize=65_536)
def show_piece(piece: bytes) -> str:
    r"""Return one token as lists show it.

    Spaces are `·`, controls have names, stray bytes are `\xf0`, and no bytes are `∅`.

    Args:
        piece: The token's bytes.

    Returns:
        Its name, never empty.
    """
    text = _decode(piece)
    if _is_plain(text):
        return text.replace(" ", "·") or "∅"
    return "".join("·" if c == " " else seen for seen, c in _parts(text)) or "∅"


def clean_text(text: str) -> str:
    """Return any string as one that UTF-8 can hold.

    Args:
        text: Any string, also one with lone surrogates.

    Returns:
        The text, with "?" for each lone surrogate.
    """
    return text.encode("utf-8", "replace").decode()


@lru_cache(maxsize=65_536)
def _group_alone(piece: bytes) -> Group | None:
    """The group of a piece that is whole characters; None for one that leaves a character open."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(piece)
    return None if decoder.getstate()[0] else _group(piece, text, 1)


def _group(raw: bytes, text: str, tokens: int) -> Group:
    if not text or _SPECIAL.fullmatch(text):
        return Group("", ((text or "∅", text),), tokens, special=bool(text))
    if "\ufffd" in text and _decode(raw) != text:  # not UTF-8 at all: show the bytes
        return Group("", ((_decode(raw), text),), tokens)
    body = text.lstrip(" ")
    lead = text[: len(text) - len(body)] if body else ""
    return Group(lead, tuple(_join_plain(_parts(text[len(lead) :]))), tokens)


def _decode(piece: bytes) -> str:
    return piece.decode("utf-8", "backslashreplace")


def _is_plain(text: str) -> bool:
    """Whether all of a text but spaces within it is seen as it is: the quick way through texts."""
    return text.isprintable() and not any(
        unicodedata.category(c)[0] == "M" for c in (*text[:1], *text[-1:])
    )


def _parts(text: str) -> list[Part]:
    """Character by character: the shown text and the character."""
    body = text.rstrip(" ")
    if body and _is_plain(body):
        return [(body, body), *[("·", " ")] * (len(text) - len(body))]
    return [
        (_show_character(c, i in (0, len(text) - 1), i >= len(body)), c) for i, c in enumerate(text)
    ]


def _show_character(c: str, edge: bool, trailing: bool) -> str:
    if c == " ":
        return "·" if trailing else c
    kind = unicodedata.category(c)
    hidden = kind[0] in "CZ" and kind != "Co"
    if c in _NAMED or not hidden or (c in _JOINERS and not edge):
        return "◌" + c if edge and kind[0] == "M" else _NAMED.get(c, c)
    return f"‹{ord(c):02x}›"


def _join_plain(parts: Iterable[Part]) -> Iterable[Part]:
    """Neighbours that are seen as they are become one part."""
    plain = ""
    for seen, raw in parts:
        if seen == raw:
            plain += raw
            continue
        if plain:
            yield plain, plain
            plain = ""
        yield seen, raw
    if plain:
        yield plain, plain
