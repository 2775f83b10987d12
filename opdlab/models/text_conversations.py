"""Make rollouts of conversations that are given as messages, in the ids of a policy's template.

    prompt ids | turn 0 as the template renders it | template's ids around the reply | turn 1 | …

The ids are those of the template, and `learn` is true on the assistant's turns with their end
tokens, so a data set of conversations trains what a student that plays them would be trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

from opdlab.data.conversation import FinalText
from opdlab.data.prompt import Prompt, name_of
from opdlab.data.rollout import Rollout
from opdlab.errors import InvalidValue
from opdlab.models.frames import Frame
from opdlab.models.talks import Talk, Talker, make_rollout


def is_conversation(text: str) -> TypeGuard[FinalText]:
    """Tell whether a text is more than one plain message of the assistant.

    Args:
        text: Any text.

    Returns:
        True for a `FinalText` with several messages, or with calls of tools.
    """
    if not isinstance(text, FinalText):
        return False
    return len(text.messages) > 1 or any(one.get("tool_calls") for one in text.messages)


def rollout_from_conversations(
    policy: Talker,
    prompts: Sequence[Prompt],
    conversations: Sequence[FinalText],
    writer: str = "answer",
    limit: int | None = None,
) -> Rollout:
    """Make a rollout of given conversations.

    Args:
        policy: Its chat template makes the ids.
        prompts: The prompt of each conversation.
        conversations: The messages after each prompt, which begin with the assistant. Messages
            behind the assistant's last turn are left out.
        writer: Who wrote them, for the trace.
        limit: The most tokens after a prompt; what is beyond is cut. None for no limit.

    Returns:
        One conversation per prompt; `logp` and `entropy` are zero, since nobody sampled.

    Raises:
        InvalidValue: A conversation does not begin with the assistant.
        OpdlabError: The chat template cannot go on with a conversation.
    """
    for prompt, text in zip(prompts, conversations, strict=True):
        if not text.messages or text.messages[0]["role"] != "assistant":
            raise InvalidValue(
                f"The conversation after prompt {name_of(prompt)} does not begin with the"
                " assistant. Put what is said before into the prompt's messages."
            )
    frame = Frame(policy)
    starts = policy.encode_unchecked(prompts)
    talks = [Talk(prompt, start) for prompt, start in zip(prompts, starts, strict=True)]
    left = [list(text.messages) for text in conversations]
    going = list(range(len(talks)))
    while going:
        turns = [left[i].pop(0) for i in going]
        is_last = [not _has_turn(left[i]) for i in going]
        is_open = [
            last and conversations[i].cut == "tokens"
            for i, last in zip(going, is_last, strict=True)
        ]
        frame.append_turns([talks[i] for i in going], turns, is_open)
        going = [i for i, last in zip(going, is_last, strict=True) if not last]
        for i in going:
            while left[i][0]["role"] != "assistant":
                talks[i].messages.append(left[i].pop(0))
        frame.append_replies([talks[i] for i in going])
    for talk, text in zip(talks, conversations, strict=True):
        talk.text = str(text)
        talk.end(text.cut)
        if limit is not None and len(talk.ids) > limit:
            _shorten(talk, limit)
    return make_rollout(policy, talks, 1, writer)


def _has_turn(messages: Sequence[dict[str, Any]]) -> bool:
    return any(message["role"] == "assistant" for message in messages)


def _shorten(talk: Talk, limit: int) -> None:
    """Cut a conversation at a number of tokens."""
    for values in (talk.ids, talk.learn, talk.turn, talk.logp, talk.entropy):
        del values[limit:]
    talk.end("tokens")
