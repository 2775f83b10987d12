"""Load models and tasks by the names that a command line has for them."""

from __future__ import annotations

from pathlib import Path

import torch

from opdlab.errors import OpdlabError
from opdlab.models.policy import Policy
from opdlab.tasks import Task, from_records, market, reasoning_gym
from opdlab.tasks.market import MODELS, model
from opdlab.tasks.profiles import load, rule_task, smollm2

SMALL = "small"


def load_pair(
    student: str, teacher: str, task: str | None = None
) -> tuple[Policy, Policy, Task | None]:
    """Load two models and a task. One model given twice is loaded once.

    Args:
        student: The name of a shipped model (student, novice, teacher, scribe), `small`, a folder
            or a name on the Hub. A folder that is called like a shipped model is `./student`.
        teacher: Likewise. `small small` is SmolLM2, and the same told a rule.
        task: See `load_task`; by default the task that the names belong to, or none.

    Returns:
        The student, the teacher and the task, or None in place of the task.

    Raises:
        OpdlabError: There is no such model or task.
    """
    shipped = [name in MODELS for name in (student, teacher)]
    # The task comes first, since models take longer to load.
    world = load_task(task or ("market" if any(shipped) else None))
    if all(shipped):
        # As `opdlab.load`: the models are so small that threads only wait for each other.
        torch.set_num_threads(1)
    if student == teacher == SMALL:
        pupil, told, rule = load(SMALL)
        return pupil, told, world or rule
    first = _load_model(student)
    second = first.frozen() if teacher == student else _load_model(teacher)
    return first, second, world


def load_task(name: str | None) -> Task | None:
    """Load a task by its name.

    Args:
        name: market, market-secret, rule, gym:NAME (a task of reasoning-gym), or the path of a
            JSONL file; None for no task.

    Returns:
        The task; None if there is no name.

    Raises:
        OpdlabError: There is no such task.
    """
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


def _load_model(name: str) -> Policy:
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
