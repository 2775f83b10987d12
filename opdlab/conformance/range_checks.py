"""Does the loss hold over the range of its inputs: temperature, parameter, extreme logits?"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from opdlab.audit.references import Value
from opdlab.conformance.claim_checks import label_of
from opdlab.conformance.contract import Kind, Quantity
from opdlab.conformance.finding import Finding
from opdlab.conformance.probe import Probe, cautioned, failed, passed, skipped
from opdlab.conformance.reading import Reading, read
from opdlab.conformance.spec import on_support
from opdlab.conformance.texts import Texts
from opdlab.errors import BadLoss, InvalidValue
from opdlab.losses import DIVERGENCES

TEMPERATURE = 2.0
SIDES = {  # of student and teacher
    "both": (TEMPERATURE, TEMPERATURE),
    "student": (TEMPERATURE, 1.0),
    "teacher": (1.0, TEMPERATURE),
    "neither": (1.0, 1.0),
}
INFINITE = "Its value is infinite"
ENDS = ((0.0, 1e-3), (1.0, 1 - 1e-3))


def check_temperature(probe: Probe) -> Finding:
    """Does a temperature reach both softmaxes?"""
    if not probe.spec.takes(Quantity.TEMPERATURE):
        return skipped("temperature", "It takes no temperature.")
    base = _divergence(probe)
    if base is None:
        return skipped("temperature", "It trains no divergence to compare with.")
    reading = _read(probe, temperature=TEMPERATURE)
    # Whoever samples at a temperature has another law of the tokens, which an estimate needs.
    readings = (reading, reading.heated(TEMPERATURE))
    for side, (own, other) in SIDES.items():
        divergence = partial(_heated, base, own, other)
        matches = [
            readings[0].match(divergence),
            readings[1].match(partial(_heated, divergence, 1 / TEMPERATURE, 1 / TEMPERATURE)),
        ]
        match = next((one for one in matches if one.exact and one.cosine > 0), None)
        if match is not None:
            return _temperature_finding(side, match.ratio)
    return failed(
        "temperature",
        "wrong_temperature",
        f"At temperature {TEMPERATURE:g} its gradient is not that of the divergence there.",
    )


def _temperature_finding(side: str, ratio: float) -> Finding:
    """Say which softmax has the temperature."""
    if side == "both":
        power = round(math.log(ratio, TEMPERATURE), 3) if ratio else 0.0
        times = f", times T to the power {power:g}" if abs(power) > 1e-3 else ""
        return passed("temperature", f"Both softmaxes have the temperature{times}.")
    if side == "neither":
        return failed("temperature", "temperature_ignored", "The temperature changes nothing.")
    return failed("temperature", "temperature_one_sided", f"Only the {side}'s softmax has it.")


def _read(probe: Probe, **values: float) -> Reading:
    return read(probe.caller, probe.name, seed=probe.seed, gradient_only=True, **values)


def _divergence(probe: Probe) -> Value | None:
    """The divergence that the loss trains at temperature 1."""
    spec = probe.spec
    if spec.trains is not None:
        match = probe.far.match(spec.reference)
        return spec.reference if match.exact and match.cosine > 0 else None
    trains = probe.far.trains
    entry = DIVERGENCES.get(trains or "")
    return on_support(entry, spec.top_k) if entry and entry.parameter is None else None


def _heated(base: Value, own: float, other: float, student: Tensor, teacher: Tensor) -> Tensor:
    return base((student / own).log_softmax(-1), (teacher / other).log_softmax(-1))


def check_parameter(probe: Probe) -> Finding:
    """Is the divergence's parameter its own at other values, and what happens at its ends?"""
    spec = probe.spec
    name = next((name for name in spec.family if name in spec.keywords), None)
    if name is None:
        return skipped("parameter", "No keyword takes the divergence's parameter.")
    value = 0.2 if DIVERGENCES[spec.trains or ""].parameter else 0.0
    reading = _read(probe, **{name: value})
    divergence = on_support(spec.divergence(**{name: value}), spec.top_k)
    match = reading.match(divergence)
    if not (match.exact and match.cosine > 0):
        return _wrong_parameter(probe, reading, name, value)
    return _check_ends(probe, name)


def _wrong_parameter(probe: Probe, reading: Reading, name: str, value: float) -> Finding:
    """Say which mistake makes a loss right at its own parameter and wrong at another."""
    spec = probe.spec
    at = f"At {name} = {value:g} "
    exchanged = on_support(spec.divergence(**{name: 1 - value}), spec.top_k)
    same = on_support(spec.divergence(), spec.top_k)
    for other, mistake, said in (
        (
            exchanged,
            "swapped_arguments",
            f"it is that of {1 - value:g}: student and teacher are"
            " exchanged, which nobody sees in the middle",
        ),
        (same, "trains_another", "its gradient is the same: the parameter does not reach it"),
    ):
        match = reading.match(other)
        if match.exact and match.cosine > 0:
            return failed("parameter", mistake, f"{at}{said}.")
    return failed("parameter", "trains_another", f"{at}its gradient is not that of the divergence.")


def _check_ends(probe: Probe, name: str) -> Finding:
    said, jumps = [], False
    for end, beside in ENDS:
        try:
            at, near = (_read(probe, **{name: value}) for value in (end, beside))
        except (BadLoss, InvalidValue):
            continue  # refused there, which leaves no jump
        lengths = at.seen.length, near.seen.length
        if not all(map(math.isfinite, lengths)) or not lengths[0]:
            said.append(f"at {name} = {end:g} its gradient is zero or not finite")
            continue
        gap = float((at.seen.gradient - near.seen.gradient).norm())
        if gap > 0.5 * max(lengths):
            jumps = True
            times = f"{lengths[0] / lengths[1]:.3g} times as long as at {beside:g}"
            said.append(f"at {name} = {end:g} its gradient is {times}")
    if jumps:
        return cautioned(
            "parameter",
            "vanishes_at_ends",
            f"It is that of the {label_of(probe.spec)} in between, but {'; '.join(said)}.",
        )
    return passed("parameter", f"{name} = 0.2 is that of the divergence, and no end jumps.")


def check_extremes(probe: Probe) -> Finding:
    """Is it finite at logits of ±1e4, in float32?"""
    texts = _extreme(probe.texts, 1e4)
    found = _finite(probe, texts)
    if found is None:
        return passed("extremes", "Value and gradient are finite at logits of ±1e4 in float32.")
    if _is_infinite_itself(probe, texts):
        return cautioned("extremes", "", f"{found}, as the divergence itself in float32.")
    if probe.spec.kind is Kind.TOP_K and found == INFINITE:
        said = f"{found}: top log-probs in float32 do not tell how small the mass outside is."
        return cautioned("extremes", "", said)
    return failed("extremes", "not_finite", f"{found}.")


def check_ruled_out(probe: Probe) -> Finding:
    """Is it finite where both policies rule a token out by -inf?"""
    texts = probe.texts
    never = torch.full_like(texts.student[..., -1], -math.inf)
    used = texts.ids == texts.student.shape[-1] - 1
    never = torch.where(used, texts.student[..., -1], never)
    logits = [
        torch.cat([one[..., :-1], never[..., None]], -1) for one in (texts.student, texts.teacher)
    ]
    found = _finite(probe, texts.moved(*logits))
    if found is None:
        return passed("ruled out", "A token that both rule out (-inf) does no harm.")
    return cautioned("ruled out", "nan_at_minus_infinity", f"{found} where both rule out a token.")


def _extreme(texts: Texts, size: float) -> Texts:
    """Logits of ±size: apart, equal, and the student sure of another token."""
    sign = torch.where(torch.arange(texts.student.shape[-1]) % 2 == 0, 1.0, -1.0).double()
    student = texts.student + size * sign
    teacher = texts.teacher - size * sign
    student[:, 1::2] = texts.student[:, 1::2]
    return texts.moved(student, teacher)


def _finite(probe: Probe, texts: Texts) -> str | None:
    """None if the loss is finite on texts in float32, else what is not."""
    caller = replace(probe.caller, spec=replace(probe.spec, dtype="float32"))
    try:
        seen = caller(texts)
    except BadLoss as error:
        return str(error).rstrip(".")
    mask = texts.mask
    value = seen.value if not seen.value.dim() else seen.value[mask]
    if not bool(torch.isfinite(value).all()):
        return "Its value is NaN" if bool(torch.isnan(value).any()) else INFINITE
    if not bool(torch.isfinite(seen.gradient[mask]).all()):
        return "Its value is finite, and its gradient is NaN or infinite"
    return None


def _is_infinite_itself(probe: Probe, texts: Texts) -> bool:
    """Tell whether the divergence, or its estimate from one token, has no finite value there."""
    trains = probe.spec.trains or probe.far.trains
    if trains is None or trains not in DIVERGENCES:
        return trains is None
    logp = [one.float().log_softmax(-1) for one in (texts.student, texts.teacher)]
    leaf = logp[0].requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = dict(probe.spec.parameters) if probe.spec.trains else {}
        value = DIVERGENCES[trains](leaf, logp[1], **options)
        slope = torch.autograd.grad(value.sum(), leaf)[0]
    if not _is_finite(value) or not _is_finite(slope):
        return True
    if not probe.spec.reads_tokens:
        return False
    # An unbiased estimate of a finite divergence may weigh a token by an unbounded ratio.
    log_u = (logp[1] - logp[0].detach()).gather(-1, texts.ids[..., None])
    return not _is_finite(log_u.exp()[texts.mask])


def _is_finite(numbers: Tensor) -> bool:
    return bool(torch.isfinite(numbers).all())
