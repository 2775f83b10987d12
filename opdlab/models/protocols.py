"""Name the abilities of policies and teachers: grade a rollout, write texts, sample a rollout.

A local `Policy` can grade and sample; the servers of `opdlab.teachers` can write, and some can
grade. Any object with these methods takes part: nothing needs to inherit from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.data.sampling_config import SamplingOptions
from opdlab.models.graded import Graded
from opdlab.models.policy import Policy

if TYPE_CHECKING:
    from typing import Unpack


@runtime_checkable
class Grader(Protocol):
    """Grade rollouts: give the distribution behind every token."""

    def grade(self, rollout: Rollout) -> Graded:
        """Grade a rollout.

        Args:
            rollout: `B` completions, in tokens that this grader shares.

        Returns:
            The distributions over `rollout.tokens` tokens, rows in order, without padding.
        """
        ...


@runtime_checkable
class TopGrader(Protocol):
    """A grader that gives the log-probs of the `k` likeliest tokens only, as servers do."""

    @property
    def k(self) -> int:
        """How many tokens."""
        ...

    def grade(self, rollout: Rollout) -> Graded:
        """Grade a rollout; see `Grader.grade`.

        Args:
            rollout: `B` completions, in tokens that this grader shares.

        Returns:
            Log-probs of the `k` likeliest tokens and of the written ones, rows in order.
        """
        ...


@runtime_checkable
class Writer(Protocol):
    """Write texts, in whatever tokens."""

    def write(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        *,
        prefixes: Sequence[str] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Sequence[Sequence[str]]:
        """Write `n` texts for each prompt.

        Args:
            prompts: Texts and chats to answer.
            n: Texts for each prompt.
            prefixes: One unfinished answer for each prompt, which the texts continue and do not
                repeat.
            options: Fields of `SamplingConfig`.

        Returns:
            `n` texts for each prompt. A `WrittenText` says whether the length limit cut it; a plain
            string counts as finished.
        """
        ...


@runtime_checkable
class Sampler(Protocol):
    """Sample rollouts: token ids with the writer's own log-probs."""

    def sample(
        self,
        prompts: Sequence[Prompt],
        n: int = 1,
        *,
        prefixes: Sequence[Sequence[int]] | None = None,
        batch_size: int | None = None,
        writer: str = "student",
        **options: Unpack[SamplingOptions],
    ) -> Rollout:
        """Write `n` completions of each prompt; row `i * n + j` is sample `j` of prompt `i`.

        See `Policy.sample`.

        Args:
            prompts: Texts and chats to answer.
            n: Completions of each prompt.
            prefixes: Token ids already written after each prompt, to be continued.
            batch_size: Prompts held in memory at once; all by default.
            writer: Who writes, for the trace.
            options: Fields of `SamplingConfig`.

        Returns:
            The completions.
        """
        ...


@runtime_checkable
class Checked(Protocol):
    """Check the student and the prompts before a run begins."""

    def check(self, student: Policy, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Check that this teacher can teach this student on these prompts.

        Args:
            student: The policy that will be trained.
            prompts: The prompts of the run.
            max_new_tokens: The longest completion, in tokens.

        Raises:
            OpdlabError: It cannot. The message says why, and names a way out.
        """
        ...
