"""Load what `opdlab doctor` looks at: two models by name, or the pair of a config file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opdlab.errors import OpdlabError
from opdlab.models.policy import Policy
from opdlab.tasks import Task
from opdlab.tasks.by_name import load_pair
from opdlab.training.config import read_config, read_toml
from opdlab.training.configured import load_parts
from opdlab.training.settings import make_settings

Planned = tuple[Policy, Any, Task | None, dict[str, Any]]


def load_named_pair(student: str, teacher: str, task: str | None) -> Planned:
    """Load two models by name.

    Args:
        student: The student's name.
        teacher: The teacher's name.
        task: A task's name; None for the models' own.

    Returns:
        Student, teacher, task, and no settings.
    """
    return (*load_pair(student, teacher, task), {})


def load_planned_pair(source: str, task: str | None) -> Planned:
    """Load the pair of a config, with the settings of the run that it describes.

    Args:
        source: The path of the config.
        task: A task beside it, which is refused.

    Returns:
        Student, teacher, task, and the settings that the run would have.

    Raises:
        OpdlabError: It is no config, or one that has no teacher.
    """
    if not source.endswith(".toml"):
        raise OpdlabError(
            f"doctor got {source!r} alone. Give two models, as `opdlab doctor STUDENT TEACHER`, or"
            " the config of a run, as `opdlab doctor config.toml`."
        )
    if task is not None:
        raise OpdlabError(f"doctor got a task beside {source}, which has its own. Leave it out.")
    config = read_config(read_toml(source), Path(source).expanduser().parent, source)
    if config.teacher is None:
        raise OpdlabError(
            f"{source} has no [teacher], so there is no pair to look at. A method that is its own"
            " teacher needs no doctor: begin with `opdlab distill`."
        )
    parts = load_parts(config)
    # What recipes of method and task say counts for the cost of a step too.
    settings = vars(make_settings(config.settings, parts.method, parts.task))
    others = {name: value for name, value in settings.items() if name != "seed"}  # of the run
    return parts.student, parts.teacher, parts.task, others
