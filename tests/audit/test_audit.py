"""`audit` against exact gradients; the real method classes among its subjects."""

from __future__ import annotations

import importlib
import warnings
from functools import partial

import pytest
import torch
from audit.pairs import slope

import opdlab as opd
from opdlab import (
    DOPD,
    EOPD,
    GOPD,
    GRPO,
    OPD,
    OVD,
    SFT,
    SODA,
    OmniOPD,
    OPDPlus,
    SelfDistillation,
    SequenceKD,
    SpanOPD,
    TopK,
    audit,
    exact,
)
from opdlab import losses as d
from opdlab.audit import as_loss, in_reward, k2, k3
from opdlab.errors import NonFinite, OpdlabError, UnknownColumn
from opdlab.losses import DIVERGENCES


def straight_through(rows) -> torch.Tensor:
    """verl's k3+: the value of k3 with the gradient of k2."""
    log_u = rows.logp_of("teacher") - rows.logp
    return k3(log_u).detach() + k2(log_u) - k2(log_u).detach()


SUBJECTS = {
    "k1 in the reward": (in_reward("k1"), "reverse_kl", {"form"}),
    "k1 as a loss": (as_loss("k1"), None, {"zero_gradient", "form"}),
    "k2 in the reward": (in_reward("k2"), None, {"form"}),
    "k2 as a loss": (as_loss("k2"), "reverse_kl", {"form"}),
    "k3 in the reward": (in_reward("k3"), "reverse_minus_forward", {"value", "form"}),
    "k3 as a loss": (as_loss("k3"), "forward_kl", {"value", "form"}),
    "k3+": (straight_through, "reverse_kl", set()),
    "full": (OPD(), "reverse_kl", set()),
    "a class": (OPD, "reverse_kl", set()),
    "sampled": (OPD(estimator="sampled"), "reverse_kl", set()),
    "with baseline": (OPD(estimator="sampled", baseline="value"), "reverse_kl", set()),
    "with returns": (OPD(estimator="sampled", discount=1.0), "reverse_kl", set()),
    "jsd 0.9": (OPD("generalized_jsd", {"beta": 0.9}), "generalized_jsd", set()),
    "jsd 0.1": (OPD("generalized_jsd", {"beta": 0.1, "normalize": True}), "generalized_jsd", set()),
    "alpha 0.3": (OPD("alpha_divergence", {"alpha": 0.3}), "alpha_divergence", set()),
    "skew": (OPD("skew_reverse_kl", {"alpha": 0.2}), "skew_reverse_kl", set()),
    "bucket": (OPD(top_k=TopK(3, by="teacher")), None, set()),
    "renormalized": (OPD(top_k=TopK(3, by="teacher", tail="renormalize")), None, set()),
    "supervised": (SFT(), "forward_kl", set()),
    "sequence": (SequenceKD, "forward_kl", set()),
    "hinted": (SelfDistillation.opsd(), "jensen_shannon", set()),
    "averaged": (SelfDistillation.sdft(), "reverse_kl", set()),
    "extrapolated 1": (GOPD(1.0), "reverse_kl", set()),
    "extrapolated": (GOPD(), None, set()),
    "routed": (DOPD(), None, {"compares"}),  # its means run over the batch
    "gated": (EOPD(), None, set()),
    "log-probs": (d.reverse_kl, "reverse_kl", set()),
    "squared": (
        lambda rows: 0.5 * ((rows.student.exp() - rows.teacher.exp()) ** 2).sum(-1),
        "squared_error",
        set(),
    ),
    "stopped reverse": (OPDPlus(stop_gradient=True), "reverse_kl", {"form"}),
    "stopped forward": (
        OPDPlus("forward_kl", stop_gradient=True),
        None,
        {"ascends", "value", "form"},
    ),
    "stopped jsd": (
        OPDPlus("jensen_shannon", stop_gradient=True),
        None,
        {"ascends", "value", "form"},
    ),
    "stopped pearson": (OPDPlus("pearson", stop_gradient=True), None, {"ascends", "value", "form"}),
    "upside down": (lambda rows: -d.forward_kl(rows.student, rows.teacher), None, {"ascends"}),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_what_is_trained_and_what_is_wrong(name):
    subject, trains, flags = SUBJECTS[name]
    found = audit(subject)
    assert found.trains == trains, found
    assert set(found.flags) == flags, found


SAME = {"reverse_kl_k3": "reverse_kl", "alpha_divergence": "squared_hellinger"}  # alpha ½


@pytest.mark.parametrize("name", DIVERGENCES)
def test_opd_plus_trains_what_it_names(name):
    options = (
        {"beta": 0.3}
        if name == "generalized_jsd"
        else {"alpha": 0.2}
        if name.startswith("skew")
        else {}
    )
    found = audit(OPDPlus(name, options, clip=None))
    assert found.trains == SAME.get(name, name)
    assert set(found.flags) == (
        {"value"} if name == "jeffreys" else set()
    )  # -E_p w is the reverse KL there


def test_verdicts_in_words():
    said = lambda loss: audit(loss).verdict
    assert (
        said(as_loss("k3"))
        == "Differentiates k3, an estimate of the reverse KL: this trains the forward KL to the"
        " teacher."
    )
    assert (
        said(as_loss("k1"))
        == "Differentiates k1, an estimate of the reverse KL: its expected gradient is zero, so it"
        " trains nothing."
    )
    assert (
        said(in_reward("k1"))
        == said(OPD(estimator="sampled"))
        == "Rewards by k1: this trains the reverse KL to the teacher."
    )
    assert (
        said(OPDPlus("forward_kl", stop_gradient=True))
        == "This climbs the squared log-ratio, away from the teacher."
    )
    assert (
        said(OPDPlus("forward_kl", discount=1.0))
        == "This trains the forward KL to the teacher over whole texts."
    )
    assert (
        said(SFT()) == "This trains the forward KL to the teacher, if a teacher wrote the answers."
    )
    assert (
        said(SequenceKD()) == "This trains the forward KL to the teacher, on the teacher's texts."
    )
    assert (
        said(SelfDistillation.sdft())
        == "This trains the reverse KL to the student's moving average, told the hint."
    )
    assert (
        said(OPD("generalized_jsd", {"beta": 0.9}))
        == "This trains the generalised JSD (beta 0.9) to the teacher."
    )
    both = lambda rows: (
        1.5 * (d.forward_kl(rows.student, rows.teacher) + d.reverse_kl(rows.student, rows.teacher))
    )
    assert (
        said(both)
        == "This trains the Jeffreys divergence to the teacher, at 1.5 times its gradient."
    )
    assert said(GOPD()).startswith(
        "This is the gradient of no divergence known here; the closest is the "
    )


@pytest.mark.parametrize(
    "loss",
    [lambda s, t: s.logsumexp(-1), lambda s, t: 5 * s.exp().sum(-1), lambda s, t: (0 * s).sum(-1)],
)
def test_a_gradient_of_rounding_is_none(loss):
    found = audit(loss)
    assert found.verdict == "Its expected gradient is zero, so it trains nothing."
    assert found.flags == {"zero_gradient": "No token's loss has a gradient."}


def test_a_small_gradient_is_one():
    assert audit(lambda s, t: 1e-9 * d.reverse_kl(s, t)).trains == "reverse_kl"


def test_what_the_value_reads_as():
    assert audit(as_loss("k3")).reads_as == audit(OPD()).reads_as == "reverse_kl"
    assert audit(as_loss("k3")).estimate == "k3 as a loss"
    assert audit(OPD(estimator="sampled")).estimate == "k1 in the reward"
    assert audit(OPD("forward_kl")).estimate is None
    assert (
        "Its value is the reverse KL, and its gradient another"
        in audit(as_loss("k3")).flags["value"]
    )


def test_noise_is_that_of_one_token():
    """Exact for a full loss; for the sampled ones by the law of the world that the audit makes."""
    assert audit(OPD()).noise == pytest.approx(1)
    plain, value = (audit(OPD(estimator="sampled", baseline=b)).noise for b in (None, "value"))
    assert 1 < value < plain
    student, teacher = (exact.Table.random(5, 1, 8, seed=i, scale=1.2).logp[:, 0] for i in (0, 1))
    p, weight = student.exp(), teacher - student
    length = (torch.eye(5, dtype=torch.float64) - p[:, None]).norm(
        dim=-1
    )  # of the score of each token
    mean = p * (weight - (p * weight).sum(-1, keepdim=True))
    assert audit(in_reward("k1")).noise == pytest.approx(
        ((p * (weight * length) ** 2).sum().sqrt() / mean.norm()).item()
    )


def test_the_answer_does_not_hang_on_the_random_world():
    for seed in (1, 2, 3):
        assert audit(as_loss("k3"), seed=seed).trains == "forward_kl"
        assert audit(OPD("skew_forward_kl", {"alpha": 0.25}), seed=seed).verdict.startswith(
            "This trains the skew forward KL (alpha 0.25)"
        )
        assert audit(OPDPlus("jensen_shannon", stop_gradient=True), seed=seed).trains is None


def test_the_table_is_the_comparison():
    tables = {
        name: exact.Table.random(5, 1, 8, seed=i, scale=1.2)
        for i, name in enumerate(("student", "teacher"))
    }
    table = audit(OPD("forward_kl")).table.set_index("name")
    ours = slope(d.forward_kl, tables)
    for name, divergence in (
        ("reverse_kl", d.reverse_kl),
        ("jensen_shannon", d.jensen_shannon),
        ("total_variation", d.total_variation),
    ):
        other = slope(divergence, tables)
        assert table["cosine"][name] == pytest.approx(
            torch.cosine_similarity(ours.flatten(), other.flatten(), dim=0).item(), abs=1e-6
        )
        assert table["ratio"][name] == pytest.approx((ours.norm() / other.norm()).item(), rel=1e-6)
    assert table["cosine"].abs().is_monotonic_decreasing
    assert table.index[0] == "forward_kl"
    assert set(table["target"]) == {"teacher"}
    assert set(audit(OPDPlus(discount=0.5)).table["credit"]) == {"token", "text"}
    assert set(audit(DOPD()).table["target"]) == {"teacher+hint", "student+hint"}


def dropped(k: int = 3, **options) -> OPD:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning is what this is about
        return OPD(top_k=TopK(k, by="teacher", tail="drop"), **options)


@pytest.mark.parametrize("k", [1, 3])
def test_a_truncated_reverse_kl_leaves_its_support(k):
    found = audit(dropped(k))
    assert set(found.flags) == {"not_zero_at_equality", "leaves_support"}
    assert f"keeps 0.37 (1/e) of the mass of {k} tokens" in found.flags["leaves_support"]


def test_a_truncated_forward_kl_gathers_on_it():
    found = audit(dropped(divergence="forward_kl"))
    assert set(found.flags) == {"not_zero_at_equality"}
    assert "moves a student that equals its target" in found.flags["not_zero_at_equality"]


def test_a_loss_with_another_optimum_is_found_out():
    found = audit(
        lambda rows: d.reverse_kl(rows.student, rows.teacher) - 0.3 * d.entropy(rows.student)
    )
    assert set(found.flags) == {"not_zero_at_equality"}
    assert found.trains is None
    rare = audit(
        lambda rows: d.reverse_kl(rows.student, rows.teacher) + 0.1 * rows.student[:, 0].exp()
    )
    assert set(rare.flags) == {"not_zero_at_equality"}  # drains one token, no support


def special_cased(rows, beta: float) -> torch.Tensor:
    """As a public trainer does: the forward KL at 0, the reverse at 1, the bare generalised JSD
    between.
    """
    if beta in (0, 1):
        return (d.reverse_kl if beta else d.forward_kl)(rows.student, rows.teacher)
    return d.generalized_jsd(rows.student, rows.teacher, beta)


def test_jumps_in_a_parameter():
    beta = {"beta": lambda b: partial(special_cased, beta=b)}
    found = audit(partial(special_cased, beta=0.5), sweep=beta)
    assert found.trains == "jensen_shannon"
    assert (
        "At beta = 0 its gradient is not the limit of those beside, which are 1e-05 times as long"
        in found.flags["discontinuous"]
    )
    assert "At beta = 1" in found.flags["discontinuous"]
    smooth = {
        "beta": lambda b: (
            lambda rows: d.generalized_jsd(rows.student, rows.teacher, b, normalize=True)
        )
    }
    assert not audit(partial(special_cased, beta=0.5), sweep=smooth).flags
    assert not audit(OPD("generalized_jsd", {"beta": 0.4})).flags  # refuses the ends
    assert not audit(OPD("generalized_jsd", {"beta": 0.4, "normalize": True})).flags
    assert not audit(OPD("alpha_divergence", {"alpha": 0.4})).flags


def test_other_forms_of_f():
    make = lambda c: (
        lambda rows: d.Generator("jensen_shannon").shifted(c).f(rows.logp_of("teacher") - rows.logp)
    )
    found = audit(make(0.0), forms=make)
    assert set(found.flags) == {"value", "form"}
    assert "its gradient changes by 3.4 times its length" in found.flags["form"]
    assert "form" not in audit(OPDPlus("jensen_shannon")).flags
    assert "only the second has a gradient" in audit(as_loss("k1")).flags["form"]


def test_it_prints_what_it_found():
    lines = repr(audit(as_loss("k3"))).splitlines()
    assert lines[0].startswith("Estimate(k='k3', use='loss'): Differentiates k3")
    assert [line[:4] for line in lines[1:]] == ["  ! "] * 2
    assert repr(audit(OPD())) == "OPD(): This trains the reverse KL to the teacher."
    assert (
        audit(special_cased_half := partial(special_cased, beta=0.5)).name
        == special_cased_half.func.__name__
    )
    assert audit(opd.method()(straight_through)).name == "straight_through"


# What it cannot say.


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (
            OmniOPD,
            r"OmniOPD\(\) needs 'teacher\.text', which does not grade the student's own tokens",
        ),
        (OVD, "needs 'teacher.text'"),
        (
            SpanOPD(),
            r"needs 'teacher\.spans'.*Audit methods that need a teacher, a reference or an ema",
        ),
        (GRPO(), r"GRPO\(\) looks at no other distribution, so there is no divergence to name"),
        (SODA(), "learns from texts of teacher and reference side by side"),
        (3, r"audit got 3\. Give a loss \(a function of rows\)"),
    ],
)
def test_it_refuses_what_has_no_expectation(method, says):
    with pytest.raises(OpdlabError, match=says):
        audit(method)


def test_errors_of_the_loss_are_its_own():
    with pytest.raises(UnknownColumn, match=r"no 'reference'.*Name the policy in `needs`"):
        audit(lambda rows: d.reverse_kl(rows.student, rows.reference))


def test_names():
    names = importlib.import_module("opdlab.audit")
    assert set(names.__all__) == {
        "Audit",
        "Estimate",
        "as_loss",
        "audit",
        "in_reward",
        "k1",
        "k2",
        "k3",
    }
    assert opd.audit is names.audit


def test_a_loss_that_is_not_finite_at_equality_is_told_where():
    """A weight over its mean is 0 / 0 where the student equals the teacher, as it rarely is."""

    class Surprise:
        needs = ("teacher",)

        def plan(self, batch):
            gap = (batch.signals["teacher_entropy"] - batch.signals["student_entropy"]).abs()
            return {"weight": gap / batch.mean(gap)}

        def loss(self, rows):
            return rows.weight * d.reverse_kl(rows.student, rows.teacher)

    with pytest.raises(NonFinite, match=r"where the student equals the teacher.*clamp_min"):
        audit(Surprise())
