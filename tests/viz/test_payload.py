"""The block that views carry: it reads back, in as few bytes as it says, and foreign data cannot
pose as ours.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from viz.traces import NASTY, made

import opdlab
from opdlab.viz import TokenLens, payload

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


def clean(data):
    """Lone surrogates become question marks; everything else stays."""
    if isinstance(data, str):
        return data.encode("utf-8", "replace").decode()
    if isinstance(data, list):
        return [clean(x) for x in data]
    return {clean(k): clean(v) for k, v in data.items()} if isinstance(data, dict) else data


@given(
    plain,
    st.lists(st.integers(-(2**31), 2**31), max_size=9),
    st.lists(st.floats(width=32), max_size=9),
)
def test_any_tree_with_arrays_reads_back(tree, whole, real):
    arrays = {
        "whole": np.array(whole, np.int64),
        "real": np.array(real, np.float64),
        "deep": [{"x": np.array([True, False])}],
    }
    back = payload.unpack(payload.pack({"tree": tree, **arrays}))
    assert back["tree"] == clean(tree)
    np.testing.assert_array_equal(back["whole"], whole)
    np.testing.assert_array_equal(back["real"], np.array(real))
    np.testing.assert_array_equal(back["deep"][0]["x"], [1, 0])


def test_integers_take_the_fewest_bytes():
    kinds = [
        payload._store(np.array(x))[0]
        for x in ([0, 255], [-1, 5], [256], [-200], [2**31], [-(2**31)], [2**40])
    ]
    assert kinds == ["u1", "i1", "u2", "i2", "u4", "i4", "f8"]


@given(
    st.lists(
        st.floats(-1e4, 1e4) | st.sampled_from([np.nan, np.inf, -np.inf]), min_size=1, max_size=30
    )
)
def test_numbers_of_long_texts_keep_what_the_colour_shows(values):
    x = np.resize(np.array(values), payload.LONG + 1)
    back = payload.unpack(payload.pack({"x": payload.compact(x)}))["x"]
    odd = ~np.isfinite(x)
    np.testing.assert_array_equal(back[odd], x[odd])
    top = np.abs(x[~odd]).max(initial=0)
    root = lambda v: np.sign(v) * np.sqrt(np.abs(v))
    assert np.all(np.abs(root(back[~odd]) - root(x[~odd])) <= np.sqrt(top) / 252 * 1.001)


@pytest.mark.parametrize(
    ("values", "rel"), [([1.2345, -67.89, 0.00123], 5e-4), ([1e6, 2.5], 1e-7), ([1e-6, 3e-7], 1e-6)]
)
def test_numbers_of_short_texts_keep_three_digits(values, rel):
    assert payload.unpack(payload.pack({"x": payload.compact(values)}))["x"] == pytest.approx(
        values, rel=rel
    )


def test_text_holds_every_distinct_token_once_and_says_where_completions_begin():
    trace = made([b"a", b" b", b"a", b"a"]).with_columns(sample=[0, 0, 2, 2])
    trace.meta["prompts"], trace.meta["finish"] = ["p", "q", "r"], ["stop", "stop", "length"]
    text = payload.describe_text(trace)
    assert text["index"].tolist() == [0, 1, 0, 0]
    assert text["glyph"] == ["a", " b"]
    assert text["word"] == [None, None]
    assert [
        (t["sample"], t["first"], t["size"], t["prompt"], t["finish"]) for t in text["texts"]
    ] == [
        (0, 0, 2, "p", "stop"),
        (2, 2, 2, "r", "length"),
    ]


def test_a_completion_is_linked_to_its_own_regrading_only():
    keys = lambda trace: [t["key"] for t in payload.describe_text(trace)["texts"]]
    one = made([b"a", b"b"])
    assert keys(one) == keys(one.with_columns(student_logp=[-9.0, -9.0]))
    assert keys(one) != keys(made([b"a", b"b"], prompt="Other?"))
    assert keys(one) != keys(made([b"b", b"a", b"c"]))


def test_noise_takes_hardly_more_than_its_entropy_and_text_less():
    rng = np.random.default_rng(0)
    noise = {str(high): rng.integers(0, high, 10_000) for high in (4, 64, 128)}
    bits = sum(10_000 * np.log2(int(high)) for high in noise)
    assert len(payload.pack({"said": "the same again, " * 500, **noise})) < 1.05 * bits / 8
    same = {str(i): noise["128"] for i in range(10)}
    assert len(payload.pack(same)) < 1.2 * len(
        payload.pack({"0": noise["128"]})
    )  # what repeats is still sent once


def test_ten_thousand_tokens_fit_the_budget():
    trace = made([f" w{i % 997}".encode() for i in range(3)] * 3333 + [b"."])
    assert len(payload.to_base64(payload.pack(TokenLens(trace).data()))) <= 120_000


def test_ten_thousand_real_tokens_fit_the_budget_with_every_channel():
    student, teacher, task = opdlab.load("market")
    rollout = student.sample(task.prompts(470), max_new_tokens=task.max_new_tokens, seed=0)
    trace = opdlab.score(rollout, student, teacher)
    n = len(trace)
    data = TokenLens(
        trace.with_columns(sample=np.zeros(n, int), position=np.arange(n))
    ).data()  # as one completion
    assert n >= 10_000
    assert data["left"] == []
    assert len(payload.to_base64(payload.pack(data))) <= 120_000


def test_an_endless_token_has_a_short_name_and_its_whole_text():
    text = payload.describe_text(made([b"x" * 1_000_000, *map(str.encode, NASTY)]))
    assert len(text["glyph"][0]) == 1_000_000
    assert text["word"][0].endswith("… (1,000,000)")
    assert len(text["word"][0]) < 80
