"""TwoRules: sets, counts and shares are those of numpy on the columns."""

from __future__ import annotations

import numpy as np
import pytest
from viz.traces import made, several

from opdlab.errors import InvalidValue, OpdlabError, UnknownColumn
from opdlab.viz import TwoRules

WORDS = [b" a", b" b", b" c"] * 8


@pytest.fixture(scope="module")
def trace():
    both = several(made(WORDS, seed=1), made(WORDS, seed=2))
    n = len(both)
    return both.with_columns(
        share=np.full(n, 1 / n), type=["x" if i % 3 else "y" for i in range(n)]
    )


def test_sets_are_those_of_the_columns(trace):
    view = TwoRules(trace, "reverse_kl > 1.5", "student_entropy <= 1")
    kl, entropy = trace.column("teacher_reverse_kl"), trace.column("student_entropy")
    a, b = kl >= 1.5, entropy <= 1
    assert (view.sets == a + 2 * b).all()
    table = view.table
    assert table["tokens"].tolist() == [
        (~a & ~b).sum(),
        (a & ~b).sum(),
        (b & ~a).sum(),
        (a & b).sum(),
    ]
    assert table.loc["only A", "of kl"] == pytest.approx(100 * kl[a & ~b].sum() / kl.sum())
    assert table["of gradient"].sum() == pytest.approx(100)
    assert (view.df["set"] == "both").sum() == (a & b).sum()
    view.b = {"key": "type", "sign": "=", "value": "y"}
    assert (view.sets >= 2).sum() == len(trace) // 3
    assert "A: reverse_kl ≥ 1.5 · B: type = y" in repr(view)
    assert view.data()["size"] == len(WORDS)


def test_the_usual_rules_and_another_completion(trace):
    view = TwoRules(trace, sample=1)
    assert (view.a["key"], view.b["key"]) == ("reverse_kl", "student_entropy")
    assert view.selected == len(WORDS)
    assert 0 < view.table.loc["both", "tokens"] < len(trace)


@pytest.mark.parametrize(
    ("rule", "error"),
    [
        ("reverse_kl", InvalidValue),
        ("reverse_kl = 1", InvalidValue),
        ("reverse_kl > x", InvalidValue),
        ("type > x", InvalidValue),
        ("type = z", InvalidValue),
        ("nothing > 1", UnknownColumn),
        (3, InvalidValue),
    ],
)
def test_a_rule_that_cannot_be_read_is_refused(trace, rule, error):
    with pytest.raises(error):
        TwoRules(trace, rule)


def test_traces_without_numbers_are_refused(trace):
    bare = made(WORDS, top=0)
    table = bare.table.select(["sample", "position", "token_id"])
    with pytest.raises(OpdlabError, match="no numbers"):
        TwoRules(type(bare)(table, bare.meta))
