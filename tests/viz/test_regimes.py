"""The regimes map without a browser: axes, groups and quadrants are those of the trace and of the
methods.
"""

from __future__ import annotations

import numpy as np
import pytest
from viz.traces import NASTY, by_method, made

import opdlab
from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.methods.dopd import Route
from opdlab.viz import Regimes
from opdlab.viz.axes import Axis, find_axes
from opdlab.viz.channels import find_channels
from opdlab.viz.grouping import find_groupings
from opdlab.viz.overview import overview
from opdlab.viz.regimes import QUADRANTS


def trace(n=40, **columns):
    found = made(
        [f"t{i % 9}".encode() for i in range(n)],
        plan={k: v for k, v in columns.items() if k not in ("share", "type")},
    )
    return found.with_columns(**{k: v for k, v in columns.items() if k in ("share", "type")})


@pytest.fixture(scope="module")
def dopd():
    student, teacher, task = opdlab.load("market")
    run = opdlab.distill(
        student, teacher, task, method=opdlab.DOPD(), steps=1, batch=8, quiet=True
    ).train()
    return run.last.trace()


def test_the_quadrants_of_gap_and_confidence_are_the_routes_of_dopd(dopd):
    view = Regimes(dopd, x="gap")
    route, found = dopd.column("route"), view.quadrants["tokens"]
    assert (view.by, view.thresholds["gap"]) == ("route", dopd.describe("gap").threshold)
    assert view.thresholds["confidence"] == dopd.describe("confidence").threshold
    assert found["low x, high y"] == (route == Route.LH).sum() > 0
    assert found["low x, low y"] == (route == Route.LL).sum()
    assert found["high x, high y"] + found["high x, low y"] == (route >= Route.HT).sum() > 0
    np.testing.assert_allclose(find_axes(dopd)["gap"].values, dopd.column("gap"), atol=1e-6)
    assert set(view.df.loc[view.df.quadrant == "low x, high y", "kind"]) == {"LH agree, sure"}


def test_axes_are_the_numbers_of_the_trace():
    scored = trace(advantage=np.linspace(-1, 1, 40))
    found, p = (
        find_axes(scored),
        {name: np.exp(scored.column(f"{name}_logp")) for name in scored.policies},
    )
    np.testing.assert_allclose(found["log_ratio"].values, np.log(p["teacher"] / p["student"]))
    np.testing.assert_allclose(found["gap"].values, abs(np.log(p["teacher"] / p["student"])))
    np.testing.assert_allclose(found["confidence"].values, p["student"] + p["teacher"])
    np.testing.assert_allclose(found["max_p"].values, np.exp(scored.column("teacher_top").max(1)))
    np.testing.assert_array_equal(found["rank"].values, scored.column("teacher_rank"))
    assert {"reverse_kl", "student_entropy", "teacher_entropy", "advantage"} <= set(found)
    assert found["confidence"].start == pytest.approx(float(np.mean(p["student"] + p["teacher"])))
    assert (found["advantage"].start, found["max_p"].start, found["rank"].scale) == (0, 0.5, "log")


def test_a_column_that_is_only_called_gap_stays_what_it_is():
    np.testing.assert_array_equal(
        find_axes(trace(gap=np.arange(40.0)))["gap"].values, np.arange(40.0)
    )


@pytest.mark.parametrize("scale", ["linear", "log", "asinh"])
def test_places_keep_order_and_ends(scale):
    values = np.array([1.0, 2.0, 5.0, 100.0])
    places = Axis("a", "a", values, scale=scale, start=3.0).spread([*values, np.inf, -np.inf])
    assert (np.diff(places[:4]) > 0).all()
    assert (places[0], places[3], places[4], places[5]) == (0, 1, 1, 0)


def test_shares_add_up_and_what_has_no_value_counts_nowhere():
    share = np.arange(40.0) / np.arange(40).sum()
    distance = np.where(np.arange(40) % 4 == 0, np.arange(40) / 40, np.nan)
    view = Regimes(
        trace(window_distance=distance, share=share),
        x="window_distance",
        thresholds={"window_distance": 0.5, "confidence": 0},
    )
    table, have = view.quadrants, ~np.isnan(distance)
    kl = view.trace.column("teacher_reverse_kl")
    assert table["tokens"].tolist() == [5, 5, 0, 0]  # 20 of 40 is 0.5, which is high
    assert table["of kl"]["high x, high y"] == pytest.approx(
        100 * kl[have & (distance >= 0.5)].sum() / kl[have].sum()
    )
    assert table["of gradient"]["low x, high y"] == pytest.approx(
        100 * share[have & (distance < 0.5)].sum() / share[have].sum()
    )
    assert (view.df["quadrant"] == "").sum() == 30


def test_infinite_gaps_are_high_or_low():
    view = Regimes(
        made([b"a", b"b"]).with_columns(student_logp=[0.0, -1.0], teacher_logp=[-np.inf, 0.0])
    )
    assert view.df["quadrant"].str.split(",").str[0].tolist() == ["low x", "high x"]


def test_lines_regions_and_hidden_groups_pick_rows():
    view = Regimes(trace(route=np.arange(40) % 3), by="route")
    df = view.df
    view.region = [-1.0, 1.0, 0.0, 2.0]
    assert view.picked.index.tolist() == df.index[df.x.between(-1, 1)].tolist() != []
    view.hidden = ["1"]
    assert set(view.picked["kind"]) == {"0", "2"}
    assert view.quadrants["tokens"].sum() == (np.arange(40) % 3 != 1).sum()
    view.thresholds = {**view.thresholds, "log_ratio": 1e9}
    assert view.quadrants["tokens"].filter(like="high x").sum() == 0


CODES = {
    "gated": np.arange(40) % 2,
    "audited": (np.arange(40) % 3 == 0).astype(float),
    "divergent": np.arange(40) % 4 // 3,
    "route": np.arange(40) % 4,
    "mine": np.arange(40) % 5 - 1,
}


def test_groups_of_files_of_the_first_format_are_named_as_their_methods_meant_them():
    tried = np.where(np.arange(40) % 2, 0.5, np.nan)
    planned = trace(**CODES, window_distance=tried, type=["skill"] * 30 + ["copy"] * 8 + [None] * 2)
    found = find_groupings(by_method(planned, opdlab.TOPD()))
    # The column with labels comes first; window_distance is an amount.
    assert list(found) == ["divergent", "type", "gated", "audited", "route", "mine"]
    assert found["divergent"].names == ["no", "yes"]
    assert np.bincount(found["divergent"].index).tolist() == [30, 10]
    assert found["type"].names == ["skill", "copy", "none"]
    assert found["mine"].names == ["-1", "0", "1", "2", "3"]
    gated = find_groupings(by_method(planned, opdlab.EOPD()))["gated"]
    assert gated.names == ["reverse KL alone", "gated: forward KL too"]
    audited = find_groupings(by_method(planned, opdlab.OmniOPD()))["audited"]
    assert audited.names == ["anchored", "audited"]
    routes = find_groupings(by_method(planned, opdlab.DOPD()))["route"]
    assert routes.names == [
        "LH agree, sure",
        "LL agree, unsure",
        "HT teacher leads",
        "HS student leads",
    ]
    assert routes.hues == ["amount", "minus", "teacher", "student"]


def test_lines_of_dopd_in_a_file_of_the_first_format_are_those_of_its_step():
    hinted = made(
        [f"t{i % 9}".encode() for i in range(40)],
        ("student", "teacher+hint", "student+hint"),
        plan={"route": np.arange(40) % 4, "gap": np.arange(40.0)},
    )
    hinted.meta["notes"] = {"thresholds": {"gap": 0.7, "confidence": 1.3}}
    found = find_axes(by_method(hinted, opdlab.DOPD()))
    assert (found["gap"].start, found["gap"].unit, found["confidence"].start) == (0.7, "nats", 1.3)
    logp = [hinted.column(f"{name}+hint_logp") for name in ("teacher", "student")]
    np.testing.assert_allclose(found["confidence"].values, np.exp(logp).sum(0))


def test_a_name_alone_means_nothing():
    """Columns of a user's own, called as opdlab's methods call theirs, keep their values and have
    no side's colour.
    """

    class DOPD(opdlab.DOPD):  # a user's, with a plan of its own
        def plan(self, batch):
            return {}

    class Mine:
        pass

    unmarked = trace(**CODES, gap=np.arange(40.0))
    added = made([f"t{i % 9}".encode() for i in range(40)]).with_columns(
        **CODES, gap=np.arange(40.0)
    )
    foreign = {
        "thresholds": {"gap": 7.0, "log_ratio": 5.0},
        "windows": "mine",
        "audits": [{"sample": 0}],
    }
    of_files = []
    for method in (Mine(), DOPD()):
        noted = opdlab.Trace(unmarked.table, unmarked.meta | {"notes": foreign})
        of_files.append(by_method(noted, method))
    for found in (unmarked, added, *of_files):
        for name, grouping in find_groupings(found).items():
            values = sorted(set(CODES[name].tolist()))
            assert grouping.names == [f"{int(value)}" for value in values]
            assert not any(grouping.hues)
        for name, values in CODES.items():
            channel = find_channels(found)[name]
            assert channel.kind == ("signed" if name == "mine" else "amount")
            np.testing.assert_array_equal(channel.values, values)
            assert not channel.formula
        assert find_axes(found)["gap"].label == "gap"
        assert find_axes(found)["log_ratio"].start == 0.0
        assert [type(view).__name__ for _, view in overview(found)] == [
            "TokenLens",
            "Timeline",
            "Regimes",
            "TwoRules",
            "Disagreements",
            "TailAudit",
        ]


def test_plain_text_and_markup_carry_the_message():
    view = Regimes(made(list(map(str.encode, NASTY)), prompt=NASTY[0]), title=NASTY[2])
    text, html = repr(view), view.static()
    assert text.splitlines()[0].endswith(
        f"by log_ratio and confidence, lines at 0 and {view.thresholds['confidence']:.3g}"
    )
    assert text.splitlines()[1].endswith(" log ratio along the tokens")
    assert [line[:14].strip() for line in text.splitlines()[2:]] == list(QUADRANTS)
    assert f"{view.quadrants['of kl'].iloc[0]:.3g} % of KL" in html
    assert "<img" not in html
    assert "<script" not in html


def test_what_is_not_there_is_named():
    with pytest.raises(UnknownColumn, match=r"no axis 'what'. It has log_ratio"):
        Regimes(trace(), x="what")
    with pytest.raises(UnknownColumn, match=r"no axis 'typo'"):
        Regimes(trace(), thresholds={"typo": 1})
    with pytest.raises(UnknownColumn, match=r"by 'type'. There is nothing"):
        Regimes(trace(), by="type")
    with pytest.raises(OpdlabError, match="no numbers to draw"):
        Regimes(
            opdlab.Trace(
                trace().table.select(["sample", "position", "token_id"]),
                trace().meta | {"policies": ["student"]},
            )
        )


def test_a_student_alone_has_two_axes_and_infinities_lie_at_the_ends():
    alone = Regimes(made([b"a", b"b"], ("student",)).with_columns(loss=[1.0, 2.0]))
    assert {alone.x, alone.y} == {"student_entropy", "loss"}
    view = Regimes(
        made([b"a", b"b", b"c"]).with_columns(
            student_logp=[0.0, -1.0, -1.0],
            teacher_logp=[-np.inf, 0.0, -1.5],
            teacher_reverse_kl=[np.inf, 1.0, 2.0],
        )
    )
    low, high = view.axes["log_ratio"].ends
    view.region = [low, 0.0, 0.0, 2.0]
    assert view.picked.index.tolist() == [0, 2]
    assert sorted(view.quadrants["of kl"]) == pytest.approx(
        [0, 20, 40, 40]
    )  # an infinite one counts as the largest finite
    view.region = [low + 0.1, high, 0.0, 2.0]
    assert view.picked.index.tolist() == [1]
