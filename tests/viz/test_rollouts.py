"""Rollouts without a browser: the table's numbers, the tokens a page carries, what a live page may
ask.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from viz.traces import made, several

from opdlab.errors import OpdlabError
from opdlab.viz import Rollouts, payload, rollouts

WORDS = [b"a", b" b", b" c", b" d"]


def one(gap, prompt="What?", finish="stop"):
    gap = np.array(gap, float)
    kl = np.array([0.0 if np.isinf(g) else abs(g) / 2 for g in gap])
    return made(WORDS, prompt=prompt, finish=finish).with_columns(
        student_logp=np.zeros(4), teacher_logp=gap, teacher_reverse_kl=kl
    )


@pytest.fixture
def view() -> Rollouts:
    return Rollouts(
        several(
            one([-1, 0, 0, 1]), one([-4, 0, 0, 0], "Other?", "length"), one([2, 2, 2, -np.inf])
        ),
        rewards=[1, 0, 1],
    )


def test_the_table_holds_means_and_the_largest(view):
    table = view.table
    assert list(table["reward"]) == [1, 0, 1]
    np.testing.assert_allclose(table["reverse_kl"], [0.25, 0.5, 0.75])
    np.testing.assert_allclose(
        table["log_ratio"], [0, -1, 2]
    )  # what is not finite is left out of means
    np.testing.assert_allclose(table["peak"], [1, 4, np.inf])
    assert list(table["finish"]) == ["stop", "length", "stop"]
    assert view.rollout == 2  # largest KL first


def test_it_can_be_sorted_by_any_column(view):
    assert Rollouts(view.whole, sort="log_ratio").rollout == 1
    assert Rollouts(view.whole, rewards={0: 0.5, 1: 2.0}, sort="-reward").rollout == 1
    with pytest.raises(
        OpdlabError, match=r"no column 'grade' to sort by\. There is prompt, text, tokens"
    ):
        Rollouts(view.whole, sort="grade")
    with pytest.raises(OpdlabError, match="no tokens, so there is no rollout"):
        Rollouts(made([]))


def test_text_tells_the_same(view):
    lines = repr(view).splitlines()
    assert lines[0] == "Rollouts: 3 completions, by reverse_kl"
    assert [line.split()[-8:] for line in lines[1:2]] == [
        ["tokens", "4,", "reward", "1,", "mean", "KL", "0.75,", "stop"]
    ]
    assert view.static().count("<tr>") == 4
    assert "3 rollouts: 2 stop, 1 length; mean tokens 4, reward 0.667, mean KL 0.5" in view.static()


def test_the_page_pools_sparklines_without_losing_peaks(view):
    sent = payload.unpack(payload.pack(view.data()))
    bins = sent["spark"]["bins"].reshape(3, rollouts.BINS)
    np.testing.assert_allclose(bins[1, :4], [-4, 0, 0, 0])
    assert np.isnan(bins[1, 4:]).all()
    long = rollouts._pool(np.where(np.arange(1000) == 777, -9.0, 0.1))
    assert long.min() == -9
    assert [sent["prompts"][i] for i in sent["table"]["prompt"]] == ["What?", "Other?", "What?"]


def test_a_page_carries_the_worst_rollouts_and_a_live_one_can_ask_for_others(view, monkeypatch):
    monkeypatch.setattr(rollouts, "ROOM", 8)
    small = Rollouts(view.whole)
    assert sorted(set(small.df["sample"])) == [1, 2]
    assert len(small.data()["table"]["sample"]) == 3
    answer = json.loads(json.dumps(small.answer({"sample": 2}), allow_nan=False))
    assert answer["text"]["texts"][0]["sample"] == 2
    assert answer["channels"][0]["values"] == [2, 2, 2, None]
    assert answer["channels"][0]["limit"] == pytest.approx(small.data()["channels"][0]["limit"])


def test_a_student_alone_is_listed_by_its_entropy():
    view = Rollouts(made(WORDS, ("student",)))
    assert view.sort == "-tokens"
    assert "student_entropy" in view.table
