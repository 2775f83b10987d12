"""Recognise an object in the wrong place, and say what it is and how to get the right one.

    distill got task='data.jsonl'. That is a path or a name. Make a task of the file:
    opdlab.tasks.from_records('data.jsonl').

Classes are told by their names, so that nothing is imported to make a sentence.
`opdlab.support.validation` uses the same sentences for arguments that are annotated with a class.
"""

from __future__ import annotations

import inspect
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from opdlab.errors import InvalidValue

Kind = TypeVar("Kind")


def expect(value: Any, kind: type[Kind], where: str, name: str) -> Kind:
    """Return `value` if it is an instance of `kind`.

    Args:
        value: What the user passed.
        kind: The class that is right, such as `Policy`.
        where: The function that was called, for the error.
        name: The argument's name, for the error.

    Raises:
        InvalidValue: It is something else. The message says what it is and how to get the right
            thing.
    """
    if not isinstance(value, kind):
        raise refusal(kind.__name__, value, where, name)
    return value


def shortened(value: Any) -> str:
    """The `repr` of a foreign value, short and on one line, for an error message."""
    try:
        said = reprlib.repr(value)
    except Exception:
        said = f"a {type(value).__name__}"
    return " ".join(said.split())


def advice(wanted: str, value: Any) -> str:
    """Say what `value` is, where that can be told, and how to get an object of the class named
    `wanted`.

    Returns:
        One or two sentences; "" for a class that is not known here.
    """
    if wanted not in _MAKE:
        return ""
    said = _described(value)
    return " ".join(
        part for part in (f"That is {said}." if said else "", _MAKE[wanted](value)) if part
    )


def refusal(wanted: str, value: Any, where: str, name: str) -> InvalidValue:
    """Make the error for a value in the wrong place."""
    return InvalidValue(f"{where} got {name}={shortened(value)}. {advice(wanted, value)}")


def _make_policy(value: Any) -> str:
    if is_model(value):
        return "Make a policy of it: Policy.of(model, tokenizer)."
    if isinstance(value, (str, os.PathLike)):
        return f"Load it: Policy.load({shortened(os.fspath(value))})."
    if _is_pair(value):
        return "Unpack it with a star: distill(*opdlab.load('market'))."
    return (
        "Use a Policy: Policy.load('a folder or a name on the Hub'), or Policy.of(model,"
        " tokenizer)."
    )


def _make_teacher(value: Any) -> str:
    if is_model(value) or isinstance(value, (str, os.PathLike)):
        return _make_policy(value)
    return (
        "Use a Policy, as Policy.load('…') gives, or a server of opdlab.teachers; the order is"
        " distill(student, teacher, task)."
    )


def _make_task(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        return (
            f"Make a task of the file: opdlab.tasks.from_records({shortened(os.fspath(value))}); or"
            " use opdlab.tasks.market()."
        )
    if _kind(value) in ("Policy", "method"):
        return (
            "The order is distill(student, teacher, task, method=…): use a task there, as"
            " opdlab.tasks.from_records(…)."
        )
    return (
        "Use a task: opdlab.tasks.from_records([{'prompt': …, 'answer': …}, …]),"
        " opdlab.tasks.market() or reasoning_gym(…)."
    )


def _make_prompt(value: Any) -> str:
    if isinstance(value, str):
        text = shortened(value)
        return (
            f"Use Prompt({text}) for plain text, or Prompt(messages=({{'role': 'user', 'content':"
            f" {text}}},)) for a chat."
        )
    return (
        "Use a Prompt: Prompt('some text'), or Prompt(messages=({'role': 'user', 'content': …},))"
        " for a chat."
    )


def _make_prompts(value: Any) -> str:
    if _kind(value) == "Task":
        return "Ask it for some: task.prompts(8)."
    if isinstance(value, str):
        return "Use a list of prompts: [Prompt('some text')], or task.prompts(8)."
    return "Use a list of Prompt objects, as [Prompt('some text')] or task.prompts(8)."


def _make_rollout(value: Any) -> str:
    return (
        "Use a Rollout, as policy.sample(prompts) gives; several are put together by"
        " opdlab.concat_rollouts([…])."
    )


def _make_trace(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        return f"Read it: Trace.load({shortened(os.fspath(value))})."
    if _kind(value) == "Rollout":
        return "Grade it first: opdlab.score(rollout, student, teacher)."
    if _kind(value) == "Step":
        return "Take its trace: step.trace()."
    if _kind(value) == "Run":
        return (
            "Take the trace of its last step, run.last.trace(), or draw the run: viz.RunBoard(run)."
        )
    return (
        "Use a Trace, as opdlab.score(rollout, student, teacher), step.trace() or"
        " Trace.load('….parquet') gives."
    )


def _make_run(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        return (
            f"Take the saved run up again: opdlab.resume({shortened(os.fspath(value))}, student,"
            " teacher, task)."
        )
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
    return any(cls.__module__.startswith("torch.nn") for cls in type(value).__mro__) and hasattr(
        value, "config"
    )


def _is_pair(value: Any) -> bool:
    """Whether it is what `opdlab.load` returns, not unpacked."""
    return isinstance(value, tuple) and len(value) > 1 and _kind(value[0]) == "Policy"


def _has_any(value: Any, names: Sequence[str]) -> bool:
    return any(callable(getattr(value, name, None)) for name in names)
