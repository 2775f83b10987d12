"""TOPD on models: the whole loss against full logits and targets as long as the vocabulary; notes,
micro-batches, runs.

Tests 7, 13, 14 and 18 of the paper file.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from plans import plan_values
from window_oracles import cosine_cost, greedy, logits, made_pair, program, sinkhorn, text, texts_of

import opdlab as opd
from opdlab import TOPD, Policy, Rollout
from opdlab.data.notes import Windows
from opdlab.engine.batch import Batch
from opdlab.engine.columns import flatten
from opdlab.engine.passes import gradient
from opdlab.engine.rows import Rows
from opdlab.methods import topd, windows
from opdlab.models.graded import States


@pytest.fixture(scope="module")
def pair(make_policy, make_tokenizer) -> dict[str, Policy]:
    return made_pair(make_policy, make_tokenizer)


@pytest.fixture(scope="module")
def written(pair) -> Rollout:
    return texts_of(pair["student"])


def oracle(method: TOPD, pair, rollout: Rollout, normalize: str) -> torch.Tensor:
    """The loss from full logits by its definition, with targets of the size of the vocabulary;
    carries a gradient.
    """
    student, teacher = pair["student"], pair["teacher"]
    bodies, lengths = rollout.completions(), rollout.lengths.tolist()
    p = [
        logits(student, q, body).log_softmax(-1)
        for q, body in zip(rollout.prompts, bodies, strict=True)
    ]
    with torch.no_grad():
        q = [
            logits(teacher, prompt, body).log_softmax(-1)
            for prompt, body in zip(rollout.prompts, bodies, strict=True)
        ]
    kl = [(a.exp() * (a - b)).sum(-1) for a, b in zip(p, q, strict=True)]
    found, k = [], method.window
    for b, body in enumerate(bodies):
        allowed = [t for t in range(len(body) - k + 1) if body[t] not in (0, 1, 2)]
        nll = sorted(allowed, key=lambda t: float(q[b][t, body[t]]))
        found += [
            (b, t, greedy(teacher, rollout.prompts[b], body[:t], k))
            for t in nll[: math.ceil(method.share * len(body))]
        ]
    table = student.weights.model.get_input_embeddings().weight.detach()
    costs = [cosine_cost(table[bodies[b][t : t + k]], table[text]) for b, t, text in found]
    limit = np.quantile([program(c) for c in costs], method.quantile)
    kept = [(f, c) for f, c in zip(found, costs, strict=True) if program(c) > limit + 1e-12]
    assert 2 < len(kept) < len(found)
    base = (
        torch.cat(kl).mean() if normalize == "token" else torch.stack([x.mean() for x in kl]).mean()
    )
    total = 0.0
    for (b, t, told), cost in kept:
        plan = (
            np.eye(k, len(told)) / min(k, len(told))
            if method.targets == "diagonal"
            else sinkhorn(cost, method.epsilon)
        )
        target = torch.zeros(k, p[b].shape[-1], dtype=torch.float64)
        for i in range(k):
            for j, token in enumerate(told):
                target[i, token] += plan[i, j]
        share = 1.0 if normalize == "token" else sum(lengths) / len(lengths) / lengths[b]
        total = total - share * (target * p[b][t : t + k]).sum() / len(kept)
    return base + method.weight * total


@pytest.mark.parametrize("normalize", ["token", "sequence"])
@pytest.mark.parametrize(
    "method",
    [
        TOPD(window=4, share=0.2, epsilon=0.5, weight=2.0),
        TOPD(window=3, share=0.3, targets="diagonal"),
        TOPD(window=1, share=0.2, epsilon=0.5),
    ],
)
def test_the_whole_loss_is_that_of_full_logits(method, normalize, pair, written):
    """Value and every parameter's gradient, through plan, engine and backbone: contexts, offsets,
    weights, normalisation.
    """
    student = pair["student"]
    want = oracle(method, pair, written, normalize)
    parameters = [
        p for name, p in student.weights.model.named_parameters() if "embed_tokens" not in name
    ]
    slopes = torch.autograd.grad(want, parameters)
    batch = Batch(written, pair)
    columns = {name: flatten(batch, name, column) for name, column in method.plan(batch).items()}
    student.weights.model.zero_grad()
    hidden = student.hidden(written)
    states = {"student": States(hidden, student.weights.head), "teacher": batch.states("teacher")}
    per_row = (
        1 / (len(written) * written.lengths.double())
        if normalize == "sequence"
        else torch.ones(12, dtype=torch.float64) / written.tokens
    )
    weight = per_row.repeat_interleave(written.lengths)
    result = gradient(method.loss, states, batch.token, weight, columns, chunk=7)
    hidden.backward(result.gradient)
    assert float((result.loss * weight).sum()) == pytest.approx(want.item(), rel=1e-5)
    for p, slope in zip(parameters, slopes, strict=True):
        torch.testing.assert_close(
            p.grad, slope, rtol=1e-4, atol=1e-5 * float(max(x.abs().max() for x in slopes))
        )
    student.weights.model.zero_grad()
    assert all(p.grad is None for p in pair["teacher"].weights.model.parameters())


def test_the_threshold_of_low_loss_positions(pair, written):
    batch = Batch(written, pair)
    TOPD(window=4, share=0.1, threshold="low_loss_q3").plan(batch)
    note = batch.notes["windows"]
    said, notes = note.facts, note.windows
    room, nll = (
        windows.room(pair["student"], written, 4),
        -batch.map(lambda rows: rows.logp_of("teacher"), needs=("teacher",)),
    )
    low = []
    for b in range(len(written)):
        count, allowed = sum(n["sample"] == b for n in notes), room[b].nonzero()[:, 0].tolist()
        low += [(b, t) for t in sorted(allowed, key=lambda t: float(nll[b, t]))[:count]]
    table = pair["student"].weights.model.get_input_embeddings().weight.detach()
    texts = [
        greedy(pair["teacher"], written.prompts[b], written.ids[b, :t].tolist(), 4) for b, t in low
    ]
    distances = [
        program(cosine_cost(table[written.ids[b, t : t + 4]], table[x]))
        for (b, t), x in zip(low, texts, strict=True)
    ]
    assert note.threshold == pytest.approx(np.quantile(distances, 0.75), abs=1e-9)
    assert said["teacher_tokens"] == sum(len(n["teacher"]) for n in notes) + sum(map(len, texts))


def test_an_unused_place_may_hold_a_token_that_the_student_rules_out():
    """One token has two targets, the other one; the student gives the id that fills the gap, 0, no
    probability.
    """
    batch = Batch(text([1, 2]), {})
    columns = windows.scatter(batch, [(0, 0)], [[3, 4]], [torch.tensor([[0.3, 0.2], [0.5, 0.0]])])
    logp = (
        torch.full((2, 12), 1.0)
        .log_softmax(-1)
        .index_fill(1, torch.tensor([0]), -math.inf)
        .log_softmax(-1)
        .requires_grad_()
    )
    rows = Rows(
        {"student": logp, "teacher": logp.detach()},
        batch.token,
        {k: flatten(batch, k, c) for k, c in columns.items()},
    )
    loss = TOPD(weight=1.0).loss(rows)
    torch.testing.assert_close(loss, torch.full((2,), math.log(11)).to(loss.dtype))
    assert torch.isfinite(torch.autograd.grad(loss.sum(), logp)[0]).all()


def test_planning_leaves_no_trace_on_models_and_random_numbers(pair, written):
    method = TOPD(
        window=4, share=0.3, student_window="greedy", threshold="low_loss_q3", downweight="high_ot"
    )
    state = torch.get_rng_state()
    weights = [
        p.detach().clone() for policy in pair.values() for p in policy.weights.model.parameters()
    ]
    first, second = ({**plan_values(method, Batch(written, pair))} for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(first[name], second[name]) or first[name].isnan().any() for name in first
    )
    for policy in pair.values():
        assert not policy.weights.model.training
        assert policy.weights.active is None
        assert all(p.grad is None for p in policy.weights.model.parameters())
    after = [p for policy in pair.values() for p in policy.weights.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))


def test_the_greedy_window_decides_the_gate_and_not_the_targets(pair, written):
    method = TOPD(window=4, share=0.3, quantile=0.0)
    ours = [Batch(written, pair) for _ in range(2)]
    plans = [
        plan_values(m, b)
        for m, b in zip((method, replace(method, student_window="greedy")), ours, strict=True)
    ]
    first, second = (b.notes["windows"].windows for b in ours)
    for a, b in zip(first, second, strict=True):
        prompt, prefix = (
            written.prompts[a["sample"]],
            written.ids[a["sample"], : a["position"]].tolist(),
        )
        assert (a["position"], a["teacher"]) == (b["position"], b["teacher"])
        assert b["student"] == greedy(pair["student"], prompt, prefix, 4)
    assert any(a["distance"] != b["distance"] for a, b in zip(first, second, strict=True))
    at = (first[0]["sample"], first[0]["position"])
    assert plans[0]["divergent"][at] == plans[1]["divergent"][at] == 2
    tokens = set(plans[1]["target"][at][plans[1]["target_weight"][at] > 0].tolist())
    assert tokens == set(first[0]["teacher"])


@pytest.mark.parametrize("embedding", ["student", "teacher"])
def test_whose_embeddings(embedding, pair, written):
    batch = Batch(written, pair)
    TOPD(window=4, share=0.3, embedding=embedding).plan(batch)
    table = pair[embedding].weights.model.get_input_embeddings().weight.detach()
    for note in batch.notes["windows"].windows[:5]:
        assert note["distance"] == pytest.approx(
            program(cosine_cost(table[note["student"]], table[note["teacher"]])), abs=1e-9
        )


def test_notes_are_plain_and_only_so_many_hold_plans(pair, written, monkeypatch):
    monkeypatch.setattr(topd, "DRAWN", 3)
    batch = Batch(written, pair)
    TOPD(window=4, share=0.5).plan(batch)
    notes = json.loads(json.dumps(batch.notes["windows"].as_json(), allow_nan=False))["windows"]
    assert len(notes) > 5
    assert ["plan" in note for note in notes] == [True] * 3 + [False] * (len(notes) - 3)
    greedy_batch = Batch(written, pair)
    TOPD(window=4, share=0.5, student_window="greedy").plan(greedy_batch)
    for made, epsilon in (
        (batch, 0.05),
        (greedy_batch, None),
    ):  # the targets' plan, or that of the distance
        for note in made.notes["windows"].windows[:3]:
            cost = windows.costs([note["student"]], [note["teacher"]], "student", pair)
            np.testing.assert_allclose(note["plan"], windows.solve(cost, epsilon)[1][0], atol=1e-4)


def test_the_median_is_of_the_own_tokens_and_not_of_padding(pair, written):
    batch = Batch(written, pair)
    weight = plan_values(
        TOPD(window=2, share=1.0, quantile=1.0, downweight="low_ot", embedding="onehot"), batch
    )["downweight"]
    loss = batch.signals["teacher_reverse_kl"]
    for b, n in enumerate(written.lengths.tolist()):
        for t in (weight[b] < 1).nonzero()[:, 0].tolist():
            assert (loss[b, t] * weight[b, t]).item() == pytest.approx(
                loss[b, :n].quantile(0.5).item(), rel=1e-5
            )
    assert (weight < 1).any(1).sum() > 6


def test_micro_batches_change_nothing(make_policy, prompts):
    after = []
    for size in (None, 1, 3):
        student = make_policy(0)
        task = opd.tasks.from_records([{"prompt": p.text} for p in prompts if p.text] * 2, test=0)
        method = TOPD(window=3, share=0.3)
        run = opd.distill(
            student,
            make_policy(1),
            task,
            method=method,
            steps=1,
            batch=6,
            max_new_tokens=10,
            lr=1e-2,
            micro_batch=size,
            quiet=True,
        )
        step = next(run)
        assert (step.plan["divergent"] == 2).sum() > 1
        after.append((step.metrics["loss"], student.weights.adapter_state(student.adapter)))
    for loss, state in after[1:]:
        assert loss == pytest.approx(after[0][0], rel=1e-5)
        for name, value in state.items():
            torch.testing.assert_close(value, after[0][1][name], rtol=1e-3, atol=1e-5)


def test_a_run_on_the_market_keeps_its_columns_and_notes():
    student, teacher, task = opd.load("market")
    run = opd.distill(
        student, teacher, task, method=TOPD(window=6, share=0.1), steps=2, batch=8, quiet=True
    ).train()
    trace = run.last.trace()
    frame = trace.to_pandas()
    note = trace.note(Windows)
    assert run.settings.normalize == "token"
    assert len(note.windows) == note.facts["candidates"] == frame["window_distance"].notna().sum()
    assert {(n["sample"], n["position"]) for n in note.windows if n["kept"]} == {
        (r["sample"], r["position"]) for r in frame[frame["divergent"] == 2].to_dict("records")
    }
    assert frame["target_weight"].map(np.sum).sum() == pytest.approx(
        len(frame) * (frame["divergent"] == 2).any(), rel=1e-4
    )


def test_a_step_without_divergence_is_kept_too(make_policy, prompts, tmp_path):
    task = opd.tasks.from_records([{"prompt": p.text} for p in prompts if p.text], test=0)
    run = opd.distill(
        make_policy(0),
        make_policy(1),
        task,
        method=TOPD(window=3, quantile=1.0),
        batch=3,
        max_new_tokens=8,
        quiet=True,
    )
    trace = next(run).trace()
    again = opd.Trace.load(trace.save(tmp_path / "step.parquet"))
    assert again.column("target").shape == (len(trace), 0)
    assert not (again.column("divergent") == 2).any()
    assert (
        np.isfinite(again.column("window_distance")).sum()
        == again.note(Windows).facts["candidates"]
        == 3
    )
