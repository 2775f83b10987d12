"""Prompts: what a policy is asked, with an optional reference answer and a privileged hint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from opdlab.errors import InvalidValue, MissingHint
from opdlab.support.expect import refusal, shortened

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


# The roles of messages that report what a tool or a function said.
TOOL_ROLES = ("tool", "function", "ipython")


class PlainText(str):
    """Hold a text that stays text: no special token is read in it, whatever it spells.

    It is the plain text wherever a `str` is wanted. Messages of tools and all replies of an
    environment are of this kind, since their text comes from elsewhere: a tool that says
    `<|im_end|>` ends no turn.
    """


@dataclass(frozen=True)
class Prompt:
    """Ask a policy something: with a plain `text`, or with a chat's `messages`.

    The tokenizer's own template renders a chat. A text is read as it stands, special tokens in it
    included, so it may be a chat that was rendered before. The context of a policy made with
    `.seeing()` is put in front of a text; give `messages` where it must land inside the chat.

    Args:
        text: A plain text.
        messages: A chat, as dicts with `role` and `content`. Contents may be lists of text parts,
            which are joined.
        answer: A reference answer, for tasks that have one.
        hint: Privileged information that only policies made with `.seeing()` read. A list of texts
            is joined by line breaks; chat messages become a `ChatHint`. An empty hint is none.
        id: Names the prompt in traces and errors.
        metadata: Values by name that belong to the prompt and that no policy sees, such as the
            subject by which a `MultiTeacher` chooses its teacher.
        tools: JSON schemas of the tools that the chat template shows the policy, as transformers'
            `get_json_schema` makes them of functions; only for chats.

    Raises:
        InvalidValue: A field is not of its type, or holds something that no tokenizer can read.
    """

    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    answer: str | None = None
    hint: str | None = None
    id: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tools: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if (self.text is None) == (self.messages is None):
            raise InvalidValue("A Prompt needs either text= or messages=, and not both.")
        if self.text is not None:
            if not isinstance(self.text, str):
                chat = isinstance(self.text, (list, tuple)) and all(
                    isinstance(one, Mapping) for one in self.text
                )
                raise InvalidValue(
                    f"Prompt got text={shortened(self.text)}. Use a"
                    f" text{', or messages= for a chat' if chat else ''}."
                )
            _check_characters(self.text, "text")
        else:
            object.__setattr__(self, "messages", read_messages(self.messages))
        if not isinstance(self.answer, str | None):
            raise InvalidValue(f"Prompt got answer={shortened(self.answer)}. Use a text, or None.")
        _check_characters(self.answer or "", "answer")
        object.__setattr__(self, "hint", read_hint(self.hint))
        if isinstance(self.id, bool) or not isinstance(self.id, (str, int)):
            raise InvalidValue(f"Prompt got id={shortened(self.id)}. Use a text or a whole number.")
        object.__setattr__(self, "id", str(self.id))
        _check_characters(self.id, "id")
        if not isinstance(self.metadata, Mapping) or not all(
            isinstance(name, str) for name in self.metadata
        ):
            raise InvalidValue(
                f"Prompt got metadata={shortened(self.metadata)}. Use a dict of values by name."
            )
        object.__setattr__(self, "metadata", dict(self.metadata))
        object.__setattr__(self, "tools", read_tools(self.tools))
        if self.tools and self.messages is None:
            raise InvalidValue(
                "Prompt got tools= with a plain text. A chat template shows tools, so give"
                " messages=."
            )

    def with_context(self, context: str) -> Prompt:
        """Put `context` before the prompt.

        A text gets it on a line of its own. A chat gets it in its system message; the messages of a
        `ChatHint` stand before the chat's own, behind its system message.

        Args:
            context: A text, or a `ChatHint`; one that is empty or blank changes nothing.

        Returns:
            A prompt with the same hint, answer and id; the prompt itself where the context is
            empty.

        Raises:
            InvalidValue: The context is something else; see `read_hint`.
        """
        told = read_hint(context)
        if told is None:
            return self
        context = told
        if self.messages is None:
            return replace(self, text=f"{context}\n{self.text}")
        before = (
            context.messages
            if isinstance(context, ChatHint)
            else ({"role": "system", "content": str(context)},)
        )
        own = self.messages
        if own[0]["role"] == "system":
            system, own = own[0]["content"], own[1:]
            if before[0]["role"] == "system":
                system, before = f"{system}\n{before[0]['content']}", before[1:]
            before = ({**self.messages[0], "content": system}, *before)
        return replace(self, messages=(*before, *own))


class ChatHint(str):
    """A hint given as chat messages.

    As a plain text, for prompts that are no chats, it is their contents, one a line.

    Attributes:
        messages: The messages, which `Prompt.with_context` puts before those of the student.
    """

    messages: tuple[dict[str, Any], ...]

    def __new__(cls, messages: Iterable[Mapping[str, Any]]) -> ChatHint:
        """Read the messages; see `read_messages`."""
        read = read_messages(messages, "hint")
        hint = super().__new__(cls, "\n".join(message.get("content", "") for message in read))
        hint.messages = read
        return hint

    def __getnewargs__(self) -> tuple[Any]:  # so that copies are made from the messages
        return (self.messages,)


def own_hint(prompt: Prompt) -> Prompt:
    """Tell a prompt its own hint.

    Args:
        prompt: The prompt, whose `hint` is its own.

    Returns:
        The prompt with its hint before it, as `Prompt.with_context` puts it there.

    Raises:
        MissingHint: It has none.
    """
    if prompt.hint is None:
        raise MissingHint(
            f"Prompt {name_of(prompt)} has no hint, but this policy reads hints. Give the prompts a"
            " hint=, or name one context for all: policy.seeing('…')."
        )
    return prompt.with_context(prompt.hint)


def name_of(prompt: Prompt, number: int | None = None) -> str:
    """Name a prompt in an error: by its id, else by its number, else by its beginning.

    Args:
        prompt: The prompt.
        number: Its number among the prompts of a call, from 0; None where there is none.

    Returns:
        The name, on one line.
    """
    if prompt.id:
        return repr(prompt.id)
    return shortened(prompt.text or prompt.messages) if number is None else str(number)


def read_messages(messages: Any, name: str = "messages") -> tuple[dict[str, Any], ...]:
    """Read chat messages: dicts with a known `role` and a `content`.

    Args:
        messages: The content of each is a text, or a list of text parts, which are joined. Other
            entries (`tool_calls`, `name`, …) are kept for the chat template, unless they are None.
        name: The argument's name, for errors.

    Returns:
        The messages as dicts of their own, in order, with the content of each as one text.

    Raises:
        InvalidValue: They are something else, or there are none.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise InvalidValue(
            f"{name} is {shortened(messages)}. Use a list of messages, as [{{'role': 'user',"
            " 'content': '…'}]."
        )
    read = tuple(
        _read_message(message, f"{name}[{number}]") for number, message in enumerate(messages)
    )
    if not read:
        raise InvalidValue(
            f"{name} is empty. Give at least one message, as {{'role': 'user', 'content': '…'}}."
        )
    return read


def _read_message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidValue(f"{name} is {shortened(message)}. Use a dict with role and content.")
    kept = {str(key): value for key, value in message.items() if value is not None}
    role = kept.get("role")
    if role is None:
        raise InvalidValue(
            f"{name} has no role; it has {', '.join(kept) or 'nothing'}. Use a dict with role and"
            " content."
        )
    if role not in ROLES:
        raise InvalidValue(f"{name} has the role {shortened(role)}. Use one of {', '.join(ROLES)}.")
    if "content" not in kept:
        if role == "assistant" and kept.get("tool_calls"):
            return {**kept, "content": ""}
        raise InvalidValue(f"{name} has no content. Give every message its text.")
    content = read_content(kept["content"], f"{name}.content")
    _check_characters(content, f"{name}.content")
    return {**kept, "content": PlainText(content) if role in TOOL_ROLES else content}


def read_content(content: Any, name: str) -> str:
    """Read the content of a message.

    Args:
        content: A text, or parts `{"type": "text", "text": …}`, which are joined without anything
            between them.
        name: Its place, for errors.

    Returns:
        The content as one text.

    Raises:
        InvalidValue: It is something else, or has parts that are no text (images, audio).
    """
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InvalidValue(f"{name} is {shortened(content)}. Use a text, or a list of text parts.")
    texts = []
    for number, part in enumerate(content):
        if isinstance(part, Mapping):
            kind = part.get("type") or "text"
            if kind not in ("text", "input_text", "output_text"):
                raise InvalidValue(
                    f"{name}[{number}] is a part of type {shortened(kind)}. Only text can be read;"
                    " leave it out."
                )
            part = part.get("text")
        if not isinstance(part, str):
            raise InvalidValue(
                f"{name}[{number}] is {shortened(part)}. Use parts like {{'type': 'text', 'text':"
                " '…'}."
            )
        texts.append(part)
    return "".join(texts)


def read_hint(hint: Any) -> str | None:
    """Read a hint: a text or a number, a list of texts (joined by line breaks), or chat messages.

    Args:
        hint: The hint as the user gave it.

    Returns:
        The hint as a text, as a `ChatHint` for chat messages, or None where it is empty or blank.

    Raises:
        InvalidValue: It is something else.
    """
    if isinstance(hint, Mapping):
        hint = [hint]
    if isinstance(hint, (list, tuple)):
        if hint and all(isinstance(one, Mapping) for one in hint):
            hint = ChatHint(hint)
        elif all(isinstance(one, str) for one in hint):
            hint = "\n".join(one for one in hint if one.strip())
    if (
        isinstance(hint, int | float | Decimal)
        and not isinstance(hint, bool)
        and math.isfinite(hint)
    ):
        hint = str(hint)
    if not isinstance(hint, str | None):
        raise InvalidValue(
            f"Prompt got hint={shortened(hint)}. Use a text, a list of texts, chat messages, or"
            " None."
        )
    _check_characters(hint or "", "hint")
    return hint if hint and hint.strip() else None


def read_tools(tools: Any, name: str = "tools") -> tuple[dict[str, Any], ...]:
    """Read the schemas of tools.

    Args:
        tools: A list of dicts, each with a `function` that has a `name`, or such functions of a
            schema without the dict around them; None for none.
        name: The argument's name, for errors.

    Returns:
        The schemas in order, each as `{"type": "function", "function": …}`.

    Raises:
        InvalidValue: They are something else.
    """
    advice = (
        "Use a list of JSON schemas, as [{'type': 'function', 'function': {'name': …}}]; for Python"
        " functions, opdlab.tasks.Tools(function, …).tools."
    )
    if tools is None:
        return ()
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Iterable):
        raise InvalidValue(f"{name} is {shortened(tools)}. {advice}")
    read = []
    for number, tool in enumerate(tools):
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise InvalidValue(f"{name}[{number}] is {shortened(tool)}. {advice}")
        read.append({"type": "function", "function": dict(inner)})
    return tuple(read)


def _check_characters(text: str, name: str) -> None:
    """Raise InvalidValue for half of a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidValue(
            f"{name} holds the lone surrogate U+{ord(text[error.start]):04X} at character"
            f" {error.start}, which is no text. Remove it, or read the file again with the right"
            " encoding."
        ) from None


def expect_prompts(value: Any, where: str, name: str = "prompts") -> list[Prompt]:
    """Return a list of prompts, which may be empty; one `Prompt` alone counts as a list of one.

    Args:
        value: The prompts as the user passed them, in any iterable.
        where: The function that was called, for the error.
        name: The argument's name, for the error.

    Returns:
        The prompts in order.

    Raises:
        InvalidValue: It is something else, as a text, a list of texts or a task.
    """
    if isinstance(value, Prompt):
        return [value]
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise refusal("prompts", value, where, name)
    prompts = list(value)
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt):
            raise refusal("Prompt", prompt, where, f"{name}[{i}]")
    return prompts
