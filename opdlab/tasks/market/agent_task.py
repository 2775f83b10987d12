"""The market with a tool as a task; see `agent` for the world."""

from __future__ import annotations

import random
from collections.abc import Sequence

from opdlab.data.prompt import Prompt
from opdlab.tasks.environments import Tools
from opdlab.tasks.market import agent
from opdlab.tasks.task import Split, Task

AGENTS = ("trainee", "clerk")
RECIPE = {"batch": 32, "lr": 1e-3, "lora": 16, "steps": 60}
MAX_TURNS = 6
MAX_NEW_TOKENS = 120  # after the prompt; a right conversation has at most 84


def market_with_tools() -> Task:
    """Make the task of errands whose prices only a tool knows.

    Returns:
        A task with an environment that draws fresh errands without end.
    """
    return Task(
        "market with tools",
        _draw,
        verify,
        MAX_NEW_TOKENS,
        settings={"tools": True},
        recipe=RECIPE,
        types=types,
        environment=Tools(agent.price, max_turns=MAX_TURNS),
        origin={"name": "market-tools"},
    )


def _draw(n: int, seed: int, split: Split) -> list[Prompt]:
    rng = random.Random(f"market with tools/{split}/{seed}")
    errands: list[agent.Errand] = []
    held: set[str] = set()
    while len(errands) < n:
        errand = agent.generate(rng, split)
        if split == "test" and errand.prompt() in held:
            continue
        held.add(errand.prompt())
        errands.append(errand)
    return [
        Prompt(
            messages=({"role": "user", "content": errand.prompt()},),
            answer=agent.bill(errand.prices()),
            id=f"{split}-{seed}-{i}",
        )
        for i, errand in enumerate(errands)
    ]


def verify(prompt: Prompt, text: str) -> float:
    """Return 1.0 if the text states the total of the reference answer, else 0.0.

    Args:
        prompt: The errand, with its bill as the answer.
        text: The student's last turn.

    Returns:
        1.0 or 0.0; the way to the total is not graded.
    """
    want = agent.total(prompt.answer or "")
    return float(want is not None and agent.total(text) == want)


def types(pieces: Sequence[str]) -> list[str]:
    """Return `agent.token_types`.

    Args:
        pieces: Tokens of a conversation, without their spaces.

    Returns:
        One type per token.
    """
    return agent.token_types(pieces)
