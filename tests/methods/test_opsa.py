"""OPSA: which tokens are pushed down and how hard, its gradient on an exact world, and refusals."""

from __future__ import annotations

import pytest
import torch

from opdlab import OPSA, exact
from opdlab.engine.batch import Batch
from opdlab.errors import InvalidValue
from opdlab.exact import Table


def batch() -> Batch:
    table = Table.random(4, 3, 2, seed=3, scale=2.0)
    return Batch(table.sample(table.prompts, 5, seed=1), {"student": table})


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_the_least_likely_tokens_of_the_whole_batch_are_chosen(share):
    one = batch()
    columns = OPSA(share, adaptive=False).plan(one)
    logp = one.rollout.logp[one.mask]
    chosen = columns["chosen"].values[one.mask] == 1
    assert int(chosen.sum()) == max(1, int(share * len(logp)))
    if not bool(chosen.all()):
        assert logp[chosen].max() <= logp[~chosen].min()
    advantage = columns["advantage"].values[one.mask]
    assert set(advantage[chosen].tolist()) == {-0.5}
    assert not advantage[~chosen].any()


def test_the_adaptive_form_is_that_of_the_paper():
    one = batch()
    columns = OPSA().plan(one)
    chosen = columns["chosen"].values == 1
    entropy = one.rollout.entropy[chosen]
    want = -0.5 - (entropy - entropy.min()) / (2 * (entropy.max() - entropy.min()))
    torch.testing.assert_close(columns["advantage"].values[chosen], want)
    assert columns["advantage"].values[chosen].min() == pytest.approx(-1)


def test_one_token_alone_is_pushed_hardest():
    columns = OPSA(share=0.001).plan(batch())
    chosen = columns["chosen"].values == 1
    assert columns["advantage"].values[chosen].tolist() == [-1.0]


def test_the_expected_gradient_is_zero_where_all_tokens_are_pushed_alike():
    table = Table.random(3, 3, 1, seed=0)
    everywhere = exact.gradient(OPSA(share=1.0, adaptive=False), {"student": table})
    assert everywhere.abs().max() < 1e-12
    some = exact.gradient(OPSA(share=0.3, adaptive=False), {"student": table}, n=2)
    assert some.abs().max() > 1e-3


@pytest.mark.parametrize("change", [{"share": 0.0}, {"share": 1.5}, {"advantage": 0.0}])
def test_what_would_not_push_down_is_refused(change):
    with pytest.raises(InvalidValue):
        OPSA(**change)
