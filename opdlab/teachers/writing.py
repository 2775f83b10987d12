"""Ask somebody who is no local policy for texts: sampling settings reach their `write`, or are
refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from opdlab.errors import InvalidValue

NEUTRAL = {"temperature": 1.0, "top_p": 1.0}  # sampling settings that change nothing


def writing_options(writer: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that `writer.write` takes; those that it lacks are left out where they
    change nothing.

    Args:
        writer: A teacher with `write(prompts, n, …)`, one of `opdlab.teachers` or a user's own.
        options: `max_new_tokens`, `temperature`, `top_p` and `seed` of the run.

    Raises:
        InvalidValue: The run samples at a temperature or top_p that this teacher cannot be told.
    """
    try:
        parameters = inspect.signature(writer.write).parameters
    except (TypeError, ValueError):  # something callable that does not tell
        return dict(options)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(options)
    for name, neutral in NEUTRAL.items():
        if name not in parameters and options.get(name, neutral) != neutral:
            raise InvalidValue(
                f"The run has {name}={options[name]}, but the teacher's"
                f" {type(writer).__name__}.write takes no {name}, so its texts would be sampled"
                f" otherwise. Use {name}={neutral:g}, or give write an argument {name}."
            )
    return {
        name: value for name, value in options.items() if name in parameters or name not in NEUTRAL
    }
