"""The gap between sampler and trainer: measured at every step, and corrected on request.

The texts of a step come from a sampler (the student's own loop, vLLM), and their gradient from the
trainer. Both hold the same weights and still give a token slightly different log-probs: other
kernels, other precision, or an adapter that is out of date. With s the sampler's law and p the
trainer's,

    gap_t        = log p(y_t) − log s(y_t)
    KL(s ‖ p)    ≈ mean of exp(gap) − 1 − gap        (the estimator k3: never negative, unbiased)
    importance_t = min(cap, exp(gap_t))              (truncated importance sampling)

The texts are drawn from s. `Settings.importance_over` says which ratios are multiplied (without a
cap, since every cap biases):

    "token"      that of y_t: the expectation over y_t is that under p, but s wrote the text before
    "prefix"     those up to y_t: the expected gradient is the on-policy one, for losses of a token
                 that depend on nothing behind it
    "sequence"   those of the whole completion: so it is for all losses, as with a reward at the end

More ratios mean less bias and more variance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opdlab.data.column import Description, Kind
from opdlab.data.rollout import Rollout
from opdlab.engine.batch import Batch
from opdlab.training.settings import Settings

BEYOND = 2.0  # a probability that differs by more than this factor counts in `sampler_beyond`

# How traces describe the columns of a step.
DESCRIPTIONS = {
    "sampler_gap": Description(
        Kind.SIGNED,
        "nats",
        "sampler gap",
        description="log p(y) − log s(y), of the trainer p and the sampler s",
        less="likelier in the sampler",
        more="likelier in the trainer",
    ),
    "importance": Description(
        Kind.AMOUNT,
        label="importance weight",
        description="min(cap, p(y) / s(y)), which multiplies the token's weight in the loss",
        less="counts less",
        more="counts more",
    ),
}


def own_tokens(rollout: Rollout) -> Tensor:
    """Find the tokens that the student's sampler wrote and the loss sees.

    Args:
        rollout: The step's rollout.

    Returns:
        `[B, T]`, booleans; false on the texts of other writers.
    """
    by_student = [name == "student" for name in rollout.writer]
    return rollout.learn & torch.tensor(by_student, device=rollout.ids.device)[:, None]


def with_trainer_logp(batch: Batch) -> Batch:
    """Put the trainer's log-probs of the student's tokens in the place of the sampler's.

    A method that reads `rollout.logp` then computes with the law whose gradient is taken, and the
    correction is left to the weights: otherwise a method with an importance ratio of its own would
    correct twice.

    Args:
        batch: The step's rollout; the student grades it, once.

    Returns:
        The batch with other log-probs.
    """
    trainer = batch.map(lambda rows: rows.logp_of("student"), needs=("student",))
    rollout = batch.rollout
    return batch.with_logp(torch.where(own_tokens(rollout), trainer, rollout.logp))


def importance(rollout: Rollout, trainer: Tensor, settings: Settings) -> Tensor:
    """Compute the weights of truncated importance sampling.

    Args:
        rollout: The rollout with the sampler's log-probs.
        trainer: The trainer's log-probs of the tokens, `[B, T]`, in nats.
        settings: The run's settings, with an `importance_cap`.

    Returns:
        `[B, T]`, without gradient; 1 on tokens that the student's sampler did not write.
    """
    gap = torch.where(own_tokens(rollout), (trainer - rollout.logp).detach(), 0.0)
    if settings.importance_over == "prefix":
        gap = gap.cumsum(1)
    elif settings.importance_over == "sequence":
        gap = torch.where(own_tokens(rollout), gap.sum(1, keepdim=True), 0.0)
    return gap.exp().clamp(max=settings.importance_cap)


def gap_of(rollout: Rollout, trainer: Tensor) -> Tensor:
    """Compute the gap of every token.

    Args:
        rollout: The rollout with the sampler's log-probs.
        trainer: The trainer's log-probs of the tokens, `[tokens]`, in nats.

    Returns:
        `[tokens]`: log p(y) − log s(y) in nats; 0 where the student's sampler wrote nothing that
        the loss sees.
    """
    mask = rollout.mask
    return torch.where(own_tokens(rollout)[mask], trainer - rollout.logp[mask], 0.0)


def measure_gap(batch: Batch, gap: Tensor) -> dict[str, float]:
    """Compute the metrics of the gap, over all processes.

    Args:
        batch: The step's batch.
        gap: The gap of every token, `[tokens]`, in nats.

    Returns:
        `sampler_gap` and `sampler_gap_max` (mean and maximum of |gap|, nats), `sampler_beyond` (the
        share of tokens whose probability differs by more than the factor `BEYOND`) and `sampler_kl`
        (KL(s ‖ p), nats per token, estimated at temperature 1). Empty if the student wrote nothing.
    """
    own = own_tokens(batch.rollout)
    every = batch.gather(batch.spread(gap), own).double()
    if not len(every):
        return {}
    return {
        "sampler_gap": float(every.abs().mean()),
        "sampler_gap_max": float(every.abs().max()),
        "sampler_beyond": float((every.abs() > math.log(BEYOND)).double().mean()),
        "sampler_kl": float((torch.special.expm1(every) - every).mean()),
    }
