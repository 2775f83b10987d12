"""Alignment by bytes: whatever two tokenizers do to one text, their spans spell it again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdlab.data.alignment import (
    Span,
    decode_bytes,
    nats_per_byte,
    one_to_one,
    spans,
    starts_character,
    text_of,
)
from opdlab.errors import OpdlabError
from opdlab.tasks.market import market, tokenizers


@st.composite
def two_cuts(draw) -> tuple[list[bytes], list[bytes]]:
    """One text and two ways to cut it, inside characters too; some tokens add nothing."""
    text = draw(st.text(max_size=12)).encode()
    sides = []
    for _ in range(2):
        cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
        sides.append([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)])
    return sides[0], sides[1]


@given(two_cuts())
def test_spans_of_any_two_tokenizations(sides):
    ours, theirs = sides
    found = spans(ours, theirs)
    for span in found:
        mine, other = (
            b"".join(side[t] for t in part)
            for side, part in ((ours, span.ours), (theirs, span.theirs))
        )
        assert mine == other
        assert len(mine) == span.size > 0
    if b"".join(ours):
        assert [t for span in found for t in span.ours] == list(range(len(ours)))
        assert [t for span in found for t in span.theirs] == list(range(len(theirs)))
    else:
        assert found == []


@given(two_cuts())
def test_no_span_can_be_split(sides):
    """Inside a span no place is a boundary of both."""
    ends = [{sum(map(len, side[:t])) for t in range(len(side) + 1)} for side in sides]
    at = 0
    for span in spans(*sides):
        assert not any(p in ends[0] and p in ends[1] for p in range(at + 1, at + span.size))
        at += span.size
        assert at in ends[0] & ends[1]


@given(two_cuts())
def test_sides_are_alike(sides):
    forth, back = spans(*sides), spans(*reversed(sides))
    assert [Span(s.theirs, s.ours, s.size) for s in forth] == back


def test_by_hand():
    found = spans([b"4", b" 7", b" =", b" 85", b""], [b"4", b" ", b"7 ", b"=", b" 8", b"5"])
    assert found == [
        Span(range(1), range(1), 1),
        Span(range(1, 3), range(1, 4), 4),
        Span(range(3, 5), range(4, 6), 3),
    ]
    assert [s.single for s in found] == [True, False, False]
    assert one_to_one(found) == 1 / 8


def test_never_by_index():
    """Equal numbers of tokens that mean different text: an index would pair b with bc."""
    found = spans([b"a", b"b", b"cd"], [b"a", b"bc", b"d"])
    assert found == [Span(range(1), range(1), 1), Span(range(1, 3), range(1, 3), 3)]


def test_one_tokenizer_is_one_to_one():
    pieces = [b"a", b"\xf0\x9f", b"\x99\x82", b" b"]
    assert one_to_one(spans(pieces, pieces)) == 1.0
    assert one_to_one([]) == 1.0


def test_other_texts_are_refused():
    with pytest.raises(
        OpdlabError, match=r"differ from byte 2 on: b'c' and b'd'\. Tokenize the very text"
    ):
        spans([b"ab", b"c"], [b"abd"])
    with pytest.raises(OpdlabError, match="differ from byte 2 on"):
        spans([b"ab"], [b"ab", b"c"])


@pytest.mark.parametrize("kind", [tokenizers.words, tokenizers.characters])
def test_spoken_is_the_decoded_text(kind):
    tokenizer = kind()
    for prompt in market(secret=True).prompts(5):
        ids = [*tokenizer(prompt.answer)["input_ids"], tokenizer.eos_token_id]
        pieces = decode_bytes(tokenizer, ids)
        assert (
            b"".join(pieces).decode()
            == prompt.answer
            == tokenizer.decode(ids, skip_special_tokens=True)
        )
        assert pieces[-1] == b""
        assert len(pieces) == len(ids)


@given(text=st.text(max_size=12))
def test_spoken_bytes_of_a_byte_level_tokenizer(bytes_bpe, text):
    assert (
        b"".join(decode_bytes(bytes_bpe, [*bytes_bpe(text)["input_ids"], bytes_bpe.eos_token_id]))
        == text.encode()
    )


def test_a_space_that_is_text_stays(bytes_bpe, words):
    assert decode_bytes(bytes_bpe, bytes_bpe(" the")["input_ids"])[0].startswith(b" ")
    ids = words("4 7")["input_ids"]
    assert decode_bytes(words, ids) == [b"4", b" 7"]
    assert decode_bytes(words, [words.eos_token_id, *ids]) == [
        b"",
        b"4",
        b" 7",
    ], "the first token that says something"


def test_two_real_tokenizers_of_one_text(words, bytes_bpe):
    text = "4 7 + 3 8 = 8 5"
    ours, theirs = (decode_bytes(t, t(text)["input_ids"]) for t in (words, tokenizers.characters()))
    found = spans(ours, theirs)
    assert [len(s.theirs) for s in found] == [1] + [2] * 7
    assert one_to_one(found) == 1 / len(text)
    assert one_to_one(spans(ours, decode_bytes(bytes_bpe, bytes_bpe(text)["input_ids"]))) < 1


def test_nats_per_byte():
    assert nats_per_byte([1.0, 2.0, 0.5], ["ab", "é"]) == 3.5 / 4
    with pytest.raises(OpdlabError, match="no bytes to divide by"):
        nats_per_byte([1.0], ["", ""])


def test_characters_are_kept_whole():
    smile = "🙂".encode()
    assert text_of([b"a", smile[:2]]) == "a"
    assert text_of([b"a", smile[:2], smile[2:]]) == "a🙂"
    assert text_of([b"a", smile[:2], b"b"]) == "a�b"
    starts = [b"a", smile[:2], b"", " é".encode()]
    assert all(starts_character(piece) for piece in starts)
    assert not any(starts_character(piece) for piece in (smile[2:], "é".encode()[1:]))
