"""Find out by trial how a server goes on with an unfinished answer.

A greedy answer is cut in half. The right way to ask is one in which the server, given the first
half, goes on with the second. This needs no knowledge of the server's model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opdlab.data.prompt import Prompt
from opdlab.errors import TeacherError
from opdlab.teachers.asking import SHORTEST_ECHO

# Asks for a greedy answer to a prompt that goes on from a prefix, in one of `asking.WAYS`.
AskGreedily = Callable[[Prompt, str, str], str]


@dataclass(frozen=True)
class _Halves:
    """A greedy answer that was cut in two."""

    prompt: Prompt
    first: str
    second: str


def find_way(prompts: Sequence[Prompt], ways: Sequence[str], ask: AskGreedily) -> str | None:
    """Find the first way that, given half of a greedy answer, goes on with its other half.

    Args:
        prompts: Chats to try.
        ways: Ways to try, some of `asking.WAYS`.
        ask: Asks the server.

    Returns:
        The way; None if none of them works, or the server cannot be greedy.

    Raises:
        TeacherError: The server does not answer, or breaks down.
    """
    halves = []
    try:
        for prompt in prompts:
            first, second = cut_in_half(ask(prompt, "", ""))
            if first and second:
                halves.append(_Halves(prompt, first, second))
    except TeacherError as error:
        if error.status is None or error.status >= 500:
            raise
        return None  # a server that cannot be greedy shows nothing
    if not halves:
        return None
    return next((way for way in ways if _works(way, halves, ask)), None)


def _works(way: str, halves: Sequence[_Halves], ask: AskGreedily) -> bool:
    """Tell whether the server goes on with the second halves."""
    right = 0
    try:
        for one in halves:
            said = ask(one.prompt, one.first, way).strip()
            right += said.startswith(one.second.strip()[:SHORTEST_ECHO])
    except TeacherError as error:
        if error.status is None:
            raise
        return False
    # Of three, one may differ: a boundary of tokens, or a server that rounds.
    return right >= max(1, len(halves) - 1)


def cut_in_half(text: str) -> tuple[str, str]:
    """Cut a text before the space nearest to its middle.

    Args:
        text: A greedy answer.

    Returns:
        Both parts; two empty texts if there are fewer than 8 characters, too few for a trial.
    """
    if len(text.strip()) < 8:
        return "", ""
    spaces = [i for i, character in enumerate(text) if character == " " and text[:i].strip()]
    middle = min(spaces, key=lambda i: abs(i - len(text) // 2), default=len(text) // 2)
    return text[:middle], text[middle:]
