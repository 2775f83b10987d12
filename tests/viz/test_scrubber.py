"""The scrubber without a browser: which steps, on one scale, changes with the right sign, words
that re-join, errors.
"""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from viz.test_token_lens import Read
from viz.traces import NASTY, made

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.viz import Scrubber, payload
from opdlab.viz.glyphs import show_piece
from opdlab.viz.scrubber import FINE, measure_change, word_diff

TOKENS = [b"The", b" cat", b" sat", b"."]


def probe(n: int = 3):
    """The same four tokens at n steps: the student moves towards the teacher on all but the last
    token, where it moves away.
    """
    base = made(TOKENS)
    teacher = np.array([-1.0, -1.0, -1.0, -1.0])
    gap = np.array([4.0, -2.0, 1.0, 0.5])
    move = lambda k: np.where(np.arange(4) == 3, gap * (1 + k), gap / (1 + k))
    return {
        10 * k: base.with_columns(teacher_logp=teacher, student_logp=teacher - move(k))
        for k in range(n)
    }


def test_all_steps_are_in_the_page_on_one_scale():
    view = Scrubber(probe())
    data = payload.unpack(payload.pack(view.data()))
    channel = data["channels"][0]
    assert (data["steps"], data["probe"], data["sizes"]) == ([0, 10, 20], True, [4, 4, 4])
    want = np.concatenate(
        [t.column("teacher_logp") - t.column("student_logp") for t in view.traces]
    )
    np.testing.assert_allclose(channel["values"], want, rtol=1e-3)
    assert channel["limit"] == pytest.approx(np.quantile(np.abs(want), 0.98))
    assert channel["peaks"][0][0] == 0
    assert channel["delta"]["peaks"][2][0] == 0  # from 4 nats away to 4/3
    assert (view.step, view.selected) == (20, 0)


def test_the_change_of_a_distance_is_how_much_nearer():
    view = Scrubber(probe(2))
    (first, now), entropy = view.channels["log_ratio"], view.channels["student_entropy"]

    np.testing.assert_allclose(measure_change(first, now), [2.0, 1.0, 0.5, -0.5])
    np.testing.assert_allclose(
        measure_change(entropy[0], entropy[1]), entropy[1].values - entropy[0].values
    )
    deltas = {c["key"]: c["delta"] for c in view.data()["channels"]}
    assert (
        deltas["log_ratio"]["kind"],
        deltas["reverse_kl"]["near"],
        deltas["student_entropy"]["kind"],
    ) == ("ratio", True, "signed")


def test_a_token_s_path_is_its_probability_and_what_was_wanted_instead():
    base = made(TOKENS)
    fate = Scrubber(
        {0: base, 5: base.with_columns(student_logp=np.log([0.5, 0.25, 1.0, 0.0 + 1e-9]))}
    ).data()["fate"]
    np.testing.assert_allclose(fate["p"]["student"][1] / 255, [0.5, 0.25, 1, 0], atol=1 / 255)
    for name in ("student", "teacher"):
        for i, at in enumerate(fate["wanted"]["at"][name][0]):
            ids, logp = base.column("support")[i], base.column(f"{name}_top")[i]
            assert fate["wanted"]["names"][at] == show_piece(base.piece(int(ids[np.argmax(logp)])))


def test_texts_that_differ_are_shown_with_their_changes():
    traces = {
        0: made([b"a", b" b", b" c"]),
        4: made([b"a", b" x", b" c", b" d"], seed=1),
        8: made([b"a", b" x", b" c", b" d"], seed=2),
    }
    view = Scrubber(traces)
    data = payload.unpack(payload.pack(view.data()))
    assert (data["probe"], data["fate"], data["sizes"]) == (False, None, [3, 4, 4])
    assert data["words"]["previous"][1] == [
        ["same", "a"],
        ["gone", " b"],
        ["new", " x"],
        ["same", " c"],
        ["new", " d"],
    ]
    assert data["words"]["previous"][2] == [["same", "a x c d"]]
    assert data["words"]["first"][2] == data["words"]["previous"][1]
    assert [one["first"] for one in data["text"]["texts"]] == [0, 3, 7]
    own = [payload.describe_text(trace)["texts"][0]["key"] for trace in traces.values()]
    assert [
        one["key"] for one in data["text"]["texts"]
    ] == own  # so that other views of these texts follow
    values = np.concatenate([c.values for c in view.channels["log_ratio"]])
    np.testing.assert_allclose(data["channels"][0]["values"], values, rtol=1e-3)
    assert all(
        a <= i < a + n
        for a, n, peaks in zip([0, 3, 7], [3, 4, 4], data["channels"][0]["peaks"], strict=True)
        for i in peaks
    )


words = st.lists(st.sampled_from([*NASTY, "a", " b", "  ", "c d"]), max_size=8).map(
    "".join
) | st.text(max_size=20)


@given(words, words)
def test_words_rejoin_to_both_texts(before, after):
    parts = word_diff(before, after)
    assert "".join(text for kind, text in parts if kind != "gone") == after
    assert sum(len(t.split()) for kind, t in parts if kind == "gone") + sum(
        len(t.split()) for k, t in parts if k == "same"
    ) == len(before.split())
    assert word_diff(after, after) == ([["same", after]] if after else [])


def test_history_gives_the_small_curves():
    history = pd.DataFrame(
        {
            "step": [1, 2, 3],
            "reverse_kl": [3.0, 2, 1],
            "length": [5, 6, 7],
            "accuracy": [np.nan, np.nan, 0.5],
        }
    )
    view = Scrubber(probe(), history)
    facts = {plot.key: plot for plot in view._facts()}
    assert list(facts) == [
        "reverse KL of this text",
        "KL in training",
        "length in training",
        "accuracy, held out",
    ]
    assert facts["accuracy, held out"].lines[0].x.tolist() == [3]
    assert facts["KL in training"].x == (0, 20)
    np.testing.assert_allclose(
        facts["reverse KL of this text"].lines[0].y, view.table["reverse_kl"]
    )


def test_long_probes_stay_small():
    trace = made([f" w{i % 50}".encode() for i in range(1000)], top=4)
    rng = np.random.default_rng(0)
    steps = {
        k: trace.with_columns(
            student_logp=trace.column("student_logp") + 0.1 * k * rng.normal(size=1000)
        )
        for k in range(20)
    }
    view = Scrubber(steps)
    assert 1000 * 20 < FINE < 2 * 1000 * 20
    assert len(payload.to_base64(payload.pack(view.data()))) < 350_000


def test_static_html_and_text_carry_the_message():
    view = Scrubber(probe(), title="<b>One</b>")
    html, text = view.html(script=False), repr(view)
    assert "step 0" in html
    assert "step 20" in html
    assert "&lt;b&gt;One" in html
    assert "rgba(0,114,178" in html
    assert text.splitlines()[1] == "█▇▆"
    assert "Moved most: The +4 → +1.33" in text
    assert json.loads(Read(view.html()).block)["traits"] | {} == view.traits
    assert Read(view.html()).data["title"] == "<b>One</b>"
    assert view.df.loc[view.selected, "token"] == "The"
    view.step = 0
    assert view.df["step"].tolist() == [0] * 4


def test_the_live_widget_moves_with_the_steps():
    view = Scrubber(probe())
    widget = view.live()
    widget.step, widget.delta = 10, True
    assert (view.step, view.delta) == (10, True)
    view.step = 0
    assert widget.step == 0
    with pytest.raises(OpdlabError, match=r"no step 7 here, only 0, 10, 20\. Set step"):
        view.step = 7


def test_what_cannot_be_shown_is_said():
    with pytest.raises(OpdlabError, match=r"at least one step, and there is none\. Give"):
        Scrubber({})
    with pytest.raises(
        OpdlabError, match=r"answers 'What\?' at step 0 and another prompt at step 5"
    ):
        Scrubber({0: made(TOKENS), 5: made(TOKENS, prompt="Why?")})
    with pytest.raises(OpdlabError, match=r"step 0 has completions 0 to 0, not 2"):
        Scrubber(probe(), sample=2)
    with pytest.raises(UnknownColumn, match=r"no channel 'loss' in common\. They have log_ratio"):
        Scrubber(probe(), channel="loss")


def test_one_step_an_empty_text_and_a_student_alone_are_drawn():
    assert Scrubber({3: made(TOKENS)}).data()["steps"] == [3]
    assert "0 at step 1" not in repr(Scrubber({1: made([])}))
    alone = Scrubber({0: made(TOKENS, ("student",)), 1: made(TOKENS, ("student",), seed=1)})
    assert alone.channel == "student_entropy"
    assert alone.data()["fate"]["rival"] is None


def test_traces_without_a_common_number_are_refused():
    bare = made([b"a", b" b"])
    names = [name for name in bare.table.column_names if "_" in name and name != "token_id"]
    bare = Trace(bare.table.drop_columns(names), bare.meta)
    with pytest.raises(UnknownColumn, match="no numbers in common"):
        Scrubber({0: bare, 1: bare})
