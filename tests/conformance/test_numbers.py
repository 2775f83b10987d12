"""The numbers of a report against autograd and closed forms."""

import torch

from opdlab import exact
from opdlab.conformance import Reduction, Spec, conform
from opdlab.conformance.calling import Caller
from opdlab.conformance.norm_checks import token_weights
from opdlab.conformance.reading import read
from opdlab.conformance.texts import lay_out, uneven
from opdlab.losses import reverse_kl


def scaled(student, teacher, mask):
    return 3.0 * reverse_kl(student, teacher)


def test_the_gradient_is_that_of_autograd_at_every_prefix():
    reading = read(Caller(scaled, Spec("log_probs")), "scaled")
    leaf = reading.student.logits.clone().requires_grad_()
    value = 3.0 * reverse_kl(leaf.log_softmax(-1), reading.teacher.logp)
    wanted = torch.autograd.grad((exact.visits(reading.student) * value).sum(), leaf)[0]
    torch.testing.assert_close(reading.seen.gradient, wanted)
    torch.testing.assert_close(reading.seen.value, value.detach())
    assert reading.noise < 1e-12


def test_one_call_gives_the_same_gradients_as_one_call_per_token():
    caller = Caller(lambda s, t, m: torch.where(m, scaled(s, t, m), 0).mean(), Spec("log_probs"))
    alone, together = (read(caller, "", gradient_only=one) for one in (False, True))
    torch.testing.assert_close(alone.slope, together.slope)
    assert together.value.isnan().all()


def test_the_noise_of_the_sampled_estimate_is_that_of_its_definition():
    def reward(student, teacher, mask):
        return (student - teacher).detach() * student

    reading = read(Caller(reward, Spec("sampled")), "reward")
    p, q = reading.student.logp[0, 0], reading.teacher.logp[0, 0]
    score = torch.eye(len(p), dtype=p.dtype) - p.exp()
    each = (p - q)[:, None] * score
    torch.testing.assert_close(reading.slope[0, 0], each)
    assert reading.trains == "reverse_kl"
    assert reading.noise > 1


def test_the_scale_and_the_wrong_scale():
    assert conform(scaled, Spec("log_probs", trains="reverse_kl", scale=3.0)).passes
    report = conform(scaled, Spec("log_probs", trains="reverse_kl"))
    assert report.mistakes == ["wrong_scale"]
    assert "3 times" in report["scale"].said


def test_the_weights_of_the_reductions():
    texts = uneven(5)
    lengths = texts.lengths.double()
    for reduction in (Reduction.TOKEN, Reduction.SEQUENCE):
        assert abs(token_weights(texts, reduction).sum() - 1) < 1e-12
    by_text = token_weights(texts, Reduction.SEQUENCE).sum(-1)
    torch.testing.assert_close(by_text, torch.full_like(by_text, 1 / len(lengths)))


def test_a_layout_puts_each_row_where_its_token_is_predicted():
    texts = uneven(5)
    for side in ("left", "right"):
        layout = lay_out(texts, side, pad_id=0)
        sequences = layout.sequences
        for text in range(len(texts.ids)):
            for at in range(int(texts.lengths[text])):
                place = int(layout.at[text, at])
                assert sequences.ids[text, place + 1] == texts.ids[text, at]
                assert sequences.labels[text, place + 1] == texts.ids[text, at]
                torch.testing.assert_close(layout.student[text, place], texts.student[text, at])
        assert int((sequences.labels != -100).sum()) == texts.count
        real = sequences.prompt_lengths + texts.lengths
        assert sequences.attention_mask.sum(-1).tolist() == real.tolist()
