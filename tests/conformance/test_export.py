"""opdlab's methods as plain functions for TRL and verl pass their own conformance."""

import pytest
import torch

import opdlab as opd
from opdlab.conformance import Spec, conform, for_trl, for_verl
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.losses import TopK, jensen_shannon


def as_trl_calls_it(loss):
    """TRL's call: labels with -100, the number of tokens of all micro-batches."""

    def call(student, teacher, mask, *, tokens, temperature, count):
        labels = tokens.masked_fill(~mask, -100)
        return loss(
            student, teacher, labels, beta=0.9, temperature=temperature, num_items_in_batch=count
        )

    return call


@pytest.mark.parametrize(
    ("method", "trains"),
    [
        (opd.OPD("jensen_shannon"), "jensen_shannon"),
        (opd.OPD(estimator="sampled"), "reverse_kl"),
        (opd.OPDPlus("forward_kl"), "forward_kl"),
    ],
    ids=str,
)
def test_for_trl(method, trains):
    names = {name: name for name in ("tokens", "temperature", "count")}
    spec = Spec(trains=trains, reduction="token", keywords=names)
    report = conform(as_trl_calls_it(for_trl(method)), spec)
    assert report.passes, report
    assert report["temperature"].status.value == "pass"
    assert report["accumulation"].status.value == "pass"


def test_the_reductions_that_trl_knows():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn((2, 3, 4), generator=generator) for _ in range(2))
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    loss = for_trl(opd.OPD("jensen_shannon"))
    each = jensen_shannon(student.log_softmax(-1), teacher.log_softmax(-1))[labels != -100]
    torch.testing.assert_close(loss(student, teacher, labels), each.mean())
    torch.testing.assert_close(loss(student, teacher, labels, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(student, teacher, labels, reduction="none"), each)
    with pytest.raises(InvalidValue, match="reduction='no'"):
        loss(student, teacher, labels, reduction="no")


def test_for_verl_on_the_teachers_top_tokens():
    loss = for_verl(opd.OPD(top_k=TopK(3, by="teacher")))

    def call(student, log_probs, ids, mask):
        found = loss(student, log_probs, ids, config=None, data_format="bshd")
        assert found["student_mass"].shape == found["teacher_mass"].shape == mask.shape
        return found["distillation_losses"]

    report = conform(call, Spec("top_k", trains="reverse_kl"))
    assert report.passes, report


@pytest.mark.parametrize("method", [opd.OPD(estimator="sampled"), opd.OPDPlus()], ids=str)
def test_for_verl_from_sampled_tokens(method):
    loss = for_verl(method)

    def call(student, teacher, mask):
        data = {"teacher_logprobs": teacher[..., None], "response_mask": mask.long()}
        return loss(None, None, {"log_probs": student}, data)[0]

    report = conform(call, Spec("sampled", trains="reverse_kl"))
    assert report.passes, report


def test_what_a_plain_function_cannot_do_is_refused():
    for export in (for_trl, for_verl, conform):
        with pytest.raises(OpdlabError, match="reference"):
            export(opd.GOPD())
        with pytest.raises(OpdlabError, match="verifier or given texts"):
            export(opd.SFT())
    for whole in (opd.OPD(), opd.OPD(top_k=TopK(3, by="student")), opd.OPDPlus(baseline="value")):
        with pytest.raises(OpdlabError, match="sampled token alone"):
            for_verl(whole)
