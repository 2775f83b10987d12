"""Any task of the reasoning-gym package, which generates prompts and checks answers."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

from opdlab.errors import OpdlabError
from opdlab.policy import Prompt
from opdlab.tasks.task import Split, Task


def reasoning_gym(name: str, *, chat: bool = True, max_new_tokens: int = 256, **config: Any) -> Task:
    """`reasoning_gym("chain_sum", num_terms=3)`; the config goes to the package. Train and test use different seeds."""
    try:
        import reasoning_gym as gym
    except ImportError as error:
        raise OpdlabError("reasoning-gym is not installed. Install it: pip install 'opdlab[notebooks]'.") from error

    @lru_cache(64)
    def dataset(n: int, seed: int, split: Split) -> Any:
        # The package draws entry i from seed + i: neighbouring seeds would share nearly all their prompts.
        start = random.Random(seed).randrange(1 << 30) + (split == "test") * (1 << 30)
        return gym.create_dataset(name, size=n, seed=start, **config)

    def draw(n: int, seed: int, split: Split) -> list[Prompt]:
        out = []
        for i, entry in enumerate(dataset(n, seed, split)):
            asked = {"messages": ({"role": "user", "content": entry["question"]},)} if chat else {"text": entry["question"]}
            out.append(Prompt(**asked, answer=str(entry["answer"]), id=f"{name}/{n}/{seed}/{split}/{i}"))
        return out

    def verify(prompt: Prompt, text: str) -> float:
        _, n, seed, split, i = prompt.id.rsplit("/", 4)
        data = dataset(int(n), int(seed), split)
        return float(data.score_answer(answer=text.strip(), entry=data[int(i)]))

    return Task(name, draw, verify, max_new_tokens, config)
