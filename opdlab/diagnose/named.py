"""Models and tasks by the names that a command line has for them."""

from __future__ import annotations

from pathlib import Path

import torch

from opdlab.errors import OpdlabError
from opdlab.models.policy import Policy
from opdlab.tasks import Task, from_records, market, reasoning_gym
from opdlab.tasks.market import MODELS, model
from opdlab.tasks.profiles import load, rule_task, smollm2

SMALL = "small"


def pair(student: str, teacher: str, task: str | None = None) -> tuple[Policy, Policy, Task | None]:
    """Two models and a task.

    A name is a shipped model's (student, novice, teacher, scribe), `small`, a folder's or the
    Hub's.

    A folder that is called like a shipped model is `./student`. `small small` is SmolLM2 and the
    same told a rule. One model given twice is loaded once. task: as `task_named`; by default the
    world that the names belong to, or none.
    """
    shipped = [name in MODELS for name in (student, teacher)]
    world = task_named(
        task or ("market" if any(shipped) else None)
    )  # first, since models take longer to load
    if all(shipped):
        torch.set_num_threads(
            1
        )  # as opdlab.load does: the models are so small that threads only wait for each other
    if student == teacher == SMALL:
        pupil, told, rule = load(SMALL)
        return pupil, told, world or rule
    first = _model(student)
    second = first.frozen() if teacher == student else _model(teacher)
    return first, second, world


def task_named(name: str | None) -> Task | None:
    """market, market-secret, rule, gym:NAME (a task of reasoning-gym) or a JSONL file."""
    if name is None:
        return None
    if name in ("market", "market-secret"):
        return market(secret=name != "market")
    if name == "rule":
        return rule_task()
    if name.startswith("gym:"):
        return reasoning_gym(name.removeprefix("gym:"))
    if Path(name).is_file():
        return from_records(name)
    raise OpdlabError(
        f"There is no task {name!r}. Use market, market-secret, rule, gym:NAME or a JSONL file."
    )


def _model(name: str) -> Policy:
    if name in MODELS:
        return model(name)
    if name == SMALL:
        return smollm2()
    try:
        return Policy.load(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OpdlabError(
            f"{name!r} is no shipped model ({', '.join((*MODELS, SMALL))}) and could not be loaded"
            f" as a folder or from the Hub ({reason}). Check the name, and the network for a Hub"
            " name."
        ) from error
