"""The alignment view without a browser: spans of equal texts, what differs as one piece, joints by
shared bytes, SpanOPD's notes.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from viz.test_token_lens import Read
from viz.traces import NASTY, byte_pieces, made

import opdlab as opd
from opdlab.data.alignment import one_to_one, spans
from opdlab.data.notes import Alignments
from opdlab.errors import OpdlabError
from opdlab.methods import SpanOPD
from opdlab.tasks.market import tokenizers
from opdlab.viz import Alignment, payload
from opdlab.viz.alignment import draw_joints, find_pieces
from opdlab.viz.glyphs import show_piece

side = st.lists(
    st.sampled_from([b"a", b"ab", b" b", b"", "é".encode(), b"\xc3", b"<b>"]), max_size=8
)


@given(side, side)
def test_pieces_cover_both_sides_whatever_they_spell(ours, theirs):
    found = list(find_pieces(ours, theirs))
    assert [t for p in found for t in p.ours] == list(range(len(ours) if found else 0))
    assert [t for p in found for t in p.theirs] == list(range(len(theirs) if found else 0))
    for p in found:
        mine, other = (
            b"".join(s[t] for t in part) for s, part in ((ours, p.ours), (theirs, p.theirs))
        )
        assert (mine == other and len(mine) == p.size) or not p.matched
    if b"".join(ours) == b"".join(theirs):
        assert [(p.ours, p.theirs) for p in found] == [
            (s.ours, s.theirs) for s in spans(ours, theirs)
        ]
    assert sum(not p.matched for p in found) <= 1


def test_what_differs_in_the_middle_is_unmatched():
    view = Alignment(
        [b"4", b" 7", b" =", b" 85", b" ok"], [b"4", b" ", b"7", b" = ", b"58", b" ok"]
    )
    assert view.df["kind"].tolist() == ["1:1", "1:2", "unmatched", "1:1"]
    assert view.df["ours"].tolist()[2] == ["·=", "·85"]
    assert view.share == pytest.approx(4 / 6)
    assert (
        "67 % of the matched bytes in 1:1 spans (2 of 3) · 5 student tokens, 6 teacher tokens · 5"
        " bytes unmatched" in repr(view)
    )
    assert view.html().count("opd-unmatched") > 1


def test_joints_join_what_shares_bytes():
    ends = lambda above, below: [
        tuple(map(float, m))
        for m in re.findall(r"M([\d.]+) 0L([\d.]+) 20", draw_joints(above, below))
    ]
    assert ends([b"a"], [b"a"]) == [(50, 50)]
    assert len(ends([b"ab", b"c"], [b"a", b"bc"])) == 3  # ab-a, ab-bc, c-bc
    assert len(ends([b"ab", b""], [b"a", b"b"])) == 2  # what has no bytes is joined to nothing


def test_two_tokenizers_of_one_text():
    text = "ana has 4 7 apples"
    view = Alignment.of(
        text, tokenizers.words(), tokenizers.characters(), names=("words", "letters")
    )
    assert b"".join(view.ours) == b"".join(view.theirs) == text.encode()
    assert view.share == one_to_one(spans(view.ours, view.theirs))
    assert "words tokens" in repr(view)


def test_a_step_of_span_opd_shows_what_each_span_costs():
    student, teacher, task = opd.load("market", teacher="scribe")
    step = next(opd.distill(student, teacher, task, method=SpanOPD(), batch=3, steps=1, quiet=True))
    view, note = Alignment.of_trace(step.trace(), 1), step.trace().note(Alignments).alignments[1]
    assert len(view.df) == len(note["spans"])
    np.testing.assert_allclose(view.df["kl"], note["kl"][: len(view.df)])
    assert [t for row in view.df["theirs"] for t in row] == [
        show_piece(t.encode()) for t in note["teacher"]
    ]
    np.testing.assert_allclose(
        payload.unpack(payload.pack(view.data()))["kl"], -view.df["kl"], rtol=1e-3
    )  # blue: the teacher wants more
    with pytest.raises(OpdlabError, match=r"notes no spans of completion 9, only of 0, 1, 2"):
        Alignment.of_trace(step.trace(), 9)


def test_any_tokens_reach_the_page_as_data_only():
    tokens = [text.encode() for text in NASTY]
    view = Alignment(
        tokens, byte_pieces(b"".join(tokens).decode(), 3), title=NASTY[0], names=(NASTY[2], "t")
    )
    read = Read(view.html(assets=False))
    assert set(read.tags) <= {"div", "span", "script", "svg", "path"}
    assert [read.data["ours"]["word"][i] for i in read.data["ours"]["at"]] == [
        payload.shorten_word(show_piece(t)) for t in tokens
    ]
    assert "0 student tokens" in repr(Alignment([], []))


def test_a_span_without_end_is_cut_and_counted():
    view = Alignment([b"a" * 3000], byte_pieces("a" * 3000, 3))
    assert view.df["kind"].tolist() == ["1:1000"]
    assert view.html(script=False).count("<span>aaa</span>") == 60
    assert "… 940 more …" in view.html(script=False)
    assert len(view.html(assets=False)) < 20_000


def test_what_does_not_fit_is_said():
    with pytest.raises(
        OpdlabError, match=r"kl for 3 spans, but the texts have 1\. Give one number a span"
    ):
        Alignment([b"a"], [b"a"], kl=[1, 2, 3])
    with pytest.raises(OpdlabError, match=r"no spans of completion 0, only of none"):
        Alignment.of_trace(made([b"a"]))
