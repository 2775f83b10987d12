"""Find the ids that a chat template writes between two turns of the student.

    prompt ids | turn 0 | the template's ids around the reply | turn 1 | …

The conversation with the reply is rendered as a whole, and the ids behind the end of the student's
last turn are taken. They are checked to change nothing before: the prompt and earlier replies must
be rendered as they were. The student's own ids stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

from transformers import PreTrainedTokenizerBase

from opdlab.data.prompt import Prompt, name_of
from opdlab.errors import OpdlabError
from opdlab.models.talks import Talk, Talker
from opdlab.models.templates import end_token

# Tokenizers whose users know that their template renders earlier turns in another way.
_warned: WeakSet[PreTrainedTokenizerBase] = WeakSet()


class Frame:
    """Find the ids that a chat template writes between two turns of the student.

    Args:
        policy: The policy that writes.
    """

    def __init__(self, policy: Talker) -> None:
        self.policy = policy
        # The same policy, whose template does not open an answer.
        self.closed = policy.with_template(add_generation_prompt=False)
        self.eos = policy.weights.eos

    def append_replies(self, talks: Sequence[Talk], limit: int | None = None) -> None:
        """Append the template's ids around the replies that the conversations end with.

        Args:
            talks: Conversations whose last messages are a reply.
            limit: The most tokens after the prompt; None for no limit. A conversation whose reply
                leaves no room for another token ends without it, and notes how long it was.

        Raises:
            OpdlabError: The template renders what was before in another way.
        """
        if not talks:
            return
        asked = self.closed.encode_unchecked([talk.prompt for talk in talks])
        said = self.closed.encode_unchecked([_until_reply(talk) for talk in talks])
        whole = self.policy.encode_unchecked([talk.extended() for talk in talks])
        for talk, before, closed, opened in zip(talks, asked, said, whole, strict=True):
            ids = self._ids_between(talk, before, closed, opened)
            if limit is not None and len(talk.ids) + len(ids) >= limit:
                talk.leave_reply_out(len(ids))
                continue
            talk.append(ids, None)
            talk.turns += 1

    def append_turns(
        self, talks: Sequence[Talk], messages: Sequence[dict[str, Any]], is_open: Sequence[bool]
    ) -> None:
        """Append turns of the assistant that somebody wrote as messages, in the template's ids.

        Args:
            talks: Conversations that end where a turn is to begin.
            messages: One message of the assistant for each.
            is_open: Whether each was cut by its writer, so that no end token belongs behind it.

        Raises:
            OpdlabError: The template renders a turn in another way than it opens one.
        """
        if not talks:
            return
        opened = self.policy.encode_unchecked([talk.extended() for talk in talks])
        for talk, message in zip(talks, messages, strict=True):
            talk.messages.append(message)
        closed = self.closed.encode_unchecked([talk.extended() for talk in talks])
        for talk, before, whole, cut in zip(talks, opened, closed, is_open, strict=True):
            ids = self._behind(talk, before, whole)
            end = next((place for place, token in enumerate(ids) if token in self.eos), None)
            body = ids if end is None else ids[:end]
            if not cut:
                body = [*body, *self._end_of(ids, end)]
            talk.append(body, ([0.0] * len(body), [0.0] * len(body)))

    def _behind(self, talk: Talk, opened: list[int], closed: list[int]) -> list[int]:
        """The ids of a turn, behind those that open it."""
        if _rest(closed, opened):
            return _rest(closed, opened)
        # A first piece that merges with the opening, as a line break: the student never sees that.
        tokenizer = self.policy.tokenizer
        before, whole = (
            str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            for ids in (opened, closed)
        )
        if not whole.startswith(before):
            raise OpdlabError(
                f"The chat template of {self.policy.name} renders a turn of the assistant on prompt"
                f" {name_of(talk.prompt)} in another way than it opens one, so its tokens cannot be"
                " told from the template's. Load the policy with a template that only appends:"
                " Policy.load(…, chat_template=…)."
            )
        return list(tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"])

    def _end_of(self, ids: list[int], end: int | None) -> list[int]:
        """The end token of a turn: the template's, or that of the policy's answers."""
        if end is not None:
            return [ids[end]]
        options = self.policy.chat_template_kwargs
        found = end_token(self.policy.tokenizer, self.eos, options, is_chat=True)
        return [] if found is None else [found]

    def _ids_between(
        self, talk: Talk, asked: list[int], said: list[int], whole: list[int]
    ) -> list[int]:
        """The ids behind the student's last turn.

        `asked` is the prompt, `said` the conversation until that turn, and `whole` the conversation
        with the reply and the opening of the next turn.
        """
        number = self._count_ends(said)
        is_kept = _starts_with(said, asked) and _starts_with(whole, asked)
        if is_kept and number <= self._count_ends(asked):
            raise OpdlabError(
                f"The chat template of {self.policy.name} writes no end token behind the"
                " assistant's turns, so a conversation cannot go on. Load the policy with a"
                " template that does: Policy.load(…, chat_template=…)."
            )
        cut = self._behind_end(whole, number)
        if cut is None or not is_kept or not self._keeps_replies(talk, whole):
            raise OpdlabError(
                f"The chat template of {self.policy.name} renders the beginning of prompt"
                f" {name_of(talk.prompt)} in another way when the conversation goes on, so the"
                " tokens that the student read would not be those of the template. Load the policy"
                " with a template that only appends: Policy.load(…, chat_template=…)."
            )
        own = talk.start + talk.ids
        has_ended = bool(talk.ids) and talk.ids[-1] in self.eos
        behind = whole[cut:] if has_ended else whole[cut - 1 :]
        rewritten = whole[:cut] != said[: self._behind_end(said, number)]
        if rewritten and whole[: cut - (not has_ended)] != own:
            self._warn_of_rewriting()
        opening = _rest(self.policy.encode_unchecked([talk.prompt])[0], asked)
        kept = whole[cut : len(whole) - len(opening)] if _ends_with(whole, opening) else []
        talk.replies.append((number, kept))
        return behind

    def _keeps_replies(self, talk: Talk, whole: list[int]) -> bool:
        """Check that earlier replies stand where they stood, and as they stood."""
        for number, ids in talk.replies:
            at = self._behind_end(whole, number)
            if at is None or whole[at : at + len(ids)] != ids:
                return False
        return True

    def _count_ends(self, ids: list[int]) -> int:
        return sum(token in self.eos for token in ids)

    def _behind_end(self, ids: list[int], number: int) -> int | None:
        """The place behind the `number`-th end token."""
        ends = [place for place, token in enumerate(ids) if token in self.eos]
        return ends[number - 1] + 1 if len(ends) >= number else None

    def _warn_of_rewriting(self) -> None:
        if self.policy.tokenizer in _warned:
            return
        _warned.add(self.policy.tokenizer)
        warnings.warn(
            f"The chat template of {self.policy.name} renders earlier turns of the assistant in"
            " another way once the conversation goes on (templates of thinking models leave"
            " thoughts out). The tokens stay as they were sampled, so the student is trained on its"
            " own history; a server that renders the conversation anew shows it another one.",
            stacklevel=2,
        )


def _until_reply(talk: Talk) -> Prompt:
    """The conversation until the student's last turn."""
    last = max(i for i, one in enumerate(talk.messages) if one["role"] == "assistant")
    said = talk.messages[: last + 1]
    return replace(talk.prompt, messages=(*(talk.prompt.messages or ()), *said))


def _starts_with(ids: list[int], start: list[int]) -> bool:
    """Check that ids go on from others; the last may have grown into a longer token."""
    return ids[: len(start) - 1] == start[:-1]


def _ends_with(ids: list[int], end: list[int]) -> bool:
    return not end or ids[-len(end) :] == end


def _rest(ids: list[int], start: list[int]) -> list[int]:
    return ids[len(start) :] if ids[: len(start)] == start else []
