"""Compare without a browser: one scale, differences, rank correlation, and texts that are not the
same.
"""

from __future__ import annotations

import numpy as np
import pytest
from viz.traces import made, several

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.viz import TokenLens, payload
from opdlab.viz.compare import Compare

WORDS = [b"a", b" b", b" c", b" d", b" e"]


def with_gap(gap, seed=0):
    return made(WORDS, seed=seed).with_columns(
        student_logp=np.zeros(5), teacher_logp=np.array(gap, float)
    )


@pytest.fixture
def compared() -> Compare:
    return Compare({"one": with_gap([0, -1, 2, 0, 0.5]), "two": with_gap([0, -4, 2, 1, 0.5])})


def test_values_and_differences_are_those_of_the_traces(compared):
    table = compared.df
    np.testing.assert_allclose(table["one"], [0, -1, 2, 0, 0.5])
    np.testing.assert_allclose(table["difference"], [0, -3, 0, 1, 0])
    assert list(compared.changed["token"]) == ["·b", "·d"]
    assert compared.selected == 1
    compared.pair = [0, 1]
    np.testing.assert_allclose(compared.df["difference"], [0, 3, 0, -1, 0])


def test_what_hardly_changed_is_not_listed():
    assert list(
        Compare({"one": with_gap([0] * 5), "two": with_gap([0.09, -9, 0, 0.0899, 1])}).changed.index
    ) == [1, 4, 0]


def test_rank_correlation_is_of_sizes():
    same_sizes = Compare(
        {"x": with_gap([0.1, 0.2, 0.3, 0.4, 0.5]), "y": with_gap([-1, -2, -3, -4, -5])}
    )
    turned = Compare({"x": with_gap([0.1, 0.2, 0.3, 0.4, 0.5]), "y": with_gap([5, 4, 3, 2, 1])})
    assert same_sizes.correlation.loc["x", "y"] == pytest.approx(1)
    assert turned.correlation.loc["x", "y"] == pytest.approx(-1)
    assert np.isnan(
        Compare({"x": with_gap([0] * 5), "y": with_gap([1, 2, 3, 4, 5])}).correlation.loc["x", "y"]
    )


def test_all_strips_have_one_scale(compared):
    sent = payload.unpack(payload.pack(compared.data()))["channels"][0]
    assert sent["limit"] == pytest.approx(
        max(TokenLens(t).limits["log_ratio"] for t in compared.traces.values())
    )
    assert compared.limit == sent["limit"]
    np.testing.assert_allclose(sent["values"][1], [0, -4, 2, 1, 0.5])
    assert compared.html().count("rgba(213,94,0,0.620)") == 2  # the legend's end and -4


def test_text_tells_the_same(compared):
    assert (
        repr(compared)
        == "Compare: completion 0, log ratio in nats\none  ▁▅▆▁▃\ntwo  ▁█▆▅▃\ntwo minus one, log"
        " ratio: rank correlation 0.718; changed most: ·b −3 (position 1), ·d +1 (position 3)"
    )


def test_lenses_are_compared_under_their_titles():
    lenses = [
        TokenLens(with_gap([0, 1, 0, 0, 0], seed), title=t)
        for seed, t in enumerate(("", "late", "late"))
    ]
    assert Compare(lenses).names == ["A", "late 2", "late 3"]
    both = several(with_gap([0] * 5), with_gap([0, 1, 0, 0, 0]))
    by_name = Compare({"lens": TokenLens(both, 1), "trace": both}, sample=1)
    np.testing.assert_allclose(by_name.df["difference"], 0)


def test_other_tokens_are_refused():
    other = made([b"a", b" b", b" x", b" d", b" e"])
    with pytest.raises(
        OpdlabError,
        match=(
            r"'p' and 'q' are not of the same text: they part at position 2 \(·c and ·x\)\."
            r" Score one"
        ),
    ):
        Compare({"p": made(WORDS), "q": other})
    with pytest.raises(OpdlabError, match=r"position 4 \(·e and the end\)"):
        Compare({"p": made(WORDS), "q": made(WORDS[:4])})


def test_what_cannot_be_compared_is_named():
    with pytest.raises(OpdlabError, match="got 1 traces; it shows two to 8"):
        Compare({"p": made(WORDS)})
    with pytest.raises(
        UnknownColumn, match=r"Not all of the traces have 'loss'. They share log_ratio, reverse_kl"
    ):
        Compare({"p": made(WORDS), "q": made(WORDS).with_columns(loss=np.ones(5))}, channel="loss")
    alone = made(WORDS, ("student",), top=0)
    bare = Trace(alone.table.drop_columns(["student_entropy"]), alone.meta)
    with pytest.raises(OpdlabError, match="share no numbers to compare"):
        Compare({"p": alone, "q": bare})


def test_a_long_text_carries_fewer_channels():
    trace = made([f" w{i % 50}".encode() for i in range(9000)])
    long = Compare({"p": trace, "q": trace.with_columns(student_logp=np.linspace(-3, 0, 9000))})
    data = long.data()
    assert len(payload.pack(data)) < 90_000
    assert data["channels"][0]["key"] == "log_ratio"
    assert len(data["channels"]) < len(long.channels)
