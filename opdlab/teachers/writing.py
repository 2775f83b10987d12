"""Ask a teacher for texts: every sampling setting reaches its `write`, or is refused."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from opdlab.data.prompt import Prompt
from opdlab.data.sampling_config import SamplingConfig
from opdlab.errors import InvalidValue
from opdlab.models.protocols import Writer

ALWAYS = ("max_new_tokens", "seed")  # passed on whatever they are; a writer may lack neither


def write_texts(
    writer: Writer, prompts: Sequence[Prompt], n: int, config: SamplingConfig
) -> list[list[str]]:
    """Let a teacher write `n` texts for each prompt.

    Raises:
        InvalidValue: The config has a value that this teacher's `write` cannot be told.
    """
    texts = writer.write(prompts, n, **options_for(writer, config))
    return [list(row) for row in texts]


def options_for(writer: Writer, config: SamplingConfig) -> dict[str, Any]:
    """Return the options that `writer.write` takes; those that change nothing are left out where it lacks them.

    Raises:
        InvalidValue: The config has a value that this teacher's `write` cannot be told.
    """
    options = dict(config.options())
    neutral = dict(SamplingConfig().options())
    changed = {name for name, value in options.items() if value != neutral[name]}
    needed = changed | {*ALWAYS, "temperature", "top_p"}
    takes = _parameters(writer)
    if takes is None:
        return {name: value for name, value in options.items() if name in needed}
    for name in sorted(changed - takes - set(ALWAYS)):
        usual = neutral[name]
        raise InvalidValue(
            f"The run has {name}={options[name]}, but the teacher's {type(writer).__name__}.write takes no {name}, so its"
            f" texts would be sampled otherwise. Use {name}={usual!r}, or give write an argument {name}."
        )
    return {
        name: value for name, value in options.items() if name in needed & (takes | set(ALWAYS))
    }


def _parameters(writer: Writer) -> set[str] | None:
    """The names that `writer.write` takes; None if it takes any."""
    try:
        parameters = inspect.signature(writer.write).parameters
    except (TypeError, ValueError):  # something callable that does not tell
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return set(parameters)
