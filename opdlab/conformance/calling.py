"""Call a loss of any kind on toy texts, and take its gradient in the student's logits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opdlab.conformance.contract import Kind, Quantity
from opdlab.conformance.spec import Spec
from opdlab.conformance.texts import Layout, Side, Texts, free_token, lay_out
from opdlab.errors import BadLoss, printable
from opdlab.support.expect import shortened


class OutOfTime(Exception):
    """The time for all checks is over."""


@dataclass(frozen=True, eq=False)
class Seen:
    """One call of a loss.

    Attributes:
        value: What it returned: `[]`, or `[B, T]` if it does not reduce.
        gradient: The gradient in the student's logits, `[B, T, V]`.
        elsewhere: Gradients `[B, L]` (their lengths) at the positions of whole sequences that
            predict no token of a completion, by region: "prompt", "padding", "next".
        heads: The gradient of the student's head with what it should be, or None.
    """

    value: Tensor
    gradient: Tensor
    elsewhere: Mapping[str, Tensor] = field(default_factory=dict)
    heads: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Caller:
    """A loss with the way to call it.

    Attributes:
        loss: The loss.
        spec: How it is called.
        until: The time of `time.monotonic` after which no call begins.
    """

    loss: Callable[..., Any]
    spec: Spec
    until: float = float("inf")

    def __call__(
        self,
        texts: Texts,
        *,
        count: float | None = None,
        side: Side = "left",
        pad_is_eos: bool = False,
        values: Mapping[str, float] | None = None,
    ) -> Seen:
        """Call the loss on texts.

        Args:
            texts: The texts.
            count: Tokens of all micro-batches over the number of processes; those of `texts` by
                default.
            side: Where whole sequences pad their prompts.
            pad_is_eos: Whether the padding is the token that ends a text.
            values: The temperature, or the divergence's parameter, by name.

        Returns:
            The value and its gradient.

        Raises:
            BadLoss: It is no loss: it raises, gives no number, or has no gradient.
            OutOfTime: The time is over.
        """
        if time.monotonic() > self.until:
            raise OutOfTime
        texts = texts.to(getattr(torch, self.spec.dtype))
        keywords = self._keywords(texts, count, values or {})
        if self.spec.kind is Kind.SEQUENCES:
            pad_id = texts.eos_ids[0] if pad_is_eos and texts.eos_ids else free_token(texts)
            return self._on_sequences(lay_out(texts, side, pad_id), texts, keywords)
        leaf = texts.student.clone().requires_grad_()
        arguments = ARGUMENTS[self.spec.kind](leaf, texts, self.spec)  # type: ignore[index]
        value = self._value(arguments, keywords, texts)
        total = self._total(value, texts.mask)
        head = arguments[1] if self.spec.kind is Kind.HIDDEN else None
        wanted = [leaf] if head is None else [leaf, head, arguments[0]]
        slopes = _slopes(total, wanted)
        heads = None
        if head is not None:
            hidden = arguments[0].detach().flatten(0, 1)
            heads = slopes[1], slopes[0].flatten(0, 1).T @ hidden
        kept = value.detach()
        if kept.dim():
            kept = torch.where(texts.mask, kept, 0.0)  # its trainer looks at no other
        return Seen(kept, slopes[0], heads=heads)

    def _keywords(
        self, texts: Texts, count: float | None, values: Mapping[str, float]
    ) -> dict[str, Any]:
        """Give the loss its keywords by its own names."""
        spec, found = self.spec, dict(self.spec.options)
        known: dict[str, Any] = {**spec.family, Quantity.TEMPERATURE.value: 1.0, **values}
        known[Quantity.COUNT.value] = float(texts.count if count is None else count)
        known[Quantity.TOKENS.value] = texts.ids.clone()
        if spec.takes(Quantity.SAMPLER):
            logp = texts.student.detach().log_softmax(-1)
            known[Quantity.SAMPLER.value] = logp.gather(-1, texts.ids[..., None])[..., 0]
        return found | {own: known[name] for name, own in spec.keywords.items()}

    def _on_sequences(self, layout: Layout, texts: Texts, keywords: dict[str, Any]) -> Seen:
        leaf = layout.student.clone().requires_grad_()
        value = self._value([leaf, layout.teacher, layout.sequences], keywords, texts)
        if value.dim():
            raise BadLoss(
                f"The loss of whole sequences returned {list(value.shape)}. Return one number."
            )
        slope = _slopes(value, [leaf])[0]
        real = layout.at >= 0
        row = torch.arange(len(real))[:, None].expand_as(real)
        gradient = torch.zeros_like(texts.student)
        gradient[real] = slope[row[real], layout.at[real]]
        return Seen(value.detach(), gradient, _regions(slope, layout, real))

    def _value(self, arguments: list[Any], keywords: dict[str, Any], texts: Texts) -> Tensor:
        """Call the loss itself, and check what it gives."""
        given = [one for one in arguments if isinstance(one, Tensor)]
        versions = [one._version for one in given]
        try:
            with torch.enable_grad():
                value = self.loss(*arguments, **keywords)
        except (Exception, SystemExit) as error:  # an exit(0) would look like a pass in CI
            raise BadLoss(_explain(error, arguments, keywords)) from error
        if [one._version for one in given] != versions:
            raise BadLoss(
                "The loss changed a tensor that it was given in place. Others read the same"
                " numbers. Work on a copy."
            )
        return _checked(value, texts)

    def _total(self, value: Tensor, mask: Tensor) -> Tensor:
        """Reduce what a loss left to its trainer: the sum over the tokens that count."""
        return value if not value.dim() else torch.where(mask, value, 0.0).sum()


def _logits(leaf: Tensor, texts: Texts, _: Spec) -> list[Any]:
    return [leaf, texts.teacher.clone(), texts.mask.clone()]


def _log_probs(leaf: Tensor, texts: Texts, _: Spec) -> list[Any]:
    return [leaf.log_softmax(-1), texts.teacher.log_softmax(-1), texts.mask.clone()]


def _sampled(leaf: Tensor, texts: Texts, _: Spec) -> list[Any]:
    student, teacher = (
        logits.log_softmax(-1).gather(-1, texts.ids[..., None])[..., 0]
        for logits in (leaf, texts.teacher)
    )
    return [student, teacher, texts.mask.clone()]


def _top_k(leaf: Tensor, texts: Texts, spec: Spec) -> list[Any]:
    assert spec.top_k is not None
    top = texts.teacher.log_softmax(-1).topk(spec.top_k.k, dim=-1)
    return [leaf, top.values, top.indices, texts.mask.clone()]


def _hidden(leaf: Tensor, texts: Texts, _: Spec) -> list[Any]:
    """Hidden states whose product with an invertible head is the logits."""
    generator = torch.Generator().manual_seed(5)
    arguments: list[Any] = []
    for logits in (leaf, texts.teacher):
        vocab = logits.shape[-1]
        noise = torch.randn((vocab, vocab), generator=generator, dtype=torch.float64)
        head = torch.linalg.qr(noise)[0] * 1.5
        hidden = logits @ torch.linalg.inv(head).T.to(logits.dtype)
        arguments += [hidden, head.to(logits.dtype)]
    arguments[1].requires_grad_()
    return [*arguments, texts.mask.clone()]


ARGUMENTS: dict[Kind, Callable[[Tensor, Texts, Spec], list[Any]]] = {
    Kind.LOGITS: _logits,
    Kind.LOG_PROBS: _log_probs,
    Kind.SAMPLED: _sampled,
    Kind.TOP_K: _top_k,
    Kind.HIDDEN: _hidden,
}


def _regions(slope: Tensor, layout: Layout, real: Tensor) -> dict[str, Tensor]:
    """Lengths of the gradient `[B, L]` where no token of a completion is predicted."""
    length = slope.norm(dim=-1)
    place = torch.arange(length.shape[1])
    last, first = layout.at.amax(-1), layout.at.masked_fill(~real, 1 << 30).amin(-1)
    has_tokens = real.any(-1)
    attention = layout.sequences.attention_mask.bool()
    begin = attention.long().argmax(-1)
    first = torch.where(has_tokens, first, begin + layout.sequences.prompt_lengths - 1)
    last = torch.where(has_tokens, last, first - 1)
    inside = (place >= first[:, None]) & (place <= last[:, None])
    before = place < first[:, None]
    after = place == last[:, None] + 1
    regions = {
        "prompt": before & attention,
        "next": after & ~inside,
        "padding": ~inside & ~(before & attention) & ~after,
    }
    return {name: torch.where(region, length, 0.0) for name, region in regions.items()}


def _slopes(total: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """Differentiate; what the loss does not depend on has a gradient of zero."""
    try:
        found = torch.autograd.grad(total, wanted, allow_unused=True)
    except RuntimeError as error:
        raise BadLoss(
            f"The gradient of the loss cannot be computed: {printable(str(error))} Use"
            " differentiable functions of the student's tensor."
        ) from error
    return [
        torch.zeros_like(one) if slope is None else slope.detach()
        for one, slope in zip(wanted, found, strict=True)
    ]


def _checked(value: Any, texts: Texts) -> Tensor:
    """Return the number or numbers of a loss, or say what is wrong with them."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    shapes = {(), (1,), tuple(texts.mask.shape)}
    if not isinstance(value, Tensor):
        raise BadLoss(
            f"The loss returned {shortened(value)}. Return a tensor: one number, or one for each"
            " token [B, T]."
        )
    if not value.is_floating_point() or tuple(value.shape) not in shapes:
        raise BadLoss(
            f"The loss returned a tensor {list(value.shape)} of {value.dtype} for texts"
            f" {list(texts.mask.shape)}. Return one number, or one for each token [B, T]."
        )
    if not value.requires_grad:
        raise BadLoss(
            "The loss has no gradient: what it returned does not depend on the student's tensor,"
            " or was detached."
        )
    return value.reshape(()) if tuple(value.shape) == (1,) and texts.mask.shape != (1,) else value


def _explain(error: BaseException, arguments: list[Any], keywords: Mapping[str, Any]) -> str:
    """Say what a loss raised, and what it was called with."""
    shapes = [
        str(list(one.shape)) if isinstance(one, Tensor) else type(one).__name__ for one in arguments
    ]
    named = [f"{name}=…" for name in keywords]
    said = " ".join(printable(str(error)).split())[:300]
    return (
        f"The loss raised {type(error).__name__}: {said} It was called with"
        f" ({', '.join([*shapes, *named])}). Check kind, keywords and options of the spec."
    )
