"""The card of a run: the numbers are those of the evaluations, the strips those of the trace,
nothing in it is markup or script.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from viz.test_run_board import troubled
from viz.test_token_lens import Read
from viz.traces import NASTY, made

import opdlab as opd
from opdlab.errors import OpdlabError
from opdlab.training.evaluation import Evaluation
from opdlab.viz import RunCard, set_renderer, view


def evaluation(right: list[float], key: str = "a") -> Evaluation:
    scores = np.array(right)
    return Evaluation(
        "",
        scores,
        np.zeros((len(scores), 0)),
        np.ones(len(scores)),
        np.zeros(len(scores)),
        key=(key,),
    )


BEFORE, AFTER = evaluation([0, 0, 0, 1] * 10), evaluation([0, 1, 1, 1] * 10)


def test_the_gain_is_the_paired_difference():
    card = RunCard(troubled(), BEFORE, AFTER)
    gain = AFTER - BEFORE
    assert (
        f"accuracy 0.250 → 0.750, +0.5 [+{gain.low:.3g}, +{gain.high:.3g}], 95 % paired over 40"
        " prompts, 1 seed" in repr(card)
    )
    places = re.findall(r'class="opd-(way|whisker|was|is)" style="left:([\d.]+)%', card.html())
    want = {"way": 25, "whisker": 25 + 100 * gain.low, "was": 25, "is": 75}
    assert {name: float(x) for name, x in places} == pytest.approx(want, abs=0.01)
    with pytest.raises(OpdlabError, match="do not pair"):
        RunCard(troubled(), BEFORE, evaluation([1] * 40, "b"))


def test_without_evaluations_the_history_says_what_it_knows():
    card = RunCard(troubled())
    assert "accuracy 0.900 → 0.500 (steps 10 and 60)" in repr(card)
    assert "opd-whisker" not in card.html(assets=False)
    assert "Alarms: entropy collapse (step 3" in repr(card)
    assert "accuracy" not in RunCard(troubled().drop(columns="accuracy")).html(assets=False)
    assert card.html(assets=False).count("<svg") == 4


def test_a_run_says_how_it_was_trained():
    student, teacher, task = opd.load("market")
    run = opd.distill(
        student,
        teacher,
        task,
        batch=2,
        n=2,
        steps=2,
        max_new_tokens=4,
        lr=0.001,
        seed=7,
        quiet=True,
    ).train()
    text = repr(RunCard(run, title="Mine"))
    assert text.startswith(
        "RunCard: Mine\nOPD · 2 steps · batch 2 × 2 · lr 0.001 · LoRA 16 · seed 7 · "
    )
    assert f"{int(run.history['tokens'].sum())} tokens written" in text


def test_strips_share_a_scale_and_escape_what_they_show():
    loud = made([b"a", b"b"]).with_columns(student_logp=[0.0, 0.0], teacher_logp=[-4.0, 4.0])
    calm = made([text.encode() for text in NASTY], prompt=NASTY[2])
    card = RunCard(
        troubled(), samples={NASTY[0]: loud, "after": calm}, title=NASTY[0], note=NASTY[2]
    )
    read = Read(card.html(assets=False))
    assert set(read.tags) <= {"div", "span", "b", "i", "svg", "path", "figure", "figcaption"}
    assert read.names <= {
        "class",
        "style",
        "dir",
        "data-mark",
        "viewbox",
        "preserveaspectratio",
        "role",
        "aria-label",
        "d",
    }
    assert "window.broken=1&lt;/script&gt;" in card.html()
    assert [caption for caption, _, _ in card.strips] == [f"{NASTY[0]}: ", "after: "]
    assert card.html(assets=False).count('class="opd-strip"') == 2
    several = opd.Trace(made([b"a"]).table, made([b"a"]).meta)
    assert len(RunCard(troubled(), samples=several).strips) == 1


def test_it_is_a_still_picture_whatever_the_renderer():
    card = RunCard(troubled())
    set_renderer("live")
    assert set(card._repr_mimebundle_()) == {"text/html", "text/plain"}
    view._renderer.clear()
    assert "<script" not in card.html()
    with pytest.raises(OpdlabError, match=r"still picture and has no widget\. Show the card"):
        card.live()


def test_what_is_not_enough_is_said():
    with pytest.raises(OpdlabError, match=r"compares two evaluations, and got one"):
        RunCard(troubled(), BEFORE)
    with pytest.raises(OpdlabError, match=r"no steps yet"):
        RunCard(pd.DataFrame())


def test_what_is_no_run_is_named():
    with pytest.raises(OpdlabError, match=r"RunCard got a Trace as its run.*samples="):
        RunCard(made([b"a"]))
