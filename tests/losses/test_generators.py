"""Generators against their definitions in u, autograd, closed forms, limits and each other
(opd_plus: what each token is told).
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opdlab import losses as d
from opdlab.losses import Generator

# Every row of the table, and the generator as a function of u written down once more.
CASES = {
    "forward_kl": (Generator("forward_kl"), lambda u: u * u.log()),
    "reverse_kl": (Generator("reverse_kl"), lambda u: -u.log()),
    "reverse_kl_k3": (Generator("reverse_kl_k3"), lambda u: -u.log() + u - 1),
    "jensen_shannon": (
        Generator("jensen_shannon"),
        lambda u: 0.5 * (u * u.log() - (1 + u) * ((1 + u) / 2).log()),
    ),
    "generalized_jsd": (
        Generator("generalized_jsd", beta=0.2),
        lambda u: 0.2 * u * (u / (0.2 * u + 0.8)).log() - 0.8 * (0.2 * u + 0.8).log(),
    ),
    "total_variation": (Generator("total_variation"), lambda u: 0.5 * (u - 1).abs()),
    "squared_hellinger": (Generator("squared_hellinger"), lambda u: 0.5 * (u.sqrt() - 1) ** 2),
    "pearson": (Generator("pearson"), lambda u: (u - 1) ** 2),
    "neyman": (Generator("neyman"), lambda u: (u - 1) ** 2 / u),
    "neyman, other form": (Generator("neyman").shifted(-1), lambda u: 1 / u - 1),
    "alpha 0.3": (
        Generator("alpha_divergence", alpha=0.3),
        lambda u: (u**0.3 - 0.3 * u - 0.7) / (0.3 * -0.7),
    ),
    "alpha -1.5": (
        Generator("alpha_divergence", alpha=-1.5),
        lambda u: (u**-1.5 + 1.5 * u - 2.5) / 3.75,
    ),
    "alpha 2.5": (
        Generator("alpha_divergence", alpha=2.5),
        lambda u: (u**2.5 - 2.5 * u + 1.5) / 3.75,
    ),
    "skew_forward_kl": (
        Generator("skew_forward_kl", alpha=0.3),
        lambda u: u * (u / (0.3 * u + 0.7)).log(),
    ),
    "skew_reverse_kl": (Generator("skew_reverse_kl", alpha=0.3), lambda u: -(0.7 * u + 0.3).log()),
    "jeffreys": (Generator("jeffreys"), lambda u: (u - 1) * u.log()),
    "le_cam": (Generator("le_cam"), lambda u: (u - 1) ** 2 / (u + 1)),
    "twice": (Generator("forward_kl").shifted(-1).scaled(2), lambda u: 2 * (u * u.log() - u + 1)),
}
SMOOTH = [name for name in CASES if name != "total_variation"]
every = pytest.mark.parametrize("name", CASES)
GRID = torch.linspace(-4, 4, 81, dtype=torch.float64)
GRID = GRID[GRID != 0]  # total variation has no slope there


def pair(seed: int, vocab: int = 6, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (
        scale * torch.randn(3, vocab, generator=g, dtype=torch.float64) for _ in range(2)
    )
    return student, teacher


def pushed(weight: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """E_p[w grad log p] in the logits: a detached weight times the score, summed over the
    vocabulary.
    """
    p = logits.softmax(-1)
    return p * (weight - (p * weight).sum(-1, keepdim=True))


def slope(value, logits: torch.Tensor) -> torch.Tensor:
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(value(leaf.log_softmax(-1)).sum(), leaf)[0]


def naive(f, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (student.exp() * f((teacher - student).exp())).sum(-1)


# The table (test 1).


@every
def test_the_row_is_its_definition(name):
    g, f = CASES[name]
    u = GRID.exp().requires_grad_()
    (first,) = torch.autograd.grad(f(u).sum(), u)
    near = lambda got, want: torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    near(g.f(GRID), f(u.detach()))
    near(g.slope(GRID), first)
    near(g.weight(GRID), -f(u.detach()) + u.detach() * first)
    near(g.stop_gradient_weight(GRID), -f(u.detach()))
    for part in ("f", "slope", "weight"):
        wide, narrow = getattr(g, part)(GRID), getattr(g, part)(GRID.float())
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), wide, rtol=2e-5, atol=2e-6)


@every
def test_it_is_convex_and_the_weight_never_falls(name):
    g, _ = CASES[name]
    assert abs(g.f(torch.zeros(1, dtype=torch.float64)).item()) < 1e-15
    assert (g.weight(torch.linspace(-30, 30, 601, dtype=torch.float64)).diff() >= -1e-12).all()
    assert (g.slope(torch.linspace(-8, 8, 161, dtype=torch.float64)).diff() >= -1e-12).all()


@every
def test_the_numbers_at_the_ends_and_in_the_middle(name):
    g, _ = CASES[name]
    at = lambda fn, x: fn(torch.tensor([x], dtype=torch.float64)).item()
    if name != "total_variation":
        assert g.centre == pytest.approx(
            (at(g.f, 1e-5) - at(g.f, -1e-5)) / 2e-5, abs=1e-5
        )  # d f / d log u
        assert g.curvature == pytest.approx(
            (at(g.weight, 1e-5) - at(g.weight, -1e-5)) / 2e-5, abs=1e-6
        )  # u f'' = w'
    assert [at(g.weight, 0.0), at(g.slope, 0.0)] == pytest.approx([g.centre] * 2, abs=1e-15)
    for price, value in (
        (g.at_zero, at(g.f, -60.0)),
        (g.at_infinity, at(g.f, 60.0) / math.exp(60)),
    ):
        assert value == pytest.approx(price, abs=1e-6) if math.isfinite(price) else value > 10
    assert at(g.f, -math.inf) == g.at_zero
    if name != "neyman, other form":  # inf - inf: shifting took away what grows
        assert at(g.f, math.inf) == (math.inf if g.at_infinity > 0 else -math.inf)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_number_is_none_at_any_ratio(name, dtype):
    g, _ = CASES[name]
    x = torch.tensor(
        [-math.inf, -1e4, -800.0, -90.0, -1.0, 0.0, 1.0, 90.0, 800.0, 1e4, math.inf], dtype=dtype
    )
    assert not torch.stack([g.weight(x), g.slope(x)]).isnan().any()
    x = x[x < 50] if name == "neyman, other form" else x  # shifting took away what grows: inf - inf
    assert not g.f(x).isnan().any()
    assert g.weight(torch.tensor([-20.0, 20.0], dtype=dtype)).isfinite().all()


def test_known_weights():
    """The paper's three, and the others' stable forms, at u = ½ and u = 3."""
    u = torch.tensor([0.5, 3.0], dtype=torch.float64)
    at = lambda g: g.weight(u.log())
    near = lambda got, want: torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    near(at(Generator("forward_kl")), u)
    near(at(Generator("reverse_kl")), u.log() - 1)
    near(at(Generator("jensen_shannon")), 0.5 * ((1 + u) / 2).log())
    near(at(Generator("reverse_kl_k3")), u.log())
    near(at(Generator("total_variation")), torch.tensor([-0.5, 0.5], dtype=torch.float64))
    near(at(Generator("pearson")), u**2 - 1)
    near(at(Generator("skew_forward_kl", alpha=0.1)), 0.9 * u / (0.1 * u + 0.9))
    near(at(Generator("alpha_divergence", alpha=0.25)), (u**0.25 - 1) / 0.25)
    near(at(Generator("le_cam")), (u - 1) * (3 * u + 1) / (u + 1) ** 2)


# The divergence (tests 2, 10 to 13).


@every
@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 6))
def test_the_weight_is_the_exact_gradient(name, seed, vocab):
    g, f = CASES[name]
    student, teacher = pair(seed, vocab)
    q, p = teacher.log_softmax(-1), student.log_softmax(-1)
    torch.testing.assert_close(g.divergence(p, q), naive(f, p, q), rtol=1e-9, atol=1e-10)
    got = pushed(g.weight(q - p), student)
    torch.testing.assert_close(
        got, -slope(lambda logp: naive(f, logp, q), student), rtol=1e-8, atol=1e-9
    )
    torch.testing.assert_close(
        got, -slope(lambda logp: g.divergence(logp, q), student), rtol=1e-8, atol=1e-9
    )


NAMED = {
    "forward_kl": d.forward_kl,
    "reverse_kl": d.reverse_kl,
    "reverse_kl_k3": d.reverse_kl,
    "jensen_shannon": d.jensen_shannon,
    "generalized_jsd": lambda s, t: d.generalized_jsd(s, t, 0.2),
    "total_variation": d.total_variation,
    "skew_forward_kl": lambda s, t: d.skew_forward_kl(s, t, 0.3),
    "skew_reverse_kl": lambda s, t: d.skew_reverse_kl(s, t, 0.3),
    "alpha 0.3": lambda s, t: d.alpha_divergence(s, t, 0.3),
    "squared_hellinger": lambda s, t: d.alpha_divergence(s, t, 0.5) / 4,
    "pearson": lambda s, t: 2 * d.alpha_divergence(s, t, 2),
    "neyman": lambda s, t: 2 * d.alpha_divergence(s, t, -1),
    "jeffreys": lambda s, t: d.forward_kl(s, t) + d.reverse_kl(s, t),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("ruled_out", [None, "student", "teacher", "both"])
def test_it_is_the_divergence_of_its_name(name, ruled_out):
    """Also where tokens are ruled out: the two modules price them alike."""
    student, teacher = pair(3)
    if ruled_out in ("student", "both"):
        student[:, 1] = -math.inf
    if ruled_out in ("teacher", "both"):
        teacher[:, 1] = -math.inf
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    got, want = CASES[name][0].divergence(p, q), NAMED[name](p, q)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
    assert want.isfinite().all() or ruled_out in ("student", "teacher")


@every
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 3))
def test_never_negative_and_zero_only_at_equality(name, seed, scale):
    g, _ = CASES[name]
    p, q = (x.log_softmax(-1) for x in pair(seed, scale=scale))
    assert (g.divergence(p, q) > 0).all()
    assert g.divergence(p, p).abs().max() < 1e-12
    each = g.f(q - p) - g.centre * (q - p).expm1()  # per sample, as k3 for the reverse KL
    assert (each >= -1e-12).all()
    torch.testing.assert_close((p.exp() * each).sum(-1), g.divergence(p, q), rtol=1e-8, atol=1e-10)


def test_on_disjoint_supports_it_reaches_its_bound():
    p = torch.tensor([0.0, 0.0, -math.inf, -math.inf]).log_softmax(-1)
    value = lambda name, **options: Generator(name, **options).divergence(p, p.flip(0)).item()
    assert value("jensen_shannon") == pytest.approx(math.log(2), abs=1e-6)
    assert value("total_variation") == value("squared_hellinger") == pytest.approx(1)
    assert value("le_cam") == pytest.approx(2)
    assert (
        value("skew_forward_kl", alpha=0.1)
        == value("skew_reverse_kl", alpha=0.1)
        == pytest.approx(-math.log(0.1))
    )
    assert (
        value("forward_kl")
        == value("reverse_kl")
        == value("neyman")
        == value("pearson")
        == value("jeffreys")
        == math.inf
    )


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_finite_with_tokens_that_both_rule_out(name):
    student, teacher = pair(4)
    want = slope(
        lambda logp: CASES[name][0].divergence(logp, teacher[:, :4].log_softmax(-1)), student[:, :4]
    )
    student[:, 4:], teacher[:, 4:] = -math.inf, -math.inf
    got = slope(lambda logp: CASES[name][0].divergence(logp, teacher.log_softmax(-1)), student)
    torch.testing.assert_close(got[:, :4], want)
    assert (got[:, 4:] == 0).all()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Generator("jensen_shannon"), Generator("jensen_shannon")),
        (Generator("total_variation"), Generator("total_variation")),
        (Generator("squared_hellinger"), Generator("squared_hellinger")),
        (Generator("jeffreys"), Generator("jeffreys")),
        (Generator("le_cam"), Generator("le_cam")),
        (Generator("forward_kl"), Generator("reverse_kl")),
        (Generator("pearson"), Generator("neyman")),
        (Generator("alpha_divergence", alpha=0.3), Generator("alpha_divergence", alpha=0.7)),
        (Generator("generalized_jsd", beta=0.2), Generator("generalized_jsd", beta=0.8)),
        (Generator("skew_forward_kl", alpha=0.2), Generator("skew_reverse_kl", alpha=0.2)),
    ],
)
def test_swapping_the_arguments(one, other):
    p, q = (x.log_softmax(-1) for x in pair(5))
    torch.testing.assert_close(one.divergence(p, q), other.divergence(q, p), rtol=1e-10, atol=1e-12)


def test_limits():
    x = torch.linspace(-3, 3, 41, dtype=torch.float64)
    near = lambda got, want: torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    for part in ("f", "weight", "slope"):
        at = lambda name, part=part, **options: getattr(Generator(name, **options), part)(x)
        for tiny in (0.0, 1e-8, 1e-5):
            near(at("alpha_divergence", alpha=tiny), at("reverse_kl_k3"))
            near(
                at("alpha_divergence", alpha=1 - tiny),
                getattr(Generator("forward_kl").shifted(-1), part)(x),
            )
            near(at("skew_forward_kl", alpha=tiny), at("forward_kl"))
            near(at("skew_reverse_kl", alpha=tiny), at("reverse_kl"))
        near(
            at("generalized_jsd", beta=1e-5) / 1e-5,
            getattr(Generator("forward_kl").shifted(-1), part)(x),
        )
        near(at("generalized_jsd", beta=1 - 1e-5) / 1e-5, at("reverse_kl_k3"))
        near(at("alpha_divergence", alpha=0.5), 4 * at("squared_hellinger"))
        near(at("alpha_divergence", alpha=2), at("pearson") / 2)
        near(at("alpha_divergence", alpha=-1), at("neyman") / 2)
        near(at("generalized_jsd"), at("jensen_shannon"))


# The stop-gradient (tests 5, 6, 14).


def test_for_the_reverse_kl_it_changes_nothing_but_a_constant():
    g, (student, teacher) = Generator("reverse_kl"), pair(6)
    x = teacher.log_softmax(-1) - student.log_softmax(-1)
    torch.testing.assert_close(
        g.weight(x) - g.stop_gradient_weight(x), torch.full_like(x, -1), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        pushed(g.weight(x), student), pushed(g.stop_gradient_weight(x), student), rtol=0, atol=1e-12
    )


def test_for_the_forward_kl_it_climbs():
    """E_p[-u log u score] is the gradient of ½ E_q log² u, upwards; near equality it is the
    gradient's opposite.
    """
    g, (student, teacher) = Generator("forward_kl"), pair(7)
    q = teacher.log_softmax(-1)
    got = pushed(g.stop_gradient_weight(q - student.log_softmax(-1)), student)
    torch.testing.assert_close(
        got,
        slope(lambda logp: 0.5 * (q.exp() * (q - logp) ** 2).sum(-1), student),
        rtol=1e-9,
        atol=1e-10,
    )
    close = teacher + 0.05 * student
    x = q - close.log_softmax(-1)
    cosine = torch.cosine_similarity(
        pushed(g.stop_gradient_weight(x), close), pushed(g.weight(x), close), dim=-1
    )
    assert (cosine < -0.9).all()


@pytest.mark.parametrize("name", SMOOTH)
def test_the_local_rule_of_signs(name):
    """Close to equality the stop-gradient pushes -f'(1) / f''(1) times as far as the divergence's
    own gradient.
    """
    g, (student, teacher) = CASES[name][0], pair(8)
    near = teacher + 1e-5 * student
    x = teacher.log_softmax(-1) - near.log_softmax(-1)
    true, stopped = pushed(g.weight(x), near), pushed(g.stop_gradient_weight(x), near)
    torch.testing.assert_close(
        stopped, -g.centre / g.curvature * true, rtol=0, atol=3e-4 * true.abs().max().item()
    )


@pytest.mark.parametrize("c", [-2.0, 0.7, 5.0])
@every
def test_the_form_matters_to_the_stop_gradient_alone(name, c):
    g, (student, teacher) = CASES[name][0], pair(9)
    q, p, other = teacher.log_softmax(-1), student.log_softmax(-1), g.shifted(c)
    torch.testing.assert_close(other.divergence(p, q), g.divergence(p, q), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(other.weight(q - p), g.weight(q - p) + c, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        pushed(other.weight(q - p), student),
        pushed(g.weight(q - p), student),
        rtol=1e-9,
        atol=1e-10,
    )
    moved = pushed(other.stop_gradient_weight(q - p), student) - pushed(
        g.stop_gradient_weight(q - p), student
    )
    torch.testing.assert_close(
        moved, c * slope(lambda logp: d.forward_kl(logp, q), student), rtol=1e-8, atol=1e-9
    )


def test_what_does_not_depend_on_the_token_teaches_nothing():
    student, _ = pair(10)
    assert pushed(torch.full_like(student, 3.0), student).abs().max() < 1e-15


# Bad input.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "kl"}, r"no generator 'kl'\. Use one of forward_kl, reverse_kl"),
        (
            {"name": "pearson", "alpha": 2},
            r"'pearson' has no alpha, but got alpha=2\. Leave it out",
        ),
        ({"name": "alpha_divergence", "beta": 0.5}, r"'alpha_divergence' has no beta"),
        (
            {"name": "generalized_jsd", "beta": 1},
            r"Generator\('generalized_jsd', beta=1\) is no divergence\. Use a beta between 0 and 1",
        ),
        ({"name": "skew_reverse_kl", "alpha": 1.0}, "Use 0 <= alpha < 1"),
        ({"name": "alpha_divergence", "alpha": math.inf}, "Use a finite alpha"),
        ({"name": "le_cam", "scale": 0}, "scale above 0"),
    ],
)
def test_bad_generators_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Generator(**options)


def test_a_generator_says_what_it_is():
    assert repr(Generator("alpha_divergence")) == "Generator('alpha_divergence', alpha=0.5)"
    assert (
        repr(Generator("forward_kl").shifted(-1).scaled(2))
        == "Generator('forward_kl', shift=-1, scale=2)"
    )
    assert Generator("skew_forward_kl") == Generator("skew_forward_kl", alpha=0.1)
    assert Generator("pearson").f(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32
