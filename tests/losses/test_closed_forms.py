"""Every closed form of the table against autograd of the same divergence."""

from __future__ import annotations

import math

import pytest
import torch

from opdlab.losses import DIVERGENCES
from opdlab.losses.closed_forms import ClosedForm, Pair, through_softmax

CASES = {
    **{name: (entry, {}) for name, entry in DIVERGENCES.items() if entry.closed_form},
    "generalized_jsd 0.1": (DIVERGENCES["generalized_jsd"], {"beta": 0.1}),
    "generalized_jsd 0.9 normalized": (
        DIVERGENCES["generalized_jsd"],
        {"beta": 0.9, "normalize": True},
    ),
    "generalized_jsd at 0": (DIVERGENCES["generalized_jsd"], {"beta": 0.0, "normalize": True}),
    "generalized_jsd at 1": (DIVERGENCES["generalized_jsd"], {"beta": 1.0, "normalize": True}),
    "alpha -1": (DIVERGENCES["alpha_divergence"], {"alpha": -1.0}),
    "alpha 0": (DIVERGENCES["alpha_divergence"], {"alpha": 0.0}),
    "alpha 1": (DIVERGENCES["alpha_divergence"], {"alpha": 1.0}),
    "alpha 2": (DIVERGENCES["alpha_divergence"], {"alpha": 2.0}),
    "skew_forward_kl 0": (DIVERGENCES["skew_forward_kl"], {"alpha": 0.0}),
    "skew_forward_kl 0.6": (DIVERGENCES["skew_forward_kl"], {"alpha": 0.6}),
    "skew_reverse_kl 0": (DIVERGENCES["skew_reverse_kl"], {"alpha": 0.0}),
    "skew_reverse_kl 0.6": (DIVERGENCES["skew_reverse_kl"], {"alpha": 0.6}),
}
every = pytest.mark.parametrize("case", CASES)
EXTREME = [
    [1e4, -1e4, 0.0, 0.0],
    [-1e4, 1e4, 0.0, 0.0],
    [0.0, 0.0, -math.inf, 1e4],
    [0.0, -math.inf, -math.inf, 0.0],
    [1e4, 1e4, -math.inf, -1e4],
    [-95.0, -110.0, 3.0, 0.0],  # probabilities that are subnormal in float32, or none
]


def closed(case: str, student: torch.Tensor, teacher: torch.Tensor) -> ClosedForm:
    entry, options = CASES[case]
    logp = student.log_softmax(-1)
    return entry.closed_form(Pair(logp, teacher.log_softmax(-1), logp.exp()), **options)


def by_autograd(
    case: str, student: torch.Tensor, teacher: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence and its gradient in the logits; rows are infinite alone, not together."""
    entry, options = CASES[case]
    leaf = student.clone().requires_grad_()
    value = entry(leaf.log_softmax(-1), teacher.log_softmax(-1), **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def test_every_divergence_has_a_closed_form():
    assert [name for name, entry in DIVERGENCES.items() if entry.closed_form is None] == []


@every
@pytest.mark.parametrize("scale", [0.01, 2.0, 8.0])
def test_it_equals_autograd(case, scale):
    noise = torch.Generator().manual_seed(5)
    student, teacher = scale * torch.randn(2, 9, 11, generator=noise, dtype=torch.float64)
    found, (value, gradient) = closed(case, student, teacher), by_autograd(case, student, teacher)
    torch.testing.assert_close(found.value, value, rtol=1e-12, atol=1e-14)
    size = gradient.abs().max()
    torch.testing.assert_close(found.gradient / size, gradient / size, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        found.gradient.sum(-1) / size, torch.zeros(9, dtype=torch.float64), rtol=0, atol=1e-12
    )


@every
@pytest.mark.parametrize("ruled_out_by", ["student", "teacher", "both"])
def test_tokens_that_are_ruled_out(case, ruled_out_by):
    noise = torch.Generator().manual_seed(6)
    student, teacher = torch.randn(2, 5, 7, generator=noise, dtype=torch.float64)
    if ruled_out_by in ("student", "both"):
        student[:, 2] = -math.inf
    if ruled_out_by in ("teacher", "both"):
        teacher[:, 2] = -math.inf
    found, (value, gradient) = closed(case, student, teacher), by_autograd(case, student, teacher)
    torch.testing.assert_close(found.value, value, rtol=1e-12, atol=1e-14)
    known = value.isfinite()
    torch.testing.assert_close(found.gradient[known], gradient[known], rtol=1e-12, atol=1e-13)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(case, dtype):
    rows = torch.tensor(EXTREME, dtype=dtype)
    student, teacher = rows.repeat_interleave(len(rows), 0), rows.repeat(len(rows), 1)
    value, gradient = by_autograd(case, student, teacher)
    found = closed(case, student, teacher)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    close(found.value, value)
    known = value.isfinite()
    assert known.any()
    assert found.gradient[known].isfinite().all()
    # Both are differences of numbers as large as the loss, so its rounding is theirs.
    rounding = 4 * torch.finfo(dtype).eps * value[known, None]
    apart = (found.gradient - gradient)[known].abs()
    assert (apart <= 1e-6 + 1e-5 * gradient[known].abs() + rounding).all()


@every
def test_float32_is_as_exact_as_autograd(case):
    noise = torch.Generator().manual_seed(7)
    student, teacher = 2 * torch.randn(2, 20, 2000, generator=noise, dtype=torch.float64)
    value, gradient = by_autograd(case, student, teacher)
    found = closed(case, student.float(), teacher.float())
    rounded = by_autograd(case, student.float(), teacher.float())
    for one, other, exact in zip(
        (found.value, found.gradient), rounded, (value, gradient), strict=True
    ):
        assert one.dtype == torch.float32
        far, most = (one - exact).abs().max(), (other - exact).abs().max()
        assert far <= 4 * most + 1e-6 * exact.abs().max()


@every
def test_equal_distributions_have_no_gradient(case):
    same = torch.randn(3, 50, generator=torch.Generator().manual_seed(8))
    found = closed(case, same, same)
    assert found.value.abs().max() < 3e-6
    assert found.gradient.abs().max() < 1e-6


def test_what_a_pair_shares_is_computed_once():
    logp = torch.randn(2, 4, 6).log_softmax(-1)
    pair = Pair(logp[0], logp[1], logp[0].exp())
    assert pair.reverse_kl is pair.reverse_kl
    assert pair.q is pair.q
    before = pair.log_ratio.clone(), pair.q.clone(), pair.p.clone()
    for entry in DIVERGENCES.values():  # none writes to what others read
        entry.closed_form(pair).gradient.fill_(7.0)
    for one, other in zip(before, (pair.log_ratio, pair.q, pair.p), strict=True):
        assert torch.equal(one, other)


def test_a_factor_scales_value_and_gradient():
    found = ClosedForm(torch.tensor([1.0, 2.0]), torch.ones(2, 3)).times(torch.tensor([0.0, 3.0]))
    assert found.value.tolist() == [0.0, 6.0]
    assert found.gradient.tolist() == [[0.0] * 3, [3.0] * 3]


def test_through_softmax_is_the_jacobian_of_log_softmax():
    noise = torch.Generator().manual_seed(9)
    logits, slope = torch.randn(2, 3, 5, generator=noise, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    want = torch.autograd.grad((leaf.log_softmax(-1) * slope).sum(), leaf)[0]
    torch.testing.assert_close(through_softmax(slope.clone(), logits.softmax(-1)), want)
