"""The predicted cost of a step: every part counted against the real thing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

from opdlab import Settings, distill, tasks
from opdlab.diagnose import cost
from opdlab.diagnose.cost import Cost
from opdlab.tasks.market import model

MARKET = tasks.market()
PLAN = Settings(batch=32, max_new_tokens=24, lora=16)


@pytest.fixture(scope="module")
def shipped():
    student, teacher = model("student"), model("teacher")
    return (
        student,
        teacher,
        student.sample(MARKET.prompts(8, split="test"), 2, max_new_tokens=24, seed=0),
    )


@pytest.fixture(scope="module")
def predicted(shipped) -> Cost:
    return cost(*shipped, PLAN)


def allocated(step) -> int:
    """Most bytes that one call has allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    now = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize(("lora", "micro"), [(16, None), (16, 8), (None, None)])
def test_a_real_step_allocates_what_was_predicted(lora, micro, shipped):
    """Band stated before: from 10 % under to 30 % over, since whoever plans would rather hear too
    much.
    """
    student, teacher, rollout = shipped
    guess = cost(student, teacher, rollout, replace(PLAN, lora=lora, micro_batch=micro))
    run = distill(
        model("student"), teacher, MARKET, batch=32, lora=lora, micro_batch=micro, quiet=True
    )
    next(run)  # the first step also makes the optimizer's moments
    got = allocated(lambda: next(run))
    beside = sum(guess.memory[name] for name in ("weights", "training", "allocator"))
    assert 0.9 * got <= guess.peak - beside <= 1.3 * got


def test_weights_and_training_are_counted_exactly(shipped, predicted):
    student, teacher, rollout = shipped
    every = lambda policy: sum(
        p.numel() * p.element_size() for p in policy.weights.model.parameters()
    )
    assert predicted.memory["weights"] == every(student) + every(teacher)
    assert cost(student, student, rollout, PLAN).memory["weights"] == every(
        student
    )  # one set in memory
    adapted = model("student").adapt(16)
    adapter = sum(t.numel() * 4 for t in adapted.weights.adapter_state(adapted.adapter).values())
    assert predicted.memory["training"] == 4 * adapter
    assert cost(student, teacher, rollout, replace(PLAN, lora=None)).memory[
        "training"
    ] == 3 * every(student)
    again = cost(
        adapted, teacher, rollout, PLAN
    )  # a student that has its adapter already costs the same
    assert again.memory["training"] == predicted.memory["training"]


def test_the_cache_is_counted_exactly(shipped, predicted):
    student, _, rollout = shipped
    net, length = student.weights.model, 7
    cache = DynamicCache(config=net.config)
    net.base_model(
        input_ids=torch.ones(1, length, dtype=torch.long), past_key_values=cache, use_cache=True
    )
    held = sum(
        t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
    )
    tokens = len(student.encode(rollout.prompts[0])) + float(rollout.lengths.float().quantile(0.95))
    logits = 32 * 4 * 4 * student.weights.vocab_size
    assert predicted.memory["writing"] == pytest.approx(32 * tokens * held / length + logits)


def test_parts_scale_as_they_should(shipped, predicted):
    student, teacher, rollout = shipped
    double = cost(student, teacher, rollout, replace(PLAN, batch=64))
    for part in ("states", "writing"):
        assert double.memory[part] == pytest.approx(2 * predicted.memory[part])
    assert double.memory["weights"] == predicted.memory["weights"]
    # On a CPU there are more backward passes, of 22 texts in place of 16, unless one is asked for.
    assert double.memory["activations"] == pytest.approx(22 / 16 * predicted.memory["activations"])
    wide = cost(student, teacher, rollout, replace(PLAN, batch=64, micro_batch=64))
    assert wide.memory["activations"] == pytest.approx(4 * predicted.memory["activations"])
    thrifty = cost(student, teacher, rollout, replace(PLAN, checkpointing=True))
    assert thrifty.memory["activations"] < predicted.memory["activations"]
    assert predicted.peak < double.peak < 2 * predicted.peak


def test_looking_changes_nothing(shipped):
    student, teacher, rollout = shipped
    before = student.log_probs(rollout)
    cost(student, teacher, rollout, PLAN)
    assert student.adapter is None
    assert torch.equal(student.log_probs(rollout), before)
    assert not any(
        p.requires_grad or p.grad is not None for p in student.weights.model.parameters()
    )


def test_it_says_which_number_is_counted_and_which_measured(predicted):
    assert "counted from the models' parts" in str(predicted)
    assert "scaled from small measurements" in str(predicted)
    assert predicted.table.loc["peak", "value"] == pytest.approx(predicted.peak / 2**20)
    assert predicted.table.loc["step", "value"] == pytest.approx(sum(predicted.seconds.values()))
    assert all(value > 0 for value in predicted.seconds.values())
    assert repr(predicted).startswith("Cost(peak ")
