"""DOPD on real models with hints: alignment, leaks, training, invariance, several processes, and
its blind spot on the market.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from naive_dopd import HS, HT, LH, LL, S, T, naive_route, tables
from plans import plan_values
from safetensors.torch import load_file, save_file

import opdlab as opd
from opdlab import DOPD, Task
from opdlab.engine.batch import Batch
from opdlab.exact import privilege
from opdlab.methods.dopd import Route
from opdlab.training.processes import AcceleratedProcesses


def test_contexts_of_unequal_length_are_aligned_on_the_completion(student, teacher, prompts):
    """Each row alone, through the plain model on hint + prompt + completion, without batch and
    padding.
    """
    rollout = student.sample(prompts, n=2, max_new_tokens=7, seed=3)
    policies = {"student": student, T: teacher.seeing(), S: student.seeing()}
    plan = plan_values(DOPD(), Batch(rollout, policies))
    assert len({len(policies[T].encode(p)) for p in prompts}) > 2
    for b, body in enumerate(rollout.completions()):
        logp = []
        for policy in (policies[T], policies[S]):
            start = policy.encode(rollout.prompts[b])
            with torch.no_grad():
                logits = policy.weights.model(torch.tensor([start + body])).logits[
                    0, len(start) - 1 : -1
                ]
            logp.append(
                logits[:, : len(student.tokenizer)]
                .log_softmax(-1)
                .gather(-1, torch.tensor(body)[:, None])[:, 0]
            )
        torch.testing.assert_close(
            plan["gap"][b, : len(body)], (logp[0] - logp[1]).abs(), rtol=1e-4, atol=1e-4
        )


def test_a_hint_that_says_nothing_is_bitwise_no_hint(student, teacher, prompts):
    rollout = student.sample(prompts, n=2, max_new_tokens=7)
    same = {
        name: policy.seeing(lambda prompt: prompt)
        for name, policy in (("student", student), ("teacher", teacher))
    }
    assert torch.equal(same["student"].hidden(rollout), student.hidden(rollout))
    policies = {"student": student, T: same["student"], S: same["student"]}
    batch = Batch(rollout, policies)
    assert (plan_values(DOPD(), batch)["route"][batch.mask] == HT).all()


def test_rollouts_never_see_a_hint(student, prompts):
    other = [replace(p, hint="lot z z z") for p in prompts]
    for one, two in zip(prompts, other, strict=True):
        assert student.encode(one) == student.encode(two)
    assert torch.equal(student.sample(prompts, seed=1).ids, student.sample(other, seed=1).ids)


def world_of(prompts) -> Task:
    return Task(
        "hinted",
        lambda n, seed, split: [prompts[(seed + i) % len(prompts)] for i in range(n)],
        max_new_tokens=20,
    )


@pytest.fixture
def pair(make_policy):
    """Fresh tiny models: training moves the student. Dropout would act in train mode."""
    return make_policy(0, attention_dropout=0.5), make_policy(1)


METHODS = [
    DOPD(),
    DOPD(anchor="frozen"),
    DOPD(anchor="ema"),
    DOPD(hs="teacher"),
    DOPD(hs="none", support="teacher"),
    DOPD(gap_student="bare"),
    DOPD(adaptive=False),
    DOPD(tail="renormalize", k=4),
]


@pytest.mark.parametrize(
    "method", METHODS, ids=lambda m: f"{m.anchor}-{m.hs}-{m.gap_student}-{m.adaptive}-{m.k}"
)
def test_two_steps_on_tiny_models(pair, prompts, method):
    student, teacher = pair
    run = opd.distill(
        student,
        teacher,
        world_of(prompts),
        method=method,
        batch=4,
        n=2,
        steps=2,
        lr=1e-2,
        quiet=True,
        micro_batch=3,
    )
    start = {name: p.detach().clone() for name, p in run.parameters.items()}
    steps = list(run)
    assert run.settings.normalize == "sequence"
    assert set(steps[0].plan["route"].tolist()) <= set(Route)
    assert steps[0].trace().describe("gap").threshold > 0
    assert steps[0].trace().column("route").tolist() == steps[0].plan["route"].tolist()
    assert any(not torch.equal(p, start[name]) for name, p in run.parameters.items())
    assert not student.weights.model.training


@pytest.mark.parametrize(
    "method", [DOPD(), DOPD(anchor="ema", gap_student="bare")], ids=["literal", "bare"]
)
def test_two_steps_on_the_market_with_secrets(method):
    run = opd.distill(
        *opd.load("market", secret=True), method=method, batch=8, steps=2, quiet=True, seed=1
    )
    steps = list(run)
    assert all(
        math.isfinite(step.metrics["loss"]) and step.metrics["grad_norm"] > 0 for step in steps
    )
    assert all(p.hint.startswith("hint receipt") for p in steps[0].rollout.prompts)
    assert len(set(steps[0].plan["route"].tolist())) == 4


def test_the_markets_confident_mistakes_are_left_to_the_student():
    """Blind spots on shipped models: where the student forgets to carry, it is sure; the teacher
    has no say there.
    """
    student, teacher, task = opd.load("market", secret=True)
    rollout = student.sample(
        task.prompts(64, split="test"), max_new_tokens=task.max_new_tokens, seed=1
    )
    batch = Batch(rollout, {"student": student, T: teacher.seeing(), S: student.seeing()})
    routes = plan_values(DOPD(), batch)["route"][batch.mask]
    kinds = np.array([kind for row in task.token_types(rollout, student.tokenizer) for kind in row])
    share = {
        kind: [(routes[kinds == kind] == r).double().mean().item() for r in Route]
        for kind in ("skill", "copy", "derived", "noise")
    }
    assert share["skill"][HS] > 0.95
    assert (
        0.6 * share["skill"][LH] + share["skill"][HT] < 0.05
    )  # the teacher's pull, 1 in plain OPD
    assert share["copy"][LH] > 0.95
    assert share["derived"][LH] > 0.95
    assert share["noise"][LL] > 0.95


def test_micro_batches_change_neither_routes_nor_update(make_policy, prompts):
    found = []
    for size in (None, 3, 1):
        run = opd.distill(
            make_policy(0),
            make_policy(1),
            world_of(prompts),
            method=DOPD(k=8),
            batch=4,
            n=2,
            steps=1,
            quiet=True,
            micro_batch=size,
        )
        found.append((next(run), {name: p.grad.clone() for name, p in run.parameters.items()}))
    for step, grads in found[1:]:
        assert torch.equal(step.plan["route"], found[0][0].plan["route"])
        assert step.metrics["loss"] == pytest.approx(found[0][0].metrics["loss"], rel=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, found[0][1][name], rtol=1e-3, atol=1e-6)


def test_padding_changes_neither_routes_nor_loss(student, teacher, prompts):
    policies = {"student": student, T: teacher.seeing(), S: student.seeing()}
    rollout = student.sample(prompts, n=2, max_new_tokens=7, seed=5)
    wide = lambda x: torch.nn.functional.pad(x, (0, 5), value=9)
    padded = replace(
        rollout,
        ids=wide(rollout.ids),
        logp=wide(rollout.logp),
        entropy=wide(rollout.entropy),
        learn=None,
        turn=None,
    )
    one, two = (plan_values(DOPD(), Batch(r, policies)) for r in (rollout, padded))
    assert torch.equal(two["route"][:, :-5], one["route"])
    assert (two["route"][:, -5:] == -1).all()
    assert (two["gap"][:, -5:] == 0).all()


def test_the_loss_is_a_mean_over_sequences_of_means_over_tokens(pair, prompts):
    student, teacher = pair
    step = next(
        opd.distill(
            student, teacher, world_of(prompts), method=DOPD(), batch=4, n=2, steps=1, quiet=True
        )
    )
    parts = step.columns["loss"].split(step.rollout.lengths.tolist())
    assert len(set(step.rollout.lengths.tolist())) > 1
    assert step.metrics["loss"] == pytest.approx(
        sum(float(x.mean()) for x in parts) / len(parts), rel=1e-5
    )
    assert step.metrics["loss"] != pytest.approx(float(step.columns["loss"].mean()), rel=1e-4)


def test_a_batch_said_twice_is_the_same_batch(student, teacher, prompts):
    """Every token twice: the same routes (untrimmed means are the same; trimming is of the same
    share) and losses.
    """
    policies = {"student": student, T: teacher.seeing(), S: student.seeing()}
    rollout = student.sample(prompts, n=2, max_new_tokens=7, seed=5)
    twice = opd.concat_rollouts([rollout, rollout])
    one, two = (plan_values(DOPD(trim=0), Batch(r, policies)) for r in (rollout, twice))
    assert torch.equal(two["route"], torch.cat([one["route"], one["route"]]))


def test_the_same_seed_gives_the_same_routes(make_policy, prompts):
    """No dropout in any pass, although the model has some."""
    found = []
    for _ in range(2):
        student = make_policy(0, attention_dropout=0.5)
        step = next(
            opd.distill(
                student,
                make_policy(1),
                world_of(prompts),
                method=DOPD(),
                batch=4,
                n=2,
                steps=1,
                quiet=True,
            )
        )
        found.append(step)
    assert torch.equal(found[0].plan["route"], found[1].plan["route"])
    assert torch.equal(found[0].columns["loss"], found[1].columns["loss"])


def plan_in_process(rank: int, port: int, folder) -> None:
    """Plan in one of two processes, on completions of its own; save what it saw and found."""
    os.environ |= {
        "RANK": f"{rank}",
        "LOCAL_RANK": f"{rank}",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": f"{port}",
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    policies = tables(seed=5)
    rollout = policies["student"].sample(policies["student"].prompts, n=2 + 5 * rank, seed=rank)
    batch = Batch(rollout, policies, processes=AcceleratedProcesses(accelerator))
    where, token = policies["student"].where(rollout), batch.token[:, None]
    seen = {name: policies[name].logp[where].gather(-1, token)[:, 0] for name in (T, S)}
    save_file(
        {**seen, "route": plan_values(DOPD(), batch)["route"][batch.mask]},
        folder / f"{rank}.safetensors",
    )


def test_two_processes_route_by_the_means_of_both(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=plan_in_process, args=(rank, port, tmp_path)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=1000)
        assert worker.exitcode == 0
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert len(one["route"]) != len(two["route"])
    lt, ls = (torch.cat([one[name], two[name]]) for name in (T, S))
    whole = naive_route(lt, ls, torch.ones(len(lt), dtype=torch.bool))
    assert [*one["route"].tolist(), *two["route"].tolist()] == whole
    assert two["route"].tolist() != naive_route(
        two[T], two[S], torch.ones(len(two[T]), dtype=torch.bool)
    )  # alone it would differ


# The gap of real models is capability: what the split of the diagnostics says about the same
# tokens.


def test_telescopes_on_real_models(student, teacher, prompts):
    rollout = student.sample(prompts, n=2, max_new_tokens=7)
    batch = Batch(
        rollout, {"student": student, "teacher": teacher, T: teacher.seeing(), S: student.seeing()}
    )
    logp = {
        name: batch.map(lambda r, name=name: r.logp_of(name), needs=(name,))[batch.mask]
        for name in privilege.POLICIES
    }
    parts = privilege.split(logp)
    torch.testing.assert_close(
        parts.capability_with_hint + parts.information_of_student, parts.gap, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        parts.information_of_teacher + parts.capability_without_hint,
        parts.gap,
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(
        plan_values(DOPD(), batch)["gap"][batch.mask],
        parts.capability_with_hint.abs(),
        rtol=1e-4,
        atol=1e-4,
    )
