"""Say how texts are sampled: one object for all parameters that travel together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypedDict, cast

from opdlab.errors import InvalidValue, UnknownOption
from opdlab.support.expect import shortened
from opdlab.support.validation import (
    Count,
    CountOrZero,
    GeneratorSeed,
    PositiveShare,
    ShareBelowOne,
    Temperature,
    validate_fields,
)


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingConfig` as keyword arguments.

    Signatures use it as `**options: Unpack[SamplingOptions]`, so that editors and type checkers
    know the options.

    Attributes:
        max_new_tokens: Length limit per completion, in tokens of whoever writes.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Keep the fewest likeliest tokens that together have this probability.
        top_k: Keep this many likeliest tokens; 0 keeps all.
        min_p: Keep tokens with at least this share of the likeliest probability; 0 keeps all.
        stop: Texts that end a completion where they occur.
        seed: The same seed gives the same texts.
        min_new_tokens: Tokens before which no completion ends.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop: str | tuple[str, ...]
    seed: int
    min_new_tokens: int


@dataclass(frozen=True)
class SamplingConfig:
    """Say how a policy or a server samples texts.

    For on-policy training keep the defaults of `temperature`, `top_p`, `top_k` and `min_p`: other
    values sample from another distribution than the student's own.

    Attributes:
        max_new_tokens: Length limit, in tokens of whoever writes.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Keep the fewest likeliest tokens that together have this probability.
        top_k: Keep this many likeliest tokens; 0 keeps all.
        min_p: Keep tokens with at least this share of the likeliest token's probability; 0 keeps
            all.
        stop: Texts that end a completion where they occur. The completion keeps them.
        seed: The same seed gives the same texts.
        min_new_tokens: Tokens before which no completion ends: until then the tokens that end a
            text are not drawn, and stop texts are passed over.

    Raises:
        InvalidValue: A field has a value that cannot be right.
    """

    max_new_tokens: Count = 64
    temperature: Temperature = 1.0
    top_p: PositiveShare = 1.0
    top_k: CountOrZero = 0
    min_p: ShareBelowOne = 0.0
    stop: tuple[str, ...] = ()
    seed: GeneratorSeed = 0
    min_new_tokens: CountOrZero = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _read_stop(self.stop))
        validate_fields(self)
        if "" in self.stop:
            raise InvalidValue(
                "SamplingConfig got an empty text in stop=. It would end every completion at once:"
                " leave it out."
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise InvalidValue(
                f"SamplingConfig got min_new_tokens={self.min_new_tokens} and"
                f" max_new_tokens={self.max_new_tokens}. Use at most as many."
            )

    @property
    def is_on_policy(self) -> bool:
        """Whether texts come from the distribution itself, and not from a changed one."""
        return (
            self.temperature == 1
            and self.top_p == 1
            and self.top_k == 0
            and self.min_p == 0
            and self.min_new_tokens == 0
        )

    @classmethod
    def of(
        cls, where: str, options: Mapping[str, Any], beside: Sequence[str] = ()
    ) -> SamplingConfig:
        """Make a config of the options that a user passed to a function.

        Args:
            where: The function's name, for errors.
            options: Fields by name.
            beside: Other arguments of the function, which the error for an unknown one lists too.

        Returns:
            The config; options that are not given take their defaults.

        Raises:
            UnknownOption: An option is no field.
            InvalidValue: A field has a value that cannot be right.
        """
        names = [field.name for field in fields(cls)]
        unknown = [name for name in options if name not in names]
        if unknown:
            raise UnknownOption(
                f"{where} has no option {unknown[0]!r}. It takes {', '.join([*beside, *names])}."
            )
        try:
            return cls(**options)
        except InvalidValue as error:
            raise InvalidValue(str(error).replace("SamplingConfig", where, 1)) from None

    def options(self) -> SamplingOptions:
        """Give the fields by name, to pass on as keyword arguments.

        Returns:
            All fields, those at their defaults too.
        """
        return cast(SamplingOptions, asdict(self))


def _read_stop(stop: Any) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop
    is_list = isinstance(texts, Sequence) and not isinstance(texts, bytes)
    if not is_list or not all(isinstance(text, str) for text in texts):
        raise InvalidValue(
            f"SamplingConfig got stop={shortened(stop)}. Use a text, or a tuple of texts."
        )
    return tuple(texts)
