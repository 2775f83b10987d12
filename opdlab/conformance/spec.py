"""Describe a loss: how to call it, and what it claims to train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from opdlab.audit.references import FIXED, Value
from opdlab.conformance.contract import Kind, Quantity, Reduction
from opdlab.engine.needs import did_you_mean
from opdlab.errors import InvalidValue
from opdlab.losses import DIVERGENCES, TopK
from opdlab.support.expect import shortened
from opdlab.support.validation import Positive, Text, Whole, validate_fields

LARGEST_VOCABULARY = 4096
Keywords = Annotated[
    Mapping[Text, Text],
    Field(description="a dict of texts, as {'count': 'num_items_in_batch'}"),
]
Options = Annotated[Mapping[Text, Any], Field(description="a dict of keywords, as {'k': 3}")]
Parameters = Annotated[Mapping[Text, Any], Field(description="a dict of numbers by name")]


@dataclass(frozen=True)
class Spec:
    """Describe how to call a loss, and what it claims.

    What is left at None is found out and reported, and is no reason to fail.

    Attributes:
        kind: What it takes: a `Kind` or its name, "logits", "log_probs", "sampled", "top_k",
            "hidden" or "sequences". `opdlab.conformance.contract` has a protocol for each.
        trains: Name of the divergence whose gradient it shall have, of `opdlab.losses.DIVERGENCES`.
        parameters: The divergence's own parameters, such as `{"beta": 0.5}`.
        top_k: The support that the divergence is on. A loss of kind "top_k" has the teacher's top
            3 with the rest in a bucket, unless this says otherwise.
        scale: Its gradient over that of the divergence; None for any.
        reduction: A `Reduction` or its name; None for any that is known.
        writer: Who wrote the texts, "student" or "teacher".
        keywords: The loss's own names of what it takes besides, by quantity: "tokens", "count",
            "temperature", "sampler", or the name of the divergence's parameter.
        options: Further keywords, passed as they are.
        vocab: Tokens of the toy models. Above 8 the texts have one token instead of two.
        dtype: The type of the numbers that it is given.

    Raises:
        InvalidValue: A value is none of these.
    """

    kind: Kind | str = Kind.LOGITS
    trains: Text | None = None
    parameters: Parameters = field(default_factory=dict)
    top_k: TopK | None = None
    scale: Positive | None = 1.0
    reduction: Reduction | str | None = None
    writer: Literal["student", "teacher"] = "student"
    keywords: Keywords = field(default_factory=dict)
    options: Options = field(default_factory=dict)
    vocab: Whole = 5
    dtype: Literal["float64", "float32"] = "float64"

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", _member(Kind, "kind", self.kind))
        if self.reduction is not None:
            object.__setattr__(self, "reduction", _member(Reduction, "reduction", self.reduction))
        for name, known in (
            ("writer", ("student", "teacher")),
            ("dtype", ("float64", "float32")),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise InvalidValue(
                    f"Spec got {name}={shortened(value)}. Use {known[0]!r} or {known[1]!r}."
                )
        if self.top_k is not None and not isinstance(self.top_k, TopK):
            raise InvalidValue(
                f"Spec got top_k={shortened(self.top_k)}. Use opdlab.TopK(3, by='teacher')."
            )
        validate_fields(self)
        if self.kind is Kind.TOP_K and self.top_k is None:
            object.__setattr__(self, "top_k", TopK(3, by="teacher"))
        self._check_numbers()
        self._check_claim()

    def _check_numbers(self) -> None:
        least = 4 if self.top_k is None else max(4, self.top_k.k + 1)
        if not least <= self.vocab <= LARGEST_VOCABULARY:
            raise InvalidValue(
                f"Spec got vocab={self.vocab}. Use {least} to {LARGEST_VOCABULARY} tokens here."
            )
        known = [one.value for one in Quantity] + [*self.family]
        if unknown := [name for name in self.keywords if name not in known]:
            raise InvalidValue(
                f"Spec got keywords={shortened(dict(self.keywords))}; there is no quantity"
                f" {unknown[0]!r}. {did_you_mean(unknown[0], known)}Use {', '.join(known)}."
            )

    def _check_claim(self) -> None:
        """Call the divergence once, so that a wrong name or parameter shows here."""
        if self.trains is None:
            if self.parameters:
                raise InvalidValue(
                    f"Spec got parameters={shortened(dict(self.parameters))} without trains. Name"
                    " the divergence."
                )
            return
        if self.trains not in DIVERGENCES and self.trains not in FIXED:
            known = [*DIVERGENCES, *FIXED]
            raise InvalidValue(
                f"Spec got trains={shortened(self.trains)}. {did_you_mean(self.trains, known)}Use"
                f" one of {', '.join(dict.fromkeys(known))}."
            )
        allowed = DIVERGENCES[self.trains].options if self.trains in DIVERGENCES else {}
        if unknown := [name for name in self.parameters if name not in allowed]:
            raise InvalidValue(
                f"Spec got parameters={shortened(dict(self.parameters))}, but {self.trains} has no"
                f" {unknown[0]!r}. It takes {', '.join(allowed) or 'none'}."
            )
        import torch

        uniform = torch.zeros(1, 2).log_softmax(-1)
        self.divergence(**self.parameters)(uniform, uniform)

    @property
    def family(self) -> dict[str, float]:
        """The divergence's own parameter with its value, such as `{"beta": 0.5}`; or nothing."""
        entry = DIVERGENCES.get(self.trains or "")
        if entry is None or entry.parameter is None:
            return {}
        name = entry.parameter.name
        return {name: self.parameters.get(name, entry.parameter.default)}

    def divergence(self, **parameters: Any) -> Value:
        """Return the divergence on the whole vocabulary.

        Args:
            parameters: Its parameters, in place of the spec's.

        Returns:
            A function of log-probs `[..., V]` of student and teacher, which gives `[...]`.
        """
        assert self.trains is not None
        if self.trains in DIVERGENCES:
            return partial(DIVERGENCES[self.trains], **{**self.parameters, **parameters})
        return FIXED[self.trains].value

    @property
    def reference(self) -> Value:
        """The divergence on the spec's support."""
        return on_support(self.divergence(), self.top_k)

    def takes(self, quantity: Quantity) -> bool:
        """Tell whether the loss takes a quantity by a keyword.

        Args:
            quantity: The quantity.

        Returns:
            True if `keywords` names it.
        """
        return quantity.value in self.keywords

    @property
    def reads_tokens(self) -> bool:
        """Tell whether the loss knows which tokens were sampled."""
        return self.kind in (Kind.SAMPLED, Kind.SEQUENCES) or self.takes(Quantity.TOKENS)


def on_support(divergence: Value, top_k: TopK | None) -> Value:
    """Put a divergence on the top tokens.

    Args:
        divergence: A function of log-probs `[..., V]` of student and teacher.
        top_k: The support; None for the whole vocabulary.

    Returns:
        A function of the same arguments.
    """
    if top_k is None:
        return divergence

    def coarse(student: Tensor, teacher: Tensor) -> Tensor:
        flat = [logp.reshape(-1, logp.shape[-1]) for logp in (student, teacher)]
        ids = top_k.support(flat[0] if top_k.by == "student" else flat[1])
        value = divergence(top_k.coarse(flat[0], ids), top_k.coarse(flat[1], ids))
        return value.view(student.shape[:-1])

    return coarse


def _member(kind: type[Kind] | type[Reduction], name: str, value: Any) -> Any:
    """Return the member of an enumeration, given itself or its value."""
    if isinstance(value, kind):
        return value
    known = [one.value for one in kind]
    if not isinstance(value, str) or value not in known:
        raise InvalidValue(f"Spec got {name}={shortened(value)}. Use one of {', '.join(known)}.")
    return kind(value)
