"""Every entry of the table of divergences, by the same tests: a new entry needs no other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opdlab import OPD, OPDPlus, losses
from opdlab.losses import DIVERGENCES, Divergence, Form, Generator

# Every entry as it is by default, and every family also at another value of its parameter.
CASES: dict[str, tuple[Divergence, dict[str, float]]] = {}
for key, found in DIVERGENCES.items():
    CASES[key] = found, {}
    if found.parameter:
        value = 0.7 * found.parameter.low + 0.3 * found.parameter.high
        CASES[f"{key} {value:.2g}"] = found, {found.parameter.name: value}
every = pytest.mark.parametrize("case", CASES)


def pair(seed: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, 5, 7, generator=noise, dtype=torch.float64)
    return student, teacher


def log_probs(seed: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = pair(seed, scale)
    return student.log_softmax(-1), teacher.log_softmax(-1)


@every
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 4))
def test_it_is_not_negative_and_zero_only_at_equality(case, seed, scale):
    entry, options = CASES[case]
    student, teacher = log_probs(seed, scale)
    assert (entry(student, teacher, **options) > 0).all()
    assert entry(student, student, **options).abs().max() < 1e-12


@every
@given(seed=st.integers(0, 10**6))
def test_the_exact_form_is_that_of_the_generator(case, seed):
    entry, options = CASES[case]
    student, teacher = log_probs(seed)
    want = Generator(entry.name, **options).divergence(student, teacher)
    torch.testing.assert_close(entry(student, teacher, **options), want, rtol=1e-9, atol=1e-10)


@every
@pytest.mark.parametrize("ruled_out_by", ["student", "teacher", "both"])
def test_the_two_forms_price_ruled_out_tokens_alike(case, ruled_out_by):
    entry, options = CASES[case]
    student, teacher = pair(3)
    if ruled_out_by in ("student", "both"):
        student[:, 1] = -math.inf
    if ruled_out_by in ("teacher", "both"):
        teacher[:, 1] = -math.inf
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    value = entry(student, teacher, **options)
    want = Generator(entry.name, **options).divergence(student, teacher)
    torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-10)
    assert value.isfinite().all() or ruled_out_by != "both"


@every
def test_the_gradient_is_that_of_finite_differences_and_of_the_weight(case):
    entry, options = CASES[case]
    student, teacher = pair(4)
    student.requires_grad_()

    def value(logits: torch.Tensor) -> torch.Tensor:
        return entry(logits.log_softmax(-1), teacher.log_softmax(-1), **options)

    assert torch.autograd.gradcheck(value, student)
    (slope,) = torch.autograd.grad(value(student).sum(), student)
    with torch.no_grad():
        logp = student.log_softmax(-1)
        weight = Generator(entry.name, **options).weight(teacher.log_softmax(-1) - logp)
        p = logp.exp()
        pushed = p * (weight - (p * weight).sum(-1, keepdim=True))
    torch.testing.assert_close(-slope, pushed, rtol=1e-8, atol=1e-9)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_a_number_at_extreme_logits(case, dtype):
    """At logits of ±1e4 and -inf: infinite only where a ratio costs without bound."""
    entry, options = CASES[case]
    form = Generator(entry.name, **options)
    rows = torch.tensor(
        [
            [1e4, -1e4, 0.0, 0.0],
            [-1e4, 1e4, 0.0, 0.0],
            [0.0, 0.0, -math.inf, 1e4],
            [0.0, -math.inf, -math.inf, 0.0],
            [1e4, 1e4, -math.inf, -1e4],
        ],
        dtype=dtype,
    )
    student = rows.repeat_interleave(len(rows), 0).requires_grad_()
    value = entry(student.log_softmax(-1), rows.repeat(len(rows), 1).log_softmax(-1), **options)
    assert not value.isnan().any()
    assert (value >= -1e-5).all()
    if math.isfinite(form.at_zero) and math.isfinite(form.at_infinity):
        assert value.isfinite().all()
    finite = value.isfinite()
    (slope,) = torch.autograd.grad(value[finite].sum(), student)
    assert slope[finite].isfinite().all()


@every
def test_the_type_is_float32_at_least(case):
    entry, options = CASES[case]
    student, teacher = log_probs(5)
    half = entry(student.bfloat16(), teacher.bfloat16(), **options)
    assert half.dtype == torch.float32
    single = entry(student.float(), teacher.float(), **options)
    assert single.dtype == torch.float32
    torch.testing.assert_close(
        single.double(), entry(student, teacher, **options), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_an_entry_is_whole(name):
    entry = DIVERGENCES[name]
    assert entry.name == name
    assert entry.label
    assert isinstance(entry.form(entry.parameter.default if entry.parameter else 0.0), Form)
    if entry.parameter:
        parameter = entry.parameter
        assert entry.options[parameter.name] == parameter.default
        assert all(map(parameter.allows, (parameter.default, parameter.low, parameter.high)))
        assert parameter.low < parameter.default < parameter.high
    if entry.form_of:
        student, teacher = log_probs(6)
        same = DIVERGENCES[entry.form_of](student, teacher)
        torch.testing.assert_close(entry(student, teacher), same)


def test_labels_are_distinct():
    labels = [entry.label for entry in DIVERGENCES.values()]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_name_is_a_method(name):
    assert OPD(name).divergence == OPDPlus(name).divergence == name


def test_an_entry_without_an_exact_form_is_summed_from_its_generator():
    known = DIVERGENCES["alpha_divergence"]
    entry = Divergence("mine", "my divergence", known.form, parameter=known.parameter)
    student, teacher = log_probs(7)
    assert entry.options == {"alpha": 0.5}
    for options in ({}, {"alpha": 0.3}):
        want = losses.alpha_divergence(student, teacher, **options)
        torch.testing.assert_close(entry(student, teacher, **options), want)
    plain = Divergence("mine", "my divergence", DIVERGENCES["pearson"].form)
    assert plain.options == {}
    torch.testing.assert_close(plain(student, teacher), losses.pearson(student, teacher))
