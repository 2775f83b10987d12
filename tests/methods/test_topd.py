"""TOPD on enumerable tables, whose states are logits: the engine's gradient is d/d(logits)."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from plans import plan_values

import opdlab as opd
from opdlab import OPD, TOPD, Prompt, exact
from opdlab.engine.batch import Batch
from opdlab.engine.columns import flatten
from opdlab.engine.passes import gradient
from opdlab.errors import MissingPolicy
from opdlab.losses.divergences import reverse_kl
from opdlab.methods import windows

# Tests 9, 13, 15, 17, 19 and 21 of the paper file.


@pytest.fixture(scope="module")
def tables() -> dict[str, exact.Table]:
    prompts = [Prompt(f"prompt {i}", id=str(i)) for i in range(3)]
    return {
        "student": exact.Table.random(4, 6, prompts, seed=0),
        "teacher": exact.Table.random(4, 6, prompts, seed=1, scale=2.0),
    }


@pytest.fixture(scope="module")
def batch(tables) -> Batch:
    return Batch(tables["student"].sample(tables["student"].prompts, 4, seed=3), tables)


def planned(method: TOPD, batch: Batch) -> tuple[dict[str, torch.Tensor], list[dict]]:
    fresh = Batch(batch.rollout, batch.policies, step=batch.step)
    columns = plan_values(method, fresh)
    for name, column in columns.items():
        flatten(fresh, name, column)  # names and shapes are allowed
    note = fresh.notes["windows"]
    json.dumps(note.as_json(), allow_nan=False)
    return columns, note.windows


def slope(method, batch: Batch) -> torch.Tensor:
    """d loss / d logits of every token, `[tokens, V]`, the loss being the mean over tokens."""
    columns = (
        {name: flatten(batch, name, c) for name, c in method.plan(batch).items()}
        if hasattr(method, "plan")
        else {}
    )
    states = {name: batch.states(name) for name in ("student", "teacher")}
    weight = torch.full((batch.rollout.tokens,), 1 / batch.rollout.tokens, dtype=torch.float64)
    return gradient(method.loss, states, batch.token, weight, columns).gradient


DIAGONAL = TOPD(window=3, share=0.3, targets="diagonal", embedding="onehot", weight=0.7)


def test_the_gradient_in_a_window_is_p_minus_the_target_over_k(tables, batch):
    """By hand, one point: (p - onehot(T_i)) / K at its window, nothing elsewhere."""
    method = replace(DIAGONAL, max_points=3, quantile=0.5)
    columns, notes = planned(method, batch)
    kept = [note for note in notes if note["kept"]]
    assert len(kept) == 1
    extra = batch.spread(slope(method, batch) - slope(OPD(), batch))
    p = batch.spread(tables["student"].logits[tables["student"].where(batch.rollout)].softmax(-1))
    want = torch.zeros_like(extra)
    b, t = kept[0]["sample"], kept[0]["position"]
    for i, token in enumerate(kept[0]["teacher"]):
        want[b, t + i] = 0.7 * (p[b, t + i] - torch.eye(4, dtype=torch.float64)[token]) / 3
    torch.testing.assert_close(extra, want, rtol=0, atol=1e-9)
    assert (want != 0).any(-1).sum() == 3
    assert (columns["divergent"] == 2).nonzero().tolist() == [[b, t]]


@pytest.mark.parametrize(
    "method",
    [
        TOPD(window=2, share=0.5, embedding="onehot"),
        TOPD(window=3, share=0.5, embedding="onehot", epsilon=None),
        replace(DIAGONAL, window=2, share=1.0),
        TOPD(window=3, share=0.4, embedding="onehot", student_window="greedy", quantile=0.0),
    ],
)
def test_the_term_is_the_mean_over_points_and_window(method, tables, batch):
    """Dense targets made from the notes, by loops; the value and the gradient with respect to the
    table's logits.
    """
    method = replace(method, threshold="quantile")
    columns, notes = planned(method, batch)
    kept = [note for note in notes if note["kept"]]
    assert len(kept) > 1
    logits = tables["student"].logits.clone().requires_grad_()
    at = batch.spread(torch.arange(batch.rollout.tokens))
    logp = logits[tables["student"].where(batch.rollout)].log_softmax(-1)
    total = 0.0
    for note in kept:
        b, t, k = note["sample"], note["position"], method.window
        own = batch.rollout.ids[b, t : t + k].tolist()
        cost = windows.costs([own], [note["teacher"]], "onehot", {})
        plan = (
            torch.eye(k) / k
            if method.targets == "diagonal"
            else windows.solve(cost, method.epsilon)[1][0]
        )
        for i in range(k):
            target = torch.zeros(4, dtype=torch.float64)
            for j, token in enumerate(note["teacher"]):
                target[token] += k * plan[i, j]
            total = total - (target * logp[at[b, t + i]]).sum() / k / len(kept)
    theirs = tables["teacher"].logp[tables["teacher"].where(batch.rollout)]
    loss = reverse_kl(logp, theirs).mean() + method.weight * total
    (want,) = torch.autograd.grad(loss, logits)
    n = batch.rollout.tokens
    got = exact.gradient_on(
        method, tables, batch.rollout, torch.full((len(batch.rollout),), 1 / n, dtype=torch.float64)
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    flat = {name: flatten(batch, name, c) for name, c in columns.items()}
    value = gradient(
        method.loss, {n: batch.states(n) for n in tables}, batch.token, torch.ones(n), flat
    ).loss.mean()
    assert value.item() == pytest.approx(loss.item())


def test_weight_zero_and_an_empty_gate_are_opd(batch):
    plain = slope(OPD(), batch)
    assert torch.equal(slope(replace(DIAGONAL, weight=0.0), batch), plain)
    none = replace(DIAGONAL, quantile=1.0)  # nothing is above the largest distance
    assert not any(note["kept"] for note in planned(none, batch)[1])
    assert planned(none, batch)[0]["target"].shape[-1] == 0
    assert torch.equal(slope(none, batch), plain)
    assert not torch.equal(slope(DIAGONAL, batch), plain)


@pytest.mark.parametrize("score", windows.SCORES)
def test_candidates_are_the_top_of_the_score(score, tables, batch):
    method = replace(DIAGONAL, score=score)
    _, notes = planned(method, batch)
    found = {(n["sample"], n["position"]) for n in notes}
    s, t = (x.logp[x.where(batch.rollout)] for x in (tables["student"], tables["teacher"]))
    own = lambda logp: logp.gather(-1, batch.token[:, None])[:, 0]
    value = {
        "teacher_nll": -own(t),
        "log_ratio": own(s) - own(t),
        "reverse_kl": (s.exp() * (s - t)).sum(-1),
    }[score]
    value = batch.spread(value)
    for b in range(len(batch.rollout)):  # 6 tokens: ceil(1.8) of the 4 positions with room for 3
        assert {t for row, t in found if row == b} == set(value[b, :4].topk(2).indices.tolist())


def test_kept_points_are_candidates_above_the_threshold(batch):
    columns, notes = planned(DIAGONAL, batch)
    distances = [n["distance"] for n in notes]
    limit = np.quantile(distances, 0.3)
    assert [n["kept"] for n in notes] == [d > limit + 1e-9 for d in distances]
    assert 0 < sum(n["kept"] for n in notes) < len(notes)
    probed = ~columns["window_distance"].isnan()
    assert probed.nonzero().tolist() == [[n["sample"], n["position"]] for n in notes]
    assert columns["window_distance"][probed].tolist() == pytest.approx(distances)
    assert (columns["divergent"][~probed] == 0).all()
    assert columns["divergent"][probed].tolist() == [1 + n["kept"] for n in notes]


def test_least_loss_and_most_points(batch):
    every = planned(replace(DIAGONAL, share=1.0), batch)[1]
    assert len(every) == 12 * 4
    nll = -batch.map(lambda rows: rows.logp_of("teacher"), needs=("teacher",))
    value = {(n["sample"], n["position"]): float(nll[n["sample"], n["position"]]) for n in every}
    some = planned(replace(DIAGONAL, share=1.0, min_loss=1.5), batch)[1]
    assert {(n["sample"], n["position"]) for n in some} == {p for p, v in value.items() if v >= 1.5}
    few = planned(replace(DIAGONAL, share=1.0, max_points=5), batch)[1]
    assert {(n["sample"], n["position"]) for n in few} == set(sorted(value, key=value.get)[-5:])


def test_extra_teacher_tokens_are_points_times_window(batch):
    fresh = Batch(batch.rollout, batch.policies)
    DIAGONAL.plan(fresh)
    said = fresh.notes["windows"].facts
    assert said["teacher_tokens"] == said["candidates"] * 3 == 12 * 2 * 3
    assert said["divergent"] == sum(n["kept"] for n in fresh.notes["windows"].windows)
    assert said["seconds"] > 0


@pytest.mark.parametrize("arm", ["low_ot", "high_ot"])
def test_downweighted_tokens_count_as_the_median(arm, batch):
    method = TOPD(window=3, share=0.4, embedding="onehot", weight=0.0, downweight=arm)
    columns, notes = planned(method, batch)
    plain, medians = batch.map(OPD().loss), batch.map(OPD().loss).quantile(0.5, dim=1)
    flat = {name: flatten(batch, name, c) for name, c in columns.items()}
    states = {name: batch.states(name) for name in ("student", "teacher")}
    loss = batch.spread(
        gradient(method.loss, states, batch.token, torch.ones(len(batch.token)), flat).loss
    )
    order = sorted(range(len(notes)), key=lambda i: notes[i]["distance"])
    n = round(0.3 * len(notes))
    allowed = {
        (notes[i]["sample"], notes[i]["position"])
        for i in (order[:n] if arm == "low_ot" else order[n:])
    }
    moved = {tuple(p) for p in (~torch.isclose(loss, plain, rtol=1e-9)).nonzero().tolist()}
    assert moved
    assert moved <= allowed
    for b, t in moved:
        assert loss[b, t].item() == pytest.approx(medians[b].item())
        assert plain[b, t] > medians[b]
    if arm == "low_ot":
        assert moved == {(b, t) for b, t in allowed if plain[b, t] > medians[b]}
    scaled = (
        batch.spread(slope(method, batch)) / columns["downweight"][..., None]
    )  # scaled, not zeroed
    torch.testing.assert_close(scaled, batch.spread(slope(OPD(), batch)))


def test_both_interventions_select_the_same_number(batch):
    """Losses of 1 wherever there can be a candidate and 0 elsewhere, so that the median is 1/2 and
    all selected ones show.
    """
    picked = []
    for arm, step in (("low_ot", 0), ("high_ot", 0), ("high_ot", 0), ("high_ot", 1)):
        fresh = Batch(batch.rollout, batch.policies, step=step)
        fresh.__dict__["signals"] = {
            "teacher_reverse_kl": torch.tensor([1.0, 1, 1, 0, 0, 0]).expand(12, 6)
        }
        weight = plan_values(TOPD(window=4, share=1.0, embedding="onehot", downweight=arm), fresh)[
            "downweight"
        ]
        assert set(weight.flatten().tolist()) == {0.5, 1.0}
        picked.append((weight < 1).nonzero().tolist())
    assert [len(p) for p in picked] == [round(0.3 * 36)] * 4
    assert not [p for p in picked[1] if p in picked[0]]
    assert picked[1] == picked[2] != picked[3]  # drawn by the step


def test_a_student_that_is_the_teacher_has_no_forks(tables, batch):
    method = TOPD(window=3, share=0.5, embedding="onehot", student_window="greedy", quantile=0.0)
    columns, notes = planned(
        method, Batch(batch.rollout, {"student": tables["student"], "teacher": tables["student"]})
    )
    assert len(notes) > 12
    assert all(n["distance"] == 0 and not n["kept"] for n in notes)
    assert not (columns["divergent"] == 2).any()


# What is refused.


def test_completions_without_room_train_as_opd_and_say_so(make_policy, prompts):
    student, teacher = make_policy(0), make_policy(1)
    rollout = student.sample(prompts, max_new_tokens=5)
    batch = Batch(rollout, {"student": student, "teacher": teacher})
    with pytest.warns(
        UserWarning,
        match=r"No completion of step 1 has room for a window of 8 tokens \(the longest has 5\)",
    ):
        columns = plan_values(TOPD(), batch)
    assert columns["target"].shape == (4, 5, 0)
    assert batch.notes["windows"].windows == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TOPD(window=2, min_loss=1e9).plan(batch)  # no candidate, but there was room
        TOPD(window=2, min_loss=1e9, threshold="low_loss_q3", downweight="low_ot").plan(batch)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"targets": "teacher_context"},
            r"cannot train on the teacher's contexts.*local_correction",
        ),
        ({"targets": "soft"}, r"targets='soft'\. Use one of transport, diagonal"),
        ({"threshold": "mean"}, "threshold='mean'"),
        ({"student_window": "beam"}, "student_window='beam'"),
        ({"embedding": "hidden"}, "Use one of student, teacher, onehot"),
        ({"downweight": "random"}, "Use one of None, low_ot, high_ot"),
        ({"score": "loss"}, "score='loss'"),
        ({"window": 0}, "window=0"),
        ({"share": 0.0}, "share=0.0"),
        ({"quantile": 1.5}, "quantile=1.5"),
        ({"weight": -1.0}, "weight=-1.0"),
        ({"epsilon": 0.0}, r"epsilon is 0.0\. Use a number above 0, or None"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, says):
    with pytest.raises(ValueError, match=says):
        TOPD(**settings)


def test_teachers_that_cannot_go_on_are_refused(tables, batch):
    class Served:
        """Grades and writes texts; cannot go on from tokens."""

        def grade(self, rollout):
            return tables["teacher"].grade(rollout)

    with pytest.raises(
        MissingPolicy, match=r"a Served cannot do\. Load the teacher with Policy\.load"
    ):
        TOPD(window=3).plan(
            Batch(batch.rollout, {"student": tables["student"], "teacher": Served()})
        )
    with pytest.raises(
        MissingPolicy,
        match=r"The student, a Table, has no token embeddings\. Use embedding='onehot'",
    ):
        TOPD(window=3).plan(Batch(batch.rollout, tables))


def test_where_it_is_found():
    assert opd.TOPD is opd.methods.TOPD is opd.methods.topd.TOPD
    assert opd.topd is opd.methods.topd
    assert TOPD.needs == ("teacher",)
