"""The sampling fields of a request.

All are sent, since servers fill in from a model's generation_config.json whatever is missing.

A server that does not know a field refuses the request. Then the field is left out from there on: a
server cannot fill in a field that it does not know. Only fields with their neutral value are left
out; a value that was asked for is sent or an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from opdlab.data.sampling_config import SamplingConfig
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
# Servers leave the stop text out of a reply unless they are asked to keep it, as samplers here do.
KEEP_STOP = "include_stop_str_in_output"  # vLLM's name for it
REFUSED = (400, 422)  # statuses of a request that the server does not understand


def sampling_fields(config: SamplingConfig) -> dict[str, Any]:
    """Return the fields of a request that say how texts are drawn.

    All other ways to shape the distribution are switched off. Length and seed are not among the
    fields, since they differ from request to request.

    Args:
        config: The sampling settings.

    Returns:
        Values by name of field, as vLLM spells it. Only with stop texts, they include `stop` and a
        field that keeps the stop text; only with a least length, `min_tokens`, as vLLM and SGLang
        name it. A server that refuses it is heard in its own words.
    """
    fields = NEUTRAL | {
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k or NEUTRAL["top_k"],
        "min_p": config.min_p,
    }
    if config.min_new_tokens:
        fields |= {"min_tokens": config.min_new_tokens}
    if config.stop:
        fields |= {"stop": list(config.stop), KEEP_STOP: True}
    return fields


def without_refused(
    fields: Mapping[str, Any], refused: Collection[str], url: str
) -> dict[str, Any]:
    """Leave out the fields that a server refuses.

    Args:
        fields: The sampling fields of a request.
        refused: Names of the fields that the server refuses.
        url: The server's address, for the error.

    Returns:
        The other fields.

    Raises:
        OpdlabError: A refused field was given a value of its own, which the server could not
            honour.
    """
    for name in refused:
        value = fields.get(name)
        if name not in fields or value == NEUTRAL.get(name):
            continue
        if name == KEEP_STOP:
            raise OpdlabError(
                f"{url} takes no {KEEP_STOP}, so its texts would lack the text of stop= that ends"
                " them. Leave stop= out and cut the texts yourself, or use another server (vLLM has"
                " it)."
            )
        raise OpdlabError(
            f"{url} takes no {name}, so it cannot write at {name}={plain(value)}. Use"
            f" {name}={NEUTRAL[name]:g}, or another server."
        )
    return {name: value for name, value in fields.items() if name not in refused}


def refused_fields(error: TeacherError, sent: Collection[str], guess: bool) -> tuple[str, ...]:
    """Return which sampling fields of a refused request to leave out: those that the error names.

    Args:
        error: The server's answer.
        sent: Names of the sampling fields in the request. `stop` is never left out, so a server
            that refuses it is heard in its own words.
        guess: Where the error names none, take all of `EXTENSIONS`.

    Returns:
        Names; empty if no sampling field can be the reason.
    """
    if error.status not in REFUSED:
        return ()
    said = str(error)
    named = [name for name in sent if re.search(rf"(?<!\w){name}(?!\w)", said)]
    optional = tuple(name for name in named if name in NEUTRAL or name == KEEP_STOP)
    if named:
        return optional
    return tuple(name for name in sent if guess and name in EXTENSIONS)


def refuses_number(error: TeacherError) -> bool:
    """Tell whether a server refuses to give as many texts at once as it was asked for.

    Args:
        error: The server's answer.

    Returns:
        True if the request was not understood and the answer names the field `n`.
    """
    return error.status in REFUSED and re.search(r"['\"`]n['\"`]", str(error)) is not None
