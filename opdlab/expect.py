"""Recognise an object in the wrong place, and say what it is and how to get the right one.

    distill got task='data.jsonl'. That is a path or a name. Make a task of the file: opdlab.tasks.from_records('data.jsonl').

Each `expect_…` returns the value if it is what its name says, and raises InvalidValue otherwise. `opdlab.validation` uses the
same sentences for arguments that are annotated with a class.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opdlab.errors import InvalidValue
from opdlab.validation import shortened

if TYPE_CHECKING:
    from opdlab.distill import Run
    from opdlab.policy import Policy
    from opdlab.prompt import Prompt
    from opdlab.rollout import Rollout
    from opdlab.tasks import Task
    from opdlab.trace import Trace


def expect_policy(value: Any, where: str, name: str = "policy") -> Policy:
    """Return `value` if it is a local policy.

    Raises:
        InvalidValue: It is something else, as a model, a name, a task or a server.
    """
    from opdlab.policy import Policy

    if not isinstance(value, Policy):
        raise _refusal("Policy", value, where, name)
    return value


def expect_teacher(value: Any, where: str, name: str = "teacher") -> Any:
    """Return `value` if it can teach: a policy, or an object that grades tokens or writes texts.

    Raises:
        InvalidValue: It can do neither.
    """
    from opdlab.policy import Policy

    if not isinstance(value, Policy) and (inspect.isclass(value) or not _has_any(value, ("grade", "write"))):
        raise _refusal("Teacher", value, where, name)
    return value


def expect_task(value: Any, where: str, name: str = "task") -> Task:
    """Return `value` if it is a supply of prompts.

    Raises:
        InvalidValue: It is something else, as a list of records, a path or a policy.
    """
    from opdlab.tasks import Task

    if not isinstance(value, Task):
        raise _refusal("Task", value, where, name)
    return value


def expect_prompts(value: Any, where: str, name: str = "prompts") -> list[Prompt]:
    """Return a list of prompts, which may be empty; one `Prompt` alone counts as a list of one.

    Raises:
        InvalidValue: It is something else, as a text, a list of texts or a task.
    """
    from opdlab.prompt import Prompt

    if isinstance(value, Prompt):
        return [value]
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _refusal("prompts", value, where, name)
    prompts = list(value)
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt):
            raise _refusal("Prompt", prompt, where, f"{name}[{i}]")
    return prompts


def expect_rollout(value: Any, where: str, name: str = "rollout") -> Rollout:
    """Return `value` if it is a rollout.

    Raises:
        InvalidValue: It is something else, as prompts, a list of rollouts or a policy.
    """
    from opdlab.rollout import Rollout

    if not isinstance(value, Rollout):
        raise _refusal("Rollout", value, where, name)
    return value


def expect_trace(value: Any, where: str, name: str = "trace") -> Trace:
    """Return `value` if it is a trace.

    Raises:
        InvalidValue: It is something else, as a rollout, a step or a path.
    """
    from opdlab.trace import Trace

    if not isinstance(value, Trace):
        raise _refusal("Trace", value, where, name)
    return value


def expect_run(value: Any, where: str, name: str = "run") -> Run:
    """Return `value` if it is a training run.

    Raises:
        InvalidValue: It is something else, as a folder or a step.
    """
    from opdlab.distill import Run

    if not isinstance(value, Run):
        raise _refusal("Run", value, where, name)
    return value


def advice(wanted: str, value: Any) -> str:
    """Say what `value` is, where that can be told, and how to get an object of the class named `wanted`.

    Returns:
        One or two sentences; "" for a class that is not known here.
    """
    if wanted not in _MAKE:
        return ""
    said = _described(value)
    return " ".join(part for part in (f"That is {said}." if said else "", _MAKE[wanted](value)) if part)


def _refusal(wanted: str, value: Any, where: str, name: str) -> InvalidValue:
    return InvalidValue(f"{where} got {name}={shortened(value)}. {advice(wanted, value)}")


def _make_policy(value: Any) -> str:
    if is_model(value):
        return "Make a policy of it: Policy.of(model, tokenizer)."
    if isinstance(value, (str, os.PathLike)):
        return f"Load it: Policy.load({shortened(os.fspath(value))})."
    if _is_pair(value):
        return "Unpack it with a star: distill(*opdlab.load('market'))."
    return "Use a Policy: Policy.load('a folder or a name on the Hub'), or Policy.of(model, tokenizer)."


def _make_teacher(value: Any) -> str:
    if is_model(value) or isinstance(value, (str, os.PathLike)):
        return _make_policy(value)
    return "Use a Policy, as Policy.load('…') gives, or a server of opdlab.teachers; the order is distill(student, teacher, task)."


def _make_task(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        return f"Make a task of the file: opdlab.tasks.from_records({shortened(os.fspath(value))}); or use opdlab.tasks.market()."
    if _kind(value) in ("Policy", "method"):
        return "The order is distill(student, teacher, task, method=…): use a task there, as opdlab.tasks.from_records(…)."
    return "Use a task: opdlab.tasks.from_records([{'prompt': …, 'answer': …}, …]), opdlab.tasks.market() or reasoning_gym(…)."


def _make_prompt(value: Any) -> str:
    if isinstance(value, str):
        text = shortened(value)
        return f"Use Prompt({text}) for plain text, or Prompt(messages=({{'role': 'user', 'content': {text}}},)) for a chat."
    return "Use a Prompt: Prompt('some text'), or Prompt(messages=({'role': 'user', 'content': …},)) for a chat."


def _make_prompts(value: Any) -> str:
    if _kind(value) == "Task":
        return "Ask it for some: task.prompts(8)."
    if isinstance(value, str):
        return "Use a list of prompts: [Prompt('some text')], or task.prompts(8)."
    return "Use a list of Prompt objects, as [Prompt('some text')] or task.prompts(8)."


def _make_rollout(value: Any) -> str:
    return "Use a Rollout, as policy.sample(prompts) gives; several are put together by opdlab.rollout.joined([…])."


def _make_trace(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        return f"Read it: Trace.load({shortened(os.fspath(value))})."
    if _kind(value) == "Rollout":
        return "Grade it first: opdlab.score(rollout, student, teacher)."
    if _kind(value) == "Step":
        return "Take its trace: step.trace()."
    if _kind(value) == "Run":
        return "Take the trace of its last step, run.last.trace(), or draw the run: viz.RunBoard(run)."
    return "Use a Trace, as opdlab.score(rollout, student, teacher), step.trace() or Trace.load('….parquet') gives."


def _make_run(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        return f"Take the saved run up again: opdlab.resume({shortened(os.fspath(value))}, student, teacher, task)."
    return "Use a Run, as opdlab.distill(student, teacher, task) gives."


_MAKE: dict[str, Callable[[Any], str]] = {
    "Policy": _make_policy,
    "Teacher": _make_teacher,
    "Task": _make_task,
    "Prompt": _make_prompt,
    "prompts": _make_prompts,
    "Rollout": _make_rollout,
    "Trace": _make_trace,
    "Run": _make_run,
}

_DESCRIBED = {
    "Policy": "a policy",
    "Task": "a task",
    "Prompt": "a prompt",
    "Rollout": "a rollout",
    "Trace": "a trace",
    "Run": "a training run",
    "Step": "one step of a run",
    "method": "a method",
}


def _described(value: Any) -> str:
    """What a value is, in words; "" where nothing can be said."""
    if inspect.isclass(value):
        return f"the class {value.__name__}, and not an object of it"
    if kind := _kind(value):
        return _DESCRIBED[kind]
    if is_model(value):
        return "a model without its tokenizer"
    if type(value).__name__ in ("DataFrame", "Dataset", "DatasetDict", "IterableDataset"):
        return f"a {type(value).__name__}"
    if isinstance(value, (str, os.PathLike)):
        return "a text, a path or a name"
    if _is_pair(value):
        return "a student, a teacher and a task in one tuple"
    if isinstance(value, Mapping):
        return "a dict"
    if isinstance(value, Sequence) and value:
        inside = _kind(value[0]) or type(value[0]).__name__
        return f"a {type(value).__name__} of {inside} objects"
    if callable(getattr(value, "apply_chat_template", None)):
        return "a tokenizer without its model"
    if _has_any(value, ("write", "grade")):
        return f"a teacher that is no local model ({type(value).__name__})"
    if inspect.isgenerator(value):
        return "a generator"
    return "" if value is None else f"a {type(value).__name__}"


def _kind(value: Any) -> str:
    """Which of opdlab's own kinds a value is; "" for none."""
    for cls in type(value).__mro__:
        if cls.__module__.split(".")[0] == "opdlab" and cls.__name__ in _DESCRIBED:
            return cls.__name__
    return "method" if callable(getattr(value, "loss", None)) and hasattr(value, "needs") else ""


def is_model(value: Any) -> bool:
    """Whether it is a model of transformers or PEFT, told without importing either."""
    return any(cls.__module__.startswith("torch.nn") for cls in type(value).__mro__) and hasattr(value, "config")


def _is_pair(value: Any) -> bool:
    """Whether it is what `opdlab.load` returns, not unpacked."""
    return isinstance(value, tuple) and len(value) > 1 and _kind(value[0]) == "Policy"


def _has_any(value: Any, names: Sequence[str]) -> bool:
    return any(callable(getattr(value, name, None)) for name in names)
