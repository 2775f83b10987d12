"""Divergences against naive float64 sums, closed forms, limits and bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opdlab import losses as d
from opdlab.losses.divergences import TopK


def naive_kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * (a.log() - b.log())).sum(-1)


def mix(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    return share * a + (1 - share) * b


# Every divergence, with the naive sum over probabilities that defines it: p the student, q the
# teacher.
CASES = {
    "forward_kl": (d.forward_kl, lambda p, q: naive_kl(q, p)),
    "reverse_kl": (d.reverse_kl, naive_kl),
    "jensen_shannon": (
        d.jensen_shannon,
        lambda p, q: 0.5 * naive_kl(q, mix(q, p, 0.5)) + 0.5 * naive_kl(p, mix(q, p, 0.5)),
    ),
    "jsd 0.1": (
        lambda s, t: d.generalized_jsd(s, t, 0.1),
        lambda p, q: 0.1 * naive_kl(q, mix(q, p, 0.1)) + 0.9 * naive_kl(p, mix(q, p, 0.1)),
    ),
    "jsd 0.9 normalized": (
        lambda s, t: d.generalized_jsd(s, t, 0.9, normalize=True),
        lambda p, q: (0.9 * naive_kl(q, mix(q, p, 0.9)) + 0.1 * naive_kl(p, mix(q, p, 0.9))) / 0.09,
    ),
    "skew_forward_kl": (
        lambda s, t: d.skew_forward_kl(s, t, 0.2),
        lambda p, q: naive_kl(q, mix(q, p, 0.2)),
    ),
    "skew_reverse_kl": (
        lambda s, t: d.skew_reverse_kl(s, t, 0.2),
        lambda p, q: naive_kl(p, mix(p, q, 0.2)),
    ),
    "alpha 0.3": (
        lambda s, t: d.alpha_divergence(s, t, 0.3),
        lambda p, q: ((q**0.3 * p**0.7).sum(-1) - 1) / (0.3 * -0.7),
    ),
    "alpha 2 (Pearson)": (
        lambda s, t: d.alpha_divergence(s, t, 2),
        lambda p, q: ((q - p) ** 2 / p).sum(-1) / 2,
    ),
    "alpha -1 (Neyman)": (
        lambda s, t: d.alpha_divergence(s, t, -1),
        lambda p, q: ((q - p) ** 2 / q).sum(-1) / 2,
    ),
    "total_variation": (d.total_variation, lambda p, q: (p - q).abs().sum(-1) / 2),
}
BOUNDED = [name for name in CASES if "alpha 2" not in name and "alpha -1" not in name]  # no e^20000
MASKABLE = [name for name in BOUNDED if name not in ("forward_kl", "reverse_kl")]
every = pytest.mark.parametrize("name", CASES)


def random_logits(seed: int, vocab: int = 11, rows: int = 3, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(
        rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def pair(seed: int = 0, vocab: int = 11, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    return random_logits(2 * seed, vocab, scale=scale), random_logits(
        2 * seed + 1, vocab, scale=scale
    )


def slopes(fn, *logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in logits]
    return torch.autograd.grad(fn(*[x.log_softmax(-1) for x in leaves]).sum(), leaves)


@every
@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 40), scale=st.floats(0.01, 5))
def test_equals_its_definition(name, seed, vocab, scale):
    fn, naive = CASES[name]
    student, teacher = pair(seed, vocab, scale)
    want = naive(student.softmax(-1), teacher.softmax(-1))
    torch.testing.assert_close(
        fn(student.log_softmax(-1), teacher.log_softmax(-1)), want, rtol=1e-9, atol=1e-10
    )
    got = fn(student.float().log_softmax(-1), teacher.float().log_softmax(-1))
    torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-5)


@every
@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 20))
def test_gradients_are_those_of_the_definition(name, seed, vocab):
    fn, naive = CASES[name]
    want = slopes(lambda s, t: naive(s.exp(), t.exp()), *pair(seed, vocab))
    torch.testing.assert_close(slopes(fn, *pair(seed, vocab)), want, rtol=1e-7, atol=1e-9)


@every
def test_gradcheck(name):
    logits = [x.requires_grad_() for x in pair(3, vocab=5)]
    assert torch.autograd.gradcheck(
        lambda s, t: CASES[name][0](s.log_softmax(-1), t.log_softmax(-1)), logits
    )
    assert torch.autograd.gradcheck(
        CASES[name][0], logits
    )  # log-probs that sum to anything, as on a dropped tail


def test_directions_on_an_asymmetric_pair():
    """Student (½, ½), teacher (¾, ¼): the closed forms differ, and each name has its own."""
    student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # naive_kl(teacher || student)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)  # naive_kl(student || teacher)
    assert forward != pytest.approx(reverse, abs=1e-3)
    assert d.forward_kl(student, teacher).item() == pytest.approx(forward, abs=1e-6)
    assert d.reverse_kl(student, teacher).item() == pytest.approx(reverse, abs=1e-6)


def test_only_the_reverse_kl_minds_a_student_outside_the_teachers_support():
    student, teacher = (
        torch.tensor([0.0, 0.0]).log_softmax(-1),
        torch.tensor([0.0, -math.inf]).log_softmax(-1),
    )
    assert d.reverse_kl(student, teacher).item() == math.inf
    assert d.forward_kl(student, teacher).item() == pytest.approx(math.log(2))
    assert d.forward_kl(teacher, student).item() == math.inf


@every
def test_zero_and_flat_at_equality(name):
    fn, same = CASES[name][0], random_logits(5).float()
    assert fn(same.log_softmax(-1), same.log_softmax(-1)).abs().max() < 3e-6
    assert slopes(fn, same, same)[0].abs().max() < 3e-6


@pytest.mark.parametrize("beta", [0.0, 1e-9, 1e-4])
def test_generalized_jsd_tends_to_the_kls(beta):
    student, teacher = (x.log_softmax(-1) for x in pair(1, scale=1.0))
    near = lambda got, want: torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-6)
    near(d.generalized_jsd(student, teacher, beta, normalize=True), d.forward_kl(student, teacher))
    near(
        d.generalized_jsd(student, teacher, 1 - beta, normalize=True),
        d.reverse_kl(student, teacher),
    )
    if beta:
        near(
            d.generalized_jsd(student, teacher, beta) / (beta * (1 - beta)),
            d.forward_kl(student, teacher),
        )


def test_generalized_jsd_at_a_small_beta_is_usable_in_float32():
    student, teacher = pair(1, vocab=2000, scale=1.0)
    small = lambda s, t: d.generalized_jsd(s, t, 1e-4, normalize=True)
    gap = small(student.float().log_softmax(-1), teacher.float().log_softmax(-1)) - d.forward_kl(
        student.log_softmax(-1), teacher.log_softmax(-1)
    )
    assert gap.abs().max() < 0.01  # nats: rounding, divided by beta
    apart = (
        slopes(small, student.float(), teacher.float())[0]
        - slopes(d.forward_kl, student, teacher)[0]
    )
    assert apart.norm() < 0.01 * slopes(d.forward_kl, student, teacher)[0].norm()


def test_alpha_and_skew_tend_to_the_kls():
    student, teacher = (x.log_softmax(-1) for x in pair(2, scale=1.0))
    forward, reverse = d.forward_kl(student, teacher), d.reverse_kl(student, teacher)
    for tiny in (0, 1e-6):
        near = lambda got, want: torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        near(d.alpha_divergence(student, teacher, tiny), reverse)
        near(d.alpha_divergence(student, teacher, 1 - tiny), forward)
        near(d.skew_forward_kl(student, teacher, tiny), forward)
        near(d.skew_reverse_kl(student, teacher, tiny), reverse)


@pytest.mark.parametrize("far", [1e4, math.inf])
def test_bounds_are_reached_on_disjoint_supports(far):
    student = torch.tensor([[0.0, 0.0, -far, -far]]).log_softmax(-1)
    teacher = torch.tensor([[-far, -far, 0.0, 0.0]]).log_softmax(-1)
    assert d.jensen_shannon(student, teacher).item() == pytest.approx(math.log(2), abs=1e-6)
    assert d.total_variation(student, teacher).item() == pytest.approx(1, abs=1e-6)
    for alpha in (0.05, 0.5):
        assert d.skew_forward_kl(student, teacher, alpha).item() == pytest.approx(
            -math.log(alpha), abs=1e-6
        )
        assert d.skew_reverse_kl(student, teacher, alpha).item() == pytest.approx(
            -math.log(alpha), abs=1e-6
        )
        mixed = -alpha * math.log(alpha) - (1 - alpha) * math.log(1 - alpha)
        assert d.generalized_jsd(student, teacher, alpha).item() == pytest.approx(mixed, abs=1e-6)
    assert d.alpha_divergence(student, teacher, 0.5).item() == pytest.approx(
        4, abs=1e-5
    )  # 4 Hellinger²


@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 100))
def test_bounds_hold_everywhere(seed, scale):
    student, teacher = (x.float().log_softmax(-1) for x in pair(seed, scale=scale))
    assert (d.jensen_shannon(student, teacher) <= math.log(2) + 1e-6).all()
    assert (d.total_variation(student, teacher) <= 1 + 1e-6).all()
    assert (d.skew_forward_kl(student, teacher, 0.1) <= -math.log(0.1) + 1e-5).all()
    assert (d.skew_reverse_kl(student, teacher, 0.1) <= -math.log(0.1) + 1e-5).all()


@pytest.mark.parametrize("name", BOUNDED)
def test_finite_at_huge_logits(name):
    student = torch.tensor([[1e4, -1e4, 0.0, 3.0], [-1e4, 1e4, 1e4, -1e4]])
    teacher = torch.tensor([[-1e4, 1e4, 0.0, 3.0], [1e4, 1e4, -1e4, -1e4]])
    assert CASES[name][0](student.log_softmax(-1), teacher.log_softmax(-1)).isfinite().all()
    assert all(slope.isfinite().all() for slope in slopes(CASES[name][0], student, teacher))


@every
def test_tokens_that_both_rule_out_do_not_count(name):
    """-inf on both sides: value and gradient are those on the rest of the vocabulary."""
    fn, keep = CASES[name][0], [0, 2, 3, 5]
    student, teacher = pair(4, vocab=6)
    want, want_slopes = (
        fn(student[:, keep].log_softmax(-1), teacher[:, keep].log_softmax(-1)),
        slopes(fn, student[:, keep], teacher[:, keep]),
    )
    student[:, [1, 4]], teacher[:, [1, 4]] = -math.inf, -math.inf
    torch.testing.assert_close(fn(student.log_softmax(-1), teacher.log_softmax(-1)), want)
    for got, expected in zip(slopes(fn, student, teacher), want_slopes, strict=True):
        torch.testing.assert_close(got[:, keep], expected)
        assert (got[:, [1, 4]] == 0).all()


@pytest.mark.parametrize("name", MASKABLE)
def test_tokens_that_one_rules_out(name):
    """-inf on one side is the limit of ever smaller logits, in value and in gradient."""
    fn, (student, teacher) = CASES[name][0], pair(6, vocab=6)
    near_student, near_teacher = student.clone(), teacher.clone()
    student[:, 1], teacher[:, 4] = -math.inf, -math.inf
    near_student[:, 1], near_teacher[:, 4] = -80.0, -80.0
    near = lambda got, want: torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    near(
        fn(student.log_softmax(-1), teacher.log_softmax(-1)),
        fn(near_student.log_softmax(-1), near_teacher.log_softmax(-1)),
    )
    near(slopes(fn, student, teacher), slopes(fn, near_student, near_teacher))


def test_forward_kl_trains_where_only_the_teacher_rules_out():
    student, teacher = pair(7, vocab=5)
    teacher[:, 2] = -math.inf
    want = student.softmax(-1) - teacher.softmax(-1)  # d naive_kl(q || p) / d logits = p - q
    torch.testing.assert_close(slopes(d.forward_kl, student, teacher)[0], want)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32(name, dtype):
    student, teacher = (x.to(dtype).log_softmax(-1) for x in pair(8))
    got = CASES[name][0](student, teacher)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, CASES[name][0](student.float(), teacher.float()))


@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 0.95))
def test_symmetries(seed, share):
    s, t = (x.log_softmax(-1) for x in pair(seed))
    same = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    same(d.jensen_shannon(s, t), d.jensen_shannon(t, s))
    same(d.total_variation(s, t), d.total_variation(t, s))
    same(d.generalized_jsd(s, t, share), d.generalized_jsd(t, s, 1 - share))
    same(d.alpha_divergence(s, t, share), d.alpha_divergence(t, s, 1 - share))
    same(d.skew_forward_kl(s, t, share), d.skew_reverse_kl(t, s, share))


def test_shapes_broadcast():
    student, teacher = random_logits(1).log_softmax(-1), random_logits(2, rows=1).log_softmax(-1)
    assert d.reverse_kl(student.expand(2, 3, 11), teacher[0]).shape == (2, 3)
    torch.testing.assert_close(
        d.forward_kl(student, teacher), d.forward_kl(student, teacher.expand(3, 11))
    )


def test_entropy():
    assert d.entropy(torch.zeros(7).log_softmax(-1)).item() == pytest.approx(math.log(7))
    assert d.entropy(torch.tensor([0.0, -math.inf])).item() == 0
    p = random_logits(1).softmax(-1)
    torch.testing.assert_close(d.entropy(p.log()), -(p * p.log()).sum(-1))


@pytest.mark.parametrize("beta", [0, 1, -0.1, 1.5])
def test_a_bare_beta_at_the_ends_is_refused(beta):
    with pytest.raises(ValueError, match=r"(?s)beta=.*Use a beta between"):
        d.generalized_jsd(*pair(0), beta)


@pytest.mark.parametrize("alpha", [-0.1, 1.0])
def test_a_bad_skew_is_refused(alpha):
    with pytest.raises(ValueError, match="Use 0 <= alpha < 1"):
        d.skew_forward_kl(*pair(0), alpha)


# The coarse support.


def on(
    support: TopK, student: torch.Tensor, teacher: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = support.support(student)
    return support.coarse(student, ids), support.coarse(teacher, ids)


@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 12))
def test_bucket_is_a_lower_bound_that_grows_with_k(seed, vocab):
    student, teacher = (x.log_softmax(-1) for x in pair(seed, vocab))
    for full in (d.reverse_kl, d.forward_kl, d.jensen_shannon, d.total_variation):
        values = torch.stack([full(*on(TopK(k), student, teacher)) for k in range(1, vocab + 2)])
        assert (values >= -1e-12).all()
        assert (values.diff(dim=0) >= -1e-12).all()
        for exact in values[vocab - 2 :]:  # k = V - 1, V, and beyond
            torch.testing.assert_close(exact, full(student, teacher))


def test_support_is_the_likeliest_first_and_the_bucket_holds_the_rest():
    logp = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    ids = TopK(2).support(logp)
    assert ids.tolist() == [[1, 3]]
    torch.testing.assert_close(TopK(2).coarse(logp, ids).exp(), torch.tensor([[0.5, 0.25, 0.25]]))
    torch.testing.assert_close(
        TopK(2, tail="renormalize").coarse(logp, ids).exp(), torch.tensor([[2 / 3, 1 / 3]])
    )
    assert TopK(9).coarse(logp, TopK(9).support(logp)).shape == (1, 4)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_tails_that_are_divergences_are_flat_at_equality(tail):
    same = random_logits(9)
    value = lambda s, t: d.reverse_kl(*on(TopK(3, tail=tail), s, t))
    assert value(same.log_softmax(-1), same.log_softmax(-1)).abs().max() < 1e-12
    assert slopes(value, same, same)[0].abs().max() < 1e-12


def test_drop_warns_and_fails_as_documented():
    with pytest.warns(UserWarning, match="Use tail='bucket'"):
        support = TopK(3, tail="drop")
    value = lambda s, t: d.reverse_kl(support.coarse(s, ids), support.coarse(t, ids))
    same = random_logits(9)
    ids = support.support(same)
    assert slopes(value, same, same)[0].norm() > 0.1  # though nothing is left to learn
    away = same.scatter(-1, ids, same.gather(-1, ids) - 3)  # moves mass off the support
    assert (value(away.log_softmax(-1), same.log_softmax(-1)) < -0.01).all()


@pytest.mark.parametrize("far", [50.0, 1e4, math.inf])
def test_coarse_gradients_stay_finite_with_tiny_tails(far):
    logits = torch.tensor([[3.0, 2.0, -far, -far, -far]])
    other = torch.tensor([[2.0, 2.5, -far, -far, -far]])
    value = lambda s, t: d.reverse_kl(*on(TopK(2), s, t))
    plain = slopes(d.reverse_kl, logits[:, :2], other[:, :2])[0]
    got = slopes(value, logits, other)[0]
    torch.testing.assert_close(got[:, :2], plain)
    assert got[:, 2:].abs().max() < 1e-6


def test_an_empty_tail_against_a_full_one_is_infinite():
    student, teacher = (
        torch.tensor([[0.0, 0.0, 0.0]]).log_softmax(-1),
        torch.tensor([[0.0, 0.0, -math.inf]]).log_softmax(-1),
    )
    assert d.reverse_kl(*on(TopK(2), student, teacher)).item() == math.inf


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": 3, "tail": "keep"}])
def test_bad_supports_are_refused(wrong):
    with pytest.raises(ValueError, match=r"TopK got k=\d+, tail=.* Use k >= 1"):
        TopK(**wrong)
