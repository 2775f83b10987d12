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
from dataclasses import dataclass
from typing import Any, TypeVar

from opdlab.errors import InvalidValue

Kind = TypeVar("Kind")


def expect(value: Any, kind: type[Kind], where: str, name: str) -> Kind:
    """Return `value` if it is an instance of `kind`.

    Args:
        value: The object that the user passed.
        kind: The class that is right, such as `Policy`.
        where: The function that was called, for the error.
        name: The argument's name, for the error.

    Returns:
        The value itself.

    Raises:
        InvalidValue: It is something else. The message says what it is and how to get the right
            thing.
    """
    if not isinstance(value, kind):
        raise refusal(kind.__name__, value, where, name)
    return value


def shortened(value: Any) -> str:
    """Represent a foreign value in an error message, short and on one line.

    Args:
        value: An object of any kind.

    Returns:
        Its `repr`, cut by `reprlib`; only its kind where the `repr` fails.
    """
    try:
        said = reprlib.repr(value)
    except Exception:  # a foreign `__repr__` may fail in any way
        said = f"a {type(value).__name__}"
    return " ".join(said.split())


def advice(wanted: str, value: Any) -> str:
    """Say what a value is, where that can be told, and how to get the right one.

    Args:
        wanted: The name of the class that is right.
        value: The object that stands in its place.

    Returns:
        One or two sentences; "" for a class that is not known here.
    """
    known = _KNOWN.get(wanted)
    if known is None or known.advise is None:
        return ""
    said = _describe(value)
    return f"That is {said}. {known.advise(value)}" if said else known.advise(value)


def refusal(wanted: str, value: Any, where: str, name: str) -> InvalidValue:
    """Make the error for a value in the wrong place.

    Args:
        wanted: The name of the class that is right, "Teacher" or "prompts".
        value: The object that stands in its place.
        where: The function that was called.
        name: The argument's name.

    Returns:
        The error, for the caller to raise.
    """
    return InvalidValue(f"{where} got {name}={shortened(value)}. {advice(wanted, value)}")


def _advise_policy(value: Any) -> str:
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


def _advise_teacher(value: Any) -> str:
    if is_model(value) or isinstance(value, (str, os.PathLike)):
        return _advise_policy(value)
    return (
        "Use a Policy, as Policy.load('…') gives, or a server of opdlab.teachers; the order is"
        " distill(student, teacher, task)."
    )


def _advise_task(value: Any) -> str:
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


def _advise_prompt(value: Any) -> str:
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


def _advise_prompts(value: Any) -> str:
    if _kind(value) == "Task":
        return "Ask it for some: task.prompts(8)."
    if isinstance(value, str):
        return "Use a list of prompts: [Prompt('some text')], or task.prompts(8)."
    return "Use a list of Prompt objects, as [Prompt('some text')] or task.prompts(8)."


def _advise_rollout(value: Any) -> str:
    return (
        "Use a Rollout, as policy.sample(prompts) gives; several are put together by"
        " opdlab.concat_rollouts([…])."
    )


def _advise_trace(value: Any) -> str:
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


def _advise_run(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        return (
            f"Take the saved run up again: opdlab.resume({shortened(os.fspath(value))}, student,"
            " teacher, task)."
        )
    return "Use a Run, as opdlab.distill(student, teacher, task) gives."


@dataclass(frozen=True)
class _Known:
    """A kind of object that opdlab knows.

    Attributes:
        words: Its name in a sentence, such as "a policy" in "That is a policy."
        advise: Says how to get one, given the object that stands in its place.
    """

    words: str = ""
    advise: Callable[[Any], str] | None = None


# By the name of its class; "Teacher" and "prompts" are wanted and are no class, and a "method" is
# any object with a loss.
_KNOWN = {
    "Policy": _Known("a policy", _advise_policy),
    "Teacher": _Known(advise=_advise_teacher),
    "Task": _Known("a task", _advise_task),
    "Prompt": _Known("a prompt", _advise_prompt),
    "prompts": _Known(advise=_advise_prompts),
    "Rollout": _Known("a rollout", _advise_rollout),
    "Trace": _Known("a trace", _advise_trace),
    "Run": _Known("a training run", _advise_run),
    "Step": _Known("one step of a run"),
    "method": _Known("a method"),
}


def _describe(value: Any) -> str:
    """Say in words what a value is; "" where nothing can be said."""
    if inspect.isclass(value):
        return f"the class {value.__name__}, and not an object of it"
    if kind := _kind(value):
        return _KNOWN[kind].words
    if is_model(value):
        return "a model without its tokenizer"
    if type(value).__name__ in ("DataFrame", "Dataset", "DatasetDict", "IterableDataset"):
        return _with_article(type(value).__name__)
    if isinstance(value, (str, os.PathLike)):
        return "a text, a path or a name"
    if _is_pair(value):
        return "a student, a teacher and a task in one tuple"
    if isinstance(value, Mapping):
        return "a dict"
    if isinstance(value, Sequence) and value:
        inside = _kind(value[0]) or type(value[0]).__name__
        return f"a {type(value).__name__} of {inside} objects"
    # Foreign objects, told by a method of theirs.
    if _has_any(value, ("apply_chat_template",)):
        return "a tokenizer without its model"
    if _has_any(value, ("write", "grade")):
        return f"a teacher that is no local model ({type(value).__name__})"
    if inspect.isgenerator(value):
        return "a generator"
    return "" if value is None else _with_article(type(value).__name__)


def _with_article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _kind(value: Any) -> str:
    """Tell which of opdlab's own kinds a value is; "" for none."""
    for cls in type(value).__mro__:
        known = _KNOWN.get(cls.__name__) if cls.__module__.split(".")[0] == "opdlab" else None
        if known is not None and known.words:
            return cls.__name__
    # A user's method needs no class of opdlab's, and this file may import none of the protocols.
    return "method" if callable(getattr(value, "loss", None)) and hasattr(value, "needs") else ""


def is_model(value: Any) -> bool:
    """Tell whether a value is a model of transformers or PEFT, without importing either.

    Args:
        value: An object of any kind.

    Returns:
        True for a PyTorch module with a `config`.
    """
    is_module = any(cls.__module__.startswith("torch.nn") for cls in type(value).__mro__)
    return is_module and hasattr(value, "config")


def _is_pair(value: Any) -> bool:
    """Tell whether it is the result of `opdlab.load`, not unpacked."""
    return isinstance(value, tuple) and len(value) > 1 and _kind(value[0]) == "Policy"


def _has_any(value: Any, names: Sequence[str]) -> bool:
    return any(callable(getattr(value, name, None)) for name in names)
