"""Losses with the wrong normaliser, temperature or range."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from opdlab.conformance.case import Case
from opdlab.conformance.contract import Reduction
from opdlab.conformance.spec import Spec


def _terms(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum()


def local_mean(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Divide each micro-batch by its own tokens."""
    return _sum(_terms(student, teacher), mask) / mask.sum().clamp_min(1)


def deaf_to_count(
    student: Tensor, teacher: Tensor, mask: Tensor, *, num_items_in_batch: float
) -> Tensor:
    """Take the number of tokens of the whole step, and divide by that of another text."""
    return _sum(_terms(student, teacher), mask) / mask.sum().clamp_min(1)


def padded_mean(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Set the padding to zero, and divide by all positions."""
    return torch.where(mask, _terms(student, teacher), 0.0).mean()


def vocabulary_mean(student: Tensor, teacher: Tensor, mask: Tensor, *, count: float) -> Tensor:
    """Use PyTorch's `reduction="mean"`, which also divides by the vocabulary."""
    p, q = student[mask].log_softmax(-1), teacher[mask].log_softmax(-1)
    total = functional.kl_div(p, q, log_target=True, reduction="mean")
    return total * mask.sum() / count


def whitened(student: Tensor, teacher: Tensor, mask: Tensor, *, tokens: Tensor) -> Tensor:
    """Whiten the advantages over the tokens of the batch."""
    p, q = (one.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] for one in (student, teacher))
    advantage = (q - p).detach()
    own = advantage[mask]
    if len(own) > 1:
        advantage = (advantage - own.mean()) / (own.std() + 1e-8)
    return _sum(-advantage * p, mask) / mask.sum().clamp_min(1)


def cold_student(
    student: Tensor, teacher: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Divide the teacher's logits alone by the temperature."""
    return _terms(student, teacher / temperature)


def sampling_only(
    student: Tensor, teacher: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Take a temperature that reaches the sampler and not the loss."""
    return _terms(student, teacher)


def vanishing(student: Tensor, teacher: Tensor, mask: Tensor, *, beta: float = 0.5) -> Tensor:
    """Use the generalised JSD as it is, with the two KLs at its ends."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta in (0, 1):
        values = (q.exp() * (q - p) if beta == 0 else p.exp() * (p - q)).sum(-1)
    else:
        share = torch.tensor(beta, dtype=p.dtype)
        middle = torch.logaddexp(p + (1 - share).log(), q + share.log())
        terms = share * q.exp() * (q - middle) + (1 - share) * p.exp() * (p - middle)
        values = terms.sum(-1)
    return values


def naive_softmax(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Take the logarithm of a softmax, which is -inf where a probability rounds to zero."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def masked_by_product(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Divide by a number of tokens that is zero where a text was left out."""
    each = (_terms(student, teacher) * mask).sum(-1) / mask.sum(-1)
    return each.mean()


COUNT = {"count": "num_items_in_batch"}
TEMPERATURE = {"temperature": "temperature"}

SCALES = (
    Case(
        "wrong normaliser under accumulation",
        local_mean,
        Spec(trains="reverse_kl", reduction=Reduction.TOKEN),
        "local_normaliser",
        "huggingface/trl#4719, #5653, #6006; modelscope/ms-swift#10076, #10096.",
    ),
    Case(
        "count of tokens that is not used",
        deaf_to_count,
        Spec(trains="reverse_kl", reduction=Reduction.TOKEN, keywords=COUNT),
        "count_ignored",
        "huggingface/trl#6478: counted before the texts are generated.",
    ),
    Case(
        "padding in the normaliser",
        padded_mean,
        Spec(trains="reverse_kl"),
        "padding_in_normaliser",
        "The mean over [B, T] after the mask.",
    ),
    Case(
        "mean over the vocabulary",
        vocabulary_mean,
        Spec(trains="forward_kl", keywords={"count": "count"}),
        "mean_over_vocabulary",
        "torch.nn.functional.kl_div's own documentation warns of it.",
    ),
    Case(
        "advantages whitened over the batch",
        whitened,
        Spec(trains="reverse_kl", keywords={"tokens": "tokens"}, scale=None),
        "batch_coupling",
        "Common in policy-gradient trainers.",
    ),
    Case(
        "temperature on one side",
        cold_student,
        Spec(trains="reverse_kl", keywords=TEMPERATURE),
        "temperature_one_sided",
        "verl-project/verl#5592: a server's log-probs have no temperature.",
    ),
    Case(
        "temperature for sampling only",
        sampling_only,
        Spec(trains="reverse_kl", keywords=TEMPERATURE),
        "temperature_ignored",
        "huggingface/trl#6847 (GKD).",
    ),
    Case(
        "generalised JSD that vanishes at its ends",
        vanishing,
        Spec(trains="generalized_jsd", parameters={"beta": 0.5}, keywords={"beta": "beta"}),
        "vanishes_at_ends",
        "modelscope/ms-swift#10078.",
    ),
    Case(
        "logarithm of a softmax",
        naive_softmax,
        Spec(trains="reverse_kl"),
        "not_finite",
        "NaN gradients: huggingface/trl#5594, microsoft/LMOps#38.",
    ),
    Case(
        "a text that is left out",
        masked_by_product,
        Spec(trains="reverse_kl"),
        "empty_batch",
        "0 / 0 where a completion is fully masked.",
    ),
)
