"""The shares of a step, and what several processes ask each other: with threads for processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import opdlab as opd
from opdlab import Prompt
from opdlab.data.rollout import Rollout
from opdlab.engine.batch import Batch
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.training.processes import (
    AcceleratedProcesses,
    Share,
    check_batch,
    check_same_run,
    sum_in_place,
)


@pytest.fixture(scope="module")
def market_student():
    return opd.load("market")[0]


@pytest.fixture(scope="module")
def market_prompts():
    return opd.tasks.market().prompts(4)


class Threads:
    """Processes of a step, each a thread of this one."""

    def __init__(self, count: int) -> None:
        self.count, self._barrier = count, threading.Barrier(count, timeout=600)
        self._given: dict[int, Any] = {}

    def exchange(self, index: int, value: Any) -> list[Any]:
        self._given[index] = value
        self._barrier.wait()
        everyone = [self._given[i] for i in range(self.count)]
        self._barrier.wait()
        return everyone

    def run(self, function: Callable[[One], Any]) -> list[Any]:
        out: list[Any] = [None] * self.count
        threads = [
            threading.Thread(target=lambda i=i: out.__setitem__(i, function(One(self, i))))
            for i in range(self.count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return out


class One:
    """One of the processes."""

    def __init__(self, threads: Threads, index: int) -> None:
        self.threads, self.index, self.count = threads, index, threads.count

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return sum(self.threads.exchange(self.index, values))

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.threads.exchange(self.index, values))

    def gather_json(self, value: Any) -> list[Any]:
        return self.threads.exchange(self.index, value)


@given(
    prompts=st.integers(1, 12),
    own=st.integers(0, 12),
    count=st.integers(1, 5),
    n=st.integers(1, 3),
    others=st.lists(st.integers(1, 3), max_size=2),
)
def test_shares_cover_every_completion_once_and_are_of_like_size(prompts, own, count, n, others):
    own = min(own, prompts)
    shares = [Share.of(prompts, own, process, count) for process in range(count)]
    rows = sorted(row for share in shares for row in share.rows(n, others))
    assert rows == list(range(own * n + (prompts - own) * sum(others)))
    sizes = [len(share.student) + len(share.others) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def rollout(lengths: list[int], seed: int = 0) -> Rollout:
    width = max(lengths)
    values = torch.rand(len(lengths), width, generator=torch.Generator().manual_seed(seed))
    prompts = tuple(Prompt(text=str(i)) for i in range(len(lengths)))
    same = ("stop",) * len(lengths)
    return Rollout(
        prompts, torch.ones(values.shape).long(), torch.tensor(lengths), values, values, same,
        same, ("student",) * len(lengths),
    )  # fmt: skip


class Echo:
    """A writer that says which random numbers it was told to draw."""

    def __init__(self) -> None:
        self.calls = 0

    def write(self, prompts, n=1, *, seed=0, places=None):
        self.calls += 1
        start = range(len(prompts)) if places is None else places
        return [
            [f"{prompt.text} {seed} {place}"] * n
            for prompt, place in zip(prompts, start, strict=True)
        ]


LENGTHS = [3, 1, 4, 2, 5]


def everything(batch: Batch) -> dict[str, Any]:
    """What a plan can ask a batch, by completion."""
    where = (batch.rollout.logp > 0.4) & batch.mask
    numbers, drawn = batch.number(where), batch.random(seed=7)
    rows = [b for b in range(len(batch.rollout)) for _ in range(LENGTHS[int(batch.row[b])] % 3)]
    asked = [batch.rollout.prompts[b] for b in rows]
    texts = batch.write("teacher.text", asked, 2, rows, seed=11)
    gathered = batch.gather(batch.rollout.logp, where)
    assert torch.equal(gathered[numbers[where]], batch.rollout.logp[where])
    by_row = {
        int(row): {
            "numbers": numbers[b][batch.mask[b]].tolist(),
            "drawn": drawn[b][batch.mask[b]].tolist(),
            "texts": [text for text, of in zip(texts, rows, strict=True) if of == b],
        }
        for b, row in enumerate(batch.row)
    }
    whole = [gathered.tolist(), batch.gather(batch.rollout.logp).tolist()]
    return {"rows": by_row, "whole": whole, "mean": float(batch.mean(batch.rollout.logp))}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_batch_answers_as_in_one_process(count):
    whole = rollout(LENGTHS)
    alone = everything(Batch(whole, {"teacher.text": Echo()}))

    def in_process(one: One) -> dict[str, Any]:
        row = list(range(one.index, len(LENGTHS), one.count))
        part = whole.select(row)
        return everything(
            Batch(part, {"teacher.text": Echo()}, processes=one, row=torch.tensor(row))
        )

    found = Threads(count).run(in_process)
    rows = {number: said for one in found for number, said in one["rows"].items()}
    assert rows == alone["rows"]
    for one in found:
        assert one["whole"] == alone["whole"]
        assert one["mean"] == pytest.approx(alone["mean"])


def test_random_numbers_of_one_process_are_those_of_torch():
    batch = Batch(rollout(LENGTHS), {})
    want = torch.rand((5, 5), generator=torch.Generator().manual_seed(3))
    assert torch.equal(batch.random(3), want)


def test_a_writer_that_takes_no_places_gets_a_seed_of_each_process():
    class Plain:
        def write(self, prompts, n=1, *, seed=0):
            return [[str(seed)] * n for _ in prompts]

    def in_process(one: One) -> list[list[str]]:
        row = torch.tensor([one.index])
        batch = Batch(rollout([2]), {"teacher.text": Plain()}, processes=one, row=row)
        return batch.write("teacher.text", [Prompt(text="a")], 1, [0], seed=5)

    first, second = Threads(2).run(in_process)
    assert first != second
    alone = Batch(rollout([2]), {"teacher.text": Plain()})
    assert alone.write("teacher.text", [Prompt(text="a")], 1, [0], seed=5) == [["5"]]


def test_a_process_without_questions_asks_nothing():
    def in_process(one: One) -> tuple[Any, int]:
        writer, rows = Echo(), [0] * one.index
        batch = Batch(
            rollout([2]), {"t.text": writer}, processes=one, row=torch.tensor([one.index])
        )
        asked = [batch.rollout.prompts[0] for _ in rows]
        return batch.write("t.text", asked, 1, rows, seed=5), writer.calls

    assert Threads(2).run(in_process) == [([], 0), ([["0 5 0"]], 1)]


def test_places_give_the_random_numbers_of_the_whole_batch(market_student, market_prompts):
    options = {"max_new_tokens": 8, "seed": 5}
    whole = market_student.sample(market_prompts, 2, **options)
    part = market_student.sample([market_prompts[i] for i in (3, 1)], 2, places=[3, 1], **options)
    want = [whole.completions()[row] for row in (6, 7, 2, 3)]
    assert part.completions() == want


@pytest.mark.parametrize("places", [[0], [0, 1, 2], [0, -1]])
def test_places_must_fit_the_prompts(market_student, market_prompts, places):
    with pytest.raises(InvalidValue, match="one number from 0"):
        market_student.sample(market_prompts[:2], places=places)


def test_gradients_are_added_up_in_messages_of_one_dtype(monkeypatch):
    monkeypatch.setattr("opdlab.training.processes.MESSAGE_BYTES", 40)
    sent = []

    class Doubled(AcceleratedProcesses):
        def sum(self, values):
            sent.append((values.dtype, len(values)))
            return 2 * values

    tensors = [
        torch.ones(3, 2),
        torch.ones(4),
        torch.ones(2).double(),
        torch.ones(30),
        torch.ones(1),
    ]
    sum_in_place(Doubled(None), tensors)
    assert all(bool((tensor == 2).all()) for tensor in tensors)
    assert [size for _, size in sent] == [10, 2, 30, 1]


def test_a_batch_smaller_than_the_processes_is_refused():
    with pytest.raises(InvalidValue, match=r"batch=2 for 3 processes.*Use batch=3"):
        check_batch(2, 3)
    check_batch(3, 3)


def test_processes_with_other_runs_are_told_in_what_they_differ():
    def in_process(one: One) -> str:
        said = {"student": "a" if one.index == 0 else "b", "task": "same"}
        try:
            check_same_run(one, said)
        except OpdlabError as error:
            return str(error)
        return ""

    for said in Threads(2).run(in_process):
        assert "Processes 0 and 1 were not given the same run: they differ in student" in said
