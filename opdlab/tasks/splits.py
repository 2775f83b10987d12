"""Tell whether prompts are the same, and divide a list of them into training and held-out ones.

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
    """Return the question of a prompt as one text, equal for equal questions only.

    Args:
        prompt: A prompt of text or of messages.

    Returns:
        JSON of the text or the messages; answer, hint and id do not count.
    """
    if prompt.messages is None:
        return json.dumps(prompt.text)
    return json.dumps([prompt.messages], sort_keys=True, default=str)


def distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return each question once, by the first of its prompts, in order.

    Args:
        prompts: Prompts, of which several may ask the same.

    Returns:
        The first prompt of each question.
    """
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(question_of(prompt), prompt)
    return list(first.values())


def count_distinct(prompts: Iterable[Prompt]) -> int:
    """Count the different questions among the prompts.

    Args:
        prompts: Prompts, of which several may ask the same.

    Returns:
        The number of questions.
    """
    return len({question_of(prompt) for prompt in prompts})


def split_prompts(
    prompts: Sequence[Prompt], test: int | float, name: str
) -> dict[str, list[Prompt]]:
    """Divide prompts into `train` and `test` so that no question is in both.

    Args:
        prompts: All of them. A question may come several times, as with several answers to learn
            from.
        test: Number or share of the different questions to hold out.
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
    order = random.Random(0).sample(range(len(questions)), len(questions))
    held = {questions[i] for i in order[:kept]}
    return {
        "train": [prompt for prompt in prompts if question_of(prompt) not in held],
        "test": distinct(prompt for prompt in prompts if question_of(prompt) in held),
    }


def check_disjoint(pool: Mapping[str, Sequence[Prompt]], name: str) -> None:
    """Check that no question is in both splits.

    Args:
        pool: The prompts by split, "train" and "test"; either may be missing.
        name: The task's name, for the error.

    Raises:
        InvalidValue: A question is in both.
    """
    training = {question_of(prompt) for prompt in pool.get("train", ())}
    shared = {question_of(prompt) for prompt in pool.get("test", ())} & training
    if shared:
        raise InvalidValue(
            f"{name} holds out {len(shared)} prompts that it also trains on, as {min(shared)[:80]}."
            " Give each prompt to one split, or let opdlab.tasks.from_prompts divide them."
        )
