"""Which prompts count as the same, and how a list of prompts is divided into training and held-out
ones.

Two prompts are the same where the student would read the same: equal text, or equal messages.
Answers, hints and ids do not count, so a question that comes with two answers is one question and
lies in one split.
"""

from __future__ import annotations

import json
import numbers
import random
from collections.abc import Iterable, Mapping, Sequence

from opdlab.data.prompt import Prompt
from opdlab.errors import EmptyPrompts, InvalidValue
from opdlab.support.validation import CountOrZero, Share, validate


def question_of(prompt: Prompt) -> str:
    """What the student is asked, as one text that is equal for equal prompts and differs for
    others.
    """
    if prompt.messages is None:
        return json.dumps(prompt.text)
    return json.dumps([prompt.messages], sort_keys=True, default=str)


def distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The prompts in their order, each question once (the first of its prompts)."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(question_of(prompt), prompt)
    return list(first.values())


def count_distinct(prompts: Iterable[Prompt]) -> int:
    """How many different questions there are among the prompts."""
    return len({question_of(prompt) for prompt in prompts})


def split_prompts(
    prompts: Sequence[Prompt], test: int | float, name: str
) -> dict[str, list[Prompt]]:
    """Divide prompts into `train` and `test` so that no question is in both.

    Args:
        prompts: All of them. A question may come several times, as with several answers to learn
            from.
        test: How many different questions to hold out, as a number or as a share.
        name: The task's name, for errors.

    Returns:
        `test` holds each of its questions once (its first prompt), `train` all prompts of the other
        questions.

    Raises:
        EmptyPrompts: Nothing is left to train on.
        InvalidValue: `test` is no number or share.
    """
    validate(name, {"test": test}, {"test": CountOrZero | Share})
    is_share = not isinstance(test, numbers.Integral)
    questions = list(dict.fromkeys(question_of(prompt) for prompt in prompts))
    kept = round(test * len(questions)) if is_share else int(test)
    if kept >= len(questions):
        raise EmptyPrompts(
            f"{name} has {len(questions)} prompts and {kept} are kept for testing. Give more, or a"
            " smaller test=."
        )
    held = {
        questions[i] for i in random.Random(0).sample(range(len(questions)), len(questions))[:kept]
    }
    return {
        "train": [prompt for prompt in prompts if question_of(prompt) not in held],
        "test": distinct(prompt for prompt in prompts if question_of(prompt) in held),
    }


def check_disjoint(pool: Mapping[str, Sequence[Prompt]], name: str) -> None:
    """Raise InvalidValue where a question is in both splits."""
    shared = {question_of(p) for p in pool.get("train", ())} & {
        question_of(p) for p in pool.get("test", ())
    }
    if shared:
        raise InvalidValue(
            f"{name} holds out {len(shared)} prompts that it also trains on, as {min(shared)[:80]}."
            " Give each prompt to one split, or let opdlab.tasks.from_prompts divide them."
        )
