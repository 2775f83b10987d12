"""Sample conversations: the student's turns, and what an environment says between them.

    prompt ids | turn 0, sampled | template's ids around the reply | turn 1, sampled | …

Token ids stay as they were sampled and are never tokenized again. Who writes the turns is a
`TurnWriter`: the policy's own loop, or vLLM (`opdlab.samplers`). What stands between two turns
comes from the chat template (`opdlab.models.frames`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from opdlab.data.conversation import Environment, Parser
from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.data.sampling_config import SamplingConfig
from opdlab.data.seeds import seed_of
from opdlab.data.tokens import completion_texts
from opdlab.errors import InvalidValue
from opdlab.models.frames import Frame
from opdlab.models.replies import (
    ask_for_reply,
    check_chats,
    check_environment,
    read_turn,
    with_tools,
)
from opdlab.models.sampled_texts import SampledTexts
from opdlab.models.sampling import SamplingLoop
from opdlab.models.talks import Talk, Talker, make_rollout
from opdlab.models.tool_calls import find_parser


class TurnWriter(Protocol):
    """Write the student's turns in its own tokens."""

    def begin(self, talks: Sequence[Talk], n: int) -> SampledTexts:
        """Write the first turns, as texts without an environment are written.

        Args:
            talks: Conversations without a turn; those of a prompt stand side by side.
            n: Conversations of each prompt.

        Returns:
            One text for each conversation, of at most `max_new_tokens` tokens.
        """
        ...

    def go_on(self, talks: Sequence[Talk]) -> SampledTexts:
        """Write the next turns of conversations that are at any turn.

        Args:
            talks: The conversations, which end with the opening of a turn.

        Returns:
            One text for each, which fits with all that was said into `max_new_tokens`.
        """
        ...


class LoopTurns:
    """The turns of a policy's own sampling loop.

    The random numbers of a token depend on seed, row and position alone.

    Args:
        policy: The policy that writes.
        config: How tokens are drawn.
        prompts: Number of prompts.
        n: Conversations of each prompt.
        places: Where each prompt stands in a batch that several processes share.
    """

    def __init__(
        self,
        policy: Talker,
        config: SamplingConfig,
        prompts: int,
        n: int,
        places: Sequence[int] | None,
    ) -> None:
        self.policy = policy
        self.loop = SamplingLoop(policy.weights, policy.head, config)
        self.uniform = self.loop.draw_uniform(prompts, n, places).flatten(0, 1)

    def begin(self, talks: Sequence[Talk], n: int) -> SampledTexts:
        """Write the first turns; see `TurnWriter.begin`.

        Args:
            talks: The conversations.
            n: Conversations of each prompt.

        Returns:
            Their first turns.
        """
        rows = [talk.row for talk in talks]
        with torch.no_grad(), self.policy.weights.using(self.policy.adapter):
            return self.loop.write([talk.start for talk in talks[::n]], n, self.uniform[rows])

    def go_on(self, talks: Sequence[Talk]) -> SampledTexts:
        """Write the next turns; see `TurnWriter.go_on`.

        Args:
            talks: The conversations.

        Returns:
            Their next turns.
        """
        limit = self.loop.config.max_new_tokens
        room = torch.tensor([limit - len(talk.ids) for talk in talks])
        numbers = torch.zeros(len(talks), int(room.max()), dtype=torch.float64)
        for row, talk in enumerate(talks):
            numbers[row, : int(room[row])] = self.uniform[talk.row, len(talk.ids) :]
        with torch.no_grad(), self.policy.weights.using(self.policy.adapter):
            return self.loop.write([talk.start + talk.ids for talk in talks], 1, numbers, room)


@dataclass(frozen=True)
class Exchange:
    """Both sides of some conversations, and what stands between them.

    Attributes:
        policy: The policy whose tokens are written.
        environment: Replies between the turns.
        parse: Reads a turn.
        frame: Finds the template's ids around a reply.
        config: How tokens are drawn.
    """

    policy: Talker
    environment: Environment
    parse: Parser
    frame: Frame
    config: SamplingConfig

    @classmethod
    def of(cls, policy: Talker, environment: Environment, config: SamplingConfig) -> Exchange:
        """Check that a policy can talk to an environment, and find its parser.

        Args:
            policy: The policy.
            environment: The environment.
            config: How tokens are drawn.

        Returns:
            The exchange.

        Raises:
            InvalidValue: An option does not suit several turns, or no parser is known.
        """
        check_environment(environment)
        _check_options(policy, config)
        parse = environment.parse or find_parser(
            policy.tokenizer, policy.chat_template_kwargs, has_tools=bool(environment.tools)
        )
        return cls(policy, environment, parse, Frame(policy), config)

    def take(self, written: SampledTexts, talks: Sequence[Talk]) -> list[Talk]:
        """Put turns into their conversations, and let the environment reply.

        Args:
            written: One turn for each conversation.
            talks: The conversations.

        Returns:
            Those that go on, with the reply and the opening of the next turn.
        """
        self._append_turns(written, talks)
        for talk in talks:
            self._answer(talk)
        going = [talk for talk in talks if not talk.finish]
        self.frame.append_replies(going, self.config.max_new_tokens)
        return [talk for talk in going if not talk.finish]

    def _append_turns(self, written: SampledTexts, talks: Sequence[Talk]) -> None:
        columns = (written.ids, written.logp, written.entropy)
        ids, logp, entropy = (values.tolist() for values in columns)
        ended = zip(written.lengths.tolist(), written.stopped.tolist(), strict=True)
        bodies = []
        for row, (talk, (length, stopped)) in enumerate(zip(talks, ended, strict=True)):
            body = ids[row][:length]
            talk.append(body, (logp[row][:length], entropy[row][:length]))
            if not stopped:
                talk.end("tokens")
            bodies.append(body)
        texts = completion_texts(self.policy.tokenizer, bodies, self.policy.weights.eos)
        for talk, text in zip(talks, texts, strict=True):
            talk.text = text

    def _answer(self, talk: Talk) -> None:
        """Let the environment reply to a turn; a conversation without a reply ends."""
        talk.messages.append(read_turn(self.parse, talk.text, talk.prompt).message())
        if talk.finish:
            return
        seed = seed_of(self.config.seed, talk.place % 2**32, talk.turns)
        reply = ask_for_reply(self.environment, talk.prompt, talk.messages, seed)
        if not reply:
            talk.end()
        elif talk.turns + 1 >= self.environment.max_turns:
            talk.end("turns")
        else:
            talk.messages += reply


def converse(
    policy: Talker,
    prompts: Sequence[Prompt],
    n: int,
    environment: Environment,
    config: SamplingConfig,
    *,
    turns: TurnWriter | None = None,
    batch_size: int | None = None,
    writer: str = "student",
    places: Sequence[int] | None = None,
) -> Rollout:
    """Let a policy talk to an environment: row `i * n + j` is conversation `j` of prompt `i`.

    The first turns are written as texts without an environment are, so a conversation of one turn
    is the same to the bit. Later turns of all conversations that wait are written side by side,
    whichever turn they are at.

    Args:
        policy: The policy whose tokens are written.
        prompts: Chats.
        n: Conversations of each prompt.
        environment: Replies between the turns.
        config: How tokens are drawn. `max_new_tokens` limits all tokens after the prompt, those of
            the environment among them.
        turns: Writes the turns; the policy's own loop by default.
        batch_size: Prompts held in memory at once; all by default.
        writer: Who writes, for the trace.
        places: Where each prompt stands in a batch that several processes share.

    Returns:
        The conversations. `learn` is true on the student's own tokens, `turn` numbers its turns (a
        reply counts to the turn before it), and `texts` are `FinalText`s. A conversation that ran
        out of tokens or turns has the finish "length", and its text says what cut it.

    Raises:
        InvalidValue: A prompt is no chat, or an option does not suit several turns.
        OpdlabError: The environment fails, or the chat template cannot go on with a conversation.
    """
    exchange = Exchange.of(policy, environment, config)
    check_chats(prompts)
    talks = _begin(policy, with_tools(prompts, environment), n, config.max_new_tokens, places)
    turns = turns or LoopTurns(policy, config, len(prompts), n, places)
    size = n * (batch_size or len(prompts))
    waiting: list[Talk] = []
    for i in range(0, len(talks), size):
        part = talks[i : i + size]
        waiting += exchange.take(turns.begin(part, n), part)
        # A pass is worth its while when it is full, or when no first turns are left.
        while waiting and (len(waiting) >= size or i + size >= len(talks)):
            part, waiting = waiting[:size], waiting[size:]
            waiting += exchange.take(turns.go_on(part), part)
    _warn_of_long_replies(talks, config.max_new_tokens)
    return make_rollout(policy, talks, n, writer)


def _begin(
    policy: Talker, prompts: Sequence[Prompt], n: int, room: int, places: Sequence[int] | None
) -> list[Talk]:
    """One conversation for each row, without a turn."""
    starts = policy.encode_all(prompts, room)
    numbers = range(len(prompts)) if places is None else places
    return [
        Talk(prompt, start, row * n + j, place * n + j)
        for row, (prompt, start, place) in enumerate(zip(prompts, starts, numbers, strict=True))
        for j in range(n)
    ]


def _check_options(policy: Talker, config: SamplingConfig) -> None:
    if config.min_new_tokens:
        raise InvalidValue(
            "min_new_tokens cannot be kept in a conversation, whose turns end when the student ends"
            " them. Leave it out, or sample without environment=."
        )
    for name in ("add_generation_prompt", "continue_final_message"):
        if name in policy.chat_template_kwargs:
            raise InvalidValue(
                f"This policy sets {name} for its chat template, which a conversation sets itself."
                " Use a policy without it."
            )


def _warn_of_long_replies(talks: Sequence[Talk], limit: int) -> None:
    """Say that a reply is too long for the limit, which the student cannot help.

    A student that talks until nothing fits is told by `finish` and `FinalText.cut` alone.
    """
    if any(2 * talk.unfit > limit for talk in talks):
        warnings.warn(
            "Conversations end early: a reply of the environment has more than half of the"
            f" max_new_tokens={limit} that a conversation may have, did not fit, and was left out."
            " These conversations count as cut (finish 'length', text.cut 'reply'). Use a larger"
            " max_new_tokens, or let the environment say less.",
            stacklevel=4,
        )
