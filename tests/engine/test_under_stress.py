"""Numbers at the edges: bf16 weights, extreme logits, no probability at all, large vocabularies,
long texts and large batches.
"""

from __future__ import annotations

import pytest
import torch
from stress import times

import opdlab as opd
from opdlab.engine.passes import gradient
from opdlab.engine.rows import Rows
from opdlab.errors import NonFinite
from opdlab.losses import forward_kl, generalized_jsd, jensen_shannon, reverse_kl, total_variation
from opdlab.models.graded import States
from opdlab.models.head import Head

LOSSES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "generalized_jsd": generalized_jsd,
    "total_variation": total_variation,
}
H = 16


def states(tokens: int, vocab: int, seed: int, dtype=torch.float32, scale=1.0, bias=None) -> States:
    """Random states with a head of their own; logits have a spread of about `scale`."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=g) * scale / H**0.5
    return States(hidden.to(dtype), Head(torch.randn(vocab, H, generator=g).to(dtype), bias, vocab))


def train(name: str, student: States, teacher: States):
    """The engine's loss and gradient of a mean over tokens."""
    tokens = len(student.hidden)
    token = torch.arange(tokens) % student.vocab_size
    weight = torch.full((tokens,), 1 / tokens)

    def loss(rows: Rows) -> torch.Tensor:
        return LOSSES[name](rows.student, rows.teacher)

    return gradient(loss, {"student": student, "teacher": teacher}, token, weight)


def reference(name: str, student: States, teacher: States) -> tuple[torch.Tensor, torch.Tensor]:
    """Autograd on full logits in float64; the mean loss, and the gradient of the hidden states."""
    hidden = student.hidden.double().requires_grad_()

    def law(at: torch.Tensor, head: Head) -> torch.Tensor:
        bias = 0 if head.bias is None else head.bias.double()
        return (at @ head.weight.double().T + bias).log_softmax(-1)

    p, q = law(hidden, student.head), law(teacher.hidden.double(), teacher.head)
    loss = LOSSES[name](p, q).mean()
    loss.backward()
    return loss.detach(), hidden.grad


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [100.0, 10_000.0])
def test_extreme_logits_give_the_numbers_of_float64(name, scale):
    student, teacher = states(12, 64, 0, scale=scale), states(12, 64, 1, scale=scale)
    found = train(name, student, teacher)
    loss, slope = reference(name, student, teacher)
    allowed = 1e-3 if scale < 1000 else 2e-2  # float32 holds a logit of 10,000 to 0.001
    assert float(found.loss.mean()) == pytest.approx(float(loss), rel=1e-3, abs=1e-5)
    assert bool(found.gradient.isfinite().all())
    assert (found.gradient - slope).norm() <= allowed * slope.norm() + 1e-5


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_tokens_without_any_probability_make_no_nan(name, who):
    """KL(p || q) is infinite at q = 0 < p, which is said; everything else is a number."""
    never = torch.zeros(64)
    never[5:9] = -torch.inf
    student = states(12, 64, 0, bias=never if who != "teacher" else None)
    teacher = states(12, 64, 1, bias=never if who != "student" else None)
    if (name, who) in (("forward_kl", "student"), ("reverse_kl", "teacher")):
        with pytest.raises(NonFinite, match=f"'{who}' gives tokens 5, 6, 7 and 1 more no prob"):
            train(name, student, teacher)
        return
    found = train(name, student, teacher)
    assert bool(found.loss.isfinite().all())
    assert bool(found.gradient.isfinite().all())
    if who == "both":  # as if the tokens were not there
        rest = [i for i in range(64) if i not in range(5, 9)]
        heads = [Head(one.head.weight[rest], None, len(rest)) for one in (student, teacher)]
        cut = [
            States(one.hidden, head) for one, head in zip((student, teacher), heads, strict=True)
        ]
        loss, slope = reference(name, *cut)
        assert float(found.loss.mean()) == pytest.approx(float(loss), rel=1e-4)
        assert (found.gradient - slope).norm() <= 1e-3 * slope.norm() + 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_bf16_weights_and_a_vocabulary_of_262_144(name):
    """The statistics are float32: the loss is that of float64 on the same bf16 weights."""
    tokens, vocab = times(8, 64), 262_144
    student = states(tokens, vocab, 0, torch.bfloat16, 4.0)
    teacher = states(tokens, vocab, 1, torch.bfloat16, 4.0)
    found = train(name, student, teacher)
    assert found.loss.dtype == torch.float32
    loss, slope = reference(name, student, teacher)
    assert float(found.loss.mean()) == pytest.approx(float(loss), rel=2e-2)
    close = torch.nn.functional.cosine_similarity(
        found.gradient.double().flatten(), slope.flatten(), 0
    )
    assert close > 0.999


def test_a_long_text_is_graded_as_its_parts(make_policy):
    """8,000 tokens in the long form, 1,500 in the short one."""
    length = times(1500, 8000)
    policies = [
        make_policy(seed, max_position_embeddings=length + 64, initializer_range=0.1)
        for seed in (0, 1)
    ]
    ids = torch.randint(6, 60, (1, length), generator=torch.Generator().manual_seed(0))
    prompt = opd.Prompt("3 + 4 =")
    whole, part = (
        opd.Rollout(
            (prompt,),
            ids[:, :some],
            torch.tensor([some]),
            torch.zeros(1, some),
            torch.zeros(1, some),
            ("length",),
            ("",),
            ("student",),
        )
        for some in (length, 100)
    )
    long, short = (
        opd.score(rollout, *policies).column("teacher_reverse_kl") for rollout in (whole, part)
    )
    assert len(long) == length
    assert (abs(long[:100] - short) <= 1e-4).all()
    assert (long >= -1e-5).all()


def test_a_batch_of_512():
    student, teacher, task = opd.load("market")
    run = opd.distill(student, teacher, task, batch=512, steps=1, max_new_tokens=8, quiet=True)
    step = next(run)
    assert len(step.rollout) == 512
    assert 0 < step.metrics["loss"] < 10
    assert step.metrics["grad_norm"] > 0
