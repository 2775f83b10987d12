"""The world of the support: what it says of itself against the package's own methods."""

from __future__ import annotations

import pytest
import torch

from opdlab import OPD, exact
from opdlab.errors import InvalidValue
from opdlab.exact.worlds import SupportWorld
from opdlab.losses import DIVERGENCES

WORLD = SupportWorld(support=0.05, places=3, vocab=4, seed=1)
FORM = [0, 1, 5]  # rows of the prefixes "", 0 and 00 in a table of 4 tokens


def test_the_student_has_the_support_that_was_asked_for():
    p, q = WORLD.student().softmax(-1), WORLD.teacher().softmax(-1)
    torch.testing.assert_close(p[:, 0], torch.full((3,), 0.05, dtype=torch.float64))
    torch.testing.assert_close(q[:, 0], torch.full((3,), 0.97, dtype=torch.float64))
    assert not torch.equal(p, SupportWorld(0.05, 3, 4, seed=2).student().softmax(-1))


def test_visits_and_accuracy_are_those_of_all_texts():
    table = WORLD.policies()["student"]
    rollout = exact.everything(table.prompts, 4, 3, by=table)
    law = exact.law(table, rollout)
    for t, visit in enumerate(WORLD.visits(WORLD.student()).tolist()):
        on_form = (rollout.ids[:, :t] == 0).all(1)
        assert visit == pytest.approx(law[on_form].sum().item())
    whole = (rollout.ids == 0).all(1)
    assert WORLD.accuracy(WORLD.student()).item() == pytest.approx(law[whole].item())


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon"])
@pytest.mark.parametrize("writer", ["student", "teacher"])
def test_a_step_is_that_of_the_method(name, writer):
    """Visits times the gradient of the divergence on the form, and nothing off it."""
    tables = WORLD.policies()
    want = exact.gradient(OPD(name), tables, writer=writer)[0]
    logits = WORLD.student().requires_grad_()
    values = DIVERGENCES[name](logits.log_softmax(-1), WORLD.teacher().log_softmax(-1))
    visits = WORLD.visits(getattr(WORLD, writer)())
    (got,) = torch.autograd.grad((visits * values).sum(), logits)
    torch.testing.assert_close(want[FORM], got)
    off = torch.ones(len(want), dtype=torch.bool)
    off[FORM] = False
    assert want[off].abs().max() < 1e-15


def test_the_pull_of_the_reverse_kl_vanishes_with_the_support_and_that_of_the_forward_kl_stays():
    pulls = {}
    for support in (1e-2, 1e-4, 1e-6):
        tables = SupportWorld(support, seed=3).policies()
        pulls[support] = [
            -exact.gradient(OPD(name), tables)[0, 0, 0].item()
            for name in ("reverse_kl", "forward_kl")
        ]
    assert pulls[1e-6][0] < 1e-4 * 1.0
    assert pulls[1e-2][0] / pulls[1e-4][0] == pytest.approx(100 * 8.0 / 12.6, rel=0.25)
    assert all(forward > 0.9 for _, forward in pulls.values())


@pytest.mark.parametrize("knobs", [{"support": 0}, {"support": 1.2}, {"places": 0}, {"error": "a"}])
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(InvalidValue, match="SupportWorld got"):
        SupportWorld(**knobs)
