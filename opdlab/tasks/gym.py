"""Any task of the reasoning-gym package, which generates prompts and checks answers.

Different seeds can yield the same question, so the split is decided by the question and not by the
seed: a quarter of all questions, by a checksum of their text, is held out.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import random
from functools import lru_cache
from typing import Any

from opdlab.data.prompt import Prompt
from opdlab.errors import EmptyPrompts, InvalidValue, OpdlabError
from opdlab.support.expect import shortened
from opdlab.support.validation import Count, Flag, validate
from opdlab.tasks.task import Split, Task

# Entries that are generated with one dataset of the package: some divide theirs by its size.
CHUNK = 64
PATIENCE = 256  # entries in a row without a new question of a split, before it counts as exhausted


def reasoning_gym(
    name: str, *, chat: bool = True, max_new_tokens: int = 256, **config: Any
) -> Task:
    """Make a task of a dataset of reasoning-gym, as `reasoning_gym("chain_sum", max_terms=3)`.

    Args:
        name: The dataset's name.
        chat: Whether to ask in a chat or in plain text.
        max_new_tokens: Length limit of an answer, in tokens.
        config: Goes to the package. If it allows too few questions, fewer held-out prompts than
            asked for come back.

    Returns:
        A task that draws fresh prompts without end and verifies with the package's own scorer.

    Raises:
        OpdlabError: The package is not installed.
        InvalidValue: The package has no such dataset, or the dataset no such configuration.
    """
    try:
        import reasoning_gym as gym
    except ImportError as error:
        raise OpdlabError(
            "reasoning-gym is not installed. Install it: pip install 'opdlab[notebooks]'."
        ) from error
    chat = validate("reasoning_gym", {"chat": chat}, {"chat": Flag})["chat"]
    validate("reasoning_gym", {"max_new_tokens": max_new_tokens}, {"max_new_tokens": Count})
    _check_dataset(gym, name, config)

    @lru_cache(maxsize=256)
    def chunk(seed: int, split: Split, number: int) -> Any:
        # The package draws entry i from seed + i: neighbouring seeds would share nearly all their
        # prompts.
        start = random.Random(seed).randrange(1 << 30) + (split == "test") * (1 << 30)
        return gym.create_dataset(name, size=CHUNK, seed=start + CHUNK * number, **config)

    @lru_cache(maxsize=4096)
    def entry(seed: int, split: Split, i: int) -> dict[str, Any]:
        return dict(chunk(seed, split, i // CHUNK)[i % CHUNK])

    def draw(n: int, seed: int, split: Split) -> list[Prompt]:
        prompts: list[Prompt] = []
        held: set[str] = set()
        last = 0  # the entry after which nothing new was found
        for i in itertools.count():
            if len(prompts) == n or i - last > PATIENCE:
                break
            found = entry(seed, split, i)
            question = str(found["question"])
            if _split_of(question) != split or question in held:
                continue
            if split == "test":
                held.add(question)
            last = i
            asked: dict[str, Any] = (
                {"messages": ({"role": "user", "content": question},)}
                if chat
                else {"text": question}
            )
            prompts.append(
                Prompt(**asked, answer=str(found["answer"]), id=f"{name}/{seed}/{split}/{i}")
            )
        if not prompts:
            raise EmptyPrompts(
                f"{name} has too few questions to give any to the {split} split. Use a wider"
                " configuration."
            )
        return prompts

    def verify(prompt: Prompt, text: str) -> float:
        # The entry holds more than the prompt, and the prompt's id leads to it.
        _, seed, split, i = prompt.id.rsplit("/", 3)
        place: tuple[int, Split] = (int(seed), "test" if split == "test" else "train")
        scorer = chunk(*place, int(i) // CHUNK)
        return float(scorer.score_answer(answer=text.strip(), entry=entry(*place, int(i))))

    origin = {"name": f"gym:{name}", "chat": chat, "max_new_tokens": max_new_tokens, **config}
    return Task(name, draw, verify, max_new_tokens, {**config, "chat": chat}, origin=origin)


def _split_of(question: str) -> Split:
    return "train" if hashlib.sha256(question.encode()).digest()[0] % 4 else "test"


def _check_dataset(gym: Any, name: str, config: dict[str, Any]) -> None:
    known = sorted(gym.factory.DATASETS)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 3) or known[:3]
        raise InvalidValue(
            f"reasoning-gym has no dataset {shortened(name)}. Use one of its {len(known)} names, as"
            f" {', '.join(near)}."
        )
    try:
        gym.create_dataset(name, size=1, seed=0, **config)
    except (AssertionError, TypeError, ValueError) as error:
        raise InvalidValue(
            f"reasoning-gym refuses the configuration {config} of {name!r}: {error}. Use the fields"
            " of that dataset's own configuration."
        ) from error
