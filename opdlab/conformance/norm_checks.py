"""Ask what the loss divides by: within a batch, over micro-batches, and over processes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from opdlab.conformance.contract import Kind, Quantity, Reduction
from opdlab.conformance.finding import Finding
from opdlab.conformance.probe import Probe, failed, passed, skipped
from opdlab.conformance.reading import WORTH
from opdlab.conformance.texts import Texts

NO_GRADIENT = "No token has a gradient."
CLOSE = 1e-4  # of a token's weight
NAMES = {
    Reduction.NONE: "does not reduce",
    Reduction.SUM: "sums over tokens",
    Reduction.TOKEN: "takes the mean over the tokens of the batch",
    Reduction.SEQUENCE: "takes the mean over texts of the mean over their tokens",
    Reduction.TEXT_SUM: "takes the mean over texts of the sum over their tokens",
}


def token_weights(texts: Texts, reduction: Reduction) -> Tensor:
    """Return what each token weighs under a reduction.

    Args:
        texts: The texts.
        reduction: The reduction.

    Returns:
        `[B, T]`; 0 where a token does not count.
    """
    mask = texts.mask.double()
    batch = len(mask)
    if reduction is Reduction.TOKEN:
        return mask / mask.sum()
    if reduction is Reduction.SEQUENCE:
        return mask / mask.sum(-1, keepdim=True).clamp_min(1) / batch
    return mask / batch if reduction is Reduction.TEXT_SUM else mask


def check_rows(probe: Probe) -> Finding:
    """Does a text's gradient depend on itself alone, but for the normaliser?"""
    texts, gradient = probe.texts, probe.batch.gradient.double()
    other = uneven_but_first(texts)
    seen = probe.caller(other)
    ratios = _ratios(seen.gradient.double()[:3], gradient[:3], texts.mask[:3])
    if ratios is None:
        return failed(
            "rows",
            "batch_coupling",
            "With other texts beside it, the gradient of a text has another direction.",
        )
    if float(ratios.amax() - ratios.amin()) > CLOSE * float(ratios.abs().amax()):
        return failed(
            "rows",
            "batch_coupling",
            "With other texts of the same lengths beside it, the tokens of a text weigh otherwise.",
        )
    return passed("rows", "The gradient of a text does not depend on the texts beside it.")


def uneven_but_first(texts: Texts) -> Texts:
    """Exchange the policies of the last texts.

    Args:
        texts: Six texts.

    Returns:
        The same tokens; the first three texts as they were.
    """
    student, teacher = texts.student.clone(), texts.teacher.clone()
    student[3:], teacher[3:] = 1.5 * texts.teacher[3:].flip(-1), texts.student[3:]
    return texts.moved(student, teacher)


def _ratios(gradient: Tensor, base: Tensor, mask: Tensor) -> Tensor | None:
    """Divide each token's gradient by that of `base`; None if directions differ."""
    one, other = gradient[mask], base[mask]
    alive = other.norm(dim=-1) > 1e-9
    one, other = one[alive], other[alive]
    if not len(one):
        return torch.ones(1, dtype=torch.float64)
    ratio = (one * other).sum(-1) / (other * other).sum(-1)
    rest = (one - ratio[:, None] * other).norm(dim=-1)
    if bool((rest > 10 * WORTH * one.norm(dim=-1) + 1e-12).any()):
        return None
    return ratio


def find_reduction(probe: Probe) -> Reduction | None:
    """Find out how the loss of a batch comes from those of its tokens.

    Args:
        probe: The loss.

    Returns:
        The reduction, or None if it is none that is known.
    """
    if probe.batch.value.dim():
        return Reduction.NONE
    texts = probe.texts
    if _weighs_text_by_text(probe):
        return _reduction_of_texts(probe)
    ratios = _ratios(probe.batch.gradient.double(), probe.alone, texts.mask)
    if ratios is None:
        return None
    alive = probe.alone[texts.mask].norm(dim=-1) > 1e-9
    if not bool(alive.any()):
        return None
    for reduction in (Reduction.TOKEN, Reduction.SEQUENCE, Reduction.TEXT_SUM, Reduction.SUM):
        wanted = token_weights(texts, reduction)[texts.mask][alive]
        if float((ratios - wanted).abs().amax()) <= CLOSE * float(wanted.amax()):
            return reduction
    return None


def _weighs_text_by_text(probe: Probe) -> bool:
    """Tell whether a token's gradient depends on later tokens of its text, as with returns."""
    texts = probe.texts
    whole = probe.caller(texts.part(slice(0, 1))).gradient.double()
    ratios = _ratios(whole, probe.alone[:1], texts.mask[:1])
    return ratios is None or float(ratios.amax() - ratios.amin()) > CLOSE * float(
        ratios.abs().amax()
    )


def _reduction_of_texts(probe: Probe) -> Reduction | None:
    """The reduction where only whole texts can be compared: as alone, in the batch."""
    texts, batch = probe.texts, len(probe.texts.ids)
    own = torch.zeros(batch, dtype=torch.float64)
    for row in range(batch):
        seen = probe.caller(texts.part(slice(row, row + 1))).gradient.double()
        ratios = _ratios(probe.batch.gradient[row : row + 1].double(), seen, texts.mask[row:][:1])
        if ratios is None:
            return None
        own[row] = ratios.mean()
    lengths = texts.mask.sum(-1).double()
    wanted = {
        Reduction.TOKEN: lengths / lengths.sum(),
        Reduction.SEQUENCE: torch.full_like(lengths, 1 / batch),
        Reduction.SUM: torch.ones_like(lengths),
    }
    for reduction, weight in wanted.items():
        if float((own - weight).abs().amax()) <= CLOSE * float(weight.amax()):
            return reduction
    return None


def check_reduction(probe: Probe) -> Finding:
    """Ask what it divides a batch by, and whether the spec says so."""
    wider = probe.caller(probe.texts.padded(3)).gradient[:, : probe.texts.ids.shape[1]]
    ratios = _ratios(wider.double(), probe.batch.gradient.double(), probe.texts.mask)
    if ratios is None or float((ratios - 1).abs().amax()) > CLOSE:
        return failed(
            "reduction",
            "padding_in_normaliser",
            "With three more columns of padding, its gradient changes.",
        )
    found, wanted = find_reduction(probe), probe.spec.reduction
    if found is None and not bool(probe.batch.gradient.any()):
        return skipped("reduction", NO_GRADIENT)
    if found is None:
        return failed(
            "reduction", "wrong_normaliser", "The tokens of a batch weigh as under no known mean."
        )
    if wanted is not None and found is not wanted:
        assert isinstance(wanted, Reduction)
        return failed(
            "reduction",
            "wrong_normaliser",
            f"It {NAMES[found]}. The spec says that it {NAMES[wanted]}.",
        )
    return passed("reduction", f"It {NAMES[found]}.")


def check_accumulation(probe: Probe) -> Finding:
    """Do two micro-batches with different numbers of tokens add up to one batch?"""
    return _check_split(probe, "accumulation", processes=1)


def check_processes(probe: Probe) -> Finding:
    """Do two processes with different numbers of tokens give what one gives?"""
    return _check_split(probe, "processes", processes=2)


def _check_split(probe: Probe, check: str, processes: int) -> Finding:
    reduction = probe.__dict__.setdefault("reduction", find_reduction(probe))
    if reduction in (Reduction.NONE, Reduction.SUM):
        return skipped(check, f"It {NAMES[reduction]}, and its trainer divides.")
    texts, whole = probe.texts, probe.batch.gradient.double()
    if not bool(whole.any()):
        return skipped(check, NO_GRADIENT)
    has_count = probe.spec.takes(Quantity.COUNT)
    count = texts.count / processes
    parts = [
        probe.caller(texts.part(piece), count=count).gradient.double()
        for piece in (slice(0, 3), slice(3, 6))
    ]
    # Without the count, a trainer takes the mean of micro-batches. Processes always average.
    share = 1.0 if has_count and processes == 1 else 0.5
    split = share * torch.cat(parts)
    things = "micro-batches" if processes == 1 else "processes"
    if float((split - whole).norm()) <= CLOSE * float(whole.norm()):
        return passed(check, f"Two {things} of different sizes give what one batch gives.")
    if has_count:
        twice = probe.caller(texts, count=2.0 * texts.count).gradient.double()
        if float((twice - whole).norm()) <= CLOSE * float(whole.norm()):
            return failed(
                check,
                "count_ignored",
                "Its gradient is the same whatever number of tokens it gets.",
            )
    own = [int(texts.part(piece).mask.sum()) for piece in (slice(0, 3), slice(3, 6))]
    off = float((split - whole).norm() / whole.norm())
    return failed(
        check,
        "local_normaliser",
        f"Two {things} of {own[0]} and {own[1]} tokens give another gradient than one batch of"
        f" {texts.count}, by {off:.0%} of its length: each is divided by its own tokens.",
    )


def check_head(probe: Probe) -> Finding:
    """Is the gradient of a fused loss's head that of its logits?"""
    if probe.spec.kind is not Kind.HIDDEN:
        return skipped("head", "It is given no head.")
    texts = replace(probe.texts, mask=probe.texts.mask)
    heads = probe.caller(texts).heads
    assert heads is not None
    found, wanted = heads
    if float((found - wanted).norm()) <= 10 * WORTH * float(wanted.norm()):
        return passed("head", "The head's gradient is that of its logits.")
    return failed("head", "wrong_head_gradient", "The head's gradient is not that of its logits.")
