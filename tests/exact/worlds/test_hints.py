"""Hints: the world's kinds of tokens, and DOPD's expected step against DOPD itself."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.maps import dopd
from opdlab import DOPD, exact
from opdlab.errors import InvalidValue
from opdlab.exact.table import Letters, make_rollout
from opdlab.exact.worlds import HintWorld
from opdlab.methods.dopd import Route

WORLD = HintWorld(help=1.0, certainty=0.8, secrets=0.3, prompts=3, vocab=4, seed=1)


def test_each_kind_is_known_to_whom_it_should_be():
    kinds = WORLD.kinds
    teacher, bare = WORLD.teacher(), WORLD.teacher(hinted=False)
    right = WORLD.right[..., None]
    secret, noise = kinds["secret"], kinds["noise"]
    known = lambda rows, part: rows.exp().gather(-1, right)[:, part, 0]
    assert known(teacher, secret).min() == pytest.approx(0.95)
    assert known(bare, secret).max() == pytest.approx(0.25)
    assert known(teacher, noise).max() == pytest.approx(0.25)
    start = WORLD.student().log_softmax(-1)
    assert known(start, kinds["unsure"]).min() == pytest.approx(0.4)
    assert known(start, kinds["stuck"]).max() < 0.1
    assert start[:, kinds["stuck"]].exp().max() == pytest.approx(0.8)
    told = WORLD.student(hinted=True).log_softmax(-1)
    assert known(told, secret).min() == pytest.approx(0.95)
    assert WORLD.shares.sum() == pytest.approx(1)
    assert WORLD.shares[secret].sum() == pytest.approx(0.3)


def test_no_student_without_a_hint_knows_a_secret_of_fresh_prompts():
    """The best log score is that of chance: secrets are drawn apart from all else."""
    guess = HintWorld(prompts=400, vocab=4, seed=7)
    sure = torch.zeros(800, 7, 4, dtype=torch.float64)
    sure[..., 0] = 1.0
    assert guess.log_score(sure, "secret") < -math.log(4)
    assert guess.log_score(0 * sure, "secret") == pytest.approx(-math.log(4))


def weighted_batch(world):
    """All tokens of each state as texts of one token, each as often as the student writes it."""
    tables = world.policies()
    student = tables["student"]
    p = student.logp.exp()[:, 0] * 4000
    texts = [
        (x, token)
        for x, row in enumerate(p)
        for token, count in enumerate(row.round().int().tolist())
        for _ in range(count)
    ]
    rollout = make_rollout(
        [student.prompts[x] for x, _ in texts],
        [[token] for _, token in texts],
        Letters(world.vocab),
        1,
        "student",
    )
    return tables, student.own(rollout)


# The world's shares weigh the kinds of tokens; here every token is met as often.
EVEN = HintWorld(help=0.8, certainty=0.7, secrets=2 / 7, prompts=3, vocab=4, unsure=0.4, seed=1)


@pytest.mark.parametrize("hs", ["self", "teacher", "none"])
def test_the_expected_step_of_dopd_is_that_of_the_method(hs):
    arm = {"self": "dopd", "teacher": "dopd_hs_teacher", "none": "dopd_hs_none"}[hs]
    tables, rollout = weighted_batch(EVEN)
    weight = torch.full((len(rollout),), 1 / 4000, dtype=torch.float64)
    want = exact.gradient_on(DOPD(hs=hs), tables, rollout, weight)[:, 0]
    logp, hinted = (tables[name].logp.view(3, 7, 4) for name in ("student", "student+hint"))
    found = dopd.pull_of(EVEN, arm, logp, hinted)
    torch.testing.assert_close(found.flatten(0, 1), want, atol=2e-3, rtol=0)


def test_the_help_of_the_hint_decides_whether_secrets_count_as_a_gap():
    """Help 1: both know the secret, so no gap. Help 0: a gap that only the hint explains."""
    share = {}
    for help_ in (0.0, 1.0):
        world = HintWorld(help=help_, secrets=0.3, seed=2)
        part = slice(0, world.prompts)
        logp, hinted = (world.student(told)[part].log_softmax(-1) for told in (False, True))
        found = dopd.routes(logp, hinted, world.teacher()[part], world.shares)
        torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
        secret = found[:, world.kinds["secret"]].mean((0, 1))
        share[help_] = secret[Route.HT] + secret[Route.HS]
    assert share[0.0] > 0.8
    assert share[1.0] == 0


def test_knobs_out_of_range_are_refused():
    with pytest.raises(InvalidValue, match="HintWorld got help"):
        HintWorld(help=-0.1)
