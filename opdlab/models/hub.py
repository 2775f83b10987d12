"""Reach the Hugging Face Hub, or go on with its cache at once where it does not answer.

The Hub's libraries try again for 45 s when there is no network, even for models that are in the
cache already. One request tells whether trying makes sense.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar
from unittest.mock import patch

from huggingface_hub import constants, get_session

TIMEOUT = 10  # seconds: as long as huggingface_hub waits for an answer
NAMES_SOURCES = ("source", "adapter", "tokenizer")  # arguments that may be names on the Hub

Parameters = ParamSpec("Parameters")
Loaded = TypeVar("Loaded")


def from_cache_if_unreachable(
    load: Callable[Parameters, Loaded],
) -> Callable[Parameters, Loaded]:
    """Make a function that loads from the Hub look only into the cache if the Hub does not answer.

    Args:
        load: The function. Names on the Hub are its positional arguments and those called source,
            adapter or tokenizer.

    Returns:
        A function with the same arguments.
    """

    @functools.wraps(load)
    def loads(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Loaded:
        with cache_if_unreachable(*args, *(kwargs.get(name) for name in NAMES_SOURCES)):
            return load(*args, **kwargs)

    return loads


@contextmanager
def cache_if_unreachable(*sources: object) -> Iterator[None]:
    """Let the Hub's libraries look only into their cache in the block, if the Hub does not answer.

    Nothing is asked if all sources are on this machine, or in offline mode.

    Args:
        sources: What is loaded in the block. Strings and paths that do not exist are names on the
            Hub; anything else is not looked up.

    Yields:
        Nothing. A warning says that the Hub does not answer.
    """
    failure = None
    if any(_is_on_hub(source) for source in sources) and not constants.HF_HUB_OFFLINE:
        failure = _ask()
    if failure is None:
        yield
        return
    warnings.warn(
        f"The Hub at {constants.ENDPOINT} does not answer ({failure}), so models are loaded from"
        f" its cache in {constants.HF_HUB_CACHE}.",
        stacklevel=4,
    )
    with patch.object(constants, "HF_HUB_OFFLINE", True):
        yield


def _is_on_hub(source: object) -> bool:
    if not isinstance(source, (str, os.PathLike)) or not str(source).strip():
        return False
    return "\0" not in str(source) and not Path(source).expanduser().exists()


def _ask() -> str | None:
    """Ask the Hub once; returns what went wrong, or None if it answers, with whatever status."""
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # huggingface_hub changed its HTTP library, and each has its own
        return type(error).__name__
    return None
