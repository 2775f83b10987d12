"""Attribution and depth: exact against other ways to compute them, and true on the market."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import pytest
import torch

import opdlab as opd
from opdlab.commands.gallery import with_types
from opdlab.data.reasons import PARTS, Reading, load_reasons, save_reasons
from opdlab.diagnose import attribute, depth
from opdlab.errors import DamagedFile, InvalidValue
from opdlab.models import attribution
from opdlab.models.attribution import attribute_log_prob
from opdlab.models.layers import log_probs_by_layer
from opdlab.viz import Why


@pytest.fixture(scope="module")
def world():
    student, teacher, task = opd.load("market", secret=True)
    prompts = task.prompts(20, split="test")
    rollout = student.sample(prompts, max_new_tokens=task.max_new_tokens, seed=0)
    return student, teacher, task, rollout


def test_a_weight_is_the_slope_along_the_scale_of_an_embedding(world):
    _, teacher, _, rollout = world
    start = teacher.seeing().encode(rollout.prompts[0]) + rollout.completions()[0][:6]
    token = rollout.completions()[0][6]
    logp, weights = attribute_log_prob(teacher, start, token)
    model = teacher.weights.model

    def scaled(i: int, factor: float) -> float:
        def scale(module, given, output):
            output = output.clone()
            output[0, i] *= factor
            return output

        handle = model.get_input_embeddings().register_forward_hook(scale)
        try:
            with torch.no_grad():
                logits = model(torch.tensor([start])).logits[0, -1]
            return float(logits.double().log_softmax(-1)[token])
        finally:
            handle.remove()

    assert logp == pytest.approx(scaled(0, 1.0), abs=1e-4)
    step = 0.02
    slopes = [(scaled(i, 1 + step) - scaled(i, 1 - step)) / (2 * step) for i in range(len(start))]
    largest = np.abs(slopes).max()
    np.testing.assert_allclose(weights.numpy(), slopes, atol=0.03 * largest)
    assert not any(weight.grad is not None for weight in model.parameters())


def test_memory_does_not_grow_with_the_insides_of_layers(world, monkeypatch):
    _, teacher, _, rollout = world
    start = teacher.encode(rollout.prompts[0]) + rollout.completions()[0][:6]

    def saved() -> tuple[int, torch.Tensor]:
        sizes = []
        keep = lambda tensor: (sizes.append(tensor.numel()), tensor)[1]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            weights = attribute_log_prob(teacher, start, 5)[1]
        return sum(sizes), weights

    less, weights = saved()
    monkeypatch.setattr(attribution, "recompute_layers", lambda *_: contextlib.nullcontext())
    more, same = saved()
    torch.testing.assert_close(weights, same)
    assert less < more


def test_the_parts_of_what_was_read(world):
    student, teacher, _, rollout = world
    reason = attribute(rollout, student, teacher.seeing(), 0, 8)
    prompt = rollout.prompts[0]
    hidden = len(teacher.seeing().encode(prompt)) - len(teacher.encode(prompt))
    assert reason.teacher.parts.count("hint") == hidden > 0
    assert reason.student.parts.count("hint") == 0
    assert reason.teacher.parts[-1] == "last"
    assert reason.teacher.parts.count("prefix") == 7
    assert str(prompt.hint).split()[0] in "".join(reason.teacher.pieces)
    shares = reason.teacher.shares()
    assert set(shares) == set(PARTS) - {"last"}
    assert sum(shares.values()) == pytest.approx(1)


def test_where_the_truth_is_known_the_largest_weight_is_the_cause(world):
    """On secret tokens the cause is the hint's letter; on skill tokens, the digits of the sum."""
    student, teacher, task, rollout = world
    hinted = teacher.seeing()
    trace = with_types(opd.score(rollout, student, hinted), task, rollout, student)
    kinds = trace.table["type"].to_pylist()
    wanted = [
        hinted.log_probs(rollout.select([i])).argmax(-1).tolist() for i in range(len(rollout))
    ]
    on_secret, hint_share, digit_share, digit_ratio = [], {"secret": [], "skill": []}, [], []
    for kind, sample, position in zip(
        kinds, trace.column("sample").tolist(), trace.column("position").tolist(), strict=True
    ):
        sampled = rollout.completions()[sample][position]
        best = wanted[sample][position]
        if kind not in hint_share or best == sampled:
            continue
        reading = attribute(rollout, student, hinted, sample, position).teacher
        hint_share[kind].append(reading.shares()["hint"])
        size = np.abs(reading.weights[:-1])  # without the last token, where the prediction is made
        letter = student.tokenizer.decode([best]).strip()
        if kind == "secret":
            at = int(size.argmax())
            on_secret.append(reading.parts[at] == "hint" and reading.pieces[at].strip() == letter)
            continue
        last = max(
            i for i, piece in enumerate(reading.pieces) if piece.strip() in (";", "<assistant>")
        )
        is_digit = np.array(
            [
                piece.strip().isdigit() and part != "hint" and (part == "prompt" or i > last)
                for i, (piece, part) in enumerate(
                    zip(reading.pieces[:-1], reading.parts[:-1], strict=True)
                )
            ]
        )
        digit_share.append(size[is_digit].sum() / size.sum())
        digit_ratio.append(size[is_digit].mean() / size[~is_digit].mean())
    assert len(on_secret) >= 30
    assert len(digit_share) >= 10
    assert np.mean(on_secret) > 0.8
    assert np.mean(hint_share["secret"]) > 0.4
    assert np.mean(hint_share["skill"]) < 0.15
    assert np.mean(digit_share) > 2 * np.mean(hint_share["skill"])
    assert np.mean(digit_ratio) > 1.5


def test_layers_are_those_of_transformers(world):
    _, teacher, _, rollout = world
    start = teacher.encode(rollout.prompts[0])
    found = log_probs_by_layer(teacher, start)
    model = teacher.weights.model
    with torch.no_grad():
        out = model(torch.tensor([start]), output_hidden_states=True)
    states = [state[:, -1] for state in out.hidden_states[:-1]]
    assert len(found) == len(states) + 1 == model.config.num_hidden_layers + 1
    for row, state in zip(found, states, strict=False):
        with torch.no_grad():
            want = model.lm_head(model.model.norm(state)).float().log_softmax(-1)[0]
        torch.testing.assert_close(row, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        found[-1], out.logits[0, -1].float().log_softmax(-1), atol=1e-4, rtol=1e-4
    )


def test_a_hint_acts_in_later_layers_and_ends_at_the_true_kl(world):
    _, teacher, _, rollout = world
    hinted = teacher.seeing()
    found = depth(rollout, teacher, hinted, 0, 23)
    one = rollout.select([0])
    ours, theirs = teacher.log_probs(one)[23].double(), hinted.log_probs(one)[23].double()
    assert found.kl[-1] == pytest.approx(float((ours.exp() * (ours - theirs)).sum()), abs=1e-3)
    assert found.kl[0] == pytest.approx(0, abs=1e-6)  # the same last token
    assert found.student[-1] == pytest.approx(float(ours[rollout.completions()[0][23]]), abs=1e-3)


def test_models_of_other_depths_are_refused(world):
    student, teacher, _, rollout = world
    with pytest.raises(InvalidValue, match="one architecture"):
        depth(rollout, student, teacher, 0, 3)
    for options in ({"sample": 999}, {"position": 999}, {"token": 10**6}, {"position": -1}):
        with pytest.raises(InvalidValue):
            attribute(rollout, student, teacher, **{"sample": 0, "position": 0, **options})


def test_reasons_stay_in_a_file_and_are_drawn_without_a_model(world, tmp_path, monkeypatch):
    student, teacher, _, rollout = world
    trace = opd.score(rollout, student, teacher)
    reason = attribute(rollout, student, teacher.seeing(), 0, 8)
    layers = depth(rollout, teacher, teacher.seeing(), 0, 8)
    path = save_reasons([reason, layers], tmp_path / "why.json")
    assert load_reasons(path) == [reason, layers]
    assert os.listdir(tmp_path) == ["why.json"]
    monkeypatch.setattr(torch.nn.Module, "__call__", None)  # no model may run
    view = Why(trace, path)
    assert view.table["policy"].tolist() == ["teacher", "student"]
    assert view.df["hint_share"].notna().sum() == 1
    other = Reading(0.0, ["x", "y"], ["prompt", "last"], [0.0, 0.0])
    with pytest.raises(InvalidValue, match="another text"):
        Why(trace, [type(reason)(0, 1, 0, "a", other, other)])
    monkeypatch.undo()
    (tmp_path / "bad.json").write_text('{"format": 1, "reasons": [{}]}', encoding="utf-8")
    with pytest.raises(DamagedFile, match="no file of reasons"):
        load_reasons(tmp_path / "bad.json")


def test_a_live_view_asks(world):
    student, teacher, _, rollout = world
    trace = opd.score(rollout, student, teacher)
    view = Why(trace, policies={"student": student, "teacher": teacher.seeing()}, rollout=rollout)
    found = view.answer({"row": 3})
    assert [side["name"] for side in found["sides"]] == ["teacher", "student"]
    assert found["depth"] is None  # other numbers of layers
    same = Why(trace, policies={"student": teacher, "teacher": teacher.seeing()}, rollout=rollout)
    assert same.answer({"row": 3})["depth"]["lines"]
