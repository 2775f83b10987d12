"""No false alarm on what is right: opdlab's divergences, estimators, supports and reductions."""

import pytest
import torch

import opdlab as opd
from opdlab.audit import as_loss, in_reward
from opdlab.conformance import Case, Reduction, Spec, conform
from opdlab.losses import DIVERGENCES, TopK


def of_log_probs(divergence):
    return lambda student, teacher, mask: divergence(student, teacher)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence_of_the_table_conforms(name):
    loss = of_log_probs(DIVERGENCES[name])
    report = conform(Case(name, loss, Spec("log_probs", trains=name)))
    assert report.passes, report
    assert report["claim"].status.value == "pass"


METHODS = [
    opd.OPD(),
    opd.OPD("generalized_jsd", {"beta": 0.2, "normalize": True}),
    opd.OPD(estimator="sampled", baseline="value"),
    opd.OPDPlus("alpha_divergence", {"alpha": 0.3}, baseline="value"),
    opd.OPD(top_k=TopK(3, by="student")),
    opd.OPD("forward_kl", top_k=TopK(3, by="teacher", tail="renormalize")),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_method_conforms_to_what_its_fields_say(method):
    report = conform(method)
    assert report.passes, report
    assert report["claim"].status.value == "pass"


@pytest.mark.parametrize(
    ("estimate", "trains"),
    [(in_reward("k1"), "reverse_kl"), (as_loss("k2"), "reverse_kl")],
    ids=str,
)
def test_the_estimates_that_train_something_conform(estimate, trains):
    report = conform(estimate)
    assert report.passes, report
    assert report.table.iloc[0]["name"] == trains


def terms(student, teacher):
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def reduced(reduction):
    def loss(student, teacher, mask, *, count):
        values = torch.where(mask, terms(student, teacher), 0.0)
        if reduction is Reduction.TOKEN:
            return values.sum() / count
        if reduction is Reduction.SEQUENCE:
            return (values.sum(-1) / mask.sum(-1).clamp_min(1)).mean()
        return values.sum(-1).mean() if reduction is Reduction.TEXT_SUM else values.sum()

    return loss


@pytest.mark.parametrize("reduction", [one for one in Reduction if one is not Reduction.NONE])
def test_each_reduction_is_told_from_the_others(reduction):
    takes = {"count": "count"}
    loss = reduced(reduction)
    # A trainer that averages micro-batches gives no count.
    if reduction is not Reduction.TOKEN:
        takes, inner = {}, loss

        def loss(student, teacher, mask):
            return inner(student, teacher, mask, count=1.0)

    report = conform(loss, Spec(trains="reverse_kl", reduction=reduction, keywords=takes))
    assert report.passes, report
    others = [one for one in Reduction if one is not reduction]
    wrong = conform(loss, Spec(trains="reverse_kl", reduction=others[0], keywords=takes))
    assert wrong.mistakes == ["wrong_normaliser"]


def test_a_large_vocabulary_and_another_seed():
    spec = Spec("top_k", trains="reverse_kl", top_k=TopK(20, by="teacher"), vocab=40)

    def with_bucket(student, log_probs, ids, mask):
        own = student.log_softmax(-1).gather(-1, ids)
        pair = []
        for logp in (own, log_probs):
            rest = torch.log1p(-logp.exp().sum(-1, keepdim=True))
            pair.append(torch.cat([logp, rest], -1))
        return (pair[0].exp() * (pair[0] - pair[1])).sum(-1)

    # The rest of a student that is sure rounds to a mass of 0, whose logarithm is -inf.
    report = conform(with_bucket, spec, seed=3)
    assert report.mistakes == ["not_finite"]
    assert report["claim"].status.value == "pass"
