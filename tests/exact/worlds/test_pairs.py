"""The world of pairs: the weights of sampled tokens against the package's own method."""

from __future__ import annotations

import pytest
import torch

from opdlab import OPDPlus, exact
from opdlab.errors import InvalidValue
from opdlab.exact.worlds import PairWorld

WORLD = PairWorld(distance=1.2, states=5, vocab=4, seed=2)


def test_the_gap_is_the_total_variation_and_grows_with_the_distance():
    p, q = WORLD.student().softmax(-1), WORLD.teacher().softmax(-1)
    want = torch.stack([(a - b).clamp(min=0).sum() for a, b in zip(p, q, strict=True)]).mean()
    torch.testing.assert_close(WORLD.gap(WORLD.student(), WORLD.teacher()), want)
    gaps = [
        world.gap(world.student(), world.teacher()).item()
        for world in (PairWorld(d, seed=1) for d in (0.0, 0.1, 0.5, 1.0, 3.0))
    ]
    assert gaps == sorted(gaps)
    assert gaps[0] == 0
    assert gaps[-1] > 0.7


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "reverse_kl", "pearson"])
def test_the_expected_step_is_that_of_the_method(name, stop):
    """-E_p w(u) (onehot(y) - p) is the gradient that `exact.gradient` finds for the method."""
    method = OPDPlus(name, stop_gradient=stop)
    logp, logq = WORLD.student().log_softmax(-1), WORLD.teacher().log_softmax(-1)
    weight = method.weight(logq - logp)
    p = logp.exp()
    expected = p * weight - p * (p * weight).sum(-1, keepdim=True)
    found = exact.gradient(method, WORLD.policies())[:, 0]
    torch.testing.assert_close(found, -expected)


def test_knobs_out_of_range_are_refused():
    with pytest.raises(InvalidValue, match="PairWorld got distance"):
        PairWorld(distance=-1)
