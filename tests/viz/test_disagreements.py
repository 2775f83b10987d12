"""Disagreements: groups, counts and shares are those of a plain loop over the trace."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from viz.traces import made, several

from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.viz import Disagreements, payload
from opdlab.viz.glyphs import show_piece

WORDS = [b" a", b" b", b" c"] * 12


@pytest.fixture(scope="module")
def trace():
    both = several(made(WORDS, seed=1), made(WORDS, seed=2))
    rng = np.random.default_rng(0)
    return both.with_columns(loss=rng.normal(size=len(both)))


def by_hand(trace, least, context=0):
    found = defaultdict(list)
    df = trace.to_pandas()
    for i, row in df.iterrows():
        top = {t: p for t, p in zip(row.support, row.teacher_top, strict=True) if t >= 0}
        wanted = max(top, key=top.get)
        if wanted == row.token_id or top[wanted] - row.teacher_logp < least:
            continue
        before = df.token_id[max(0, i - context) : i][df["sample"] == row["sample"]]
        key = (*before, row.token_id, wanted)
        found[tuple(show_piece(trace.piece(int(t))) for t in key)].append(i)
    return found


@pytest.mark.parametrize(("least", "context"), [(0.0, 0), (1.0, 0), (0.5, 1)])
def test_groups_are_those_of_a_loop(trace, least, context):
    view = Disagreements(trace, least=least, context=context)
    want = by_hand(trace, least, context)
    found = {
        (*row.before.split(), row.student, row.teacher): row for row in view.groups.itertuples()
    }
    assert found.keys() == want.keys()
    loss = np.abs(trace.column("loss"))
    sample = trace.column("sample")
    for key, rows in want.items():
        row = found[key]
        assert row.count != 0
        assert row[4] == len(rows)
        assert row.completions == len(set(sample[rows]))
        assert row.share_of_loss == pytest.approx(100 * loss[rows].sum() / loss.sum())
    assert view.groups.share_of_loss.is_monotonic_decreasing
    df = view.df
    for i, row in enumerate(view.groups.itertuples()):
        assert (
            sorted(df.index[df.group == i]) == want[(*row.before.split(), row.student, row.teacher)]
        )
    drawn = payload.unpack(payload.pack(view.data()))
    assert drawn["places"] == len(drawn["row"]) == sum(map(len, want.values()))
    assert [g["count"] for g in drawn["groups"]] == view.groups["count"].tolist()


def test_a_teacher_that_agrees_leaves_nothing(trace):
    view = Disagreements(trace, least=1e6)
    assert len(view.groups) == 0
    assert view.selected == -1
    assert view.data()["row"].tolist() == []
    assert "0 groups" in repr(view)


def test_shares_are_of_the_kl_where_there_is_no_loss():
    view = Disagreements(made(WORDS))
    assert "share_of_kl" in view.groups.columns
    assert view.data()["amount"] == "kl"


def test_wrong_traces_and_names_are_refused(trace):
    with pytest.raises(OpdlabError, match="no top tokens of a teacher"):
        Disagreements(made(WORDS, top=0))
    with pytest.raises(OpdlabError, match="no top tokens of a teacher"):
        Disagreements(made(WORDS, ("student",)))
    with pytest.raises(UnknownColumn, match="It has those of teacher"):
        Disagreements(trace, teacher="nobody")
