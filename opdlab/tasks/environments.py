"""Environments for several turns: plain Python functions as tools.

Tools run in this process, with all its rights: give a student only functions that may be called
with any arguments.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

from opdlab.data.conversation import Environment, Message, Parser
from opdlab.data.prompt import Prompt
from opdlab.errors import InvalidValue
from opdlab.support.expect import shortened
from opdlab.support.validation import Count, Positive, validate

__all__ = ["Environment", "Tools", "run_call"]


class Tools(Environment):
    """Let the student call plain Python functions.

        task = opdlab.tasks.from_records(records, environment=opdlab.tasks.Tools(price))

    Here `price` is a function with type hints and a Google docstring that describes each argument.
    They make the schemas that the student's chat template shows, as in transformers. Each call of a
    turn is answered by a message of the role `tool`: with what the function returned (texts as they
    are, everything else as JSON, in which NaN and Infinity are errors), or with the error where it
    raised one, took too long, does not exist or cannot be read. A turn without calls ends the
    conversation.

    Functions must give the same for the same arguments: a conversation is sampled again when an
    interrupted run resumes.

    Args:
        functions: Functions with type hints and Google docstrings that describe every argument.
        max_turns: The most turns of the student.
        seconds: The longest that a call may take. A function that takes longer runs on in its
            thread, but nobody waits for it.
        parse: Reads the student's turns, from a text to an `opdlab.data.conversation.Turn`; by
            default the parser of its chat template.

    Attributes:
        functions: The functions by name.
        seconds: As above.

    Raises:
        InvalidValue: Something is no function, has no type hints, or does not describe an argument.
    """

    def __init__(
        self,
        *functions: Callable[..., Any],
        max_turns: int = 8,
        seconds: float = 10.0,
        parse: Parser | None = None,
    ) -> None:
        limits = validate(
            "Tools",
            {"max_turns": max_turns, "seconds": seconds},
            {"max_turns": Count, "seconds": Positive},
        )
        self.tools = tuple(_schema(function) for function in functions)
        self.functions = {str(function.__name__): function for function in functions}
        if not functions or len(self.functions) < len(functions):
            raise InvalidValue("Tools needs functions, each with a name of its own.")
        if waiting := [one for one in functions if inspect.iscoroutinefunction(one)]:
            raise InvalidValue(
                f"Tools got the coroutine {waiting[0].__name__}, which nothing awaits. Give a plain"
                " function, as one that calls asyncio.run."
            )
        if parse is not None and not callable(parse):
            raise InvalidValue(
                f"Tools got parse={shortened(parse)}. Use a function from a text to an"
                " opdlab.data.conversation.Turn, or None."
            )
        self.max_turns, self.seconds = limits["max_turns"], limits["seconds"]
        self.parse = parse

    def reply(self, prompt: Prompt, messages: Sequence[Message], seed: int) -> list[dict[str, Any]]:
        """Call the functions that the student's last turn asks for; see `Environment.reply`.

        Args:
            prompt: The prompt.
            messages: The conversation after it.
            seed: Not used.

        Returns:
            One message per call, in order; none where the turn has no calls.
        """
        last = messages[-1]
        if last.get("error"):
            return [{"role": "tool", "name": "", "content": f"Error: {last['error']}"}]
        return [self._answer(call["function"]) for call in last.get("tool_calls") or ()]

    def _answer(self, call: Message) -> dict[str, Any]:
        name, arguments = call["name"], dict(call["arguments"])
        if name not in self.functions:
            known = ", ".join(self.functions)
            content = f"Error: there is no tool {name}. There is {known}."
        else:
            content = run_call(self.functions[name], arguments, self.seconds)
        return {"role": "tool", "name": name, "content": content}

    def __repr__(self) -> str:
        return f"Tools({', '.join(self.functions)})"


def _write_json(value: Any) -> str:
    """A result as chat templates write it with `tojson`: letters of all languages as they are.

    Raises ValueError for NaN and Infinity, which JSON does not have and other readers refuse.
    """
    try:
        return json.dumps(value, default=str, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        if "JSON compliant" not in str(error):
            raise
        raise ValueError("the result holds NaN or Infinity, which JSON does not have") from None


def _describe(error: BaseException) -> str:
    """A user's error in words; its own words may fail, too."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def run_call(function: Callable[..., Any], arguments: dict[str, Any], seconds: float) -> str:
    """Call a function, and tell the result or the error as a text.

    Args:
        function: The function.
        arguments: Its arguments by name, as a student wrote them.
        seconds: The longest that it may take.

    Returns:
        A text as it is, any other result as JSON, or a line that begins with "Error".
    """
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        return f"Error: {error}"
    result: list[str] = []

    def call() -> None:
        try:
            value = function(**arguments)
            text = value if isinstance(value, str) else _write_json(value)
            text.encode()  # half of a surrogate pair is no text
        except BaseException as error:  # whatever a user's function may raise, sys.exit() too
            text = f"Error: {_describe(error)}".encode(errors="replace").decode()
        result.append(text)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    name = getattr(function, "__name__", "the tool")
    return result[0] if result else f"Error: {name} took longer than {seconds:g} seconds"


def _schema(function: Any) -> dict[str, Any]:
    if not callable(function) or not getattr(function, "__name__", ""):
        raise InvalidValue(
            f"Tools got {shortened(function)}. Use functions with type hints and a docstring."
        )
    try:
        return dict(get_json_schema(function))
    except Exception as error:  # transformers' own, and whatever a docstring makes of its parser
        reason = " ".join(str(error).split()).rstrip(".")
        raise InvalidValue(
            f"Tools cannot describe {function.__name__} to a model: {reason}. Give every argument a"
            " type hint, and describe it in the docstring under Args:."
        ) from None
