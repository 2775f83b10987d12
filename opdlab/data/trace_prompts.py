"""Keep the prompts of a rollout in its trace, so that policies can read them again.

The metadata `rollout` holds each different prompt once, as policies read it: its text or messages,
its tools, its hint and its id. Answers and other metadata of prompts are not kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from opdlab.data.prompt import ChatHint, Prompt
from opdlab.data.rollout import Rollout


def describe_rollout(rollout: Rollout) -> dict[str, Any]:
    """Describe the prompts and the origin of a rollout as plain data.

    Args:
        rollout: The rollout.

    Returns:
        `prompts`, each different one once; `of`, the number of the prompt of each completion;
        `writer`, `n` and `vocabulary` as the rollout has them. Empty if JSON cannot hold the
        prompts.
    """
    try:
        records = [json.dumps(_describe_prompt(prompt)) for prompt in rollout.prompts]
    except (TypeError, ValueError, RecursionError):  # a chat may hold anything beside its contents
        return {}
    return {
        **_number(records),
        "writer": list(rollout.writer),
        "n": rollout.n,
        "vocabulary": rollout.vocabulary,
    }


def read_prompts(described: Mapping[str, Any]) -> list[Prompt]:
    """Read the prompt of each completion from what `describe_rollout` made.

    Args:
        described: The description.

    Returns:
        The prompts, in the order of the completions.
    """
    prompts = [_read_prompt(record) for record in described["prompts"]]
    return [prompts[number] for number in described["of"]]


def merge_descriptions(
    parts: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Merge the descriptions of the parts of one rollout.

    Args:
        parts: The description of each part.
        rows: For each part, the number of each of its completions in the whole.

    Returns:
        The description of the whole.
    """
    records: dict[int, str] = {}
    writers: dict[int, str] = {}
    for part, numbers in zip(parts, rows, strict=True):
        for row, number in enumerate(numbers):
            records[number] = json.dumps(part["prompts"][part["of"][row]])
            writers[number] = part["writer"][row]
    order = sorted(records)
    return {
        **parts[0],
        **_number([records[number] for number in order]),
        "writer": [writers[number] for number in order],
    }


def _number(records: Sequence[str]) -> dict[str, Any]:
    """Each different record once, and the number of the record of each completion."""
    numbers = {record: number for number, record in enumerate(dict.fromkeys(records))}
    return {
        "prompts": [json.loads(record) for record in numbers],
        "of": [numbers[record] for record in records],
    }


def _describe_prompt(prompt: Prompt) -> dict[str, Any]:
    hint: Any = prompt.hint
    if isinstance(hint, ChatHint):
        hint = {"messages": list(hint.messages)}
    fields = {
        "text": prompt.text,
        "messages": prompt.messages,
        "tools": prompt.tools or None,
        "hint": hint,
        "id": prompt.id or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _read_prompt(record: Mapping[str, Any]) -> Prompt:
    fields = dict(record)
    if isinstance(fields.get("hint"), Mapping):
        fields["hint"] = ChatHint(fields["hint"]["messages"])
    return Prompt(**fields)
