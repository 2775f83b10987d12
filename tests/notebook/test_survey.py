"""The survey's methods as data, and what six choices make of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

import opdlab as opd
from opdlab.losses.divergences import TopK
from opdlab.notebook.survey import SLOTS, compose, compose_all, findings, survey

ROWS = json.loads((Path(__file__).parents[2] / "data" / "survey.json").read_text(encoding="utf-8"))[
    "methods"
]
AXES = [
    "4.1",
    "4.2",
    "4.3",
    "5.1.1",
    "5.1.2",
    "5.2.1",
    "5.2.2",
    "5.2.3",
    "6.1",
    "6.2",
    "6.3",
    "after",
]
CLASSES = {
    "forward KL",
    "reverse KL",
    "symmetric or skew",
    "any f-divergence",
    "KL and reward",
    "preference",
    "other",
    None,
}


def test_ids_and_names_are_well_formed_and_unique():
    ids = [row["arxiv"] for row in ROWS]
    assert all(re.fullmatch(r"2[0-9](0[1-9]|1[0-2])\.\d{5}", one) for one in ids)
    assert len(set(ids)) == len(ids) > 150
    assert len({row["name"] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_rows_use_the_words_there_are(row):
    assert row["axis"].split()[0] in AXES
    assert row["access"] in ("white-box", "black-box", "teacher-free")
    assert row["granularity"] in (
        "token",
        "sequence",
        "span",
        "step",
        "turn",
        "trajectory",
        "prompt",
    )
    assert row["loss"] in CLASSES
    assert 10 <= len(row["line"]) <= 100
    assert row["certainty"]["row"] in ("v4", "later list")
    assert (row["loss"] is None) == (row["certainty"]["loss"] is None)
    assert ("slots" in row) == ("slots" in row["certainty"])
    if "slots" in row:
        assert tuple(row["slots"]) == SLOTS
        assert row["certainty"]["slots"] in ("read", "inferred")


def test_axes_come_in_the_survey_s_order():
    assert [axis.split()[0] for axis in survey()["axis"].unique()] == AXES


def test_the_frame_has_dates_and_none_where_nothing_is_known():
    frame = survey()
    assert frame.loc["GKD", "date"] == pd.Timestamp("2023-06-01")
    assert frame.loc["PACED", "loss"] is None
    assert frame.loc["Lion", "divergence"] is None
    assert frame.loc["GKD", list(SLOTS)].tolist() == [
        "mixed",
        "teacher",
        "generalized_jsd",
        "full",
        "none",
        "constant",
    ]


@pytest.mark.parametrize(
    ("choices", "method"),
    [
        ({}, opd.OPD()),
        (
            {"prefix": "mixed", "divergence": "generalized_jsd"},
            opd.OPD("generalized_jsd", on_policy=0.5),
        ),
        ({"prefix": "teacher", "divergence": "forward_kl"}, opd.OPD("forward_kl", on_policy=0.0)),
        ({"estimator": "top-k"}, opd.OPD(top_k=TopK(16, by="teacher"))),
        ({"estimator": "sampled"}, opd.OPD(estimator="sampled")),
        ({"estimator": "sampled, baseline"}, opd.OPD(estimator="sampled", baseline="value")),
        ({"estimator": "return"}, opd.OPD(estimator="sampled", discount=1.0)),
        ({"estimator": "sampled", "divergence": "pearson"}, opd.OPDPlus("pearson")),
        ({"target": "hinted self"}, opd.SelfDistillation("reverse_kl")),
        ({"target": "hinted self, averaged"}, opd.SelfDistillation("reverse_kl", anchor="ema")),
        ({"weight": "forks"}, opd.TOPD()),
        ({"weight": "undecided teacher"}, opd.EOPD()),
        ({"target": "beyond the teacher", "estimator": "sampled"}, opd.GOPD()),
    ],
)
def test_choices_make_methods(choices, method):
    assert compose(**choices) == method


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"schedule": "annealed"}, r"no schedule 'annealed' in this place\. Use constant"),
        ({"prefix": "blend"}, r"no prefix 'blend' .*Use student, mixed, teacher"),
        ({"weight": "pass rate"}, "no weight 'pass rate'"),
        ({"prefix": "mixed", "weight": "forks"}, "no weight 'forks'"),
        ({"target": "a friend"}, r"no target 'a friend' .*hinted self"),
        (
            {"target": "hinted self", "estimator": "sampled"},
            r"target 'hinted self' on whole distributions\. Use prefix='student'",
        ),
        ({"divergence": "bregman"}, "no divergence 'bregman'"),
        ({"estimator": "guess"}, "no estimator 'guess'"),
        (
            {"prefix": "mixed", "estimator": "sampled"},
            r"^opdlab has the estimator 'sampled' for the prefix 'student' only, not for 'mixed'\. "
            r".*the student sampled\. Use prefix='student'",
        ),
        (
            {"estimator": "return", "divergence": "pearson"},
            r"'return' for the reverse KL only.*Use estimator='sampled'",
        ),
    ],
)
def test_what_is_lacking_is_named(choices, says):
    with pytest.raises(opd.OpdlabError, match=says):
        compose(**choices)


def test_the_papers_of_opdlab_s_methods_make_them():
    ready = compose_all(survey())
    made = {
        name: type(ready[name])
        for name in (
            "TOPD (Bridging)",
            "EOPD",
            "G-OPD / ExOPD",
            "DOPD",
            "OVD",
            "OmniOPD",
            "SODA",
            "SimCT",
        )
    }
    assert list(made.values()) == [
        opd.TOPD,
        opd.EOPD,
        opd.GOPD,
        opd.DOPD,
        opd.OVD,
        opd.OmniOPD,
        opd.SODA,
        opd.SpanOPD,
    ]
    assert not {"MiniLLM", "PowerOPD", "KETCHUP", "TIP"} & set(ready)


def test_findings_name_their_papers():
    table = findings()
    assert table.index.is_unique
    assert all(re.fullmatch(r"26(0[1-9]|1[0-2])\.\d{5}", one) for one in table.index)
    assert table["claim"].str.len().between(20, 100).all()
    assert (table["here"].str.len() > 5).all()
    assert {"2608.31046", "2609.35259", "2609.32722", "2608.09228"} <= set(table.index)


def test_methods_later_than_the_survey_come_from_the_catalogue():
    later = survey().query("axis == 'after v4'")
    assert len(later) > 70
    assert (later["row_from"] == "later list").all()
    assert {"OPSA", "MOPD", "TurnOPD", "BPM"} <= set(later.index)
