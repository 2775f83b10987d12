"""The sampling fields of a request.

All are sent, since servers fill what is missing from a model's generation_config.json.

A server that does not know a field refuses the request. Then the field is left out from there on: a
server cannot fill in what it does not know. Only fields with their neutral value are left out; a
value that was asked for is sent or an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from opdlab.errors import OpdlabError, TeacherError
from opdlab.teachers.redaction import plain

# Fields of OpenAI's API, and those that vLLM, SGLang and llama.cpp add, each with the value that
# changes nothing. top_k is off at -1: 0 is refused by older vLLM and by SGLang.
STANDARD: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
EXTENSIONS: dict[str, Any] = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
NEUTRAL = STANDARD | EXTENSIONS
REFUSED = (400, 422)  # statuses of a request that the server does not understand


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn; everything else is switched off."""

    temperature: float = 1.0
    top_p: float = 1.0

    def fields(self) -> dict[str, Any]:
        """Return the fields of a request."""
        return NEUTRAL | {"temperature": self.temperature, "top_p": self.top_p}


def without(fields: Mapping[str, Any], refused: Collection[str], url: str) -> dict[str, Any]:
    """Leave out the fields that a server refuses.

    Raises:
        OpdlabError: One of them was given a value of its own, which the server could not honour.
    """
    for name in refused:
        if fields.get(name, NEUTRAL[name]) != NEUTRAL[name]:
            raise OpdlabError(
                f"{url} takes no {name}, so it cannot write at {name}={plain(fields[name])}. "
                f"Use {name}={NEUTRAL[name]:g}, or another server."
            )
    return {name: value for name, value in fields.items() if name not in refused}


def refused_fields(error: TeacherError, sent: Collection[str], guess: bool) -> tuple[str, ...]:
    """Return which sampling fields of a refused request to leave out: those that the error names.

    Args:
        error: What the server answered.
        sent: Names of the sampling fields in the request that may be left out.
        guess: Where the error names none, take all of `EXTENSIONS`.

    Returns:
        Names, or nothing where no sampling field can be the reason.
    """
    if error.status not in REFUSED:
        return ()
    said = str(error)
    named = tuple(name for name in sent if re.search(rf"(?<!\w){name}(?!\w)", said))
    return named or tuple(name for name in sent if guess and name in EXTENSIONS)
