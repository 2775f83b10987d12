"""Random numbers of a batch that several processes share: they follow the place of a prompt.

A process that writes some of a batch's texts says where each of its prompts stands in the whole
batch (`places`). The texts are then those that one process would write.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from typing import Any

from opdlab.errors import InvalidValue
from opdlab.support.expect import shortened
from opdlab.support.validation import WholeNumbers, validate


def read_places(places: Any, prompts: int) -> list[int] | None:
    """Read where each prompt stands in the batch of all processes.

    Args:
        places: As the caller gave them; None for a batch that nobody else shares.
        prompts: How many prompts there are.

    Returns:
        One number from 0 for each prompt, or None.

    Raises:
        InvalidValue: There is not one number for each prompt, or one is negative.
    """
    if places is None:
        return None
    read = validate("sample", {"places": places}, {"places": WholeNumbers})
    numbers = list(read["places"])
    if len(numbers) != prompts or any(place < 0 for place in numbers):
        raise InvalidValue(
            f"sample got places={shortened(numbers)} for {prompts} prompts. Use one number from 0"
            " for each prompt, or leave it out."
        )
    return numbers


def seeded(
    write: Callable[..., Any], seed: int, places: Sequence[int] | None, process: int
) -> dict[str, Any]:
    """Return the options that decide the random numbers of a call.

    Args:
        write: The method that is called, `sample` or `write` of a policy or a teacher.
        seed: The seed of the whole batch.
        places: Where each prompt of the call stands in the batch; None for a batch that nobody
            else shares.
        process: Number of this process.

    Returns:
        `seed`, with `places` where the method takes them by name. Another method gets a seed of
        this process's own, so that no two processes draw the same numbers.
    """
    if places is None:
        return {"seed": seed}
    if takes_places(write):
        return {"seed": seed, "places": list(places)}
    return {"seed": random.Random(f"{seed} in process {process}").randrange(2**48)}


def takes_places(write: Callable[..., Any]) -> bool:
    """Tell whether a method takes `places` by name.

    Args:
        write: `sample` or `write` of a policy or a teacher.

    Returns:
        True if it does; False for one that only takes any keywords.
    """
    try:
        return "places" in inspect.signature(write).parameters
    except (TypeError, ValueError):  # some callables do not tell
        return False
