"""Conversations of several turns: what an environment is, and what a student's turn says.

An environment speaks between the student's turns. It is a function of the conversation so far, so
that nothing has to be remembered between steps and a resumed run is the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

from opdlab.data.prompt import Prompt

Message = Mapping[str, Any]
# What cuts a conversation: the student's last turn ran out of tokens, the environment's reply did
# not fit with another token behind it, or the student had no turn left. "" for nothing.
Cut = Literal["", "tokens", "reply", "turns"]


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool, as a student wrote it.

    Attributes:
        name: The tool's name.
        arguments: Its arguments by name.
    """

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """Hold a student's turn in parts, as a parser read it.

    Attributes:
        content: The text beside the calls.
        calls: The calls of tools, in order.
        thought: The text of a thought that stands before, or "".
        error: What is wrong with a call that cannot be read, or "". The environment is told.
    """

    content: str
    calls: tuple[ToolCall, ...] = ()
    thought: str = ""
    error: str = ""

    def message(self) -> dict[str, Any]:
        """Make the assistant's message, as chat templates read it.

        Returns:
            A dict with `role`, `content` and, where there are any, `tool_calls`,
            `reasoning_content` and `error`.
        """
        calls = [
            {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in self.calls
        ]
        extra = {"tool_calls": calls, "reasoning_content": self.thought, "error": self.error}
        return {
            "role": "assistant",
            "content": self.content,
            **{name: value for name, value in extra.items() if value},
        }


Parser = Callable[[str], Turn]


@runtime_checkable
class Environment(Protocol):
    """Speak between the student's turns: tool results, a user's reply, an error.

    Subclass it, or use `opdlab.tasks.Tools` for plain functions.

    Attributes:
        tools: JSON schemas of the tools that the chat template shows the student.
        max_turns: The most turns of the student. A conversation that would need more counts as cut.
        parse: Reads the student's turns; None for the parser of the student's chat template.
    """

    tools: tuple[dict[str, Any], ...] = ()
    max_turns: int = 8
    parse: Parser | None = None

    def reply(self, prompt: Prompt, messages: Sequence[Message], seed: int) -> Sequence[Message]:
        """Reply to the student's last turn.

        Args:
            prompt: The prompt.
            messages: The conversation after the prompt; the last message is the student's. Its
                `tool_calls` are those that it wrote, its `error` says what is wrong with one that
                cannot be read.
            seed: For randomness; the same for the same place of a conversation in a run.

        Returns:
            The next messages, none of them the assistant's. An empty list ends the conversation.
        """
        ...


class FinalText(str):
    """Hold the student's last turn, with the conversation that led to it.

    It is the plain text wherever a `str` is wanted: a verifier that looks at the answer needs
    nothing else, and one that looks at the whole conversation reads `messages`.

    Args:
        text: The text of the last turn, without the token that ends it.
        messages: The conversation after the prompt.
        cut: What has cut the conversation; "" where it ended by itself.

    Attributes:
        messages: The conversation after the prompt, the student's turns among them.
        cut: "tokens" where the student's last turn was cut, "reply" where the environment's reply
            did not fit and was left out, "turns" where the student had no turn left, else "".
    """

    messages: tuple[dict[str, Any], ...]
    cut: Cut

    def __new__(cls, text: str, messages: Sequence[Message], cut: Cut = "") -> FinalText:
        """Make the text; see the class."""
        made = super().__new__(cls, text)
        made.messages = tuple(dict(message) for message in messages)
        made.cut = cut
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:  # so that copies keep the messages
        return (str(self), self.messages, self.cut)


def before_turn(prompt: Prompt, text: str, turn: int) -> Prompt:
    """Return what the student was asked before one of its turns.

    Args:
        prompt: The prompt of a completion.
        text: The completion's text, of `Rollout.texts`.
        turn: The number of the turn, from 0.

    Returns:
        The prompt with the conversation before that turn; the prompt itself for the first.
    """
    if turn == 0:
        return prompt
    messages = messages_of(text)
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    before = [
        {name: value for name, value in message.items() if name != "error"}
        for message in messages[: places[turn]]
    ]
    return replace(prompt, messages=(*(prompt.messages or ()), *before))


def transcript(text: str) -> str:
    """Write a conversation out as one text, for readers without a chat template.

    Args:
        text: A text of `Rollout.texts`.

    Returns:
        Of a conversation of several turns, one part per message, each begun by its role; else the
        text itself.
    """
    messages = messages_of(text)
    if len(messages) < 2:
        return str(text)
    parts = []
    for message in messages:
        calls = [
            f"{call['function']['name']}({dict(call['function']['arguments'])})"
            for call in message.get("tool_calls", ())
        ]
        said = " ".join(one for one in (str(message["content"]), *calls) if one)
        parts.append(f"{message['role']}: {said}")
    return "\n".join(parts)


def messages_of(text: str) -> tuple[dict[str, Any], ...]:
    """Return the conversation after the prompt that a completion is.

    Args:
        text: A text of `Rollout.texts`.

    Returns:
        The messages of a `FinalText`; of a plain text, one message of the assistant.
    """
    if isinstance(text, FinalText):
        return text.messages
    return ({"role": "assistant", "content": str(text)},)
