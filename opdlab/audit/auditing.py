"""`audit`: which gradient does a loss really train?

The loss (or the whole method, with its plan) runs through the engine on every token that a few
random, asymmetric students could write, each with its exact probability. What comes out is the
expected gradient itself, without noise; it is compared with the gradients of known divergences, and
put to the questions of `checks`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from opdlab import exact
from opdlab.audit import checks
from opdlab.audit.card import Audit
from opdlab.audit.kl import ESTIMATES, Estimate
from opdlab.audit.references import FIXED, Match, matches
from opdlab.audit.subject import Observation, Subject, observe, subject_of
from opdlab.support.validation import Seed, validate_arguments


@validate_arguments
def audit(
    loss: Any,
    *,
    needs: Sequence[str] | str | None = None,
    forms: Callable[[float], Any] | None = None,
    sweep: Mapping[str, Callable[[float], Any]] | None = None,
    seed: Seed = 0,
) -> Audit:
    """Find out which gradient a loss trains.

    A plan sees all texts in one batch, each once. So a plan that compares texts (means, quantiles)
    compares all of them, likely or not; the flag `compares` says so. `exact.gradient(…, n=…)` has
    the gradient in batches as training draws them.

    Args:
        loss: A method, or anything else that `as_method` takes, such as a function of rows.
        needs: The policies that a bare function reads, the teacher by default.
        forms: Makes the same loss from f + c (u - 1), given c; known for OPDPlus and the estimates.
        sweep: Makes the loss from the value of a parameter, by the parameter's name; tried at 0 and
            1 and beside them. Known for the alpha and beta among a method's options.
        seed: Seed of the random students and targets.

    Returns:
        The verdict, with warnings and a table of divergences.

    Raises:
        OpdlabError: The method learns from texts or from a verifier, or the loss itself raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the texts here are short, and a method may say so
        subject = subject_of(loss, needs)
        world = subject.world(seed)
        seen = observe(subject.method, subject, world)
        visits = None if subject.writer == "student" else exact.visits(world[subject.writer])
        found = matches(
            seen.gradient, world["student"], {name: world[name] for name in subject.targets}, visits
        )
        best, reads_as, estimate = (
            found[0],
            find_value(seen, subject, world),
            find_estimate(seen, subject, world),
        )
        trains = best.divergence if best.exact and best.cosine > 0 and not seen.is_zero else None
        flags = checks.direction(seen, best, reads_as, trains)
        flags |= (
            checks.equality(subject, seen)
            | checks.form(subject, world, seen, forms)
            | checks.jumps(subject, world, sweep)
            | checks.compares(subject, world)
        )
    noise = math.inf if seen.is_zero else seen.rms / seen.length
    uses = {"reward": "in the reward", "loss": "as a loss"}
    said = f"{estimate.k} {uses[estimate.use]}" if estimate else None
    return Audit(
        subject.name,
        describe(subject, seen, best, estimate),
        flags,
        make_table(found),
        trains,
        reads_as,
        said,
        noise,
    )


def find_estimate(
    seen: Observation, subject: Subject, world: Mapping[str, exact.Table]
) -> Estimate | None:
    """Find the estimate of the KL, and its use, that a loss is in value and gradient at each token.

    Args:
        seen: The loss on the world.
        subject: The loss.
        world: A table for every policy.

    Returns:
        The estimate, or None.
    """
    if subject.writer != "student" or len(subject.targets) != 1 or not seen.rms:
        return None
    pair = {"student": world["student"], "teacher": world[subject.targets[0]]}
    uses: tuple[Literal["reward", "loss"], ...] = ("reward", "loss")
    for estimate in (Estimate(k, use) for k in ESTIMATES for use in uses):
        other = observe(estimate, replace(subject, needs=("teacher",)), pair)
        if _is_near(other.losses, seen.losses) and _is_near(other.slopes, seen.slopes):
            return estimate
    return None


def _is_near(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-6, atol=1e-12)


def find_value(
    seen: Observation, subject: Subject, world: Mapping[str, exact.Table], rtol: float = 1e-6
) -> str | None:
    """Find the divergence that a loss's mean value is, at every prefix.

    Args:
        seen: The loss on the world.
        subject: The loss.
        world: A table for every policy.
        rtol: How far two values may be apart, relative to the second.

    Returns:
        Its name, or None.
    """
    for target in subject.targets:
        for name, known in FIXED.items():
            if torch.allclose(
                known.value(world["student"].logp, world[target].logp),
                seen.value,
                rtol=rtol,
                atol=1e-3 * rtol,
            ):
                return name
    return None


def describe(subject: Subject, seen: Observation, best: Match, estimate: Estimate | None) -> str:
    """Say in a sentence what a loss trains.

    Args:
        subject: The loss.
        seen: The loss on the world.
        best: The divergence whose gradient is closest.
        estimate: The estimate of the KL that it is, or None.

    Returns:
        The sentence.
    """
    lead = ""
    if estimate:
        lead = (
            f"Differentiates {estimate.k}, an estimate of the reverse KL: "
            if estimate.use == "loss"
            else f"Rewards by {estimate.k}: "
        )
    whom = _whom(best.target)
    where = " over whole texts" if best.credit == "text" else subject.texts and f", {subject.texts}"
    often = "" if abs(best.ratio - 1) < 1e-6 else f", at {best.ratio:.3g} times its gradient"
    if seen.is_zero:
        said = "its expected gradient is zero, so it trains nothing."
    elif best.exact and best.cosine > 0:
        said = f"this trains the {best.label} to {whom}{where}{often}."
    elif best.exact:
        said = f"this climbs the {best.label}{where}{often}, away from {whom}."
    else:
        closest = f"the {best.label} to {whom}{where} (cosine {best.cosine:+.3f})"
        said = f"this is the gradient of no divergence known here; the closest is {closest}."
    whole = lead + said
    return whole[0].upper() + whole[1:]


def _whom(target: str) -> str:
    base = target.removesuffix("+hint")
    said = {"reference": "the student before training", "ema": "the student's moving average"}.get(
        base, f"the {base}"
    )
    return said if base == target else f"{said}, told the hint"


def make_table(found: list[Match]) -> pd.DataFrame:
    """Make the table of an audit.

    Args:
        found: The comparisons, the closest first.

    Returns:
        One row per divergence, target and credit.
    """
    return pd.DataFrame(
        {
            "divergence": m.label,
            "name": m.divergence,
            "target": m.target,
            "credit": m.credit,
            "cosine": m.cosine,
            "ratio": m.ratio,
        }
        for m in found
    )
