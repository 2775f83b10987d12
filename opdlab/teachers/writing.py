"""Pass a run's sampling settings to a teacher's `write`: each reaches it, or is refused."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from opdlab.data.prompt import Prompt
from opdlab.data.sampling_config import SamplingConfig
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.models.places import seeded
from opdlab.models.protocols import Writer

NEEDED = ("max_new_tokens", "seed")  # options that a run sets anew in every step
USUAL = ("temperature", "top_p")  # options that are passed on even where they change nothing


def write_texts(
    writer: Writer,
    prompts: Sequence[Prompt],
    n: int,
    config: SamplingConfig,
    places: Sequence[int] | None = None,
    process: int = 0,
) -> list[list[str]]:
    """Let a teacher write `n` texts for each prompt.

    Args:
        writer: The teacher.
        prompts: The questions.
        n: Texts for each prompt.
        config: The sampling settings, with length limit and seed.
        places: Where each prompt stands in a batch that several processes share; None for a batch
            of this process alone.
        process: Number of this process.

    Returns:
        One list for each prompt, with `n` texts.

    Raises:
        InvalidValue: The teacher's `write` cannot be told a value of the config.
        OpdlabError: The teacher gave another number of texts.
    """
    options = options_for(writer, config)
    options |= seeded(writer.write, config.seed, places, process)
    texts = [list(row) for row in writer.write(prompts, n, **options)]
    counts = [len(row) for row in texts]
    if counts != [n] * len(prompts):
        raise OpdlabError(
            f"The teacher's {type(writer).__name__}.write gave {counts} texts for {len(prompts)}"
            f" prompts. Let it return one list for each prompt, with n={n} texts."
        )
    return texts


def options_for(writer: Writer, config: SamplingConfig) -> dict[str, Any]:
    """Return the options to call `writer.write` with.

    Options that change nothing are left out if the writer does not take them by name, so a teacher
    of a user's own needs few arguments.

    Args:
        writer: The teacher.
        config: The sampling settings, with length limit and seed.

    Returns:
        Keyword arguments by name: `NEEDED`, all that differ from the neutral value, and `USUAL` if
        the writer takes them.

    Raises:
        InvalidValue: The writer takes no length or seed, or lacks an option that the config sets.
    """
    options = dict(config.options())
    neutral = dict(SamplingConfig().options())
    changed = {name for name, value in options.items() if value != neutral[name]}
    takes = _keywords(writer, set(options))
    owner = f"{type(writer).__name__}.write"
    for name in NEEDED:
        if name not in takes:
            raise InvalidValue(
                f"The teacher's {owner} takes no {name}, which a run sets in every step. Give write"
                f" a keyword argument {name}, or **options."
            )
    for name in sorted(changed - takes):
        raise InvalidValue(
            f"The run has {name}={options[name]}, but the teacher's {owner} takes no {name}, so its"
            f" texts would be sampled otherwise. Use {name}={neutral[name]!r}, or give write an"
            f" argument {name}."
        )
    passed = (changed | {*NEEDED, *USUAL}) & takes
    return {name: value for name, value in options.items() if name in passed}


def _keywords(writer: Writer, names: set[str]) -> set[str]:
    """Those of `names` that `writer.write` takes as keyword arguments."""
    try:
        parameters = inspect.signature(writer.write).parameters
    except (TypeError, ValueError):  # some callables do not tell
        return names
    kinds = [parameter.kind for parameter in parameters.values()]
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return names
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    return names & {
        name for name, parameter in parameters.items() if parameter.kind not in positional
    }
