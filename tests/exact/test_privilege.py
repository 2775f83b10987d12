"""The tabular world of privileged distillation: golden values, each also derived by hand from the
definitions.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import minimize

from opdlab.errors import OpdlabError
from opdlab.exact.privilege import (
    POLICIES,
    TYPES,
    World,
    floor,
    geometric_floor,
    information,
    split,
)

WORLD = World()
V, RIGHT, WEAK = 16, 0.95, 0.4
MISS, DULL, FLAT = (
    0.05 / 15,
    0.6 / 15,
    1 / 16,
)  # a wrong token of who knows, of who is weak, and any token of who does not know
LIKED, ACCEPTED = 0.9 - 14 * MISS, 0.1

# Mean nats a token of the bare student, type by type: the whole gap, then its parts.
GOLDEN = {
    #     gap      cap|p    info_S   info_T   cap      interaction
    "E": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "C": (-1.1449, -1.1449, 0.0, 0.0, -1.1449, 0.0),
    "I": (-2.5779, 0.0, -2.5779, -2.5779, 0.0, 0.0),
    "B": (-2.5779, -2.2755, -0.3024, -2.5779, 0.0, -2.2755),
    "D": (-1.1449, -1.1449, 0.0, 0.0, -1.1449, 0.0),
    "X": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "R": (-1.6151, -1.6151, 0.0, 0.0, -1.6151, 0.0),
}
PARTS = (
    "gap",
    "capability_with_hint",
    "information_of_student",
    "information_of_teacher",
    "capability_without_hint",
    "interaction",
)


def by_hand() -> dict[str, tuple[float, ...]]:
    """The same table from the definitions, outcome by outcome: right token, or one of the wrong
    ones.
    """
    log = math.log
    skill = WEAK * log(RIGHT / WEAK) + (1 - WEAK) * log(MISS / DULL)
    told = log(RIGHT / FLAT) / V + 15 / V * log(
        MISS / FLAT
    )  # a flat student writes; who is told the hint knows
    half = log(WEAK / FLAT) / V + 15 / V * log(
        DULL / FLAT
    )  # as well, but who is told is weak at using it
    taste = LIKED * log(ACCEPTED / LIKED) + ACCEPTED * log(LIKED / ACCEPTED)
    zero, clear = (0.0,) * 6, lambda g: (g, g, 0.0, 0.0, g, 0.0)
    hint, both = (
        (told, 0.0, told, told, 0.0, 0.0),
        (told, told - half, half, told, 0.0, told - half),
    )
    return {
        "E": zero,
        "C": clear(skill),
        "I": hint,
        "B": both,
        "D": clear(skill),
        "X": zero,
        "R": clear(taste),
    }


def test_the_golden_table_follows_from_the_definitions():
    for kind, row in by_hand().items():
        assert GOLDEN[kind] == pytest.approx(row, abs=5e-5), kind


@pytest.mark.parametrize("column", range(len(PARTS)), ids=PARTS)
def test_the_world_is_the_golden_table(column):
    mean = WORLD.mean(getattr(WORLD.split(), PARTS[column]))
    assert mean.keys() == GOLDEN.keys() == TYPES.keys()
    for kind, row in by_hand().items():
        assert mean[kind] == pytest.approx(row[column], abs=1e-12), kind


def test_both_telescopes_and_the_shapley_split_sum_to_the_gap():
    s = split(
        {
            name: torch.randn(50, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            for i, name in enumerate(POLICIES)
        }
    )
    torch.testing.assert_close(s.capability_with_hint + s.information_of_student, s.gap)
    torch.testing.assert_close(s.information_of_teacher + s.capability_without_hint, s.gap)
    torch.testing.assert_close(s.capability + s.information, s.gap)
    torch.testing.assert_close(s.information_of_teacher - s.information_of_student, s.interaction)
    assert s.interaction.abs().max() > 0.1


def test_the_splits_parts_are_what_they_are_called():
    s = split({"teacher": 1.0, "teacher+hint": 10.0, "student": 100.0, "student+hint": 1000.0})
    got = [float(getattr(s, name)) for name in (*PARTS, "capability", "information")]
    assert got == [-90, -990, 900, 9, -99, -891, -544.5, 454.5]


def test_tables_are_distributions_and_hints_reach_only_who_is_told():
    for name in POLICIES:
        p = WORLD.logp(name).exp()
        assert p.shape == (7, 16, 16)
        torch.testing.assert_close(p.sum(-1), torch.ones(7, 16, dtype=torch.float64))
        same = (p == p[:, :1]).all(-1).all(-1)
        assert [kind for kind, blind in zip(TYPES, same, strict=True) if not blind] == (
            ["I", "B"] if "hint" in name else []
        )
    assert WORLD.law().sum().item() == pytest.approx(1)


def test_the_exact_batch_holds_every_token_as_often_as_it_is_likely():
    kind, hint, token = WORLD.tokens()
    assert len(kind) == 1200 * 16 * 20
    count = torch.zeros(7, 16, 16, dtype=torch.float64).index_put_(
        (kind, hint, token), torch.ones(()).double(), accumulate=True
    )
    torch.testing.assert_close(count / len(kind), WORLD.law())
    with pytest.raises(
        OpdlabError, match="In 7 tokens the probabilities of this world are no whole numbers"
    ):
        WORLD.tokens(7)


# The information floor.


def test_floors_in_closed_form():
    found = floor()
    assert (found.forward_kl, found.reverse_kl, found.jensen_shannon) == pytest.approx(
        (2.4387, 2.5779, 0.4769), abs=5e-5
    )
    hinted = WORLD.logp("teacher+hint")
    kinds = dict(
        zip(
            TYPES,
            zip(information(hinted).tolist(), geometric_floor(hinted).tolist(), strict=True),
            strict=True,
        )
    )
    for kind in "IB":
        assert kinds[kind] == pytest.approx((found.forward_kl, found.reverse_kl), abs=1e-12)
    for kind in "ECDXR":
        assert kinds[kind] == pytest.approx((0, 0), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_no_student_without_the_hint_goes_below_the_floor(seed):
    """Hinted teachers at random: minimise each mean divergence over all students; the minimum is
    the floor.
    """
    g = torch.Generator().manual_seed(seed)
    logp = torch.randn(5, 6, generator=g, dtype=torch.float64).mul(1.5).log_softmax(-1)

    def least(divergence) -> float:
        def objective(x):
            student = torch.tensor(x, requires_grad=True)
            value = divergence(student.log_softmax(-1), logp).mean()
            value.backward()
            return value.item(), student.grad.numpy()

        return minimize(
            objective, torch.randn(6, generator=g, dtype=torch.float64).numpy(), jac=True, tol=1e-12
        ).fun

    assert least(lambda s, t: (t.exp() * (t - s)).sum(-1)) == pytest.approx(
        information(logp).item(), abs=1e-8
    )
    assert least(lambda s, t: (s.exp() * (s - t)).sum(-1)) == pytest.approx(
        geometric_floor(logp).item(), abs=1e-8
    )


def test_the_flat_student_is_best_for_jensen_shannon_too():
    told = WORLD.logp("teacher+hint")[2].exp()

    def mean_js(student):
        middle = (student + told) / 2
        return (
            (student * (student / middle).log() + told * (told / middle).log()).sum(-1) / 2
        ).mean()

    flat = torch.full((16,), 1 / 16, dtype=torch.float64)
    assert mean_js(flat).item() == pytest.approx(floor().jensen_shannon, abs=1e-12)
    for seed in range(20):
        other = (
            torch.randn(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            .mul(0.3)
            .softmax(-1)
        )
        assert mean_js(other) > floor().jensen_shannon


def test_who_memorised_the_hint_goes_below():
    told = WORLD.logp("teacher+hint")[2]
    student = (0.5 * told.exp() + 0.5 / 16).log()  # a model that knows half of each prompt's hint
    assert (told.exp() * (told - student)).sum(-1).mean() < floor().forward_kl


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"vocab": 2}, "vocab=2"),
        ({"shares": (1, 2)}, r"one share for each of E, C, I, B, D, X, R"),
        ({"shares": (0,) * 7}, "one share"),
        ({"error": 0.0}, "error=0.0"),
        ({"weak": 1.0}, "weak=1.0"),
        ({"second": 0.96}, "second=0.96"),
    ],
)
def test_impossible_worlds_are_refused(settings, says):
    with pytest.raises(OpdlabError, match=says):
        World(**settings)
