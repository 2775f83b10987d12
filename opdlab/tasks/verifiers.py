"""Verifiers by name, for config files: plain functions of a prompt and a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from opdlab.data.prompt import Prompt
from opdlab.tasks.answers import same_answer


def exact(prompt: Prompt, text: str) -> float:
    """Return 1.0 if the text is the reference answer, but for space at its ends, else 0.0.

    Args:
        prompt: The question with its answer.
        text: The text to grade.

    Returns:
        1.0 or 0.0.
    """
    return float(prompt.answer is not None and text.strip() == prompt.answer.strip())


def contains(prompt: Prompt, text: str) -> float:
    """Return 1.0 if the reference answer stands somewhere in the text, else 0.0.

    Args:
        prompt: The question with its answer.
        text: The text to grade.

    Returns:
        1.0 or 0.0.
    """
    return float(bool(prompt.answer and prompt.answer.strip() in text))


def same_json(prompt: Prompt, text: str) -> float:
    """Return 1.0 if the text is JSON and, where the prompt has an answer, equals it as JSON.

    Args:
        prompt: The question; its answer, if it has one, is JSON.
        text: The text to grade.

    Returns:
        1.0 or 0.0.
    """
    try:
        said = json.loads(text)
        return float(prompt.answer is None or said == json.loads(prompt.answer))
    except (ValueError, RecursionError):
        return 0.0


VERIFIERS: Mapping[str, Callable[[Prompt, str], Any]] = {
    "answer": same_answer,
    "exact": exact,
    "contains": contains,
    "json": same_json,
}
