"""Get to know a server by one request: its model's name, and the fields that it understands."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from opdlab.errors import TeacherError
from opdlab.teachers.asking import check_no_error
from opdlab.teachers.redaction import plain
from opdlab.teachers.reply import Fault
from opdlab.teachers.sampling import REFUSED

# `transformers serve` is greedy without this field.
SAMPLE = {"generation_config": json.dumps({"do_sample": True, "top_k": 0, "top_p": 1.0})}
LONGEST_NAME = 512  # characters of a model's name
TRANSFORMERS = "@main"  # the end of names that `transformers serve` gives

# Sends a greeting with these fields, and with or without a guess at the field that is refused (see
# `TextServer.post`); returns the model's name and how many texts came.
Ask = Callable[[dict[str, int], bool], tuple[str, int]]


@dataclass(frozen=True)
class Introduction:
    """Facts about a server, as they are kept in the cache.

    Attributes:
        model: The model's name to ask for.
        names: Names under which the server answers.
        extra: Further fields that it needs.
        limit: Its name for the length limit.
        several: Whether it gives several texts for one request.
        refused: Sampling fields that it does not know.
    """

    model: str
    names: tuple[str, ...]
    extra: dict[str, Any]
    limit: str
    several: bool
    refused: tuple[str, ...]

    @classmethod
    def of_json(cls, kept: Mapping[str, Any]) -> Introduction:
        """Read an introduction from the cache.

        Args:
            kept: Data from `as_json`, after a round trip through JSON.

        Returns:
            The introduction.
        """
        return cls(**{**kept, "names": tuple(kept["names"]), "refused": tuple(kept["refused"])})

    def as_json(self) -> dict[str, Any]:
        """Return plain data for the cache.

        Returns:
            The fields by name, all of them JSON data.
        """
        return asdict(self)


def greet(ask: Ask, limit: str) -> Introduction:
    """Ask for two texts of one token, in one way after the other until the server answers.

    Args:
        ask: Sends the request.
        limit: The name for the length limit to try first.

    Returns:
        The facts; `refused` is left empty.

    Raises:
        TeacherError: The server gives no usable answer.
    """
    fields, guess = {limit: 1, "n": 2}, False
    while True:
        try:
            name, texts = ask(fields, guess)
            break
        except TeacherError as error:
            fields, guess = _after_refusal(fields, guess, error)
    return Introduction(
        model=name.removesuffix(TRANSFORMERS),
        names=(name,),
        extra=SAMPLE if name.endswith(TRANSFORMERS) else {},
        limit=next(iter(fields)),
        several=texts > 1,
        refused=(),
    )


def read_name(
    reply: Mapping[str, Any], model: str | None, without_key: Callable[[str], str]
) -> tuple[str, int]:
    """Read the model's name in a reply to a greeting.

    Args:
        reply: The reply.
        model: The user's name for the model, if there is one.
        without_key: Removes the key from a text.

    Returns:
        The name, and how many texts the reply has.

    Raises:
        Fault: The reply is no answer, or another model's.
    """
    name, listed = reply.get("model"), reply.get("choices")
    if not isinstance(name, str) or not name or not isinstance(listed, list) or not listed:
        raise Fault("the reply has no model or no choices")
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise Fault(f"the model's name is none: {plain(name)!r}")
    if without_key(name) != name:
        raise Fault(
            "the model's name holds the key, which would be kept with the answers", final=True
        )
    for choice in listed:
        check_no_error(choice)
    if len(listed) > 2:
        raise Fault(f"{len(listed)} texts came where 2 were asked for")
    # The name may be a dated snapshot's, or lack the part that a router's name begins with.
    if model and not (name.startswith(model) or model.endswith(f"/{name}")):
        raise Fault(
            f"the model {plain(name)!r} answered and not {model!r}. Name it as the server does, or"
            " leave model= out"
        )
    return name, len(listed)


def _after_refusal(
    fields: dict[str, int], guess: bool, error: TeacherError
) -> tuple[dict[str, int], bool]:
    """The fields and the guess of the next greeting, after a server refused one.

    If the server does not name the field that it refuses, `n` goes first: without it texts come
    one at a time, which changes none of them.

    Raises:
        TeacherError: Nothing is left to try; it is `error` itself.
    """
    if error.status not in REFUSED:
        raise error
    limit, many = next(iter(fields)), {"n": 2}
    if "max_completion_tokens" in str(error) and limit == "max_tokens":
        return {"max_completion_tokens": 1, **many}, False
    if "n" in fields:
        return {limit: 1}, guess
    if not guess:
        return {limit: 1, **many}, True
    raise error
