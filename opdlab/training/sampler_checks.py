"""Check before a run that its sampler is one, is used, and can write for the student."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from opdlab.data.prompt import Prompt
from opdlab.errors import InvalidValue
from opdlab.methods.contract import name_of, student_share
from opdlab.models.protocols import Checked, Sampler, StudentSampler
from opdlab.support.expect import shortened
from opdlab.tasks import Task
from opdlab.training.state import RunState


def expect_sampler(value: Any, where: str) -> StudentSampler:
    """Return `value` if it can write a student's texts.

    Args:
        value: The object that the user passed.
        where: The function that was called, for the error.

    Returns:
        `value` itself.

    Raises:
        InvalidValue: It has not all methods of `StudentSampler`.
    """
    if not inspect.isclass(value) and isinstance(value, StudentSampler):
        return value
    needed = ("sample", "start", "update", "close")
    lacking = [name for name in needed if not callable(getattr(value, name, None))]
    if inspect.isclass(value) or not lacking:
        why = "That is a class, and not an object of it."
    else:
        why = f"It has no {' and no '.join(lacking)}."
    raise InvalidValue(
        f"{where} got sampler={shortened(value)}. {why} Use opdlab.samplers.VLLM(…) or"
        " VLLMServer(url), or leave it out for the student's own loop."
    )


def check_turns(writer: Any, task: Task, where: str) -> None:
    """Check that a writer can talk to a task's environment.

    A teacher that only writes texts writes a turn at a time (`opdlab.teachers.conversing`).

    Args:
        writer: Whoever writes the conversations.
        task: The task.
        where: The function that was called, for the error.

    Raises:
        InvalidValue: The task has an environment, and the writer's `sample` takes none.
    """
    if task.environment is None or not isinstance(writer, Sampler):
        return
    parameters = inspect.signature(writer.sample).parameters
    if "environment" not in parameters:
        raise InvalidValue(
            f"{where} got {shortened(writer)} for {task.name}, whose environment replies between"
            " turns. Its sample() has no argument environment, so it writes one turn only. Use"
            " opdlab.samplers.VLLM(…) or VLLMServer(url), the student's own loop (leave sampler="
            " out), or a task without environment."
        )


def check_sampler(run: RunState, prompts: Sequence[Prompt]) -> None:
    """Check before a run that its sampler is used, and can write for this student.

    Args:
        run: The run.
        prompts: The prompts that it will be asked.

    Raises:
        InvalidValue: The student writes nothing in this run.
        OpdlabError: The sampler cannot write for this student.
    """
    if run.sampler is None:
        return
    check_turns(run.sampler, run.task, "distill")
    if student_share(run.method) == 0:
        raise InvalidValue(
            f"distill got sampler={shortened(run.sampler)}, which would change nothing: in"
            f" {name_of(run.method)} the student writes no text. Leave it out."
        )
    if isinstance(run.sampler, Checked):
        run.sampler.check(run.student, prompts, run.settings.max_new_tokens)
