"""The profile of a run: seconds and bytes of each phase, beside the limit of the device."""

from __future__ import annotations

import math

import pytest
import torch

import opdlab as opd
from opdlab.diagnose import profile as profiling  # noqa: F401  (the name is the function)
from opdlab.diagnose.profile import Rates, _Work, _work_of_step
from opdlab.errors import OpdlabError
from opdlab.support.memory import PeakMemory


@pytest.fixture(scope="module")
def run():
    student, teacher, task = opd.load("market")
    made = opd.distill(student, teacher, task, steps=5, batch=4, lora=4, quiet=True)
    next(made)
    return made


def test_steps_are_measured_and_count(run):
    done = run.done
    found = opd.profile(run, steps=2)
    assert run.done == done + 2
    assert [phase.name for phase in found.phases] == ["generate", "grade", "learn"]
    row = run.metrics[-1]
    assert found.steps == 1  # the first of them is a warm-up
    assert found.seconds == pytest.approx(row["generate_s"] + row["grade_s"] + row["learn_s"])
    assert all(phase.bytes > 2**20 for phase in found.phases)
    assert all(0 < phase.limit < phase.seconds for phase in found.phases)
    assert "step takes" in found.sentence
    assert found.to_json()["phases"]["learn"]["bytes"] > 0
    assert found.table["share"].sum() == pytest.approx(1)


def test_recorded_seconds_need_no_further_step(run):
    done = run.done
    found = opd.profile(run, steps=0)
    assert run.done == done
    assert found.steps == done - 1
    assert not any("_bytes" in name for name in run.metrics[0])


def test_without_a_step_there_is_nothing_to_profile():
    student, teacher, task = opd.load("market")
    fresh = opd.distill(student, teacher, task, steps=2, batch=2, quiet=True)
    with pytest.raises(OpdlabError, match="done no step"):
        opd.profile(fresh, steps=0)


def test_operations_are_those_that_pytorch_counts(run):
    """The student's pass over all prompts and completions, counted by PyTorch itself."""
    from torch.utils.flop_counter import FlopCounterMode

    works, unknown = _work_of_step(run)
    assert unknown == ()
    rollout = run.last.rollout
    policy = run.policies["teacher"]
    shape = policy.weights.model
    tokens = [policy.encode(p) for p in rollout.prompts]
    counted = FlopCounterMode(display=False)
    with counted, torch.no_grad():
        for ids, length, row in zip(tokens, rollout.lengths, rollout.ids, strict=True):
            whole = torch.cat([torch.tensor(ids), row[:length]])[None]
            shape.model(input_ids=whole)
    linear = sum(
        count
        for name, count in counted.get_flop_counts()["Global"].items()
        if "attention" not in str(name) and "bmm" not in str(name)
    )
    # Vectors of norms are counted as numbers that a token is multiplied with.
    assert works["grade"].operations == pytest.approx(linear, rel=0.03)


def test_the_limit_is_the_longer_of_products_and_reading():
    rates = Rates("a device", compute=100.0, bandwidth=10.0)
    assert _Work(operations=200, bytes=10).limit(rates) == (2.0, "compute")
    assert _Work(operations=200, bytes=50).limit(rates) == (5.0, "memory")


def test_a_teacher_that_only_writes_has_no_limit():
    student, teacher, task = opd.load("market")
    hidden = opd.teachers.TextOnly(teacher)
    made = opd.distill(student, hidden, task, method=opd.SequenceKD(), steps=1, batch=2, quiet=True)
    found = opd.profile(made)
    assert math.isnan(found.phases[0].limit)
    assert "not known" in found.sentence


def test_the_mark_of_memory_falls_and_rises():
    mark = PeakMemory(torch.device("cpu"))
    before = mark.reset()
    block = torch.ones(2**24)  # 64 MiB
    held = mark.read()
    del block
    after = mark.reset()
    if math.isnan(before):
        pytest.skip("memory of a process is read from Linux's /proc")
    assert held - before > 60 * 2**20
    assert held - after > 60 * 2**20
