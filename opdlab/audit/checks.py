"""Questions that losses in use have failed, each answered by a sentence or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdlab import exact
from opdlab.audit.references import FIXED, Match
from opdlab.audit.subject import ROUNDING, Observation, Subject, observe
from opdlab.errors import NonFinite
from opdlab.exact.comparing import find_compared
from opdlab.methods.contract import HasForms

Tables = Mapping[str, exact.Table]
Flags = dict[str, str]


def direction(seen: Observation, best: Match, reads_as: str | None, trains: str | None) -> Flags:
    """Check whether the expected gradient is there, points to the target, and belongs to the value.

    Args:
        seen: The loss on the world.
        best: The divergence whose gradient is closest.
        reads_as: Name of the divergence that the loss's mean value is; None if it is none.
        trains: Name of the divergence that its gradient is; None if it is none.

    Returns:
        The flags `zero_gradient`, `ascends` and `value`, those that are raised, each with a
        sentence.
    """
    if seen.rms <= ROUNDING:
        return {"zero_gradient": "No token's loss has a gradient."}
    if seen.is_zero:
        return {
            "zero_gradient": (
                "Its pushes on the tokens of a prefix undo each other in the mean: all of it is"
                " noise."
            )
        }
    flags = {}
    if best.cosine < 0 and best.divergence != "reverse_minus_forward":
        flags["ascends"] = (
            f"It goes up the {best.label} (cosine {best.cosine:+.3f}): its minimum is not the"
            " target."
        )
    if reads_as and reads_as != trains:
        flags["value"] = (
            f"Its value is the {FIXED[reads_as].label}, and its gradient another: the curve that it"
            " logs is not what it trains."
        )
    return flags


def compares(subject: Subject, world: Tables) -> Flags:
    """Check whether the plan gives a text other columns beside other texts.

    Args:
        subject: The loss.
        world: A table for every policy.

    Returns:
        The flag `compares`, if it is raised, with a sentence.
    """
    by = world[subject.writer]
    policies = {name: world[name] for name in dict.fromkeys(["student", *subject.needs])}
    rollout = exact.everything(by.prompts, by.vocab, by.length, by=by)
    column = find_compared(subject.method, policies, rollout)
    if column is None:
        return {}
    return {
        "compares": (
            f"Its column {column!r} depends on the whole batch, and the batch here holds every text"
            " once, likely or not. exact.gradient(…, n=…) has the gradient in batches as training"
            " draws them."
        )
    }


def equality(subject: Subject, seen: Observation) -> Flags:
    """Check whether the loss moves a student that equals everybody, and where to.

    Args:
        subject: The loss.
        seen: The loss where policies differ, for the scale of its gradients.

    Returns:
        The flags `not_zero_at_equality` and `leaves_support`, those that are raised.

    Raises:
        NonFinite: The loss is NaN or infinite where all policies are equal.
    """
    try:
        arrived = observe(subject.method, subject, subject.world(same=True))
    except NonFinite as error:
        raise NonFinite(
            f"{error} This is in audit's world where the student equals the teacher, so that every"
            " difference between them is 0; the loss is finite where they differ. A mean or a sum"
            " of differences is 0 there: divide by it only after .clamp_min(1e-6)."
        ) from error
    if arrived.length <= max(1e-7 * max(seen.rms, arrived.rms), ROUNDING):
        return {}
    q, p = descended(subject)
    gap = (p * (p / q).log()).sum().item()
    flags = {
        "not_zero_at_equality": (
            f"It moves a student that equals its target, up to a reverse KL of {gap:.2f} nats."
        )
    }
    p_same = subject.world(same=True)["student"].logp.exp()
    if drains(arrived.gradient, p_same):
        fell = p < 0.98 * q
        kept = (p[fell].sum() / q[fell].sum()).item()
        inverse = " (1/e)" if abs(kept - math.exp(-1)) < 0.01 else ""
        flags["leaves_support"] = (
            f"From the target on, it keeps {kept:.2f}{inverse} of the mass of {int(fell.sum())}"
            " tokens and moves the rest to tokens that it does not count: a truncated support"
            " without its tail."
        )
    return flags


def drains(gradient: Tensor, p: Tensor) -> bool:
    """Tell whether the loss only lowers p(S) at equality, S the likeliest tokens of every prefix.

    The slope of p(S) is p_v (1[v in S] - p(S)) in logit v: over p_v it takes two values, a positive
    one on S.

    Args:
        gradient: The expected gradient `[..., V]` where all policies are equal.
        p: Their probabilities `[..., V]`.

    Returns:
        True if the gradient has this form at every prefix.
    """
    each = gradient / p
    high, low = (end(-1, keepdim=True) for end in (each.amax, each.amin))
    inside = each > (high + low) / 2
    two = torch.minimum(high - each, each - low) <= 1e-6 * (high - low)
    likeliest = p.masked_fill(~inside, math.inf).amin(-1) >= p.masked_fill(inside, 0.0).amax(-1)
    return bool(two.all()) and bool(likeliest.all())


def descended(subject: Subject, steps: int = 250) -> tuple[Tensor, Tensor]:
    """Run Adam on the exact gradient, from a student that equals everybody.

    Args:
        subject: The loss.
        steps: Updates of Adam, at a learning rate of 0.05.

    Returns:
        The law `[V]` of the first token before and after.
    """
    world = subject.world(seed=1, same=True, prompts=1)
    start, leaf = world["student"], world["student"].logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=0.05)
    for _ in range(steps):
        world["student"] = replace(start, logits=leaf.detach().clone())
        leaf.grad = observe(subject.method, subject, world).gradient
        optimizer.step()
    return start.logp[0, 0].exp(), leaf.detach()[0, 0].softmax(-1)


def form(
    subject: Subject, world: Tables, seen: Observation, forms: Callable[[float], Any] | None
) -> Flags:
    """Check whether f + c (u - 1), the same divergence, gives another gradient.

    Args:
        subject: The loss.
        world: A table for every policy.
        seen: The loss on this world.
        forms: Makes the method of c; by default the method's own `form`.

    Returns:
        The flag `form` if the gradient changes, else nothing.
    """
    if forms is None and isinstance(subject.method, HasForms):
        forms = subject.method.form
    if forms is None:
        return {}
    other = observe(forms(1.0), subject, world)
    change = (other.gradient - seen.gradient).norm().item()
    if change <= 1e-6 * max(seen.length, other.length):
        return {}
    said = (
        "only the second has a gradient"
        if seen.is_zero
        else f"its gradient changes by {change / seen.length:.2g} times its length"
    )
    return {"form": f"f and f + (u - 1) are the same divergence, but {said}."}


def jumps(
    subject: Subject, world: Tables, sweep: Mapping[str, Callable[[float], Any]] | None
) -> Flags:
    """Check whether the gradient at an end of a parameter's range is far from those beside it.

    Args:
        subject: The loss.
        world: A table for every policy.
        sweep: By parameter, a function that makes the method for a value from 0 to 1; by default
            the alpha and beta among its options.

    Returns:
        The flag `discontinuous` if there is a jump, else nothing.
    """
    said = []
    for name, make in (own_parameters(subject.method) if sweep is None else sweep).items():
        for end, beside in ((0.0, 1e-5), (1.0, 1 - 1e-5)):
            try:
                at, near = (observe(make(x), subject, world) for x in (end, beside))
            except (ValueError, TypeError):  # refused there, which leaves no jump
                continue
            if (at.gradient - near.gradient).norm().item() > 0.05 * max(at.length, near.length):
                ratio = near.length / at.length if at.length else math.inf
                said.append(
                    f"At {name} = {end:g} its gradient is not the limit of those beside, which are"
                    f" {ratio:.2g} times as long."
                )
    return {"discontinuous": " ".join(said)} if said else {}


def own_parameters(method: Any) -> dict[str, Callable[[float], Any]]:
    """Find the alpha and beta among a method's options.

    Args:
        method: The method; only a dataclass with a dict `options` has any.

    Returns:
        By name, a function that makes the method with another value.
    """
    options = getattr(method, "options", None)
    if not is_dataclass(method) or isinstance(method, type) or not isinstance(options, dict):
        return {}

    def change(name: str) -> Callable[[float], Any]:
        return lambda value: replace(method, options={**options, name: value})

    return {name: change(name) for name in options if name in ("alpha", "beta")}
