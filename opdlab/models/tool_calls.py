"""Read tool calls from the text that a model wrote, in the form of its family.

The form is told by the chat template: Qwen2.5, Qwen3 and the Hermes models write JSON within
`<tool_call>` tags, Llama 3.1 and later write one JSON object with `parameters`. A tokenizer with a
`response_template` is read by transformers itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from opdlab.data.conversation import Parser, ToolCall, Turn
from opdlab.errors import InvalidValue

_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>\s*", re.DOTALL)
_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_LLAMA_START = "<|python_tag|>"


def find_parser(
    tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], has_tools: bool = True
) -> Parser:
    """Find the parser of a model's own form of tool calls.

    Args:
        tokenizer: Brings the template.
        options: The policy's arguments for the template.
        has_tools: Whether there are tools to call; without any, a turn is a thought and a text.

    Returns:
        A function from the text of a turn to what it says.

    Raises:
        InvalidValue: The template is of no family that is known here.
    """
    if not has_tools:
        return parse_plain
    if getattr(tokenizer, "response_template", None):
        return _by_transformers(tokenizer)
    templates = options.get("chat_template", tokenizer.chat_template)
    source = " ".join(templates.values()) if isinstance(templates, Mapping) else str(templates)
    if "<tool_call>" in source:
        return parse_hermes
    if '"parameters": ' in source and "tool_call" in source:
        return parse_llama
    if "tool_call" not in source:
        return parse_hermes  # the template knows no calls: the most common form is as good as any
    raise InvalidValue(
        "The chat template writes tool calls in a form that opdlab does not read (it reads those of"
        " Qwen2.5, Qwen3, Hermes and Llama 3.1, and tokenizers with a response_template). Give the"
        " environment a parser: opdlab.tasks.Tools(…, parse=function), from a text to an"
        " opdlab.data.conversation.Turn."
    )


def parse_plain(text: str) -> Turn:
    """Read a turn without calls.

    Args:
        text: The text of the turn.

    Returns:
        The thought within `<think>` tags that it begins with, and the rest.
    """
    thought, content = _split_thought(text)
    return Turn(content, thought=thought)


def parse_hermes(text: str) -> Turn:
    """Read a turn in which each call is a JSON object within `<tool_call>` tags.

    Args:
        text: The text of the turn.

    Returns:
        The calls and the text before them; a call that is no JSON object is an error.
    """
    thought, text = _split_thought(text)
    found = list(_HERMES.finditer(text))
    if not found:
        return Turn(text, thought=thought)
    calls = []
    for match in found:
        call = _read_call(match[1], "arguments")
        if isinstance(call, str):
            return Turn(text, thought=thought, error=call)
        calls.append(call)
    # Templates write a line break between a text and its first call.
    return Turn(text[: found[0].start()].rstrip("\n"), tuple(calls), thought)


def parse_llama(text: str) -> Turn:
    """Read a turn that is one JSON object with `name` and `parameters`, as Llama 3.1 writes it.

    Args:
        text: The text of the turn.

    Returns:
        The call, or the text where it does not begin as an object.
    """
    body = text.strip().removeprefix(_LLAMA_START).strip()
    if not body.startswith("{"):
        return Turn(text)
    call = _read_call(body, "parameters")
    return Turn(text, error=call) if isinstance(call, str) else Turn("", (call,))


def parse_any(text: str) -> Turn:
    """Read a turn of a model whose template is not known, as one behind a server.

    Args:
        text: The text of the turn.

    Returns:
        The turn in the form that it looks like: with `<tool_call>` tags, as one JSON object with
        `parameters`, or without a call.
    """
    _, said = _split_thought(text)
    body = said.strip().removeprefix(_LLAMA_START).strip()
    is_object = body.startswith("{") and '"parameters"' in body
    return parse_llama(text) if is_object and "<tool_call>" not in said else parse_hermes(text)


def write_hermes(content: str, calls: Iterable[ToolCall]) -> str:
    """Write a turn with calls as `parse_hermes` reads it.

    Args:
        content: The text beside the calls.
        calls: The calls.

    Returns:
        The text of the turn.
    """
    parts = [content] if content else []
    for call in calls:
        said = {"name": call.name, "arguments": dict(call.arguments)}
        parts.append(f"<tool_call>\n{json.dumps(said, ensure_ascii=False)}\n</tool_call>")
    return "\n".join(parts)


def _split_thought(text: str) -> tuple[str, str]:
    """The thought within `<think>` tags that begins a text, and the rest."""
    match = _THOUGHT.match(text)
    return (match[1].strip("\n"), text[match.end() :]) if match else ("", text)


def _read_call(text: str, arguments: str) -> ToolCall | str:
    """The call that a JSON object is, or what is wrong with it."""
    try:
        call = json.loads(text, parse_constant=_refuse_constant, parse_float=_read_float)
    except (ValueError, RecursionError):
        return "the tool call is not valid JSON"
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return "the tool call is no JSON object with a name"
    given = call.get(arguments, {})
    if not isinstance(given, dict):
        return f"the {arguments} of the tool call are no JSON object"
    return ToolCall(call["name"], given)


def _refuse_constant(name: str) -> Any:
    """Refuse what Python's parser reads and JSON does not have: NaN and Infinity."""
    raise ValueError(name)


def _read_float(text: str) -> float:
    """A number with a point or an exponent; one beyond a float's range would become Infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _by_transformers(tokenizer: PreTrainedTokenizerBase) -> Parser:
    def parse(text: str) -> Turn:
        try:
            message = tokenizer.parse_response(text, prefix="")
        except Exception as error:  # a template of the user's, on a text of the student's
            return Turn(text, error=f"the turn cannot be parsed: {type(error).__name__}")
        calls: Iterable[Any] = message.get("tool_calls") or ()
        read = []
        for call in calls:
            inner = call.get("function", call)
            read.append(ToolCall(str(inner.get("name", "")), dict(inner.get("arguments") or {})))
        thought = message.get("thinking") or message.get("reasoning_content") or ""
        return Turn(str(message.get("content") or ""), tuple(read), str(thought))

    return parse
