"""Losses that are none, and losses that behave badly: each gets a report, none a raw error."""

import random
import sys
import time

import pytest
import torch

from opdlab.conformance import Case, Spec, conform
from opdlab.errors import InvalidValue
from opdlab.losses import reverse_kl


def in_place(student, teacher, mask):
    teacher.sub_(1)
    return reverse_kl(student, teacher)


def raises(student, teacher, mask):
    raise ZeroDivisionError("\x1b[2Jno")


HOSTILE = {
    "None": lambda s, t, m: None,
    "an int": lambda s, t, m: 3,
    "a dict": lambda s, t, m: {"loss": s.sum()},
    "an empty tuple": lambda s, t, m: (),
    "another shape": lambda s, t, m: s,
    "whole numbers": lambda s, t, m: s.argmax(-1),
    "not differentiable": lambda s, t, m: reverse_kl(s, t).detach(),
    "numpy": lambda s, t, m: s.detach().numpy().sum(),
    "raises": raises,
    "exits": lambda s, t, m: sys.exit(0),
    "never ends by itself": lambda s, t, m: _again(_again),
    "too few arguments": lambda s: s,
    "a second backward": lambda s, t, m: _backward(reverse_kl(s, t).sum()),
}


def _again(function):
    return function(function)


def _backward(loss):
    loss.backward()
    return loss


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_loss_is_said_to_be_none(name):
    report = conform(HOSTILE[name], Spec("log_probs"), name=name)
    assert report.mistakes == ["no_loss"]
    assert report.findings[0].check == "call"
    assert all(one.status.value == "skip" for one in report.findings[1:])
    assert "\x1b" not in repr(report)
    assert report._repr_html_()


def test_nan_is_said_to_be_nan():
    report = conform(lambda s, t, m: reverse_kl(s, t) * torch.nan, Spec("log_probs"))
    assert report.mistakes[0] == "not_finite"


def test_a_loss_that_is_zero_everywhere_is_said_to_be_zero():
    report = conform(lambda s, t, m: (s * 0).sum())
    assert report.mistakes[0] == "zero_gradient"
    assert report["reduction"].status.value == report["accumulation"].status.value == "skip"


def test_settings_of_the_process_are_put_back():
    def careless(student, teacher, mask):
        torch.set_default_dtype(torch.float16)
        return reverse_kl(student, teacher)

    conform(careless, Spec("log_probs"))
    assert torch.get_default_dtype() == torch.float32


def test_inputs_that_change_are_noticed():
    assert conform(in_place, Spec("log_probs")).mistakes == ["changes_inputs"]


@pytest.mark.parametrize("draw", [torch.rand, lambda _: random.random()], ids=["torch", "python"])
def test_random_losses_are_noticed_and_the_users_generators_are_left_alone(draw):
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    report = conform(lambda s, t, m: reverse_kl(s, t) * draw(1), Spec("log_probs"))
    assert report.mistakes == ["not_repeatable"]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_slow_loss_ends_when_its_time_is_over():
    def slow(student, teacher, mask):
        time.sleep(0.05)
        return reverse_kl(student, teacher)

    report = conform(slow, Spec("log_probs", trains="reverse_kl"), seconds=0.3)
    assert report.mistakes == ["out_of_time"]
    assert not report.passes


def test_an_interrupt_is_the_users():
    def interrupted(student, teacher, mask):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conform(interrupted)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"loss": 3}, "Give a function"),
        ({"loss": len, "spec": {}}, "Use opdlab.conformance.Spec"),
        ({"loss": Case("a", len, Spec()), "spec": Spec()}, "leave it out"),
    ],
    ids=["no loss", "no spec", "two specs"],
)
def test_what_is_no_argument_is_refused(arguments, said):
    with pytest.raises(InvalidValue, match=said):
        conform(**arguments)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "logit"},
        {"trains": "revers_kl"},
        {"trains": "reverse_kl", "parameters": {"beta": 1}},
        {"parameters": {"beta": 1}},
        {"keywords": {"counts": "n"}},
        {"keywords": {"count": 3}},
        {"reduction": "mean"},
        {"writer": "me"},
        {"vocab": 2},
        {"vocab": 10**6},
        {"scale": 0.0},
        {"top_k": 3},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_spec_that_cannot_be_is_refused(fields):
    with pytest.raises(InvalidValue):
        Spec(**fields)
