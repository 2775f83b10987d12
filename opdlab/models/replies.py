"""Read what a turn of the student says, and ask an environment for its reply to it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from opdlab.data.conversation import Environment, Message, Parser, ToolCall, Turn
from opdlab.data.prompt import PlainText, Prompt, name_of, read_messages
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.support.expect import shortened

TURNS = 4096  # most turns of a conversation, for seeds


def check_environment(environment: Any) -> None:
    """Check that an object can reply to turns.

    Args:
        environment: As the user gave it.

    Raises:
        InvalidValue: It is no environment, or has a limit of turns that cannot be right.
    """
    if isinstance(environment, type) or not isinstance(environment, Environment):
        raise InvalidValue(
            f"environment is {shortened(environment)}. Use opdlab.tasks.Tools(function, …), or an"
            " object of a subclass of opdlab.tasks.Environment with a method reply(prompt,"
            " messages, seed)."
        )
    limit = environment.max_turns
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= TURNS:
        raise InvalidValue(
            f"The environment has max_turns={shortened(limit)}. Use a whole number from 1 to"
            f" {TURNS}."
        )


def with_tools(prompts: Sequence[Prompt], environment: Environment) -> list[Prompt]:
    """Show the environment's tools in the chats that show none of their own.

    Args:
        prompts: The prompts; plain texts stay as they are.
        environment: Its `tools` are shown.

    Returns:
        The prompts in order; the same objects where nothing changes.
    """
    return [
        replace(prompt, tools=environment.tools)
        if environment.tools and prompt.messages is not None and not prompt.tools
        else prompt
        for prompt in prompts
    ]


def check_chats(prompts: Sequence[Prompt]) -> None:
    """Check that all prompts are chats, since an environment replies in one.

    Args:
        prompts: The prompts.

    Raises:
        InvalidValue: One is a plain text.
    """
    for prompt in prompts:
        if prompt.messages is None:
            raise InvalidValue(
                f"Prompt {name_of(prompt)} is a plain text, and an environment replies in a chat."
                " Give messages=."
            )


def read_turn(parse: Parser, text: str, prompt: Prompt) -> Turn:
    """Read a turn; a parser of the user's own that fails gives a turn with an error.

    Args:
        parse: The parser.
        text: The text of the turn.
        prompt: The prompt of the conversation, for errors.

    Returns:
        The turn in parts.

    Raises:
        InvalidValue: The parser returned something else. The message names the prompt.
    """
    try:
        turn = parse(text)
    except OpdlabError:
        raise
    except Exception as error:
        return Turn(text, error=f"the turn cannot be parsed: {type(error).__name__}")
    if not isinstance(turn, Turn) or not all(isinstance(one, ToolCall) for one in turn.calls):
        raise InvalidValue(
            f"The parser of the environment returned {shortened(turn)} on prompt"
            f" {name_of(prompt)}. Return an opdlab.data.conversation.Turn, whose calls are"
            " ToolCall(name, arguments)."
        )
    return turn


def ask_for_reply(
    environment: Environment, prompt: Prompt, messages: Sequence[Message], seed: int
) -> tuple[dict[str, Any], ...]:
    """Let an environment reply to the student's last turn.

    Args:
        environment: Replies.
        prompt: The prompt.
        messages: The conversation after it; the last message is the student's.
        seed: For the environment's randomness.

    Returns:
        The next messages, whose contents are `PlainText`; none where the conversation ends.

    Raises:
        OpdlabError: The environment fails, or replies with something that is no message of its own.
            The error names the prompt.
    """
    name = type(environment).__name__
    where = f"prompt {name_of(prompt)} after turn {_count_turns(messages) - 1}"
    try:
        # A copy, since what was written must stay what it was.
        given = environment.reply(prompt, copy.deepcopy(tuple(messages)), seed)
    except Exception as error:
        raise OpdlabError(
            f"The environment {name} failed on {where}: {type(error).__name__}: {error}. Mend its"
            " reply(), or let it return a message that tells the error."
        ) from error
    if given is None:
        raise OpdlabError(
            f"The environment {name} replied None on {where}. Return a list of messages; [] ends"
            " the conversation."
        )
    try:
        reply = read_messages(given, "the reply") if len(given) else ()
    except (InvalidValue, TypeError) as error:
        raise OpdlabError(
            f"The environment {name} replied on {where} with something that is no list of messages:"
            f" {error} Return messages, as [{{'role': 'tool', 'content': '…'}}]."
        ) from error
    if any(message["role"] == "assistant" for message in reply):
        raise OpdlabError(
            f"The environment {name} replied on {where} with a message of the assistant, which the"
            " student writes itself. Use the roles tool, user or system."
        )
    return tuple({**message, "content": PlainText(message["content"])} for message in reply)


def _count_turns(messages: Sequence[Message]) -> int:
    return sum(message["role"] == "assistant" for message in messages)
