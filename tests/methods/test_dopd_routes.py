"""Where DOPD sends a token: its definition, ties, trimming, and the types of the tabular world."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive_dopd import HS, HT, LH, LL, S, T, naive_route, sampled

from opdlab.exact import privilege
from opdlab.methods.dopd import Route, gap, route, thresholds

# Routing: properties 1 to 5.


@given(seed=st.integers(0, 10**6), n=st.integers(1, 80), trim=st.sampled_from([0.0, 0.05, 0.3]))
def test_routes_are_the_definition_and_partition_the_tokens(seed, n, trim):
    lt, ls = sampled(seed, n)
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.8
    got = route(lt, ls, mask, trim)
    assert got.dtype == torch.int64
    assert (got[~mask] == -1).all()
    assert set(got[mask].tolist()) <= set(Route)
    if mask.any():
        assert got.tolist() == naive_route(lt, ls, mask, trim)


@given(seed=st.integers(0, 10**6))
def test_padding_enters_nothing(seed):
    lt, ls = sampled(seed, 20)
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[:, :5] = True
    for garbage in (0.0, -1e9, math.nan, -math.inf):
        wide = [
            torch.full((4, 9), garbage, dtype=torch.float64).masked_scatter(mask, x)
            for x in (lt, ls)
        ]
        assert thresholds(*wide, mask) == thresholds(lt, ls, torch.ones(20, dtype=torch.bool))
        assert torch.equal(
            route(*wide, mask)[mask], route(lt, ls, torch.ones(20, dtype=torch.bool))
        )


def test_ties_go_to_high_to_confident_and_to_the_teacher():
    """Two gaps of ½ and one of 1 and of 0 each: the mean is ½.

    Powers of two, so that equal is equal.
    """
    lt, ls = torch.tensor([-1.0, -0.5, -1.0, -2.0]), torch.tensor([-0.5, -1.0, -2.0, -2.0])
    mask = torch.ones(4, dtype=torch.bool)
    assert thresholds(lt, ls, mask, trim=0)[0] == 0.5
    assert route(lt, ls, mask, trim=0).tolist() == [HS, HT, HT, LL]
    half = torch.full((4,), 0.5).log()
    uneven = torch.tensor([0.25, 0.75, 0.5, 0.5]).log()
    found = route(half, half.clone(), mask, limits=(1.0, 2 * half[0].double().exp().item()))
    assert found.tolist() == [LH] * 4  # all gaps below 1, the sum of both exactly the mean
    assert (
        route(half, half.clone(), mask).tolist() == [HT] * 4
    )  # no gap at all is not below the mean gap, and q_T = q_S
    assert route(uneven, half, mask, limits=(0.0, 0.0)).tolist() == [HS, HT, HT, HT]


@pytest.mark.parametrize("equal", [0.1, 0.3, 1.1, 2.7])
def test_equal_gaps_are_all_high_whatever_the_rounding(equal):
    above = 0  # how often a bare mean would exceed its equal values
    for n in range(1, 60):
        unsure, mask = (
            torch.full((n,), -equal, dtype=torch.float64),
            torch.ones(n, dtype=torch.bool),
        )
        sure = torch.zeros_like(unsure)
        above += unsure.abs().mean().item() > equal
        assert route(sure, unsure, mask).tolist() == [HT] * n
        assert route(unsure, sure, mask).tolist() == [HS] * n
    assert above


@given(seed=st.integers(0, 10**6))
def test_swapping_the_sides_swaps_who_leads(seed):
    lt, ls = sampled(seed)
    mask = torch.ones(60, dtype=torch.bool)
    assert (gap(lt, ls) >= 0).all()
    assert torch.equal(gap(lt, ls), gap(ls, lt))
    swap = torch.tensor([LH, LL, HS, HT])
    assert torch.equal(route(ls, lt, mask), swap[route(lt, ls, mask)])


@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 10))
def test_the_unit_of_the_gap_does_not_matter(seed, scale):
    lt, ls = sampled(seed)
    mask = torch.ones(60, dtype=torch.bool)
    merged = torch.tensor([LL, LL, HT, HS])  # confidence is not a matter of the gap
    assert torch.equal(merged[route(scale * lt, scale * ls, mask)], merged[route(lt, ls, mask)])


def test_means_are_those_of_the_whole_batch():
    lt, ls = sampled(3)
    mask = torch.ones(60, dtype=torch.bool)
    whole = route(lt, ls, mask)
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(route(lt[shuffled], ls[shuffled], mask), whole[shuffled])
    limits = thresholds(lt, ls, mask)
    halves = [route(lt[i : i + 30], ls[i : i + 30], mask[:30], limits=limits) for i in (0, 30)]
    assert torch.equal(torch.cat(halves), whole)
    order = gap(lt, ls).argsort()  # a part of small gaps only has another mean
    assert not torch.equal(route(lt[order[:30]], ls[order[:30]], mask[:30]), whole[order[:30]])


def test_an_outlier_moves_no_mean_and_is_still_routed():
    lt, ls = sampled(4, 100)
    mask = torch.ones(100, dtype=torch.bool)
    worst = int(gap(lt, ls).argmax())
    before, limits = route(lt, ls, mask), thresholds(lt, ls, mask)
    lt[worst] = -1e6
    assert thresholds(lt, ls, mask)[0] == pytest.approx(limits[0], rel=1e-12)
    assert thresholds(lt, ls, mask, trim=0)[0] > 1e3
    after = route(lt, ls, mask)
    assert after[worst] == HS
    others = torch.arange(100) != worst
    assert torch.equal(after[others], before[others])
    lt[worst] = -math.inf
    assert torch.equal(route(lt, ls, mask), after)


def test_tokens_that_both_rule_out_have_no_gap():
    none = torch.tensor([-math.inf, -1.0, -2.0])
    assert gap(none, none).tolist() == [0, 0, 0]
    assert route(
        none, torch.tensor([-math.inf, -1.5, -2.0]), torch.ones(3, dtype=torch.bool), trim=0
    ).tolist() == [LL, HT, LL]


def test_no_tokens_have_no_routes():
    none = torch.zeros(2, 0)
    assert route(none, none, none.bool()).shape == (2, 0)
    assert (
        route(torch.zeros(3), torch.zeros(3), torch.zeros(3, dtype=torch.bool)).tolist() == [-1] * 3
    )


# The tabular world: what the routes and the known error do to each type of token.

WORLD = privilege.World()
KIND, HINT, TOKEN = WORLD.tokens()
ALL = torch.ones(len(KIND), dtype=torch.bool)
SEEN = {name: WORLD.logp(name)[KIND, HINT, TOKEN] for name in privilege.POLICIES}
RIGHT, ACCEPTED, LIKED = 0.95, 0.1, 0.9 - 14 * 0.05 / 15

# Shares of LH, LL, HT and HS among the tokens of each type; in the world these are probabilities of
# right and wrong tokens.
LITERAL = {
    "E": (RIGHT, 1 - RIGHT, 0, 0),
    "C": (0, 0, 0.4, 0.6),
    "I": (1 / 16, 15 / 16, 0, 0),
    "B": (0, 0, 1 / 16, 15 / 16),
    "D": (0, 0, 0.4, 0.6),
    "X": (0, 1, 0, 0),
    "R": (0, 1 - LIKED - ACCEPTED, ACCEPTED, LIKED),
}
BARE = LITERAL | {"C": (0.4, 0, 0, 0.6), "D": (0.4, 0, 0, 0.6), "I": (0, 0, 1 / 16, 15 / 16)}


def shares(routes: torch.Tensor) -> dict[str, tuple[float, ...]]:
    return {
        kind: tuple((routes[i == KIND] == r).double().mean().item() for r in Route)
        for i, kind in enumerate(privilege.TYPES)
    }


@pytest.mark.parametrize(
    ("student", "golden"), [(S, LITERAL), ("student", BARE)], ids=["literal", "bare"]
)
def test_routes_by_type_of_token(student, golden):
    found = shares(route(SEEN[T], SEEN[student], ALL))
    for kind, want in golden.items():
        assert found[kind] == pytest.approx(want, abs=1e-9), kind


def test_thresholds_of_the_world_by_hand():
    """Means over what is left when the largest 5 % are trimmed: all of B and most of the student's
    own taste are gone.
    """
    log = math.log
    gaps = sorted(
        [
            (x, p * share / 20)
            for share, parts in (
                (8, [(0, 1)]),
                (5, [(0, 1)]),  # E; I and X
                (4, [(log(0.95 / 0.4), 0.4), (log(0.04 / (0.05 / 15)), 0.6)]),  # C and D
                (1, [(log(0.95 / 0.4), 1 / 16), (log(0.04 / (0.05 / 15)), 15 / 16)]),  # B
                (2, [(log(LIKED / ACCEPTED), LIKED + ACCEPTED), (0, 1 - LIKED - ACCEPTED)]),  # R
            )
            for x, p in parts
        ]
    )
    last = next(x for i, (x, _) in enumerate(gaps) if sum(p for _, p in gaps[: i + 1]) >= 0.95)
    kept = [(x, p) for x, p in gaps if x <= last]
    want = sum(x * p for x, p in kept) / sum(p for _, p in kept)
    assert thresholds(SEEN[T], SEEN[S], ALL)[0] == pytest.approx(want, rel=1e-9)


def auroc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """P(a positive scores higher than a negative) + half the ties, from all pairs of distinct
    values.
    """
    (a, m), (b, n) = (x.unique(return_counts=True) for x in (positive, negative))
    wins = (a[:, None] > b).double() + 0.5 * (a[:, None] == b)
    return ((wins * m[:, None] * n).sum() / (m.sum() * n.sum())).item()


@pytest.mark.parametrize(("student", "want"), [(S, 1.0), ("student", 0.0)], ids=["literal", "bare"])
def test_the_gap_tells_capability_from_information_if_both_are_told(student, want):
    a = gap(SEEN[T], SEEN[student])
    assert auroc(a[KIND == 1], a[KIND == 2]) == want


@pytest.mark.parametrize("s", [0.5, 0.65, 0.8, 0.95])
def test_a_confident_error_is_nearly_blind_to_the_teacher(s):
    """V = 8, a flat teacher, a student with mass s on one token, among as many tokens on which all
    agree. The pull of the teacher at a prefix is w = sum_y S(y) [light 1_LH(y) + 1_HT(y)]; it is
    1 in plain OPD, and at most 1 - s here.
    """
    n = 1400
    own = torch.tensor([round(n * s)] + [round(n * (1 - s) / 7)] * 7)
    assert own.sum() == n
    p = torch.tensor([s] + [(1 - s) / 7] * 7, dtype=torch.float64)
    ls = torch.cat([p.repeat_interleave(own), torch.full((n,), 0.5).double()]).log()
    lt = torch.cat([torch.full((n,), 0.125), torch.full((n,), 0.5)]).double().log()
    mean = thresholds(lt, ls, torch.ones(2 * n, dtype=torch.bool))[0]
    assert math.log(8 * s) >= mean  # the condition of the bound
    routes = route(lt, ls, torch.ones(2 * n, dtype=torch.bool))[:n]
    w = ((routes == HT).double() + 0.6 * (routes == LH)).mean().item()
    assert w <= 1 - s + 1e-12
    assert (routes[: own[0]] == HS).all()
    high = (
        math.log(7 / (8 * (1 - s))) >= mean
    )  # whether the other tokens are far enough from the teacher to be taught
    assert w == pytest.approx((1 - s) * high, abs=1e-9)
