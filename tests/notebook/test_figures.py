"""The pictures of the notebooks: what they must show, whatever the layout."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import opdlab as opd
from opdlab.errors import OpdlabError
from opdlab.notebook import figures, stills


def test_seeds_are_summarised_by_students_t():
    values = pd.DataFrame([[0.90, 0.94, 0.95], [0.5, 0.5, 0.5]], index=["a", "b"])
    table = figures.summarize_seeds(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values.loc["a"]), stats.sem(values.loc["a"]))
    assert np.allclose(table.loc["a", ["mean", "low", "high"]].astype(float), [0.93, low, high])
    assert table.loc["a", "seeds"] == [0.90, 0.94, 0.95]
    assert table.loc["b", "low"] == table.loc["b", "high"] == 0.5


def test_one_seed_has_no_interval():
    table = figures.summarize_seeds(pd.DataFrame([[0.4]], index=["a"]))
    assert table["mean"].item() == 0.4
    assert np.isnan(table["low"].item())


def test_arms_show_every_seed_and_cut_intervals_at_the_limits():
    values = pd.DataFrame([[0.8, 0.9, 1.0], [0.2, 0.3, 0.1]], index=["a", "b"])
    table = figures.summarize_seeds(values)
    figure = figures.draw_arms({"left": table, "right": table}, "title", "share", (0, 1))
    drawn = np.sort(np.concatenate([trace.x for trace in figure.data if len(trace.x) == 3]))
    assert np.allclose(drawn, np.sort(np.tile(values.to_numpy().ravel(), 2)))
    ends = [trace.x for trace in figure.data if trace.mode == "lines"]
    assert max(max(end) for end in ends) == 1  # the interval of "a" reaches beyond
    assert [note.text for note in figure.layout.annotations] == ["left", "right", "share"]


def test_arms_refuse_panels_that_differ():
    one, other = (
        figures.summarize_seeds(pd.DataFrame([[0.1, 0.2]], index=[name])) for name in "ab"
    )
    with pytest.raises(OpdlabError, match="same arms"):
        figures.draw_arms({"x": one, "y": other}, "title", "share")
    with pytest.raises(OpdlabError, match="same arms"):
        figures.draw_arms({}, "title", "share")


def test_changes_show_the_means_and_every_seed_below_its_row():
    changes = pd.DataFrame(
        {"before": [0.3, 0.0], "hinted": [1.0, 0.1], "after": [0.8, 0.1]}, index=["a", "b"]
    ).assign(seeds=[[0.7, 0.9], [0.1]])
    figure = figures.draw_changes(changes, "title", "share", ["red", "grey"])
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    kept = [(*line.x, line.line.color) for line in lines if line.opacity is None]
    assert kept == [(0.3, 0.8, "red"), (0, 0.1, "grey")]
    # only the first arm lost a part of its hint's effect
    lost = [(*line.x, line.line.color) for line in lines if line.opacity is not None]
    assert lost == [(0.8, 1.0, "red")]
    *means, seeds = [trace for trace in figure.data if trace.mode == "markers"]
    assert [tuple(mean.x) for mean in means] == [(0.3, 0.0), (1.0, 0.1), (0.8, 0.1)]
    assert means[-1].marker.color == ("red", "grey")  # as the arm
    assert list(seeds.marker.color) == ["red", "red", "grey"]
    assert list(seeds.x) == [0.7, 0.9, 0.1]
    assert np.floor(seeds.y).tolist() == [0, 0, 1]  # the row that they belong to
    assert min(seeds.y) > 0  # beside the means, which hide nothing
    with pytest.raises(OpdlabError, match="2 arms and 1 colours"):
        figures.draw_changes(changes, "title", "share", ["red"])


def test_the_map_has_every_method_and_fills_those_that_run():
    field = opd.notebook.survey()
    ready = opd.notebook.compose_all(field)
    figure = figures.draw_survey(field, ready, "title")
    dots = [trace for trace in figure.data if trace.x[0] is not None]
    assert sum(len(trace.x) for trace in dots) == len(field)
    places = {(x, y) for trace in dots for x, y in zip(trace.x, trace.y, strict=True)}
    assert len(places) == len(field)  # no dot hides another
    filled = sum(colour != "rgba(0,0,0,0)" for trace in dots for colour in trace.marker.color)
    assert filled == len(ready)
    assert set(field["axis"]) == {axis for axes in figures.LANES.values() for axis in axes}


def test_the_map_names_what_runs_and_no_two_names_touch():
    ready = opd.notebook.compose_all(opd.notebook.survey())
    figure = figures.draw_survey(opd.notebook.survey(), ready, "title")
    names = [note for note in figure.layout.annotations if note.xref != "paper"]
    assert {note.text for note in names} == {name.split(" (")[0].split(" / ")[0] for name in ready}
    at = sorted((note.y, note.x - 0.08 * len(note.text), note.text) for note in names)
    for (y, x, text), (next_y, next_x, _) in pairwise(at):
        assert next_y > y or next_x > x + 0.16 * len(text)


def test_cosines_name_divergences_once_and_say_where_there_is_no_gradient():
    cosines = pd.DataFrame(
        {"forward KL": [0.8, np.nan], "reverse KL": [1.0, np.nan]}, index=["a", "b"]
    )
    figure = figures.draw_cosines(cosines, ["the reverse KL", "nothing"], "title", "cosine")
    said = {note.text: note.y for note in figure.layout.annotations}
    assert said == {
        "it trains": -1.1,
        "the reverse KL": 0,
        "nothing": 1,
        "no gradient on average": 1,
    }
    dots = {trace.name: trace for trace in figure.data if trace.text}
    assert {name: dots[name].x[0] for name in dots} == {"forward KL": 0.8, "reverse KL": 1.0}
    assert [list(trace.text) for trace in dots.values()] == [["forward KL", ""], ["reverse KL", ""]]
    with pytest.raises(OpdlabError, match="2 losses and 1 verdicts"):
        figures.draw_cosines(cosines, ["the reverse KL"], "title", "cosine")


def test_the_loop_keeps_a_picture_where_scripts_and_svg_are_stripped():
    bundle = figures.draw_loop()._repr_mimebundle_()
    assert "The student learns" in bundle["text/html"]
    assert "the student learns" in bundle["text/plain"]
    assert stills._STATIC.search(bundle["text/html"])  # freezing finds the place for its picture


def test_events_stand_on_the_line_of_their_run():
    ends = {("loops", 0): 12, ("loops", 1): 12, ("drift", 0): 20}
    events = [("loops", 1, 9, "its own alarm"), ("drift", 0, 5, "the score has fallen")]
    figure = figures.draw_events(ends, events, {"loops": "a", "drift": "b"}, "title")
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert [trace.x[1] for trace in lines] == [12, 12, 20]
    marks = {trace.name: trace for trace in figure.data if trace.mode == "markers"}
    assert marks["its own alarm"].y[0] == lines[1].y[0]
    assert marks["its own alarm"].x[0] == 9
    assert marks["the score has fallen"].y[0] == lines[2].y[0]
    assert len(marks["another alarm"].x) == 0


@pytest.mark.parametrize(("mark", "expected"), [(0.3, [0.3, 0.3]), ([0.1, 0.2], [0.1, 0.2])])
def test_each_panel_has_its_mark(mark, expected):
    table = figures.summarize_seeds(pd.DataFrame([[0.1, 0.2]], index=["a"]))
    figure = figures.draw_arms({"x": table, "y": table}, "title", "share", mark=mark)
    assert [(line.x0, line.xref) for line in figure.layout.shapes] == [
        (expected[0], "x"),
        (expected[1], "x2"),
    ]
