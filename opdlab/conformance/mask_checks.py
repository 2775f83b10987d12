"""Ask which tokens the loss sees: alignment, prompts, padding, EOS, cut texts, tools' tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from opdlab.conformance.calling import Seen
from opdlab.conformance.contract import Kind
from opdlab.conformance.finding import Finding
from opdlab.conformance.probe import Probe, cautioned, failed, passed, skipped
from opdlab.conformance.reading import WORTH
from opdlab.conformance.texts import PADDING, Texts
from opdlab.errors import BadLoss

NOT_WHOLE = "It is given completions, not whole sequences."


def check_call(probe: Probe) -> Finding:
    """Can it be called, has it a gradient, and does it give the same again?"""
    try:
        first, again = probe.batch, probe.caller(probe.texts)
    except BadLoss as error:
        said = str(error)
        mistake = "changes_inputs" if "in place" in said else "no_loss"
        return failed("call", mistake, said)
    same = torch.equal(first.gradient, again.gradient) and torch.equal(first.value, again.value)
    if not same and not _is_near(first, again):
        return failed("call", "not_repeatable", "The same call gives other numbers.")
    return passed("call", "It returns a number with a gradient, and the same one again.")


def _is_near(one: Seen, other: Seen) -> bool:
    options = {"rtol": 1e-5, "atol": 1e-8, "equal_nan": True}
    return all(
        torch.allclose(a, b, **options)  # type: ignore[arg-type]
        for a, b in ((one.gradient, other.gradient), (one.value, other.value))
    )


def _lengths(gradient: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(gradient, dim=-1)
    return length


def _largest(seen: Seen) -> float:
    return float(torch.nan_to_num(_lengths(seen.gradient)).amax())


def check_alignment(probe: Probe) -> Finding:
    """Is each row of logits compared at the token that it predicts?"""
    if probe.spec.kind is not Kind.SEQUENCES:
        return skipped("alignment", NOT_WHOLE)
    seen = probe.caller(probe.texts.part(slice(1, 2)))  # one token: its row, and the row behind it
    own, behind = _largest(seen), float(seen.elsewhere["next"].amax())
    if behind > WORTH * own:
        return failed(
            "alignment",
            "shift_by_one",
            "The row of logits behind a token has a gradient, so rows are compared one token too"
            " late.",
        )
    if not own:
        return failed("alignment", "tokens_dropped", "A text of one token has no gradient.")
    return passed("alignment", "Row i of the logits is compared at token i + 1.")


def check_prompt(probe: Probe) -> Finding:
    """Has the prompt no gradient?"""
    if probe.spec.kind is not Kind.SEQUENCES:
        return skipped("prompt", NOT_WHOLE)
    for side in PADDING:
        seen = probe.caller(probe.texts, side=side)  # type: ignore[arg-type]
        if float(seen.elsewhere["prompt"].amax()) > WORTH * _largest(seen):
            return failed("prompt", "prompt_in_loss", "Tokens of the prompt have a gradient.")
    return passed("prompt", "No token of the prompt has a gradient.")


def check_padding(probe: Probe) -> Finding:
    """Does padding change nothing, whatever stands in it?"""
    texts, seen = probe.texts, probe.batch
    outside = _lengths(seen.gradient)[~texts.real]
    elsewhere = [seen.elsewhere[name].amax() for name in ("padding",) if name in seen.elsewhere]
    strays = torch.stack([outside.amax(), *elsewhere])
    if float(strays.amax()) > WORTH * _largest(seen):
        if _only_behind_other_ends(probe, seen):
            return failed(
                "padding",
                "one_eos_of_several",
                "What stands behind a text has a gradient, unless the first of its EOS ids ends"
                " it.",
            )
        return failed("padding", "padding_in_loss", "Tokens of the padding have a gradient.")
    if not bool(torch.isfinite(seen.gradient[texts.mask]).all()):
        return failed("padding", "not_finite", "The gradient of an ordinary batch is not finite.")
    large = probe.caller(_filled(texts, 1e4))
    is_finite = bool(torch.isfinite(large.gradient).all() & torch.isfinite(large.value).all())
    if is_finite and not _is_near(large, seen):
        return failed(
            "padding", "padding_in_loss", "Large logits in the padding change value or gradient."
        )
    if not is_finite:
        said = "Large logits in the padding give NaN: the loss is not finite there, and a mask"
        return cautioned("padding", "nan_in_padding", f"{said} that multiplies cannot stop it.")
    try:
        with_nan = probe.caller(_filled(texts, float("nan")))
    except BadLoss as error:
        return cautioned("padding", "nan_in_padding", f"With NaN in the padding: {error}")
    if not _is_near(with_nan, seen):
        return cautioned(
            "padding",
            "nan_in_padding",
            "Numbers in the padding change nothing, but NaN there reaches the loss.",
        )
    return passed("padding", "Nothing in the padding changes value or gradient, NaN neither.")


def _only_behind_other_ends(probe: Probe, seen: Seen) -> bool:
    """Tell whether only texts that the first EOS id does not end have a gradient behind them."""
    texts = probe.texts
    if "padding" not in seen.elsewhere:
        return False
    last = texts.ids.gather(1, texts.lengths[:, None] - 1)[:, 0]
    by_first = last == texts.eos_ids[0]
    behind = seen.elsewhere["padding"].amax(-1) > WORTH * _largest(seen)
    shorter = texts.lengths < texts.ids.shape[1]
    return not bool((behind & by_first).any()) and bool((behind & ~by_first & shorter).any())


def _filled(texts: Texts, number: float) -> Texts:
    """Texts with another number in the rows of the padding."""
    outside = ~texts.real[..., None]
    fill = torch.full_like(texts.student, number)
    fill[..., ::2] *= -1  # not a uniform distribution
    return texts.moved(
        torch.where(outside, fill, texts.student), torch.where(outside, fill, texts.teacher)
    )


def check_mask(probe: Probe) -> Finding:
    """Do tokens in the middle that do not count, such as a tool's, have no gradient?"""
    texts = probe.texts
    mask = texts.mask.clone()
    mask[0, 1], mask[3, 2] = False, False
    seen = probe.caller(replace(texts, mask=mask))
    length = _lengths(seen.gradient)
    holes = texts.real & ~mask
    if float(length[holes].amax()) > WORTH * _largest(seen):
        return failed("mask", "mask_ignored", "Tokens that do not count have a gradient.")
    if dropped := _dropped(length, mask & (_lengths(probe.batch.gradient) > 0)):
        return failed("mask", "tokens_dropped", f"{dropped} tokens beside them have none.")
    return passed("mask", "Tokens in the middle that do not count have no gradient.")


def check_eos(probe: Probe) -> Finding:
    """Does the token that ends a text count, also where padding is EOS, and for each EOS?"""
    texts = probe.texts
    ends = torch.isin(texts.ids, torch.tensor(texts.eos_ids)) & texts.real
    alive = _alive_alone(probe)
    calls = [partial(probe.caller, texts)]
    if probe.spec.kind is Kind.SEQUENCES:
        calls = [
            partial(probe.caller, texts, side=side, pad_is_eos=same)  # type: ignore[arg-type]
            for side in PADDING
            for same in (False, True)
        ]
    for i, call in enumerate(calls):
        seen = call()
        length = _lengths(seen.gradient)
        where = " where the padding is the EOS token" if i % 2 else ""
        if _dropped(length, ends & alive) and not _dropped(length, texts.mask & alive & ~ends):
            return failed("eos", "eos_masked", f"A token that ends a text has no gradient{where}.")
        if seen.elsewhere and float(seen.elsewhere["padding"].amax()) > WORTH * _largest(seen):
            return failed(
                "eos", "padding_in_loss", f"Tokens behind the end have a gradient{where}."
            )
    if _dropped(length, ends & alive):
        return skipped("eos", "Tokens of all kinds have no gradient; see truncation.")
    return passed("eos", "Every token that ends a text has its gradient.")


def check_truncation(probe: Probe) -> Finding:
    """Does a text that was cut count in full, and a text without tokens not at all?"""
    texts = probe.texts
    sides = PADDING if probe.spec.kind is Kind.SEQUENCES else ("left",)
    for side in sides:
        seen = probe.caller(texts, side=side)  # type: ignore[arg-type]
        dropped = _dropped(_lengths(seen.gradient), texts.mask & _alive_alone(probe))
        if dropped:
            return failed(
                "truncation",
                "tokens_dropped",
                f"{dropped} of {texts.count} tokens that count have no gradient (padding on the"
                f" {side} of the prompts).",
            )
    some = texts.mask.clone()
    some[3] = False  # as where a trainer leaves out cut texts
    seen = probe.caller(replace(texts, mask=some))
    if not bool(torch.isfinite(seen.gradient).all() & torch.isfinite(seen.value).all()):
        return failed("truncation", "empty_batch", "A text without tokens that count gives NaN.")
    return passed("truncation", "A text that was cut counts in full; one that is left out, not.")


def check_empty(probe: Probe) -> Finding:
    """Is a batch finite in which no token counts?"""
    texts = probe.texts
    try:
        seen = probe.caller(replace(texts, mask=torch.zeros_like(texts.mask)), count=texts.count)
    except BadLoss as error:
        return cautioned("empty batch", "empty_batch", f"With no token that counts: {error}")
    if not bool(torch.isfinite(seen.gradient).all() & torch.isfinite(seen.value).all()):
        return cautioned(
            "empty batch", "empty_batch", "A batch in which no token counts gives NaN."
        )
    return passed("empty batch", "A batch in which no token counts is a finite zero.")


def _alive_alone(probe: Probe) -> Tensor:
    """`[B, T]`: tokens that have a gradient when they are a text of their own."""
    return _lengths(probe.alone) > 1e-9


def _dropped(length: Tensor, wanted: Tensor) -> int:
    """Count the wanted tokens that have no gradient."""
    least = WORTH * float(length[wanted].amax()) * 1e-3 if bool(wanted.any()) else 0.0
    return int((length[wanted] <= least).sum())
