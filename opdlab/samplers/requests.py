"""Let an engine write the student's texts and turns: the part that all engines share.

An engine takes orders of token ids and gives completions of token ids with log-probs. Nothing is
tokenised again, between the turns of a conversation either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opdlab.data.conversation import Environment
from opdlab.data.prompt import Prompt, expect_prompts
from opdlab.data.rollout import Rollout
from opdlab.data.sampling_config import SamplingConfig
from opdlab.data.seeds import seed_of
from opdlab.errors import InvalidValue, SamplerError
from opdlab.models.conversations import converse
from opdlab.models.places import read_places
from opdlab.models.policy import Policy
from opdlab.models.replies import check_chats, with_tools
from opdlab.models.sampled_texts import SampledTexts
from opdlab.models.talks import Talk
from opdlab.samplers.completions import Completion, Order, read_texts
from opdlab.samplers.fields import SEEDS, seed_of_prompt

Write = Callable[[Sequence[Order], SamplingConfig], list[Completion]]


@dataclass(frozen=True)
class Request:
    """Hold what a sampler is asked for.

    Attributes:
        prompts: The prompts.
        n: Completions of each prompt.
        config: The sampling settings.
        prefixes: Token ids already written after each prompt; None for none.
        environment: Replies between the student's turns; None for texts of one turn.
        batch_size: Prompts given to the engine at once; None for all.
        writer: Who writes, for the trace.
        places: Where each prompt stands in the batch of all processes; None for a batch of this
            process alone.
    """

    prompts: Sequence[Prompt]
    n: int
    config: SamplingConfig
    prefixes: Sequence[Sequence[int]] | None = None
    environment: Environment | None = None
    batch_size: int | None = None
    writer: str = "student"
    places: Sequence[int] | None = None

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt],
        n: int,
        options: Mapping[str, Any],
        *,
        prefixes: Sequence[Sequence[int]] | None,
        environment: Environment | None,
        batch_size: int | None,
        writer: str,
        places: Sequence[int] | None,
    ) -> Request:
        """Check the arguments of `sample` and make a request of them.

        Args:
            prompts: A single prompt counts as a list of one.
            n: Completions of each prompt.
            options: Fields of `SamplingConfig`, as the user gave them.
            prefixes: Token ids already written after each prompt.
            environment: Replies between the student's turns.
            batch_size: Prompts given to the engine at once.
            writer: Who writes.
            places: Where each prompt stands in the batch of all processes.

        Returns:
            The request.

        Raises:
            OpdlabError: An argument is not what it must be.
        """
        beside = ("n", "prefixes", "batch_size", "writer", "places", "environment")
        config = SamplingConfig.of("sample", options, beside=beside)
        prompts = expect_prompts(prompts, "sample")
        return cls(
            prompts,
            n,
            config,
            prefixes=prefixes,
            environment=environment,
            batch_size=batch_size,
            writer=writer,
            places=read_places(places, len(prompts)),
        )

    @property
    def numbers(self) -> list[int]:
        """The place of each prompt, which its seed follows from."""
        return list(range(len(self.prompts)) if self.places is None else self.places)


def expect_student(student: Policy | None) -> Policy:
    """Return the student that a sampler holds.

    Args:
        student: The student; None before `start`.

    Returns:
        The student.

    Raises:
        SamplerError: There is none.
    """
    if student is None:
        raise SamplerError(
            "This sampler holds no student yet. Call sampler.start(student), or give it to"
            " distill or evaluate."
        )
    return student


def sample_with(
    write: Write,
    check_room: Callable[[Sequence[Sequence[int]], int], None],
    student: Policy,
    request: Request,
) -> Rollout:
    """Sample texts or conversations from an engine.

    Args:
        write: Has the engine write.
        check_room: Refuses prompts that do not fit the engine with so many new tokens.
        student: The policy that the engine holds.
        request: What is asked for.

    Returns:
        The completions with the engine's log-probs at temperature 1, in nats, without entropies.

    Raises:
        InvalidValue: The request has prefixes and an environment.
        ContextTooLong: A prompt with its completion does not fit.
        SamplerError: The engine gives completions that these settings do not allow.
    """
    prompts, n, config = request.prompts, request.n, request.config
    if request.environment is None:
        starts = student.starts(prompts, config.max_new_tokens, request.prefixes)
        check_room(starts, config.max_new_tokens)
        size = request.batch_size or len(starts)
        numbers, completions = request.numbers, list[Completion]()
        for i in range(0, len(starts), size):
            orders = _first_orders(starts[i : i + size], n, config, numbers[i : i + size])
            completions += write(orders, config)
        rooms = [config.max_new_tokens] * len(completions)
        written = read_texts(student, completions, rooms, config)
        return student.make_rollout(prompts, n, written, request.writer)
    if request.prefixes is not None:
        raise InvalidValue(
            "sample got prefixes= and environment=. Put the beginning of a conversation into the"
            " prompt's messages, or leave one of them out."
        )
    check_chats(prompts)
    shown = with_tools(prompts, request.environment)
    check_room(student.encode_all(shown, config.max_new_tokens), config.max_new_tokens)
    return converse(
        student,
        prompts,
        n,
        request.environment,
        config,
        turns=EngineTurns(write, student, config),
        batch_size=request.batch_size,
        writer=request.writer,
        places=request.places,
    )


def _first_orders(
    starts: Sequence[list[int]], n: int, config: SamplingConfig, numbers: Sequence[int]
) -> list[Order]:
    return [
        Order(start, n, config.max_new_tokens, seed_of_prompt(config, number))
        for start, number in zip(starts, numbers, strict=True)
    ]


def order_of_trial(start: list[int], config: SamplingConfig) -> Order:
    """Order two texts to try an engine with.

    Args:
        start: Token ids of a prompt.
        config: The sampling settings.

    Returns:
        The order.
    """
    return Order(start, 2, config.max_new_tokens, seed_of_prompt(config, 0))


@dataclass(frozen=True)
class EngineTurns:
    """Turns that an engine writes; a `TurnWriter`.

    The first turns have the seeds of texts without an environment. Later ones have a seed that
    follows from the place of the conversation and the number of the turn.

    Attributes:
        write: Has the engine write.
        student: The policy that the engine holds.
        config: The sampling settings.
    """

    write: Write
    student: Policy
    config: SamplingConfig

    def begin(self, talks: Sequence[Talk], n: int) -> SampledTexts:
        """Write the first turns; see `TurnWriter.begin`.

        Args:
            talks: The conversations.
            n: Conversations of each prompt.

        Returns:
            Their first turns.
        """
        first = talks[::n]
        numbers = [talk.place // n for talk in first]
        orders = _first_orders([talk.start for talk in first], n, self.config, numbers)
        return self._texts(orders)

    def go_on(self, talks: Sequence[Talk]) -> SampledTexts:
        """Write the next turns; see `TurnWriter.go_on`.

        Args:
            talks: The conversations.

        Returns:
            Their next turns.
        """
        limit = self.config.max_new_tokens
        return self._texts(
            [
                Order(talk.start + talk.ids, 1, limit - len(talk.ids), self._seed(talk))
                for talk in talks
            ]
        )

    def _seed(self, talk: Talk) -> int:
        return seed_of(self.config.seed % SEEDS, talk.place % 2**32, talk.turns) % SEEDS

    def _texts(self, orders: Sequence[Order]) -> SampledTexts:
        rooms = [order.room for order in orders for _ in range(order.n)]
        return read_texts(self.student, self.write(orders, self.config), rooms, self.config)
