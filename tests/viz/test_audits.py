"""The audit view without a browser: what it shows is what OmniOPD noted, and its formula gives the
weights.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from viz.traces import NASTY, made, with_notes

import opdlab
from opdlab.data.notes import Chunks
from opdlab.errors import OpdlabError
from opdlab.viz import Audits


@pytest.fixture(scope="module")
def trace():
    student, teacher, task = opdlab.load("market")
    method = opdlab.OmniOPD(chunks=2, continuations=4, length=3, alpha=0.5, match_length=True)
    return (
        opdlab.distill(student, teacher, task, method=method, steps=1, batch=6, lr=0, quiet=True)
        .train()
        .last.trace()
    )


def noted(pieces=("a", "b", "c", "d", "e"), **audit):
    found = made(
        [p.encode() for p in pieces],
        ("student", "reference"),
        plan={"weight": np.ones(len(pieces))},
    )
    note = {
        "sample": 0,
        "start": 1,
        "length": 2,
        "text": "bc",
        "continuations": ["bc", "bd", "bc"],
        "similarity": [1.0, 0.5, 1.0],
        "prior": 0.5,
        "weight": 3.0 / 4.0,
    }
    return with_notes(found, chunks=Chunks([note | audit], facts={"alpha": 0.5}))


def test_the_audits_are_those_of_the_step(trace):
    view, notes = Audits(trace), trace.note(Chunks).chunks
    table, df = view.table, view.df
    assert len(table) == len(notes) == 12
    assert table.weight.is_monotonic_increasing
    assert view.selected == table["row"][0]
    np.testing.assert_array_equal(df.audit >= 0, trace.column("audited") > 0)
    for row in table.to_dict("records"):
        note = next(n for n in notes if (n["sample"], n["start"]) == (row["sample"], row["start"]))
        assert df.position[row["row"]] == note["start"]
        assert (
            b"".join(trace.tokens()[row["row"] : row["row"] + 3]).decode().replace("<eos>", "")
            == note["text"]
        )
        assert row["similarity"] == pytest.approx(math.fsum(note["similarity"]) / 4)
        assert df.weight[row["row"]] == pytest.approx(row["weight"], abs=1e-6)
        assert sum(n for _, n in row["answers"]) == 4


def test_alpha_is_that_of_the_notes_and_gives_the_weights(trace):
    view = Audits(trace)
    assert view.alpha == view.data()["alpha"] == 0.5
    for a in view.audits.values():
        assert a["weight"] == pytest.approx(
            (math.fsum(a["similarity"]) + view.alpha * a["prior"]) / (4 + view.alpha)
        )
    assert Audits(with_notes(trace, chunks=Chunks(trace.note(Chunks).chunks))).alpha is None


def test_the_lanes_are_those_of_the_chunks_whatever_the_plan_s_columns(trace):
    view = Audits(noted())  # the plan's own weights are 1
    _, weight, similarity = view.data()["channels"]
    np.testing.assert_allclose(weight["values"], [np.nan, 0.75, 0.75, np.nan, np.nan])
    np.testing.assert_allclose(similarity["values"][1:3], 2.5 / 3, rtol=1e-3)
    _, weight, _ = Audits(trace).data()["channels"]
    inside = trace.column("audited") > 0
    np.testing.assert_allclose(weight["values"][inside], trace.column("weight")[inside], rtol=1e-3)


def test_equal_answers_are_counted_and_the_most_similar_comes_first():
    drawn = Audits(noted()).data()["audits"][0]
    assert [(a["similarity"], a["count"]) for a in drawn["answers"]] == [(1.0, 2), (0.5, 1)]
    assert (drawn["row"], drawn["length"], drawn["n"]) == (1, 2, 3)


def test_audits_of_other_rows_are_left_out_and_chunks_of_one_completion_stay_apart():
    trace = noted()
    (first,) = trace.note(Chunks).chunks
    several = Chunks([first, first | {"sample": 4}, first | {"start": 3}, {"sample": 0}])
    assert Audits(with_notes(trace, chunks=several)).df.audit.tolist() == [-1, 1, 1, 3, 3]


def test_plain_text_and_markup_carry_the_message():
    view = Audits(noted(continuations=["bc", NASTY[0], NASTY[2]]), title=NASTY[2])
    assert "1 audited chunks: mean similarity 0.833, weights 0.75 to 0.75" in repr(view)
    assert "0:1  weight 0.75 = prior 0.5, similarity 0.833  'bc' | 'bc'," in repr(view)
    html = view.static()
    assert "<img" not in html
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_a_trace_without_audits_is_refused():
    with pytest.raises(OpdlabError, match=r"no audits. Take step.trace\(\) of a run with OmniOPD"):
        Audits(made([b"a"]))
