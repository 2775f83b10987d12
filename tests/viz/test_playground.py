"""The playground without a browser: its small worlds agree with the divergences themselves, and
with what is known of them.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from viz.test_token_lens import Read
from viz.traces import made

from opdlab import losses
from opdlab.audit import as_loss, in_reward
from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.losses import DIVERGENCES, Generator
from opdlab.methods import OPD
from opdlab.viz import Playground, payload, toys
from opdlab.viz.playground_losses import PlaygroundLosses

LOSSES = {
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "generalized_jsd": losses.generalized_jsd,
    "skew_forward_kl": losses.skew_forward_kl,
    "skew_reverse_kl": losses.skew_reverse_kl,
    "alpha_divergence": losses.alpha_divergence,
    "jensen_shannon": losses.jensen_shannon,
    "total_variation": losses.total_variation,
}
TEACHER = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
STUDENT = torch.tensor([0.05, 0.15, 0.8], dtype=torch.float64)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_push_per_unit_of_probability_is_the_generator_s_weight(name):
    g = Generator(name)
    want = (g.weight(toys.X) - g.centre).numpy()
    np.testing.assert_allclose(toys.weights(toys.of_generator(g)), want, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        toys.weights(toys.of_generator(g, clip=1.5)), np.clip(want, -1.5, 1.5), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", LOSSES)
def test_an_own_loss_goes_the_way_of_the_built_in_one(name):
    own, known = toys.of_loss(LOSSES[name]), toys.of_generator(Generator(name))
    np.testing.assert_allclose(toys.weights(own), toys.weights(known), rtol=1e-6, atol=1e-8)
    apart = (
        toys.X.numpy() != 0 if name == "total_variation" else slice(None)
    )  # at 0 it jumps, and a rounding decides
    np.testing.assert_allclose(
        toys.pulls(own, 0.3)[apart], toys.pulls(known, 0.3)[apart], rtol=1e-6, atol=1e-8
    )
    np.testing.assert_allclose(
        toys.field(own, TEACHER, 2.0), toys.field(known, TEACHER, 2.0), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_way_of_a_student_leads_to_the_tempered_teacher(name):
    want = toys.apply_temperature(TEACHER.log(), 2.0).exp()
    end = toys.path(toys.of_generator(Generator(name)), STUDENT, TEACHER, 600, 2.0)
    np.testing.assert_allclose(end[0], STUDENT)
    np.testing.assert_allclose(
        end[-1], want, atol=0.1 if name == "total_variation" else 1e-3
    )  # total variation steps past it
    np.testing.assert_allclose(end.sum(1), 1)


def test_forward_kl_matches_moments_and_reverse_kl_sits_on_a_hill():
    """The Gaussian is an exponential family, so forward KL ends where first and second moments
    agree.
    """
    q = toys.hills().exp()
    at, width = toys.fit(toys.of_generator(Generator("forward_kl")), 400)
    p = (-(((toys.SPACE - at) / width) ** 2) / 2).softmax(-1)
    for power in (1, 2):
        assert float((p * toys.SPACE**power).sum()) == pytest.approx(
            float((q * toys.SPACE**power).sum()), abs=1e-4
        )
    at, width = toys.fit(toys.of_generator(Generator("reverse_kl")), 400)
    assert (at, width) == pytest.approx((toys.HILLS[1][1], toys.HILLS[1][2]), abs=0.02)
    table = Playground(["forward_kl", "reverse_kl"]).table
    assert table["covers"].tolist() == [True, False]


def test_what_a_loss_holds_back_shows_in_finite_differences():
    for whole in (losses.reverse_kl, as_loss("k3"), OPD("jensen_shannon")):
        gap, top = toys.finite_difference(whole)
        assert gap < 1e-8 < top
    gap, top = toys.finite_difference(in_reward("k1"))
    assert gap > 0.1
    view = Playground({"whole": losses.reverse_kl, "held": in_reward("k1")})
    cards = view.data()["cards"]
    assert [card["held"] for card in cards] == [False, True]
    assert "Agrees with finite differences" in cards[0]["check"]
    assert cards[1]["verdict"] == view.audits["held"].verdict
    assert "trains the reverse KL" in repr(view)


def test_the_page_may_ask_for_own_losses_at_other_settings():
    view = Playground({"mine": losses.forward_kl})
    asked = {
        "mass": 0.2,
        "temperature": 2.0,
        "steps": 30,
        "teacher": [0.2, 0.2, 0.6],
        "student": [0.5, 0.25, 0.25],
    }
    (found,) = view.answer(asked)
    known = toys.of_generator(Generator("forward_kl"))
    np.testing.assert_allclose(found["fit"], toys.fit(known, 30, 2.0), rtol=1e-6)
    walk = toys.path(
        known,
        torch.tensor(asked["student"]).double(),
        torch.tensor(asked["teacher"]).double(),
        30,
        2.0,
    )
    np.testing.assert_allclose(np.reshape(found["walk"], (-1, 3)), walk, atol=1e-6)
    pulls = np.array([math.nan if v is None else v for v in found["pulls"]])
    np.testing.assert_allclose(pulls, toys.pulls(known, 0.2), atol=1e-6)
    assert (
        len(view.answer(asked | {"steps": 10**9, "teacher": [0, 0, 0], "mass": 7})[0]["walk"])
        == 3 * 1001
    )  # whatever a page sends


def test_settings_reach_the_page_and_the_text():
    view = Playground(["pearson", Generator("skew_forward_kl", alpha=0.3)], title="<b>x</b>")
    assert (view.shown, view.parameter) == (["pearson", "skew_forward_kl"], 0.3)
    read = Read(view.html())
    assert "<b>x" not in view.html()
    assert read.data["settings"]["teacher"] == view.teacher
    assert view.html(script=False).count("<svg") == 2
    assert "skew forward KL: covers both hills" in repr(view)
    np.testing.assert_allclose(
        view.df["pearson"], toys.weights(toys.of_generator(Generator("pearson")))
    )


def test_own_losses_keep_names_of_their_own():
    view = Playground(
        [losses.reverse_kl, "reverse_kl", lambda rows: rows.logp, lambda rows: -rows.logp]
    )
    assert view.shown == ["my reverse_kl", "reverse_kl", "<lambda>", "<lambda> 2"]
    assert list(view.own) == ["my reverse_kl", "<lambda>", "<lambda> 2"]
    assert Playground(losses.reverse_kl).shown == ["my reverse_kl", "forward_kl", "reverse_kl"]


def test_a_text_brings_its_tokens():
    view = Playground(trace=made([b"a", b" b"]))
    data = payload.unpack(payload.pack(view.data()))
    assert len(data["text"]["index"]) == 2
    assert data["duel"]["count"].min() > 0


def test_what_cannot_be_played_with_is_said():
    with pytest.raises(OpdlabError, match=r"no divergence 'kl'\. Use forward_kl"):
        Playground(["kl"])
    with pytest.raises(OpdlabError, match=r"up to 4 losses at a time, and got 5"):
        Playground(list(DIVERGENCES)[:5])
    with pytest.raises(UnknownColumn, match="rows has no 'advantage'"):
        Playground(lambda rows: rows.advantage * rows.logp)


def test_it_begins_at_the_token_where_the_two_sides_differ_most():
    trace = made([b"a", b" b", b" c"]).with_columns(
        student_logp=[-1.0, -1.0, -1.0], teacher_logp=[-1.5, -0.9, -4.0]
    )
    assert Playground(trace=trace).selected == 2
    assert Playground(trace=made([b"a", b" b"], ("student",))).selected == 0


def test_a_divergence_that_the_page_does_not_know_is_computed_here(monkeypatch):
    known = tuple(name for name in PlaygroundLosses.known if name != "pearson")
    monkeypatch.setattr(PlaygroundLosses, "known", known)
    view = Playground(["pearson", "forward_kl"])
    drawn = view.data()
    assert [one["name"] for one in drawn["own"]] == ["pearson"]
    assert not drawn["own"][0]["mine"]
    assert "pearson" not in [name for name, _ in drawn["known"]]
    np.testing.assert_allclose(drawn["own"][0]["weights"], toys.weights(view.push("pearson")))
    assert drawn["cards"] == []
    (again,) = view.answer({**drawn["settings"], "steps": 3})
    assert again["name"] == "pearson"
    assert len(again["walk"]) == 3 * (3 + 1)
