"""Conversations whose turns an engine writes: ids are kept, and settings reach every turn."""

from __future__ import annotations

from dataclasses import replace

import torch

import opdlab as opd
from opdlab.data.conversation import messages_of
from opdlab.data.sampling_config import SamplingConfig
from opdlab.models.sampling import SamplingLoop
from opdlab.samplers.completions import Completion
from opdlab.samplers.requests import Request, sample_with
from opdlab.tasks import market
from opdlab.tasks.market import model


class Engine:
    """Another copy of the student, which goes on from token ids as vLLM does."""

    def __init__(self, student: opd.Policy) -> None:
        self.held, self.orders, self.rooms = student.copied(), [], []

    def write(self, orders, config):
        self.orders.append(list(orders))
        return [one for order in orders for one in self._ask(order, config)]

    def _ask(self, order, config):
        options = {"max_new_tokens": order.room, "seed": order.seed}
        loop = SamplingLoop(self.held.weights, self.held.head, replace(config, **options))
        with torch.no_grad():
            found = loop.run([order.start], order.n)
        rows = zip(*(values.tolist() for values in found.tensors()), strict=True)
        return [
            Completion(ids[:length], logp[:length], "stop" if stopped else "length")
            for ids, logp, _, length, stopped in rows
        ]

    def check_room(self, starts, room):
        self.rooms.append((max(map(len, starts)), room))


def test_conversations_are_those_of_the_students_own_loop():
    task, student = market(tools=True), model("clerk")
    prompts = task.prompts(5, seed=3)
    options = {"max_new_tokens": 90, "temperature": 0.0}
    want = student.sample(prompts, 2, **options, **task.sample_options)
    engine = Engine(student)
    request = Request(prompts, 2, SamplingConfig(**options), environment=task.environment)
    found = sample_with(engine.write, engine.check_room, student, request)
    for name in ("ids", "learn", "turn", "lengths"):
        assert torch.equal(getattr(found, name), getattr(want, name)), name
    assert (found.texts, found.finish, found.n) == (want.texts, want.finish, want.n)
    assert [messages_of(text) for text in found.texts] == [messages_of(t) for t in want.texts]
    torch.testing.assert_close(found.logp, want.logp, rtol=1e-3, atol=1e-4)
    assert int(found.turn.max()) >= 2
    # The very ids were sent, and each turn may take what is left.
    first, *later = engine.orders
    assert [order.start for order in first] == student.encode_all(prompts)
    assert {order.room for order in first} == {90}
    for orders in later:
        for order in orders:
            assert order.n == 1
            matching = [
                row
                for row in range(len(found))
                if (student.encode(found.prompts[row]) + found.completions()[row])[
                    : len(order.start)
                ]
                == order.start
            ]
            assert matching
            start = len(student.encode(found.prompts[matching[0]]))
            assert order.room == 90 - (len(order.start) - start)
    assert engine.rooms == [(max(map(len, student.encode_all(prompts))), 90)]


def test_every_turn_of_every_conversation_has_a_seed_of_its_own():
    task, student = market(tools=True), model("clerk")
    engine = Engine(student)
    config = SamplingConfig(max_new_tokens=90, seed=7)
    request = Request(task.prompts(3, seed=3), 2, config, environment=task.environment)
    sample_with(engine.write, engine.check_room, student, request)
    seeds = [order.seed for orders in engine.orders for order in orders]
    assert len(set(seeds)) == len(seeds) > 6
    shared = Request(
        task.prompts(3, seed=3)[2:], 2, config, environment=task.environment, places=[2]
    )
    again = Engine(student)
    sample_with(again.write, again.check_room, student, shared)
    assert {order.seed for orders in again.orders for order in orders} < set(seeds)
