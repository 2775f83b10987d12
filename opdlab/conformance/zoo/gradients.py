"""Losses that train something else than they say. Their trainer reduces them."""

from __future__ import annotations

import torch
from torch import Tensor

from opdlab.conformance.case import Case
from opdlab.conformance.contract import Kind
from opdlab.conformance.spec import Spec
from opdlab.losses import TopK

TOKENS = {"tokens": "tokens"}
PER_ENTRY = 0.05  # nats that one token of the vocabulary may add


def k1_as_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Differentiate the log-ratio of the sampled token."""
    return student - teacher


def k3_as_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Differentiate the low-variance estimate of the reverse KL."""
    log_u = teacher - student
    return log_u.expm1() - log_u


def position_advantage(student: Tensor, teacher: Tensor, mask: Tensor, *, tokens: Tensor) -> Tensor:
    """Use the top-k KL of the position as a detached advantage of the sampled token."""
    logp, ids = student.log_softmax(-1), teacher.topk(3, dim=-1).indices
    p, q = logp.gather(-1, ids), teacher.log_softmax(-1).gather(-1, ids)
    advantage = -(p.exp() * (p - q)).sum(-1).detach()
    return -advantage * logp.gather(-1, tokens[..., None])[..., 0]


def fixed_reward(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Reward a token by its share -u log u of the forward KL, held fixed."""
    log_u = (teacher - student).detach()
    return log_u.exp() * log_u * student


def truncated(student: Tensor, log_probs: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Sum the reverse KL over the teacher's top tokens, whose log-probs do not sum to one."""
    logp = student.log_softmax(-1).gather(-1, ids)
    return (logp.exp() * (logp - log_probs)).sum(-1)


def clamped(student: Tensor, log_probs: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Clamp the truncated reverse KL at zero."""
    logp = student.log_softmax(-1).gather(-1, ids)
    return (logp.exp() * (logp - log_probs)).sum(-1).clamp_min(0)


def renormalised(student: Tensor, log_probs: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Renormalise both sides on the teacher's top tokens, though a tail is claimed."""
    logp = student.gather(-1, ids).log_softmax(-1)
    return (logp.exp() * (logp - log_probs.log_softmax(-1))).sum(-1)


def _jsd_terms(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    middle = torch.logaddexp(p, q) - torch.tensor(2.0).log()
    return 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle))


def per_entry_clip(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Clip what each token of the vocabulary adds to a JSD from above, not from below."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    middle = torch.logaddexp(p, q) - torch.tensor(2.0).log()
    of_teacher = (q.exp() * (q - middle)).clamp(max=PER_ENTRY)
    of_student = (p.exp() * (p - middle)).clamp(max=PER_ENTRY)
    return 0.5 * (of_teacher + of_student).sum(-1)


def with_cross_entropy(student: Tensor, teacher: Tensor, mask: Tensor, *, tokens: Tensor) -> Tensor:
    """Mix half a JSD with half the cross entropy of the tokens, as a default."""
    soft = _jsd_terms(student, teacher).sum(-1)
    hard = -student.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return 0.5 * soft + 0.5 * hard


def wrong_way(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Call the forward KL the reverse KL, as a guide did."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1)


def climbing(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return a reward where the trainer minimises a loss."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    return -(p.exp() * (p - q)).sum(-1)


def swapped_mixture(student: Tensor, teacher: Tensor, mask: Tensor, *, beta: float = 0.5) -> Tensor:
    """Exchange the two policies of a generalised JSD, which is symmetric at beta 0.5."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    middle = torch.logaddexp(p + _log(1 - beta), q + _log(beta))
    terms = beta * q.exp() * (q - middle) + (1 - beta) * p.exp() * (p - middle)
    return terms.sum(-1)


def _log(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64).log()


REVERSE_ON_TOP = Spec(Kind.TOP_K, trains="reverse_kl", top_k=TopK(3, by="teacher"))

GRADIENTS = (
    Case(
        "k1 as a loss",
        k1_as_loss,
        Spec(Kind.SAMPLED, trains="reverse_kl"),
        "k1_as_loss",
        "An option of verl's estimators; verl refuses it as a loss.",
    ),
    Case(
        "k3 as a loss",
        k3_as_loss,
        Spec(Kind.SAMPLED, trains="reverse_kl"),
        "k3_as_loss",
        "verl's default of one of its two configurations; Thinking-Space/Rethinking-OPD#17.",
    ),
    Case(
        "top-k KL as a detached advantage",
        position_advantage,
        Spec(trains="reverse_kl", keywords=TOKENS, scale=None),
        "blind_advantage",
        "radixark/miles#2362, #2352, #2410.",
    ),
    Case(
        "f(u) as a fixed reward",
        fixed_reward,
        Spec(Kind.SAMPLED, trains="forward_kl"),
        "missing_pathwise_term",
        "The practice that OPD+ corrects (arXiv 2606.01039).",
    ),
    Case(
        "top-k reverse KL, not renormalised",
        truncated,
        REVERSE_ON_TOP,
        "truncated_support",
        "verl-project/verl#5041, #6676, #7425, #7806.",
    ),
    Case(
        "negative token losses clamped",
        clamped,
        REVERSE_ON_TOP,
        "negative_losses_clamped",
        "verl-project/verl#7806, #7856: active in most steps.",
    ),
    Case(
        "top-k without the tail that it claims",
        renormalised,
        REVERSE_ON_TOP,
        "tail_ignored",
        "Defaults of NeMo-RL and ms-swift, which claim no tail.",
    ),
    Case(
        "per-entry clip of a JSD",
        per_entry_clip,
        Spec(trains="jensen_shannon"),
        "clipped_entries",
        "OPSD's stabiliser: huggingface/trl#5990, THUDM/slime#2074.",
    ),
    Case(
        "cross entropy mixed in",
        with_cross_entropy,
        Spec(trains="jensen_shannon", keywords=TOKENS, scale=None),
        "cross_entropy_added",
        "TRL's GKD with Liger, from #3946 until #5731.",
    ),
    Case(
        "forward KL under the name of reverse KL",
        wrong_way,
        Spec(trains="reverse_kl"),
        "swapped_arguments",
        "THUDM/slime#2039, #2254 (a guide).",
    ),
    Case(
        "a reward where a loss is minimised",
        climbing,
        Spec(trains="reverse_kl"),
        "wrong_sign",
        "A common slip where a KL moves between reward and loss.",
    ),
    Case(
        "swapped arguments at beta 0.5",
        swapped_mixture,
        Spec(trains="generalized_jsd", parameters={"beta": 0.5}, keywords={"beta": "beta"}),
        "swapped_arguments",
        "huggingface/trl#6530 (review): tests at 0.5 cannot see it.",
    ),
)
