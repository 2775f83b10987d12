"""Numbers that are right in kind but too large for any machine are refused before they cost time.

The figures in the messages depend on the machine, so these calls are not in docs/errors.md.
"""

from __future__ import annotations

import math
import re

import pytest
import torch

import opdlab as opd
from opdlab.errors import InvalidValue
from opdlab.support import memory

MANY = 10**12


@pytest.fixture(scope="module")
def world() -> tuple[opd.Policy, opd.Policy, opd.Task]:
    return opd.load("market")


CALLS = {
    "texts of a prompt": lambda s, t, task: s.sample(task.prompts(2), n=MANY),
    "prompts": lambda s, t, task: task.prompts(MANY),
    "held-out prompts": lambda s, t, task: opd.evaluate(s, task, n=MANY, quiet=True),
    "samples of an evaluation": lambda s, t, task: opd.evaluate(s, task, n=2, k=MANY, quiet=True),
    "prompts of a diagnosis": lambda s, t, task: opd.doctor(s, t, task, n=MANY),
    "prompts of a step": lambda s, t, task: run(s, t, task, batch=MANY),
    "texts of a step": lambda s, t, task: run(s, t, task, batch=1, n=MANY),
    "rank": lambda s, t, task: run(s, t, task, lora=MANY),
    "rank of an adapter": lambda s, t, task: s.frozen().adapt(rank=MANY),
    "texts of a token's credit": lambda s, t, task: opd.credit(
        s.sample(task.prompts(1), max_new_tokens=2), s, t, task, n=MANY
    ),
}


def run(student: opd.Policy, teacher: opd.Policy, task: opd.Task, **settings: int) -> None:
    opd.distill(student.frozen(), teacher, task, steps=1, quiet=True, **settings).train()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_fits_no_machine_is_refused_in_words(world, call):
    with pytest.raises(InvalidValue, match=r"needs at least [\d,]+ GiB of memory") as caught:
        call(*world)
    assert type(caught.value) is InvalidValue
    assert re.search(r"(fewer|common|batch_size)", str(caught.value))


def test_all_held_out_prompts_may_be_asked_for_by_any_number():
    task = opd.tasks.from_records([{"prompt": str(i), "answer": str(i)} for i in range(10)], test=4)
    assert len(task.prompts(MANY, split="test")) == 4
    with pytest.raises(InvalidValue, match="needs at least"):
        task.prompts(MANY)  # the training prompts are drawn again and again


def test_the_limit_is_the_whole_memory_and_not_what_is_free_now():
    whole = memory.total_memory(torch.device("cpu"))
    assert 2**28 < whole < math.inf
    cpu = torch.device("cpu")
    memory.refuse_beyond_memory("This", whole, cpu, "Go on.")
    with pytest.raises(InvalidValue, match=r"^This needs at least .* Take less\.$"):
        memory.refuse_beyond_memory("This", whole * 1.01, cpu, "Take less.")


def test_a_device_that_does_not_say_its_memory_refuses_nothing():
    memory.refuse_beyond_memory("This", 1e30, torch.device("meta"), "")
