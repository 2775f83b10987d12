"""The fork explorer without a browser: its windows are TOPD's, its verdicts the threshold's, and
what it asks is what is written.
"""

from __future__ import annotations

import numpy as np
import pytest
from viz.traces import NASTY, made, with_notes

import opdlab
from opdlab.data.notes import Windows
from opdlab.errors import OpdlabError
from opdlab.methods import windows
from opdlab.viz import Forks


@pytest.fixture(scope="module")
def step():
    student, teacher, task = opdlab.load("market")
    run = opdlab.distill(
        student, teacher, task, method=opdlab.TOPD(window=6), steps=1, batch=16, lr=0, quiet=True
    ).train()
    return run.last


def noted(pieces=("a", "b", "c", "d"), **window):
    trace = made([p.encode() for p in pieces])
    note = {
        "sample": 0,
        "position": 1,
        "student": [1, 2],
        "teacher": [2, 2],
        "distance": 0.5,
        "kept": True,
        "plan": [[0.5, 0], [0, 0.5]],
    }
    return with_notes(trace, windows=Windows([note | window], threshold=0.2))


def test_the_windows_and_verdicts_are_those_of_the_step(step):
    trace, view = step.trace(), Forks(step.trace())
    notes, df = trace.note(Windows).windows, view.df
    assert len(view.table) == len(notes) > 4
    np.testing.assert_allclose(df.distance, trace.column("window_distance"), atol=1e-6)
    named = [trace.describe("divergent").labels[code] for code in trace.column("divergent")]
    assert [verdict or "no candidate" for verdict in df.verdict] == named
    assert view.table.verdict.nunique() == 2
    first = view.table.iloc[0]
    note = next(
        n for n in notes if (n["sample"], n["position"]) == (first["sample"], first["position"])
    )
    own = step.rollout.ids[first["sample"], first["position"] : first["position"] + 6].tolist()
    assert note["student"] == own
    assert first["student"] == b"".join(trace.piece(i) for i in own).decode()
    assert view.selected == first["row"]


def test_the_threshold_parts_real_forks_from_false_alarms():
    view = Forks(noted())
    assert view.threshold == 0.2
    assert view.table.verdict.tolist() == ["real fork"]
    view.threshold = 0.5  # equal is not above
    assert view.table.verdict.tolist() == ["false alarm"]
    assert "1 tokens of high loss: 0 real forks, 1 false alarms" in repr(view)


def test_new_windows_are_what_the_policies_write(step):
    policies = {name: step.policies[name] for name in ("student", "teacher")}
    view, known = Forks(step.trace(), policies, prompts=step.rollout.prompts), Forks(step.trace())
    row, other = view.selected, 2
    point = (int(view.df["sample"][row]), int(view.df["position"][row]))
    got = view.at(row)
    assert (
        got["teacher"]
        == windows.write(policies["teacher"], step.rollout, [point], 6)[0]
        == known.windows[row]["teacher"]
    )
    assert got["student"] == windows.write(policies["student"], step.rollout, [point], 6)[0]
    distance, plan = windows.solve(
        windows.costs([got["student"]], [got["teacher"]], "student", policies)
    )
    assert got["distance"] == pytest.approx(float(distance[0]))
    np.testing.assert_allclose(got["plan"], plan[0])
    assert len(view.table) == len(known.table)
    drawn = view.answer({"do": "windows", "row": other})
    assert len(view.table) == len(known.table) + 1
    assert (drawn["row"], len(drawn["student"]), len(drawn["same"]), len(drawn["plan"])) == (
        other,
        6,
        6,
        6,
    )
    assert drawn["same"][0][0] == (drawn["student"][0] == drawn["teacher"][0])


def test_either_side_goes_on_to_the_end(step):
    policies = {name: step.policies[name] for name in ("student", "teacher")}
    bare, exact = (
        Forks(step.trace(), policies),
        Forks(step.trace(), policies, prompts=step.rollout.prompts),
    )
    row = exact.selected
    sample, position = int(exact.df["sample"][row]), int(exact.df["position"][row])
    text = exact.answer({"do": "go", "side": "teacher", "row": row})["text"]
    prefix, prompt = step.rollout.ids[sample, :position].tolist(), step.rollout.prompts[sample]
    want = (
        policies["teacher"]
        .sample([prompt], prefixes=[prefix], temperature=0, max_new_tokens=24)
        .texts[0]
    )
    assert text.removesuffix("<eos>").split() == want.split()
    assert (
        bare.continue_text(row, "teacher") == text
    )  # the market's prompts are chats of one message
    assert exact.continue_text(row, "student", tokens=2).count(" ") == 2
    with pytest.raises(OpdlabError, match=r"no side 'critic'. Ask for student or teacher"):
        exact.answer({"do": "go", "side": "critic", "row": row})


def test_tokens_that_the_trace_does_not_know_are_named_by_number():
    view = Forks(noted(teacher=[2, 999]))
    assert view.table.teacher[0] == "c‹999›"


def test_windows_of_other_rows_are_left_out():
    trace = noted()
    (window,) = trace.note(Windows).windows
    several = Windows([window, window | {"sample": 3}, {"sample": 0, "position": 0}])
    assert len(Forks(with_notes(trace, windows=several)).table) == 1


def test_markup_is_inert():
    trace = noted(NASTY, student=[0, 1], teacher=[2, 4])
    html = Forks(trace, title=NASTY[2]).static()
    assert "<img" not in html
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_what_is_not_there_is_named(step):
    with pytest.raises(
        OpdlabError, match=r"no windows. Take step.trace\(\) of a run with TOPD, or hand in"
    ):
        Forks(made([b"a"]))
    with pytest.raises(OpdlabError, match="no policies were handed in"):
        Forks(noted()).at(1)
    policies = {name: step.policies[name] for name in ("student", "teacher")}
    with pytest.raises(OpdlabError, match=r"rows 0 to \d+, not -1"):
        Forks(step.trace(), policies).at(-1)
