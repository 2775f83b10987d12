"""Refuse prompts and completions that do not fit a model's context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opdlab.data.prompt import Prompt, name_of
from opdlab.errors import ContextTooLong


@dataclass(frozen=True)
class ContextLimit:
    """Tokens that a prompt and its completion may have together.

    Attributes:
        tokens: The limit; None for none.
        model: The model's name, for errors.
        is_hinted: Whether prompts are read with a hint, which may be what is too long.
    """

    tokens: int | None
    model: str
    is_hinted: bool

    def allows(self, length: int) -> bool:
        """Tell whether this many tokens fit.

        Args:
            length: Tokens of a prompt and its completion together.

        Returns:
            True without a limit, too.
        """
        return self.tokens is None or length <= self.tokens

    def check_prompts(
        self,
        prompts: Sequence[Prompt],
        starts: Sequence[Sequence[int]],
        written: Sequence[int],
        room: int,
    ) -> None:
        """Check that tokens still to come fit behind each prompt.

        Args:
            prompts: The prompts.
            starts: Their token ids.
            written: How many tokens are written already behind each.
            room: How many new tokens must fit.

        Raises:
            ContextTooLong: One does not fit.
        """
        for number, (start, more) in enumerate(zip(starts, written, strict=True)):
            if self.tokens is None or len(start) + more + room <= self.tokens:
                continue
            left = self.tokens - len(start) - more
            advice = f", or ask for at most {left} new tokens" if left > 0 else ""
            raise ContextTooLong(
                f"Prompt {name_of(prompts[number], number)} has {len(start)} tokens and"
                f" {more + room} more are to come, but {self.model}'s context is {self.tokens}."
                f" Shorten the prompt{' or its hint' if self.is_hinted else ''}{advice}."
            )

    def check_completions(
        self,
        prompts: Sequence[Prompt],
        starts: Sequence[Sequence[int]],
        bodies: Sequence[Sequence[int]],
    ) -> None:
        """Check that each completion fits behind its prompt.

        Args:
            prompts: The prompts, for the error.
            starts: Token ids of each prompt.
            bodies: Token ids of each completion.

        Raises:
            ContextTooLong: One does not. The message is about the longest.
        """
        lengths = [len(start) + len(body) for start, body in zip(starts, bodies, strict=True)]
        longest = max(lengths)
        if self.allows(longest):
            return
        worst = lengths.index(longest)
        raise ContextTooLong(
            f"A prompt with its completion has {longest} tokens (prompt"
            f" {name_of(prompts[worst], worst)}, {len(starts[worst])} and {len(bodies[worst])}),"
            f" but the context of {self.model} is {self.tokens}. Shorten the"
            f" {'hint' if self.is_hinted else 'prompt'} or sample fewer tokens."
        )
