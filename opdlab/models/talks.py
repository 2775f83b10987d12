"""Conversations that go on: what was said, and the ids that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opdlab.data.conversation import Cut, FinalText
from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.models.fingerprints import vocabulary_digest
from opdlab.models.head import Head
from opdlab.models.weights import Weights


class Talker(Protocol):
    """The part of a `Policy` that talks: it reads chats and writes turns."""

    weights: Weights
    chat_template_kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The model's name in errors."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the weights."""
        ...

    @property
    def adapter(self) -> str | None:
        """Name of the adapter in use."""
        ...

    @property
    def head(self) -> Head:
        """The output head as the adapter leaves it."""
        ...

    def encode_all(self, prompts: Sequence[Prompt], room: int = 0) -> list[list[int]]:
        """Encode prompts, and check that `room` new tokens fit behind each.

        Args:
            prompts: The prompts.
            room: New tokens that must fit.

        Returns:
            Token ids of each prompt.
        """
        ...

    def encode_unchecked(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Encode prompts, however long they are.

        Args:
            prompts: The prompts.

        Returns:
            Token ids of each prompt.
        """
        ...

    def with_template(self, **chat_template_kwargs: Any) -> Talker:
        """Make a view with more arguments for the chat template.

        Args:
            chat_template_kwargs: Arguments by name.

        Returns:
            The view.
        """
        ...


@dataclass
class Talk:
    """One conversation that goes on.

    Attributes:
        prompt: The prompt, with the environment's tools.
        start: Token ids of the prompt as the policy reads it.
        row: Number of the conversation in this call.
        place: Number of the conversation in the batch of all processes, for seeds.
        ids, learn, turn, logp, entropy: One value for each token after the prompt.
        messages: The conversation after the prompt.
        turns: The student's turns so far.
        finish: "stop" or "length" once it has ended; "" while it goes on.
        cut: What has cut it, if anything has.
        unfit: Tokens that a reply had which did not fit; 0 if all did.
        replies: For each reply, the number of end tokens before it and its ids without the opening
            of the next turn.
    """

    prompt: Prompt
    start: list[int]
    row: int = 0
    place: int = 0
    ids: list[int] = field(default_factory=list)
    learn: list[bool] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    turns: int = 0
    finish: str = ""
    cut: Cut = ""
    unfit: int = 0
    text: str = ""
    replies: list[tuple[int, list[int]]] = field(default_factory=list)

    def extended(self) -> Prompt:
        """The prompt with the conversation so far behind it."""
        return replace(self.prompt, messages=(*(self.prompt.messages or ()), *self.messages))

    def end(self, cut: Cut = "") -> None:
        """End the conversation.

        Args:
            cut: What has cut it; "" where it ended by itself.
        """
        self.finish, self.cut = "length" if cut else "stop", cut

    def leave_reply_out(self, unfit: int = 0) -> None:
        """End the conversation before a reply that does not fit.

        Args:
            unfit: Tokens that the reply had, where that is known.
        """
        while self.messages[-1]["role"] != "assistant":
            self.messages.pop()
        self.unfit = unfit
        self.end("reply")

    def append(self, ids: Sequence[int], numbers: tuple[list[float], list[float]] | None) -> None:
        """Add tokens to the turn that runs; `numbers` are log-probs and entropies of the student's.

        Tokens that the student did not write have none.
        """
        self.ids += ids
        self.learn += [numbers is not None] * len(ids)
        self.turn += [self.turns] * len(ids)
        zeros = [0.0] * len(ids)
        self.logp += zeros if numbers is None else numbers[0]
        self.entropy += zeros if numbers is None else numbers[1]


def make_rollout(policy: Talker, talks: Sequence[Talk], n: int, writer: str) -> Rollout:
    """Make a rollout of conversations that have ended.

    Args:
        policy: The policy whose tokens they are.
        talks: The conversations.
        n: Conversations of each prompt, which stand side by side.
        writer: Who wrote the turns, for the trace.

    Returns:
        The conversations; `texts` are `FinalText`s.
    """
    device = policy.weights.device
    width = max(1, *(len(talk.ids) for talk in talks))

    def column(name: str, dtype: torch.dtype) -> Tensor:
        rows = [getattr(talk, name) for talk in talks]
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype)

    columns = {
        "ids": column("ids", torch.long),
        "logp": column("logp", torch.float32),
        "entropy": column("entropy", torch.float32),
        "learn": column("learn", torch.bool),
        "turn": column("turn", torch.long),
    }
    return Rollout(
        prompts=tuple(talk.prompt for talk in talks),
        lengths=torch.tensor([len(talk.ids) for talk in talks], device=device),
        finish=tuple(talk.finish for talk in talks),
        texts=tuple(FinalText(talk.text, talk.messages, talk.cut) for talk in talks),
        writer=(writer,) * len(talks),
        n=n,
        vocabulary=vocabulary_digest(policy.tokenizer),
        **{name: values.to(device) for name, values in columns.items()},
    )
