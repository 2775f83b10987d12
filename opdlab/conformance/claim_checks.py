"""Ask what the loss trains, whether that is its claim, and which known mistake it is if not."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from opdlab.audit.checks import direction, drains
from opdlab.conformance.finding import Finding
from opdlab.conformance.probe import Probe, cautioned, failed, passed, skipped
from opdlab.conformance.reading import WORTH, Reading
from opdlab.conformance.spec import Spec, on_support
from opdlab.losses import DIVERGENCES, TopK

Diagnosis = tuple[str, str]  # the mistake, and a sentence about it
TAILS = ("bucket", "renormalize", "drop")


def check_gradient(probe: Probe) -> Finding:
    """Is there an expected gradient, and does it descend some divergence?"""
    reading = probe.far
    best = reading.matches[0]
    flags = direction(reading.seen, best, reading.reads_as, reading.trains)
    if reading.is_zero or "zero_gradient" in flags:
        mistake, said = _why_zero(reading)
        return failed("gradient", mistake, said)
    if probe.spec.trains is None and "ascends" in flags:
        return failed("gradient", "wrong_sign", flags["ascends"])
    said = f"{reading.verdict} Noise of one token: {reading.noise:.2f} of its mean."
    if reading.trains is None and probe.spec.trains is None:
        return cautioned("gradient", "", said)
    return passed("gradient", said)


def _why_zero(reading: Reading) -> Diagnosis:
    if reading.seen.rms <= 1e-12:
        return "zero_gradient", "No token's loss has a gradient."
    if reading.estimate and (reading.estimate.k, reading.estimate.use) == ("k1", "loss"):
        return "k1_as_loss", reading.verdict
    spread = reading.credit.amax(-1) - reading.credit.amin(-1)
    if bool((spread <= WORTH * reading.credit.abs().amax(-1)).all()):
        return (
            "blind_advantage",
            "All tokens that could follow a prefix are pushed alike, so the expected gradient is"
            " zero: the advantage does not depend on the sampled token.",
        )
    return "zero_gradient", reading.verdict


def check_claim(probe: Probe) -> Finding:
    """Does it train the divergence that the spec names?"""
    spec, reading = probe.spec, probe.far
    if spec.trains is None:
        return skipped("claim", "The spec names no divergence.")
    match = reading.match(spec.reference, spec.trains, spec.trains)
    label = label_of(spec)
    if match.exact and match.cosine > 0:
        where = " over whole texts" if match.credit == "text" else ""
        return passed("claim", f"It trains the {label}{where} (cosine {match.cosine:.9f}).")
    if reading.is_zero:
        return failed("claim", "zero_gradient", f"It does not train the {label}, nor anything.")
    for diagnose in DIAGNOSES:
        if found := diagnose(probe):
            return failed("claim", found[0], found[1])
    said = f"It does not train the {label} (cosine {match.cosine:+.4f}). {reading.verdict}"
    return failed("claim", "trains_another", said)


def label_of(spec: Spec) -> str:
    """Name the divergence of a spec, with its parameter and support.

    Args:
        spec: The spec; it names a divergence.

    Returns:
        Words, such as "reverse KL on the teacher's top 3".
    """
    assert spec.trains is not None
    label = DIVERGENCES[spec.trains].label if spec.trains in DIVERGENCES else spec.trains
    own = ", ".join(f"{name} {value:g}" for name, value in spec.family.items())
    own = f" ({own})" if own else ""
    return label + own + (f" {_support(spec.top_k)}" if spec.top_k else "")


def _support(top_k: TopK) -> str:
    tail = {"bucket": "with a bucket", "renormalize": "renormalised", "drop": "truncated"}
    return f"on the {top_k.by}'s top {top_k.k}, {tail[top_k.tail]}"


def _k3(probe: Probe) -> Diagnosis | None:
    estimate = probe.far.estimate
    if estimate and (estimate.k, estimate.use) == ("k3", "loss"):
        return "k3_as_loss", probe.far.verdict
    return None


def _pathwise(probe: Probe) -> Diagnosis | None:
    """The claimed divergence's own numbers, used as rewards: E[value] is the divergence."""
    reading = probe.far
    if bool(torch.isnan(reading.credit).any()):
        return None
    mean = (reading.chance * reading.credit).sum(-1)
    claimed = probe.spec.reference(reading.student.logp, reading.teacher.logp)
    if torch.allclose(mean, claimed, rtol=1e-4, atol=1e-7):
        return (
            "missing_pathwise_term",
            f"It rewards a token by its share of the {label_of(probe.spec)}, as if that number did"
            f" not move with the student. {reading.verdict}",
        )
    return None


def _sign(probe: Probe) -> Diagnosis | None:
    match = probe.far.match(probe.spec.reference)
    if match.exact and match.cosine < 0:
        return "wrong_sign", f"It climbs the {label_of(probe.spec)}."
    return None


def _swapped(probe: Probe) -> Diagnosis | None:
    reference = probe.spec.reference
    match = probe.far.match(lambda student, teacher: reference(teacher, student))
    if match.exact and match.cosine > 0:
        return (
            "swapped_arguments",
            f"It trains the {label_of(probe.spec)} with student and teacher exchanged.",
        )
    return None


def supports(spec: Spec) -> list[TopK]:
    """List the supports on which a loss may have put its divergence.

    Args:
        spec: The spec.

    Returns:
        The claimed k, or each k from 1 if it claims none; by either policy; with every tail.
    """
    sizes = [spec.top_k.k] if spec.top_k else list(range(1, min(spec.vocab, 8)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tail="drop" is looked for, not used
        return [
            TopK(k, by, tail)  # type: ignore[arg-type]
            for tail in reversed(TAILS)
            for k in sizes
            for by in ("teacher", "student")
        ]


def _support_of(probe: Probe) -> Diagnosis | None:
    """The claimed divergence on another support or with another tail, also where clamped."""
    spec, reading = probe.spec, probe.far
    each = reading.each
    alive = each.norm(dim=-1) > 1e-9 * float(each.norm())
    for top_k in supports(spec):
        if top_k == spec.top_k:
            continue
        truncated = on_support(spec.divergence(), top_k)
        if not _same_where(reading.slope_of(truncated), each, alive):
            continue
        said = f"It trains the {DIVERGENCES[spec.trains or ''].label} {_support(top_k)}"
        if not bool(alive.all()):
            value = truncated(reading.student.logp, reading.teacher.logp)
            if bool((value[~alive] < 0).all()) and bool((value[alive] > 0).all()):
                share = 1 - alive.double().mean().item()
                return (
                    "negative_losses_clamped",
                    f"{said}, with no gradient at the {share:.0%} of the prefixes where it is"
                    " negative.",
                )
            continue
        mistake = {"drop": "truncated_support", "renormalize": "tail_ignored"}.get(
            top_k.tail, "trains_another"
        )
        return mistake, f"{said}."
    return None


def _same_where(one: torch.Tensor, other: torch.Tensor, where: torch.Tensor) -> bool:
    """Tell whether two gradients `[X, S, V]` have one direction and one ratio at some prefixes."""
    a, b = one[where], other[where]
    if not len(a) or not bool(b.norm()) or not bool(a.norm()):
        return False
    return float((a * b).sum() / (a.norm() * b.norm())) > 1 - 1e-9


def _clipped(probe: Probe) -> Diagnosis | None:
    """The claimed divergence where the policies almost agree, and another gradient elsewhere."""
    match = probe.near.match(probe.spec.reference)
    if not (match.exact and match.cosine > 0):
        return None
    reading = probe.far
    true = reading.slope_of(probe.spec.reference)
    climbs = ((reading.each * true).sum(-1) < 0).double().mean().item()
    negative = (reading.value < -1e-9).double().mean().item()
    return (
        "clipped_entries",
        f"It trains the {label_of(probe.spec)} only where the policies almost agree. Elsewhere"
        f" something is clipped: it climbs at {climbs:.0%} of the prefixes and is negative at"
        f" {negative:.0%} of the tokens.",
    )


DIAGNOSES: tuple[Callable[[Probe], Diagnosis | None], ...] = (
    _sign,
    _k3,
    _pathwise,
    _swapped,
    _support_of,
    _clipped,
)


def check_scale(probe: Probe) -> Finding:
    """Is its gradient as long as the divergence's?"""
    spec, reading = probe.spec, probe.far
    if spec.trains is None:
        ratio = reading.matches[0].ratio
        return skipped("scale", f"The spec names no divergence; the ratio is {ratio:.4g}.")
    match = reading.match(spec.reference)
    if not (match.exact and match.cosine > 0):
        return skipped("scale", "It trains another gradient.")
    said = f"Its gradient is {match.ratio:.6g} times that of the {label_of(spec)}."
    if spec.scale is None or abs(match.ratio / spec.scale - 1) < 1e-4:
        return passed("scale", said)
    if abs(match.ratio * spec.vocab / spec.scale - 1) < 1e-4:
        return failed("scale", "mean_over_vocabulary", f"{said} That is 1/V, V = {spec.vocab}.")
    return failed("scale", "wrong_scale", f"{said} The spec says {spec.scale:g}.")


def check_bias(probe: Probe) -> Finding:
    """Compare the mean of its gradient with that of the divergence, and measure its noise."""
    spec, reading = probe.spec, probe.far
    if spec.trains is None:
        return skipped("bias", "The spec names no divergence.")
    match = reading.match(spec.reference)
    bias = (max(0.0, 1 - match.cosine**2)) ** 0.5 if match.cosine > 0 else 1.0
    said = (
        f"Bias {bias:.1e} of the true gradient's length; noise of one token {reading.noise:.2f} of"
        " its mean."
    )
    if not match.exact or match.cosine <= 0:
        return failed("bias", "", said)
    return passed("bias", said)


def check_extra_terms(probe: Probe) -> Finding:
    """Is a term of the sampled token added to a loss that knows the whole distribution?"""
    spec, reading = probe.spec, probe.far
    if not spec.reads_tokens:
        return skipped("extra terms", "It does not see which tokens were sampled.")
    rest = reading.slope - reading.each[..., None, :]
    if float(rest.norm()) <= WORTH * float(reading.slope.norm()):
        return passed("extra terms", "Its gradient does not depend on the sampled token.")
    score = reading.score
    share = float((rest * score).sum() / (score * score).sum())
    is_constant = float((rest - share * score).norm()) <= WORTH * float(rest.norm())
    if is_constant and not reading.is_zero and share < 0:
        return failed(
            "extra terms",
            "cross_entropy_added",
            f"{-share:.3g} times the cross entropy of the sampled token is added.",
        )
    return passed("extra terms", "Its gradient is an estimate from the sampled token.")


def check_equality(probe: Probe) -> Finding:
    """Does it leave a student alone that equals its teacher?"""
    reading = probe.equal
    scale = max(probe.far.seen.rms, reading.seen.rms)
    if reading.seen.length <= max(1e-6 * scale, 1e-12):
        return passed("equality", "A student that equals its teacher stays where it is.")
    p = reading.student.logp.exp()
    if reading.seen.length > 0 and drains(reading.each, p):
        return failed(
            "equality",
            "truncated_support",
            "From the teacher on, it lowers the mass of the likeliest tokens: a truncated support"
            " without its tail.",
        )
    share = reading.seen.length / scale if scale else 0.0
    return failed(
        "equality",
        "moves_at_equality",
        f"It moves a student that equals its teacher, by {share:.2g} of a token's gradient.",
    )


def check_value(probe: Probe) -> Finding:
    """Is the number that it logs that of the divergence that it trains?"""
    reading = probe.far
    if not reading.reads_as:
        return passed("value", "Its value is no divergence known here, so no curve misleads.")
    label = DIVERGENCES[reading.reads_as].label if reading.reads_as in DIVERGENCES else ""
    if reading.reads_as == reading.trains:
        return passed("value", f"Its value is the {label}, as its gradient.")
    return cautioned(
        "value",
        "",
        f"Its value is the {label}, and its gradient another: the curve that it logs is not what it"
        " trains.",
    )


def check_tail(probe: Probe) -> Finding:
    """Ask what happens to the mass outside the top tokens."""
    top_k = probe.spec.top_k
    if top_k is None:
        return skipped("tail", "It is on the whole vocabulary.")
    if top_k.tail == "bucket":
        return passed("tail", f"The rest is one more outcome ({_support(top_k)}).")
    if top_k.tail == "renormalize":
        return cautioned(
            "tail",
            "tail_ignored",
            f"It is {_support(top_k)}: it does not see how much mass lies outside.",
        )
    return failed("tail", "truncated_support", f"It is {_support(top_k)}.")
