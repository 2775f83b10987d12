"""The road: its visits, scores and steps against enumeration by the package's own methods."""

from __future__ import annotations

import pytest
import torch

from opdlab import OPD, exact
from opdlab.errors import InvalidValue
from opdlab.exact.worlds import RoadWorld
from opdlab.exact.worlds.pulls import PULLS

WORLD = RoadWorld(horizon=4, noise=0.5, vocab=4, seed=3)


def table_of(logits):
    return WORLD.policies(logits)["student"]


def test_visits_and_score_are_those_of_all_texts():
    logits = WORLD.student()
    table, states = table_of(logits), WORLD.states_of_prefixes()
    found = torch.zeros(8, dtype=torch.float64).index_add_(0, states, exact.visits(table)[0])
    torch.testing.assert_close(WORLD.visits(logits).flatten(), found)
    rollout = exact.everything(table.prompts, 4, 4, by=table)
    law = exact.law(table, rollout)
    right = WORLD.right.flatten()[states[table.where(rollout)[1]]].view(len(rollout), 4)
    want = (law[:, None] * (rollout.ids == right)).sum(0).mean()
    torch.testing.assert_close(WORLD.on_road(logits), want)


@pytest.mark.parametrize("writer", ["student", "teacher"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_a_step_is_that_of_the_method(name, writer):
    logits = WORLD.student()
    tables = WORLD.policies(logits)
    by_prefix = exact.gradient(OPD(name), tables, writer=writer)[0]
    want = torch.zeros(8, 4, dtype=torch.float64).index_add_(
        0, WORLD.states_of_prefixes(), by_prefix
    )
    visits = WORLD.visits(logits if writer == "student" else WORLD.teacher())
    pull = visits[..., None] * PULLS[name](logits.log_softmax(-1), WORLD.teacher())
    torch.testing.assert_close(pull.flatten(0, 1), want)


def test_the_teacher_knows_the_way_back_unless_it_is_noise():
    back = {
        noise: RoadWorld(noise=noise, seed=1).teacher()[:, 1, -1].exp().mean().item()
        for noise in (0.0, 0.5, 1.0)
    }
    assert back[0.0] == pytest.approx(0.98)
    assert back[0.0] > back[0.5] > back[1.0]
    assert RoadWorld(seed=1).on_road(RoadWorld(seed=1).teacher()) == pytest.approx(0.98)


def test_capacity_is_the_rank_of_what_can_be_learned():
    for capacity in (0.25, 0.5, 1.0):
        kernel = RoadWorld(8, capacity=capacity).kernel()
        torch.testing.assert_close(kernel.diag(), torch.ones(16, dtype=torch.float64))
        assert torch.linalg.matrix_rank(kernel) == 16 * capacity


def test_knobs_out_of_range_are_refused():
    with pytest.raises(InvalidValue, match="RoadWorld got noise"):
        RoadWorld(noise=1.5)
