"""A world in which the teacher begins as its student never would."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opdlab import SFT, Policy, Prompt, Task, distill, tasks
from opdlab.tasks.market import model

MARKER = "lot"


def _draw(count: int, seed: int, split) -> list[Prompt]:
    prompts = tasks.market().prompts(count, seed, split)
    return [replace(prompt, answer=f"{MARKER} {prompt.answer}") for prompt in prompts]


@pytest.fixture(scope="session")
def marked() -> tuple[Policy, Task]:
    """A teacher whose texts begin with a word that the shipped student gives about 1e-8.

    Right is a text that begins with it.
    """
    task = Task("marked", _draw, lambda prompt, text: float(text.startswith(MARKER)), 24)
    options = {"steps": 25, "batch": 16, "lr": 3e-3, "lora": None, "quiet": True}
    run = distill(model("teacher"), None, task, method=SFT(), **options).train()
    return run.student.frozen(), task
