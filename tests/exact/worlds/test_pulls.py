"""Closed-form gradients against autograd on the package's own losses."""

from __future__ import annotations

import pytest
import torch

from opdlab.exact.worlds.pulls import PULLS, peaked
from opdlab.losses import DIVERGENCES


@pytest.mark.parametrize("name", PULLS)
def test_a_pull_is_the_gradient_of_its_divergence(name):
    noise = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits, logq = (3 * noise[0]).requires_grad_(), (3 * noise[1]).log_softmax(-1)
    (want,) = torch.autograd.grad(DIVERGENCES[name](logits.log_softmax(-1), logq).sum(), logits)
    torch.testing.assert_close(PULLS[name](logits.detach().log_softmax(-1), logq), want)


def test_peaked_puts_a_mass_on_each_token():
    rows = peaked(torch.tensor([1, 0]), torch.tensor([0.7, 0.4]), 3)
    want = torch.tensor([[0.15, 0.7, 0.15], [0.4, 0.3, 0.3]], dtype=torch.float64)
    torch.testing.assert_close(rows, want, atol=1e-7, rtol=0)
