"""Verdicts of the maps of estimators and of the support, on seeds that the files do not have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.maps import opd_plus, support
from benchmarks.maps.opd_plus import EXACT
from opdlab.exact.worlds import PairWorld, SupportWorld
from opdlab.losses import DIVERGENCES

FRESH = (101, 102, 103)


def scores(plan, **settings):
    """Arm to [seeds, settings …] of the only metric."""
    (part,) = [dict(plan.grid) | settings]
    found: dict = {}
    for one in plan.measure(part, FRESH):
        key = tuple(one.knobs[name] for name in plan.together)
        found.setdefault(one.arm, {}).setdefault(key, []).append(
            next(iter(one.scores["updates"].values()))
        )
    return {arm: {key: np.array(v) for key, v in cells.items()} for arm, cells in found.items()}


@pytest.mark.parametrize("arm", support.ARMS)
def test_the_support_map_descends_the_loss_that_it_names(arm):
    """One small step of an arm lowers its loss as its gradient says."""
    world = SupportWorld(0.05, places=2, seed=5)
    student, teacher = world.student(), world.teacher()
    divergence, share, on_texts = support.ARMS[arm]
    logits = student.clone().requires_grad_()
    values = DIVERGENCES[divergence](logits.log_softmax(-1), teacher.log_softmax(-1))
    want = ((1 - share) * world.visits(student) * values).mean()
    if share:
        texts = DIVERGENCES[on_texts](logits.log_softmax(-1), teacher.log_softmax(-1))
        want = want + (share * world.visits(teacher) * texts).mean()
    torch.testing.assert_close(support.loss_of(arm, student, teacher), want.detach())


@pytest.fixture(scope="module")
def by_support():
    settings = {"support": (1e-6, 1e-2), "updates": (128,), "places": (4,), "optimizer": ("sgd",)}
    return scores(support.PLAN, **settings)


def test_the_reverse_kl_stalls_without_support_and_the_forward_kl_does_not(by_support):
    assert (by_support["reverse_kl"][1e-6, 128] < 0.01).all()
    assert (by_support["forward_kl"][1e-6, 128] > 0.95).all()
    assert (by_support["reverse_kl"][1e-2, 128] > 0.95).all(), "with support it is as good"


def test_jensen_shannon_and_the_teachers_prefixes_do_not_help_and_its_texts_do(by_support):
    assert (by_support["jensen_shannon"][1e-6, 128] < 0.01).all()
    assert (by_support["reverse_kl_mixed"][1e-6, 128] < 0.01).all()
    assert (by_support["reverse_kl_and_texts"][1e-6, 128] > 0.95).all()


def test_adam_without_noise_hides_the_stall():
    settings = {"support": (1e-6,), "updates": (32, 128), "places": (1,), "optimizer": ("adam",)}
    found = scores(support.PLAN, **settings)["reverse_kl"]
    assert (found[1e-6, 32] < 0.1).all()
    assert (found[1e-6, 128] > 0.95).all()


@pytest.fixture(scope="module")
def by_weight():
    return {
        name: scores(opd_plus.PLAN, distance=(0.3, 1.0), batch=(1, EXACT), divergence=(name,))
        for name in ("reverse_kl", "forward_kl", "jensen_shannon")
    }


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
@pytest.mark.parametrize("distance", [0.3, 1.0])
def test_the_missing_half_decides_for_forward_kl_and_jensen_shannon(by_weight, name, distance):
    start = np.array(
        [1 - float(PairWorld.gap(w.student(), w.teacher())) for w in worlds_at(distance)]
    )
    assert (by_weight[name]["stop_gradient"][distance, EXACT] < start + 0.01).all()
    assert (by_weight[name]["opd_plus"][distance, EXACT] > 0.95).all()


@pytest.mark.parametrize("distance", [0.3, 1.0])
def test_it_does_not_matter_for_the_reverse_kl_but_for_noise(by_weight, distance):
    found = by_weight["reverse_kl"]
    exact = found["opd_plus"][distance, EXACT] - found["stop_gradient"][distance, EXACT]
    assert np.abs(exact).max() < 1e-6
    one = found["opd_plus"][distance, 1] - found["stop_gradient"][distance, 1]
    assert (one < -0.02).all(), "its constant -1 is noise in a batch of one token"
    centred = found["opd_plus_centred"][distance, 1] - found["stop_gradient"][distance, 1]
    assert np.abs(centred).max() < 1e-6


def worlds_at(distance):
    return [PairWorld(distance, seed=seed) for seed in FRESH]
