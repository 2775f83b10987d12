"""Segments: thought and answer by the marks in a text, wherever tokens are cut, or by a column."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from viz.traces import byte_pieces, made

from opdlab.viz import PrivilegeLens, TokenLens
from opdlab.viz.segments import find_segments


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<think>carry</think>85", ["think", "answer"]),
        ("carry</think>85", ["think", "answer"]),  # the template opened it, in the prompt
        ("So: <think>carry</think>85<think>check</think>", ["answer", "think", "answer", "think"]),
        ("<think>carry", ["think"]),  # cut off
        ("a</think>b</think>c", ["think", "answer"]),  # said again in the answer
        ("<think>a<think>b</think>c", ["think", "answer"]),
        ("85", []),
        ("", []),
    ],
)
def test_marks_part_a_text_however_it_is_cut(text, wanted):
    for size in (1, 2, 3, 7, 50):
        pieces = byte_pieces(text, size)
        found = find_segments(made(pieces))
        if size == 1:
            assert [name for name, *_ in found] == wanted
            answer = "".join(
                text[first : first + n] for name, first, n in found if name == "answer"
            )
            assert not any(part in answer for part in ("carry", "check", "<think>"))
        assert sum(n for *_, n in found) == (len(pieces) if wanted else 0)


def test_a_token_belongs_where_its_last_byte_does():
    assert find_segments(made([b"a </thi", b"nk>", b"b"])) == [("think", 0, 2), ("answer", 2, 1)]
    assert find_segments(made([b"a", b" <think>b", b" </think> c", b"d"])) == [
        ("answer", 0, 1),
        ("think", 1, 1),
        ("answer", 2, 2),
    ]


def test_a_column_of_names_decides():
    trace = made([b"<think>", b"a", b"</think>", b"b"]).with_columns(
        segment=["plan", "plan", None, "code"]
    )
    assert find_segments(trace) == [("plan", 0, 2), ("", 2, 1), ("code", 3, 1)]
    assert find_segments(trace.with_columns(segment=[1, 1, 2, 2])) == [
        ("think", 0, 3),
        ("answer", 3, 1),
    ]  # numbers are no names


@given(
    st.lists(st.sampled_from([b"<think>", b"</think>", b"a", b"<", b"think>", b"/think>", b"\xff"]))
)
def test_segments_cover_every_token_once_and_neighbours_differ(pieces):
    found, at = find_segments(made(pieces)), 0
    for _, first, size in found:
        assert (first, size > 0) == (at, True)
        at += size
    assert all(one[0] != after[0] for one, after in pairwise(found))
    text = b"".join(pieces)
    assert at == (len(pieces) if b"<think>" in text or b"</think>" in text else 0)


def test_both_lenses_carry_them():
    trace = made([b"a", b"</think>", b"b"], ("student", "teacher", "teacher+hint"))
    for view in (TokenLens(trace), PrivilegeLens(trace)):
        assert view.data()["segments"] == [("think", 0, 2), ("answer", 2, 1)]
