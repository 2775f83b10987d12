"""Load models and tasks by the names that command lines and config files have for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from opdlab.engine.needs import did_you_mean
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.models.policy import Policy
from opdlab.tasks import Task, from_records, market, reasoning_gym
from opdlab.tasks.market import MODELS, data
from opdlab.tasks.market.agent_task import AGENTS
from opdlab.tasks.market.world import SKILLS
from opdlab.tasks.profiles import load, rule_task, smollm2
from opdlab.tasks.verifiers import VERIFIERS

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
    # The task comes first, since models take longer to load.
    world = load_task(task or default_task(student, teacher))
    fit_threads(student, teacher)
    if student == teacher == SMALL:
        pupil, told, _ = load(SMALL)
        return pupil, told, world
    first = load_model(student)
    second = first.frozen() if teacher == student else load_model(teacher)
    return first, second, world


def default_task(*sources: str) -> str | None:
    """Name the task that the names of models belong to.

    Args:
        sources: The names of the models of a run.

    Returns:
        market-tools if one of them is the trainee or the clerk, market if one is another shipped
        model, rule if all are SmolLM2, or None.
    """
    if any(name in AGENTS for name in sources):
        return "market-tools"
    if any(name in MODELS for name in sources):
        return "market"
    return "rule" if all(name == SMALL for name in sources) else None


def fit_threads(*sources: str) -> None:
    """Compute with one thread if all models are shipped ones, as `opdlab.load` does.

    They are so small that threads only wait for each other.

    Args:
        sources: The names of the models of a run.
    """
    if all(name in MODELS for name in sources):
        torch.set_num_threads(1)


def load_task(name: str | None, options: Mapping[str, Any] | None = None) -> Task | None:
    """Load a task by its name.

    Args:
        name: market, market-secret, market-tools, rule, gym:NAME (a task of reasoning-gym), or the
            path of a JSONL file; None for no task.
        options: Further arguments of the task, as its function takes them.

    Returns:
        The task; None if there is no name.

    Raises:
        OpdlabError: There is no such task, or it does not take an option.
    """
    if name is None:
        return None
    given = dict(options or {})
    if name in ("market", "market-secret"):
        _check_options(name, given, ("hint", "wrong", "alike"))
        return market(secret=name != "market", **given)
    if name == "market-tools":
        _check_options(name, given, ())
        return market(tools=True)
    if name == "rule":
        _check_options(name, given, ())
        return rule_task()
    if name.startswith("gym:"):
        return reasoning_gym(name.removeprefix("gym:"), **given)
    if Path(name).is_file():
        return load_records(name, **given)
    raise OpdlabError(
        f"There is no task {name!r}. Use market, market-secret, market-tools, rule, gym:NAME or a"
        " JSONL file."
    )


def load_records(path: str, verify: str | None = None, **options: Any) -> Task:
    """Make a task of a JSONL file.

    Args:
        path: The file.
        verify: How answers are judged, a name of `VERIFIERS`; by default "answer" if the records
            have answers.
        options: The other arguments of `from_records`.

    Returns:
        The task.

    Raises:
        InvalidValue: There is no such verifier, or an option is not one of `from_records`.
    """
    _check_options(path, options, ("name", "test", "max_new_tokens", "keep"))
    if verify is not None and verify not in VERIFIERS:
        raise InvalidValue(
            f"There is no verifier {verify!r}. {did_you_mean(verify, VERIFIERS)}Use one of"
            f" {', '.join(VERIFIERS)}; for a function of your own, --verify FILE.py:NAME on the"
            " command line, or opdlab.tasks.from_records(…, verify=…) in Python."
        )
    # By default answers are compared too, and there any of several answers is right.
    judge = None if verify in (None, "answer") else VERIFIERS[str(verify)]
    return from_records(path, verify=judge, **options)


def _check_options(name: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            takes = f"It takes {', '.join(known)}." if known else "It takes none."
            raise InvalidValue(
                f"The task {name} has no option {key!r}. {did_you_mean(key, known)}{takes}"
            )


def folder_of_model(name: str) -> str:
    """Find where a model's configuration lies.

    Args:
        name: A shipped model, small (SmolLM2), a folder or a name on the Hub.

    Returns:
        The folder of a shipped model; the name itself for others.
    """
    return str(data() / name) if name in MODELS else name


def load_model(name: str, **options: Any) -> Policy:
    """Load a model by its name.

    Args:
        name: A shipped model, small (SmolLM2), a folder or a name on the Hub.
        options: Arguments of `Policy.load`. The shipped student has the shipped adapters "addition"
            and "subtraction".

    Returns:
        The policy.

    Raises:
        OpdlabError: There is no such model.
    """
    if name == SMALL:
        return smollm2(**options)
    if name == "student" and options.get("adapter") in SKILLS:
        options["adapter"] = data() / options["adapter"]
    if name in MODELS:  # models of this size are slower on a GPU
        return Policy.load(data() / name, **{"device": "cpu", **options})
    try:
        return Policy.load(name, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OpdlabError(
            f"{name!r} is no shipped model ({', '.join((*MODELS, SMALL))}) and could not be loaded"
            f" as a folder or from the Hub ({reason}). Check the name, and the network for a Hub"
            " name."
        ) from error
