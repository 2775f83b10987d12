"""Channels beyond the columns: what the kept top tokens say, kinds and their marks, what a page of
a long text carries.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from viz.traces import NASTY, made

import opdlab
from opdlab.data.column import Column, Description
from opdlab.errors import InvalidValue, OpdlabError, UnknownColumn
from opdlab.models.policy import sample
from opdlab.viz import TokenLens, categories, kept, payload
from opdlab.viz.channel import Channel
from opdlab.viz.channels import ROOM, describe_fitting, find_channels

WORDS = [f" t{i}".encode() for i in range(30)]


@pytest.fixture(scope="module")
def scored(student, teacher, prompts):
    return opdlab.score(sample(student, prompts, seed=0, max_new_tokens=8), student, teacher, k=4)


def without(trace, *names):
    return type(trace)(trace.table.drop_columns(list(names)), trace.meta)


@pytest.mark.parametrize("key", ["reverse_kl", "forward_kl", "jsd"])
def test_the_kept_tokens_bound_a_divergence_from_below(scored, key):
    exact, found = find_channels(scored)[key], find_channels(without(scored, f"teacher_{key}"))[key]
    assert np.all(found.values <= exact.values + 1e-5)
    assert found.values.sum() > 0.2 * exact.values.sum()
    assert "lower bound" in found.formula
    assert "lower bound" not in exact.formula


def test_the_kept_tokens_are_exact_where_they_are_all():
    trace = made(WORDS, top=100)  # no tail
    found = find_channels(without(trace, "teacher_reverse_kl"))["reverse_kl"]
    np.testing.assert_allclose(found.values, trace.column("teacher_reverse_kl"), rtol=1e-9)
    student, teacher = kept.coarse(trace, "student"), kept.coarse(trace, "teacher")
    assert np.isneginf(student[:, -1]).all()
    p, q = np.exp(student), np.exp(teacher)
    log = lambda x: np.log(np.where(x > 0, x, 1))
    wanted = 0.5 * sum((x * (log(x) - log((p + q) / 2))).sum(1) for x in (p, q))
    np.testing.assert_allclose(find_channels(trace)["jsd"].values, wanted, rtol=1e-6)


def test_overlap_counts_shared_favourites(scored):
    np.testing.assert_allclose(kept.overlap(scored, "teacher"), scored.column("teacher_overlap"))
    assert kept.width(scored) == 4
    assert find_channels(scored)["overlap"].limit == 100


def test_an_impossible_token_gives_an_infinite_divergence():
    half, none = np.log(0.5), -np.inf
    p, q = np.array([[half, half], [0.0, none]]), np.array([[0.0, none], [half, half]])
    assert kept.kl(p, q)[0] == np.inf
    assert kept.kl(p, q)[1] == pytest.approx(np.log(2))


def test_ranks_fall_into_four_bins():
    trace = made([b"a", b"b", b"c", b"d", b"e"]).with_columns(teacher_rank=[1, 2, 10, 11, 101])
    rank = find_channels(trace)["rank"]
    assert [rank.names[int(v)] for v in rank.values] == ["1", "2–10", "2–10", "11–100", "over 100"]
    assert (rank.kind, rank.limit) == ("ordinal", 3)


def test_a_column_of_names_is_a_kind_with_a_mark_each():
    kinds = ["number", "word", "number", None, "none"]
    trace = made([b"a", b"b", b"c", b"d", b"e"]).with_columns(type=kinds)
    found = find_channels(trace)["type"]
    assert found.names == ("number", "word", "none")
    assert found.marks == ("N", "W", "no")
    np.testing.assert_array_equal(found.values, [0, 1, 0, np.nan, 2])
    lens = TokenLens(trace, channel="type")
    assert "1 number 40 %, 2 word 20 %, 3 none 20 % of 5 tokens" in repr(lens)
    assert "121·3" in repr(lens)
    assert lens.html().count("text-decoration:underline solid") >= 2
    sent = payload.unpack(payload.pack(lens.data()))["channels"]
    assert list(next(c["values"] for c in sent if c["key"] == "type")) == [0, 1, 0, -1, 2]


def test_rare_kinds_become_one():
    found = categories.channel_of_names("type", [f"k{i}" for i in range(20) for _ in range(20 - i)])
    assert found is not None
    assert len(found.names) == categories.MOST
    assert found.names[-1] == "other"
    assert found.values.max() == categories.MOST - 1


def test_codes_with_labels_are_kinds_and_other_numbers_are_amounts():
    labels = ("LH sure", "LL unsure", "HT teacher", "HS student")
    said = Description(labels=labels, hues=("", "minus", "teacher", "student"))
    as_kind = lambda values: categories.channel_of_codes("route", np.array(values), said)
    found = as_kind([0, 3, -1])
    assert (found.names, found.marks, found.hues) == (labels, ("LH", "LL", "HT", "HS"), said.hues)
    np.testing.assert_array_equal(found.values, [0, 3, np.nan])
    np.testing.assert_array_equal(as_kind([0.0, np.nan, 2.0]).values, [0, np.nan, 2])
    assert as_kind([0, 4]) is None
    assert as_kind([0.5, 1.0]) is None
    trace = made([b"a", b"b"]).with_columns(route=Column([0, 9], labels=("no", "yes")))
    assert find_channels(trace)["route"].kind == "amount"  # a label for 9 is not known


def test_a_column_is_drawn_as_it_describes_itself():
    trace = made([b"a", b"b", b"c"], ("student", "teacher", "teacher+hint")).with_columns(
        pull=Column(
            [0.5, 1.0, 2.0],
            "how hard the hint pulls",
            kind="signed",
            unit="bits",
            label="pull of the hint",
            compares=("teacher+hint", "teacher"),
            less="away",
            more="towards",
        ),
        is_new=Column([0, 1, 1], kind="flag", description="whether the token is new"),
        said=Column(["x", "y", "x"], label="who said it"),
    )
    found = find_channels(trace)
    pull = found["pull"]
    assert (pull.label, pull.unit, pull.kind) == ("pull of the hint", "bits", "signed")
    assert (pull.less, pull.more, pull.against) == ("away", "towards", "teacher+hint")
    assert pull.formula == "how hard the hint pulls"
    assert (found["is_new"].names, found["is_new"].formula) == (
        ("no", "yes"),
        "whether the token is new",
    )
    assert (found["said"].label, found["said"].names) == ("who said it", ("x", "y"))


def test_what_a_user_adds_is_drawn_as_it_is():
    """Flags, numbers with gaps and texts under any name; small integers stay numbers."""
    trace = made([b"a", b"b", b"c", b"d"]).with_columns(
        right=[True, False, None, True],
        clipped=np.array([True, True, False, True]),
        route=[0, 1, 1, -1],
        gap=[0.5, math.nan, 2.0, None],
        weight=torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16),
        nothing=[math.nan] * 4,
        teacher_says=["no", "no", "yes", None],
    )
    found = find_channels(trace)
    nan = math.nan
    drawn = {
        "right": [1, 0, nan, 1],
        "clipped": [1, 1, 0, 1],
        "route": [0, 1, 1, -1],
        "gap": [0.5, nan, 2, nan],
        "weight": [1, 2, 3, 4],
        "nothing": [nan] * 4,
        "teacher_says": [0, 0, 1, nan],
    }
    for name, values in drawn.items():
        np.testing.assert_array_equal(found[name].values, values)
        lens = TokenLens(trace, channel=name)
        assert payload.unpack(payload.pack(lens.data()))
        assert name.replace("_", " ") in repr(lens)
        assert lens.html()
    assert found["right"].names == found["clipped"].names == ("no", "yes")
    assert "2 yes 50 %" in repr(TokenLens(trace, channel="right"))
    assert (found["route"].kind, found["gap"].kind, found["teacher_says"].names) == (
        "signed",
        "amount",
        ("no", "yes"),
    )
    assert "Largest nothing: none" in repr(TokenLens(trace, channel="nothing"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0], r"got 1 values for 'x', and the trace has 2 rows"),
        ("ab", "is no column"),
        (3.0, "is no column"),
        (None, "is no column"),
        (np.array([1j, 2j]), "a table cannot hold"),
        ([object(), object()], "a table cannot hold"),
        ({"a": 1, "b": 2}, "is no column"),
        (torch.tensor(1.0), "is no column"),
        ([1, "a"], "a table cannot hold"),
    ],
)
def test_what_is_no_column_is_refused(values, words):
    with pytest.raises(
        InvalidValue,
        match=rf"with_columns got .*{words}.*Give a list, an array or a tensor of 2|{words}",
    ):
        made([b"a", b"b"]).with_columns(x=values)


@given(st.lists(st.sampled_from(NASTY) | st.text(max_size=4), max_size=30, unique=True))
def test_marks_tell_any_names_apart(names):
    found = categories.choose_marks(names)
    assert len(set(found)) == len(names)
    assert all(1 <= len(mark) <= 3 and mark.isprintable() for mark in found)


def test_a_long_text_carries_what_its_page_has_room_for():
    rng, n = np.random.default_rng(0), 10_000
    trace = made([f" w{i}".encode() for i in rng.integers(0, 60, n)], top=4).with_columns(
        share=rng.random(n)
    )
    assert len(payload.pack(TokenLens(trace).data())) <= ROOM + 4000 <= 90_000  # 120 kB as base64
    lens = TokenLens(trace, tracks=["jsd"])
    data = lens.data()
    have = [c["key"] for c in data["channels"]]
    assert have[:2] == ["log_ratio", "reverse_kl"]
    assert "jsd" in have
    assert len(payload.pack(data)) <= ROOM + 12_000  # a channel asked for may go beyond
    assert (
        set(data["left"])
        == {c.label for key, c in lens.channels.items() if key not in have}
        != set()
    )
    jsd = next(c for c in payload.unpack(payload.pack(data))["channels"] if c["key"] == "jsd")
    assert (
        np.abs(np.sqrt(jsd["values"]) - np.sqrt(lens.channels["jsd"].values)).max()
        < np.sqrt(jsd["limit"]) / 16
    )


def test_a_longer_text_has_more_room():
    rng = np.random.default_rng(0)
    long = {key: Channel(key, key, rng.normal(size=30_000)) for key in "ab"}
    limits = {key: c.limit for key, c in long.items()}
    cost = payload.measure_cost(payload.compact(long["a"].values))
    assert [c["key"] for c in describe_fitting(long, limits, spent=ROOM)] == ["a", "b"]
    assert [c["key"] for c in describe_fitting(long, limits, spent=3 * ROOM - cost - 1000)] == ["a"]
    assert [c["key"] for c in describe_fitting(long, limits, keep=["b"], spent=3 * ROOM)] == ["b"]


def test_tracks_are_channels_and_there_are_four():
    trace = made(WORDS)
    assert TokenLens(trace, tracks=["jsd"]).tracks == ["jsd"]
    with pytest.raises(UnknownColumn, match="no channel 'nothing'"):
        TokenLens(trace, tracks=["nothing"])
    with pytest.raises(OpdlabError, match="room for 4 tracks under a line, not 5"):
        TokenLens(trace, tracks=["jsd"] * 5)


def test_more_kinds_than_there_are_letters_have_marks():
    marks = categories.choose_marks([f"kind {i}" for i in range(130)])
    assert len(marks) == 130
    assert len(set(marks[:99])) == 99
