"""A method of a user's own is drawn in its own words and colours, in every picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import opdlab
from opdlab import viz
from opdlab.data.column import Column
from opdlab.data.notes import Chunks, Windows
from opdlab.viz import payload
from opdlab.viz.axes import find_axes
from opdlab.viz.overview import overview

LABELS = ("imitate", "steady", "leave")
HUES = ("teacher", "", "minus")


class Routed:
    """A method with columns that describe themselves, and with notes of its own."""

    needs = ("teacher",)

    def plan(self, batch):
        gap = batch.signals["teacher_logp"] - batch.signals["student_logp"]
        route = torch.where(gap > 0.1, 0, torch.where(gap > -0.1, 1, 2))
        ids = batch.rollout.ids
        batch.notes["detours"] = Windows(
            [
                {
                    "sample": 0,
                    "position": 1,
                    "student": ids[0, 1:3].tolist(),
                    "teacher": ids[0, :2].tolist(),
                    "distance": 0.75,
                }
            ],
            threshold=0.5,
        )
        return {
            "route": Column(route, "how the token is taught", labels=LABELS, hues=HUES),
            "pull": Column(
                gap,
                "log T(y) − log S(y)",
                unit="nats",
                kind="signed",
                compares=("teacher", "student"),
                threshold=0.25,
                less="away",
                more="towards",
            ),
        }

    def loss(self, rows):
        return opdlab.losses.reverse_kl(rows.student, rows.teacher)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    student, teacher, task = opdlab.load("market")
    run = opdlab.distill(student, teacher, task, method=Routed(), steps=1, batch=4, quiet=True)
    path = run.train().last.trace().save(tmp_path_factory.mktemp("own") / "step.parquet")
    return opdlab.Trace.load(path)


def drawn(view):
    return payload.unpack(payload.pack(view.data()))


def names_of(trace):
    return [LABELS[code] for code in trace.column("route")]


def test_the_lens_colours_by_the_user_s_labels(trace):
    view = viz.TokenLens(trace, channel="route")
    channel = next(c for c in drawn(view)["channels"] if c["key"] == "route")
    assert (tuple(channel["names"]), tuple(channel["hues"])) == (LABELS, HUES)
    assert channel["formula"] == "how the token is taught"
    assert [LABELS[code] for code in channel["values"]] == names_of(view.trace)
    assert "rgba(0,114,178,0.500)" in view.static()  # the teacher's blue
    assert "imitate" in repr(view)


def test_regimes_group_by_the_user_s_route_and_start_at_its_threshold(trace):
    view = viz.Regimes(trace, x="pull")
    assert view.by == "route"
    (grouped, *_) = drawn(view)["sorts"]
    assert set(grouped["names"]) <= set(LABELS)
    assert grouped["hues"] == [HUES[LABELS.index(name)] for name in grouped["names"]]
    assert view.df["kind"].tolist() == names_of(trace)
    assert view.thresholds["pull"] == 0.25
    axis = find_axes(trace)["pull"]
    assert (axis.unit, axis.less, axis.more) == ("nats", "away", "towards")


def test_the_timeline_names_the_route_of_the_token_looked_at(trace):
    view = viz.Timeline(trace, samples=[0])
    (kind,) = drawn(view)["kinds"]
    assert (kind["label"], tuple(kind["names"]), tuple(kind["hues"])) == ("route", LABELS, HUES)
    assert view.df["route"].tolist() == names_of(trace.sample(0))
    assert "route: 1 imitate" in repr(view)
    assert "route: 1 imitate" in view.static()


def test_the_scrubber_names_the_route_at_every_step(trace):
    first = trace.sample(0)
    moved = np.roll(first.column("route"), 1)
    later = first.with_columns(route=Column(moved, first.describe("route")))
    view = viz.Scrubber({0: first, 10: later})
    (kind,) = drawn(view)["kinds"]
    assert (tuple(kind["names"]), tuple(kind["hues"])) == (LABELS, HUES)
    np.testing.assert_array_equal(kind["values"], [*first.column("route"), *moved])
    assert "step 0, route: 1 imitate" in repr(view)
    assert "step 10, route: 1 imitate" in view.static()


def test_compare_names_the_routes_of_either_side(trace):
    other = trace.with_columns(route=Column(np.zeros(len(trace), int), trace.describe("route")))
    view = viz.Compare({"old": trace, "new": other})
    (kind,) = drawn(view)["kinds"]
    assert (tuple(kind["names"]), tuple(kind["hues"])) == (LABELS, HUES)
    np.testing.assert_array_equal(kind["values"][0], trace.sample(0).column("route"))
    assert not kind["values"][1].any()
    assert "new, route: 1 imitate 100 %" in repr(view)
    assert "route" not in view.channels  # a difference of names is no number


def test_windows_of_a_method_of_one_s_own_get_the_forks_view(trace):
    views = {type(view): view for _, view in overview(trace)}
    assert viz.Forks in views
    view = views[viz.Forks]
    assert view.threshold == 0.5
    assert view.table["verdict"].tolist() == ["real fork"]
    ids = trace.sample(0).column("token_id")
    assert view.table["student"][0] == b"".join(trace.piece(i) for i in ids[1:3]).decode()


def test_chunks_of_a_method_of_one_s_own_get_the_audits_view(trace):
    chunk = {
        "sample": 0,
        "start": 0,
        "length": 2,
        "text": "a b",
        "continuations": ["a b", "c"],
        "similarity": [1.0, 0.0],
        "prior": 0.5,
        "weight": 0.5,
    }
    notes = {"Mine": {"checked": Chunks([chunk]).as_json()}}
    noted = opdlab.Trace(trace.table, trace.meta | {"notes": notes})
    views = {type(view): view for _, view in overview(noted)}
    assert len(views[viz.Audits].table) == 1
    assert viz.Forks not in views
