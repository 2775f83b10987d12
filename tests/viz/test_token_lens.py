"""The lens without a browser: tokens re-join, nothing becomes markup, numbers are those of the
trace.
"""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from viz.traces import NASTY, by_method, byte_pieces, made

import opdlab
from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.models.policy import sample
from opdlab.viz import TokenLens, payload
from opdlab.viz.channels import find_channels
from opdlab.viz.duel import FEWER, LEAST, find_duel
from opdlab.viz.glyphs import group_pieces, show_piece
from opdlab.viz.markup import INK, format_number, strength_of

pieces = st.lists(
    st.sampled_from(NASTY).map(str.encode)
    | st.binary(max_size=4)
    | st.text(max_size=6).map(str.encode),
    max_size=12,
)


class Read(HTMLParser):
    """What a parser makes of a fragment: tags, attributes, the strip's text and the data block."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: set[str] = set()
        self.text, self.block, self.depth, self.inside = "", "", 0, ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}
        look = dict(attrs).get("class", "")
        self.inside = look if tag in ("script", "style") else self.inside
        self.depth += self.depth > 0 or look == "opd-strip"

    def handle_endtag(self, tag):
        self.inside = "" if tag in ("script", "style") else self.inside
        self.depth -= self.depth > 0

    def handle_data(self, text):
        self.text += text if self.depth else ""
        self.block += text if self.inside == "opd-data" else ""

    @property
    def data(self) -> dict:
        return payload.unpack(base64.b64decode(json.loads(self.block)["packed"]))


def raw(glyph) -> str:
    return glyph if isinstance(glyph, str) else glyph[0] + "".join(part for _, part in glyph[1])


def rejoined(text: dict) -> str:
    """What the page's script reads: single tokens from the vocabulary, groups of several where
    `joined` says so.
    """
    joined, out, i = {at: (n, glyph) for at, n, glyph in text["joined"]}, "", 0
    while i < len(text["index"]):
        n, glyph = joined.get(i, (1, text["glyph"][int(text["index"][i])]))
        out, i = out + raw(glyph), i + n
    return out


@given(pieces)
def test_groups_rejoin_to_the_decoded_bytes(tokens):
    made_groups = group_pieces(tokens)
    assert "".join(g.text for g in made_groups) == b"".join(tokens).decode("utf-8", "replace")
    assert sum(g.tokens for g in made_groups) == len(tokens)


def test_a_character_cut_into_bytes_is_one_glyph_over_its_tokens():
    found = group_pieces([b"a", *byte_pieces("🤗", 1), b"b"])
    assert [(g.text, g.tokens) for g in found] == [("a", 1), ("🤗", 4), ("b", 1)]


def test_a_character_that_never_ends_leaves_the_next_token_alone():
    found = group_pieces([b"a", b"\xf0\x9f", b"<|im_end|>"])
    assert [(g.text, g.tokens, g.special) for g in found] == [
        ("a", 1, False),
        ("\ufffd", 1, False),
        ("<|im_end|>", 1, True),
    ]
    assert found[1].parts == (("\\xf0\\x9f", "\ufffd"),)


@pytest.mark.parametrize(
    ("piece", "seen"),
    [
        (b" the", "·the"),
        (b"", "∅"),
        (b"\n", "⏎"),
        (b"\t", "⇥"),
        ("\u200b".encode(), "‹200b›"),
        (b"\x00", "‹00›"),
        (b"\xf0\x9f", "\\xf0\\x9f"),
        ("👩\u200d💻".encode(), "👩\u200d💻"),
        ("\u0301".encode(), "◌\u0301"),
        ("\u202e".encode(), "‹202e›"),
        ("\u00a0x".encode(), "‹a0›x"),
    ],
)
def test_a_listed_token_shows_what_cannot_be_seen(piece, seen):
    assert show_piece(piece) == seen


@given(pieces, st.sampled_from(NASTY))
def test_tokens_reach_the_page_as_data_only(tokens, text):
    lens = TokenLens(made(tokens, prompt=text), title=text)
    read = Read(lens.html(assets=False))
    data = read.data
    assert rejoined(data["text"]) == lens.text == b"".join(tokens).decode("utf-8", "replace")
    assert data["prompt"] == data["title"] == text if text else data["prompt"] == text
    assert set(read.tags) <= {"div", "span", "script"}
    assert read.tags.count("script") == 1
    assert read.names <= {"class", "style", "dir", "data-mark", "data-finish", "type"}
    assert read.text == lens.text.replace("\0", "")


def test_module_and_styles_are_inlined_and_cannot_be_closed_by_data():
    html = TokenLens(made([b"</script>", b"<!--<script>"])).html()
    read = Read(html)
    assert read.tags.count("script") == 2
    assert read.tags.count("style") == 1
    assert html.count("</script") == 2
    assert "import " not in html


def test_channels_are_the_columns_of_the_trace():
    plan = {
        "advantage": np.array([1.0, -2.0, 0.5]),
        "route": np.array([0, 1, 2]),
        "words": np.array(["a", "b", "c"]),
    }
    trace = made(
        [b"x", b" y", b"z"], ("student", "teacher", "teacher+hint"), plan=plan
    ).with_columns(loss=[0.1, 0.2, 0.3], share=[0.5, 0.25, 0.25])
    found = find_channels(trace)
    assert list(found) == [
        "log_ratio",
        "reverse_kl",
        "student_entropy",
        "teacher_entropy",
        "teacher+hint_entropy",
        "teacher+hint_log_ratio",
        "teacher+hint_reverse_kl",
        "loss",
        "share",
        "advantage",
        "route",
        "words",
        "forward_kl",
        "jsd",
        "entropy_gap",
        "rank",
        "overlap",
        "student_tail",
        "teacher_tail",
        "teacher+hint_tail",
        "teacher+hint_forward_kl",
        "teacher+hint_jsd",
        "teacher+hint_entropy_gap",
        "teacher+hint_rank",
        "teacher+hint_overlap",
    ]
    np.testing.assert_allclose(
        found["log_ratio"].values, trace.column("teacher_logp") - trace.column("student_logp")
    )
    np.testing.assert_allclose(found["share"].values, [50, 25, 25])
    assert (found["advantage"].kind, found["route"].kind, found["log_ratio"].kind) == (
        "signed",
        "amount",
        "ratio",
    )
    dopd = find_channels(by_method(trace, opdlab.DOPD()))["route"]
    assert (dopd.kind, dopd.marks) == ("category", ("LH", "LL", "HT", "HS"))
    assert dopd.names[0] == "LH agree, sure"
    assert found["teacher+hint_log_ratio"].against == "teacher+hint"


@pytest.mark.parametrize(
    "policies", [("student",), ("student", "teacher"), ("student", "teacher+hint", "reference")]
)
def test_duel_keeps_all_mass_and_the_sampled_token(policies):
    trace = made([f"t{i}".encode() for i in range(30)], policies, top=8)
    shown = find_duel(trace)
    assert shown is not None
    p = {name: np.exp(trace.column(f"{name}_top")) for name in policies}
    ends = np.cumsum(shown["count"])
    for i, (start, end) in enumerate(zip(ends - shown["count"], ends, strict=True)):
        ids = shown["ids"][shown["row"][start:end]]
        assert trace.column("token_id")[i] in ids
        assert len(ids) == len(set(ids)) <= 9
        assert [shown["names"][j] for j in shown["row"][start:end]] == [
            show_piece(trace.piece(int(t))) for t in ids
        ]
        for name in policies:
            assert shown["p"][name][start:end].astype(float).sum() + shown["other"][name][
                i
            ] == pytest.approx(1, abs=4e-3)
            at = {int(t): p[name][i, j] for j, t in enumerate(trace.column("support")[i]) if t >= 0}
            assert shown["p"][name][start:end] == pytest.approx(
                [at[t] for t in ids], rel=1e-3, abs=1e-7
            )
        best = np.max([shown["p"][name][start:end] for name in policies], axis=0)
        assert all(best[:-1] >= best[1:])
        assert all(
            b >= LEAST * 0.999 or t == trace.column("token_id")[i]
            for b, t in zip(best, ids, strict=True)
        )


def test_a_duel_without_room_for_all_keeps_the_tokens_that_differ_most():
    trace = made([f"t{i % 40}".encode() for i in range(3000)], top=8)
    shown, gap = (
        find_duel(trace),
        np.abs(trace.column("teacher_logp") - trace.column("student_logp")),
    )
    assert shown is not None
    kept = shown["count"] > 0
    assert FEWER - 9 < shown["count"].sum() <= FEWER
    assert gap[kept].min() >= gap[~kept].max()
    assert len(shown["other"]["teacher"]) == kept.sum()


def test_colour_says_side_and_size():
    trace = made([b"a", b"b", b"c"]).with_columns(
        student_logp=[-1.0, -5.0, -1.0], teacher_logp=[-5.0, -4.0, -1.0]
    )
    html = TokenLens(trace).with_limits({"log_ratio": 4.0}).html()
    strip = html.split('class="opd-strip"')[1].split('class="opd-peaks"')[0]
    assert strength_of(1.0, 4.0) == 0.5
    assert strip.count("rgba") == 2  # the third token is neutral, so it has no colour at all
    assert f"rgba(213,94,0,{INK['student'][1]:.3f})" in strip
    assert f"rgba(0,114,178,{INK['teacher'][1] / 2:.3f})" in strip


def test_full_colour_ignores_one_outlier_and_keeps_quiet_strips_pale():
    trace = made([f"t{i}".encode() for i in range(200)])
    gap = np.where(np.arange(200) == 7, 50.0, 0.004)
    lens = TokenLens(trace.with_columns(student_logp=np.zeros(200), teacher_logp=-gap))
    assert lens.limits["log_ratio"] == pytest.approx(0.1)
    assert lens.channels["log_ratio"].peaks() == [7]


def test_numbers_that_json_does_not_know_survive():
    trace = made([b"a", b"b", b"c"]).with_columns(
        student_logp=[0.0, 0.0, np.nan], teacher_logp=[-np.inf, -1.0, 0.0]
    )
    lens = TokenLens(trace)
    data = Read(lens.html(assets=False)).data
    np.testing.assert_array_equal(data["channels"][0]["values"], [-np.inf, -1.0, np.nan])
    assert "−∞" in repr(lens)


def test_plain_text_is_a_sparkline_and_the_largest_tokens():
    trace = made([b"a", b" b", b"c"]).with_columns(
        student_logp=[0.0, 0.0, 0.0], teacher_logp=[0.0, -4.0, 1.0]
    )
    bundle = TokenLens(trace, title="One")._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    assert (
        bundle["text/plain"]
        == "TokenLens: One, 3 tokens, log ratio in nats (− student over-confident, + teacher"
        " prefers)\n▁█▅\nLargest log ratio: ·b −4 (position 1), c +1 (position 2)"
    )


def test_a_student_alone_and_a_training_trace_are_drawn():
    alone = TokenLens(made([b"a", b"b"], ("student",)))
    assert alone.channel == "student_entropy"
    training = TokenLens(made([b"a", b"b"], top=0), channel="reverse_kl")
    read = Read(training.html())
    assert read.data["duel"] is None
    assert json.loads(read.block)["traits"]["channel"] == "reverse_kl"


def test_an_empty_completion_is_drawn():
    lens = TokenLens(made([]))
    assert "0 tokens" in repr(lens)
    assert Read(lens.html()).text == ""


def test_a_scored_rollout_is_drawn(student, teacher, prompts):
    trace = opdlab.score(sample(student, prompts, seed=0, max_new_tokens=6), student, teacher, k=4)
    for i in range(len(prompts)):
        lens = TokenLens(trace, i)
        assert lens.text == b"".join(trace.sample(i).tokens()).decode()
        assert Read(lens.html()).data["prompt"] == trace.meta["prompts"][i]


def test_what_is_not_there_is_named():
    trace = made([b"a"])
    with pytest.raises(UnknownColumn, match=r"no channel 'loss'. It has log_ratio, reverse_kl"):
        TokenLens(trace, channel="loss")
    with pytest.raises(OpdlabError, match=r"completions 0 to 0, not 3. Give sample=0"):
        TokenLens(trace, 3)
    trace.meta["texts"].append("more")
    with pytest.raises(OpdlabError, match=r"no row of completion 1, only of 0"):
        TokenLens(trace, 1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-17.62, "−17.6"),
        (1e-6, "<0.001"),
        (-1e-6, ">−0.001"),
        (float("nan"), "–"),
        (123456.0, "123000"),
    ],
)
def test_numbers_read_the_same_everywhere(value, text):
    assert format_number(value) == text


def test_a_lens_like_another_keeps_its_scale():
    student, teacher, task = opdlab.load("market")
    rollout = student.sample(task.prompts(2, split="test"), max_new_tokens=task.max_new_tokens)
    loud, calm = (
        opdlab.score(rollout, student, teacher),
        opdlab.score(rollout, teacher, teacher.frozen()),
    )
    first = opdlab.viz.TokenLens(loud)
    assert opdlab.viz.TokenLens(calm).limits["log_ratio"] < first.limits["log_ratio"]
    assert opdlab.viz.TokenLens(calm, like=first).limits["log_ratio"] == first.limits["log_ratio"]
