"""The board without a browser: it trains the run it shows, draws what the history says, and puts
alarms where they belong.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from viz.test_token_lens import Read

import opdlab as opd
from opdlab.diagnose.health import Alarm, Limits, health
from opdlab.errors import OpdlabError
from opdlab.viz import RunBoard, payload
from opdlab.viz.lines import POINTS, Line, draw_path, find_range, thin


def troubled(n: int = 60) -> pd.DataFrame:
    """Entropy collapses at step 30, texts grow from 40 on, accuracy peaks at 20."""
    step = np.arange(1, n + 1)
    accuracy = np.where(step % 10 == 0, np.where(step <= 20, 0.9, 0.5), np.nan)
    return pd.DataFrame(
        {
            "step": step,
            "loss": 1 / step,
            "reverse_kl": np.ones(n),
            "entropy": np.where(step < 30, 1.0, 0.1),
            "length": np.full(n, 20.0),
            "cut": np.where(step < 40, 0.0, 0.5),
            "accuracy": accuracy,
        }
    )


@pytest.fixture(scope="module")
def run() -> opd.Run:
    student, teacher, task = opd.load("market")
    return opd.distill(
        student,
        teacher,
        task,
        batch=4,
        steps=5,
        max_new_tokens=6,
        evaluate_every=0,
        quiet=True,
        seed=1,
    )


def test_a_board_trains_its_run_and_watches_it(run):
    board, seen = RunBoard(run), []
    for step in board:
        seen.append(step.number)
        if step.number == 2:
            break
    assert (seen, run.done, len(board.df)) == ([1, 2], 2, 2)
    board.train()  # goes on where it was left
    assert run.done == 5
    pd.testing.assert_frame_equal(board.df[run.history.columns], run.history)
    assert board.df["acceptance"].between(0, 1).all()
    assert [plot.key for plot in board.plots] == [
        "loss",
        "reverse_kl",
        "entropy",
        "length",
        "reward",
        "acceptance",
    ]
    assert "OPD 5 of 5 steps · no alarms" in repr(board)


def test_an_interrupt_leaves_picture_and_run(run):
    student, teacher, task = opd.load("market")
    again = opd.distill(
        student, teacher, task, batch=4, steps=5, max_new_tokens=6, quiet=True, seed=1
    )
    board = RunBoard(again)
    steps = iter(board)
    assert [next(steps).number, next(steps).number] == [1, 2]
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt)
    assert "OPD 2 of 5 steps" in board.html()
    board.train()
    np.testing.assert_array_equal(
        again.history["loss"], run.history["loss"]
    )  # as if nothing had happened


def test_the_live_widget_follows(run):
    student, teacher, task = opd.load("market")
    board = RunBoard(
        opd.distill(student, teacher, task, batch=2, steps=1, max_new_tokens=4, quiet=True)
    )
    widget = board.live()
    assert payload.unpack(widget.packed)["plots"] == []
    board.train()
    assert [p["key"] for p in payload.unpack(widget.packed)["plots"]][:2] == ["loss", "reverse_kl"]


def test_alarms_stand_on_their_curves():
    board = RunBoard(troubled())
    marks = {plot.key: plot.marks for plot in board.plots if plot.marks}
    found = [(alarm.signature, float(alarm.step)) for _, alarm in board.alarms]
    assert [name for name, _ in found] == [
        "entropy collapse",
        "late over-training",
        "length run-away",
    ]
    assert marks == {
        "entropy": [(found[0][1], "1")],
        "accuracy": [(found[1][1], "2")],
        "length": [(found[2][1], "3")],
    }
    assert [row[3] for row in board.data()["alarms"]] == [name for name, _ in found]
    assert all(
        alarm.remedy in Read(board.html()).data["alarms"][i][5]
        for i, (_, alarm) in enumerate(board.alarms)
    )
    calm = RunBoard(troubled(), watch=health(limits=Limits(entropy=0.01)))
    assert calm.alarms == []


def test_an_alarm_of_ones_own_stands_on_its_own_curve():
    """On the number that it names, else on a count under its name; never on a curve that it was not
    read off.
    """
    history = troubled(20).assign(my_number=np.linspace(0, 2, 20), note="text")
    watch = health(history)
    watch.alarms += [
        Alarm(3, "a word of mine", "Hm.", "Look.", metric="my_number"),
        Alarm(5, "my_number", "Hm.", "Look."),
        Alarm(7, "information loss", "Hm.", "Look."),
        Alarm(9, "information loss", "Again.", "Look."),
        Alarm(11, "note", "Text.", "Look.", metric="note"),
        Alarm(12, "repetition", "A loop.", "Stop."),
    ]
    board = RunBoard(history, watch=watch)
    marks = {plot.key: plot.marks for plot in board.plots if plot.marks}
    assert marks == {
        "my_number": [(3.0, "1"), (5.0, "2")],
        "information loss": [(7.0, "3"), (9.0, "4")],
        "note": [(11.0, "5")],
        "repetition": [(12.0, "6")],
    }
    curves = {plot.key: plot.lines[0].y.tolist() for plot in board.plots}
    assert curves["my_number"] == history["my_number"].tolist()
    assert curves["information loss"] == [0] * 6 + [1] * 2 + [2] * 12
    assert [plot.label for plot in board.plots][-4:] == [
        "my number",
        "information loss",
        "note",
        "repeated triples of tokens, share",
    ]
    assert "information loss" in board.static()
    assert len(Read(board.html()).data["plots"]) == len(board.plots)
    assert "information loss 0 → 2" in repr(board)


def test_a_meter_that_rings_is_shown():
    watch = health(limits=Limits(window=2))
    history = pd.DataFrame({"step": [1, 2, 3, 4], "loss": [1.0] * 4})
    for step, share in enumerate([0.0, 0.0, 0.9, 0.9], 1):
        watch.note({"step": float(step), "loss": 1.0, "repetition": share})
    board = RunBoard(history, watch=watch)
    assert [alarm.signature for alarm in watch.alarms] == ["repetition"]
    assert [(plot.key, len(plot.marks)) for plot in board.plots] == [("loss", 0), ("repetition", 1)]


def test_no_mark_lies_on_another():
    history, watch = troubled(100), health()
    watch.alarms += [Alarm(step, "mine", "", "") for step in (10, 10, 12, 50)]
    (mine,) = [plot for plot in RunBoard(history, watch=watch).plots if plot.key == "mine"]
    assert mine.marks == [(10.0, "1 2 3"), (12.0, ""), (50.0, "4")]
    assert mine.html().count("opd-lp-flag") == 2
    assert mine.html().count("opd-lp-mark") == 3


def test_a_watch_is_of_one_run():
    with pytest.raises(
        OpdlabError, match=r"RunBoard got watch=.* for 2 runs\. Give the watch of one run"
    ):
        RunBoard({"a": troubled(), "b": troubled()}, watch=health())
    with pytest.raises(OpdlabError, match=r"watch=3 for 1 run\."):
        RunBoard(troubled(), watch=3)


def test_runs_are_overlaid_by_name_on_one_scale():
    board = RunBoard({"<b>one</b>": troubled(), "two": troubled(30).assign(loss=5.0)}, title="Both")
    loss = board.plots[0]
    assert {line.name for line in loss.lines} == {"<b>one</b>", "two"}
    assert (loss.x, loss.y) == ((1, 60), (0, 5))
    assert len({line.look for line in loss.lines}) == 2
    assert not {line.look for line in loss.lines} & {"teacher", "student"}
    board.hidden = ["two"]
    assert {line.name for line in board.plots[0].lines} == {"<b>one</b>"}
    html = board.html(script=False)
    assert "<b>one" not in html
    assert html.count("<svg") == len(board.plots)
    assert "<b>one</b>, step" in repr(board)


def test_many_steps_get_a_mean_and_keep_their_peaks():
    x, y = np.arange(5000.0), np.zeros(5000)
    y[1234], y[4321] = 7.0, -3.0
    few_x, few = thin(x, y)
    assert len(few) <= POINTS + 2
    assert (few.max(), few.min()) == (7, -3)
    assert (few_x[0], few_x[-1]) == (0, 4999)
    kinds = [line.kind for line in RunBoard(troubled()).plots[0].lines]
    assert kinds == ["faint", "line"]
    assert [line.kind for line in RunBoard(troubled(10)).plots[0].lines] == ["line"]
    assert [line.kind for line in RunBoard(troubled()).plots[-1].lines] == [
        "line",
        "dots",
    ]  # accuracy: one step in ten


def test_a_pen_draws_in_percent_and_lifts_at_gaps():
    line = Line("", np.array([0.0, 5, 10, 10]), np.array([0.0, 1, np.nan, 2]))
    assert draw_path(line, (0, 10), (0, 2)) == "M0.00 100.00h0L50.00 50.00M100.00 0.00h0"
    assert find_range([np.array([np.nan])]) == (0, 1)
    assert find_range([np.array([3.0, 3.0])]) == (1.5, 4.5)


def test_what_is_no_run_is_refused():
    with pytest.raises(OpdlabError, match=r"RunBoard got int for 'a'\. Give a run, or"):
        RunBoard({"a": 3})
    with pytest.raises(OpdlabError, match=r"needs a run, and there is none"):
        RunBoard({})
    with pytest.raises(OpdlabError, match=r"shows a history, so there is nothing to train"):
        RunBoard(troubled()).train()
    with pytest.raises(OpdlabError, match=r"shows 2 runs"):
        RunBoard({"a": troubled(), "b": troubled()}).train()
    assert "0 steps" in repr(RunBoard(pd.DataFrame()))


def test_lengths_are_not_drawn_from_zero():
    """A growth of the texts by a tenth must be seen."""
    history = pd.DataFrame({"loss": [2.0, 1.0], "length": [22.0, 24.0]})
    plots = {plot.key: plot for plot in RunBoard(history).plots}
    assert plots["length"].y == (22.0, 24.0)
    assert plots["loss"].y[0] == 0.0


def with_seconds(*steps: tuple[float, float, float]) -> pd.DataFrame:
    table = pd.DataFrame(steps, columns=["generate_s", "grade_s", "learn_s"])
    return table.assign(step=range(1, len(steps) + 1), loss=1.0)


def test_bars_say_where_the_time_of_a_step_goes():
    board = RunBoard(with_seconds((9, 9, 9), (2, 1, 1), (4, 1, 1)))  # the first step is slower
    assert [(bar.label, bar.seconds) for bar in board.phases] == [
        ("sampling", 3.0),
        ("grading", 1.0),
        ("learning", 1.0),
    ]
    assert board.data()["phases"] == [
        ["sampling 3 s", 0.6, 0.0],
        ["grading 1 s", 0.2, 0.0],
        ["learning 1 s", 0.2, 0.0],
    ]
    assert "flex-grow:0.6000" in board.static()
    assert "a step: sampling 3 s; grading 1 s; learning 1 s" in repr(board)


@pytest.mark.parametrize(
    "history",
    [troubled(), with_seconds(), with_seconds((np.nan, np.nan, np.nan)), with_seconds((0, 0, 0))],
)
def test_there_are_no_bars_where_nobody_knows_the_seconds(history):
    board = RunBoard(history)
    assert board.phases == board.data()["phases"] == []
    assert "opd-phases" not in board.static()


def test_several_runs_have_no_bars():
    runs = {name: with_seconds((2, 1, 1)) for name in ("one", "two")}
    assert RunBoard(runs).phases == []


def test_a_profile_puts_the_limit_on_the_bars(run):
    found = opd.profile(run, steps=1)
    board = RunBoard(run, profile=found)
    for bar, phase in zip(board.phases, found.phases, strict=True):
        assert (bar.seconds, bar.limit, bar.bytes) == (phase.seconds, phase.limit, phase.bytes)
        assert 0 < bar.reach <= 1
        assert "limit" in bar.words
    assert [reach for _, _, reach in board.data()["phases"]] == [b.reach for b in board.phases]


@pytest.mark.parametrize(
    ("runs", "profile"), [({"a": troubled(), "b": troubled()}, None), (troubled(), "fast")]
)
def test_a_profile_is_that_of_one_run(run, runs, profile):
    with pytest.raises(
        OpdlabError, match=r"RunBoard got profile=.* for \d runs?\. Give the profile"
    ):
        RunBoard(runs, profile=profile or opd.profile(run, steps=0))
