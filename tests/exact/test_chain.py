"""The road: against all walks, closed forms, and the rates that it is there to show."""

from __future__ import annotations

import itertools

import pytest
import torch

from opdlab.errors import OpdlabError
from opdlab.exact import Chain

BOTH = ("teacher", "student")


@pytest.mark.parametrize("prefixes", BOTH)
@pytest.mark.parametrize(
    "chain", [Chain(0.2, 6), Chain(0.3, 5, lost=0.4), Chain(0.1, 6, oracle=False, lost=0.2)]
)
def test_regret_is_the_mean_over_all_walks(chain, prefixes):
    """A walk is a string of steps on (0) and off (1) the road; its chance is a product of four
    numbers.
    """
    knows = prefixes == "student" and chain.oracle
    back = 1 - chain.error if knows else chain.lost
    go = {(0, 0): 1 - chain.error, (0, 1): chain.error, (1, 0): back, (1, 1): 1 - back}
    total, seen = 0.0, torch.zeros(chain.horizon, 2, dtype=torch.float64)
    for walk in itertools.product((0, 1), repeat=chain.horizon):
        chance, at = 1.0, 0
        for step in walk:
            chance, at = chance * go[at, step], step
        total += chance * sum(walk)
        for t, place in enumerate(walk):
            seen[t, place] += chance
    assert chain.regret(prefixes) == pytest.approx(total, abs=1e-12)
    torch.testing.assert_close(chain.visits(prefixes), seen)


@pytest.mark.parametrize("horizon", [1, 10, 300])
def test_closed_forms(horizon):
    e = 0.03
    lost_for_good = horizon - (1 - e) * (1 - (1 - e) ** horizon) / e
    assert Chain(e, horizon).regret("teacher") == pytest.approx(lost_for_good)
    assert Chain(e, horizon).regret("student") == pytest.approx(e * horizon)


def test_one_grows_with_the_square_of_the_horizon_and_the_other_with_it():
    regret = {(p, t): Chain(1e-5, t).regret(p) for p in BOTH for t in (100, 200)}
    assert regret["teacher", 200] / regret["teacher", 100] == pytest.approx(4, rel=0.01)
    assert regret["student", 200] / regret["student", 100] == pytest.approx(2, rel=0.01)
    assert regret["teacher", 200] == pytest.approx(1e-5 * 200**2 / 2, rel=0.01)


def test_a_teacher_who_is_lost_itself_takes_the_benefit_away():
    bad = Chain(0.01, 50, oracle=False)
    assert bad.regret("student") == bad.regret("teacher") == Chain(0.01, 50).regret("teacher")
    assert Chain(0.01, 50).regret("student") < 0.05 * bad.regret("student")


@pytest.mark.parametrize("wrong", [{"error": 1.5}, {"lost": -1}, {"horizon": 0}])
def test_bad_numbers_are_refused(wrong):
    with pytest.raises(
        OpdlabError, match=r"Chain got error=.*Use chances from 0 to 1 and at least one step"
    ):
        Chain(**{"error": 0.1, "horizon": 5, **wrong})


def test_bad_prefixes_are_refused():
    with pytest.raises(OpdlabError, match=r"no prefixes 'both'\. Use 'teacher' or 'student'"):
        Chain(0.1, 5).regret("both")
