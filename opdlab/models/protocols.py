"""Name the abilities of policies, teachers and samplers: grade, write texts, sample a rollout.

A local `Policy` can grade and sample; the servers of `opdlab.teachers` can write, and some can
grade. Any object with these methods takes part: nothing needs to inherit from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
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
    def k(self) -> int | None:
        """Number of likeliest tokens; None where it gives whole distributions after all."""
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
class StudentSampler(Sampler, Protocol):
    """Sample the student's texts during training, in place of the student's own loop.

    It holds a copy of the student's weights, which a run keeps up to date:

        sampler.start(student)           before the first step, or after another run's
        sampler.sample(prompts, n, …)    once a step
        sampler.update(student, step)    between an update and the next sampling

    `sample` means what `Policy.sample` means, in all its options; what a sampler cannot honour, it
    refuses. `Rollout.logp` holds the sampler's own log-probs at temperature 1, so that their gap to
    the trainer's can be measured. A sampler that has `check` (`Checked`) is asked before the run
    begins.
    """

    def start(self, student: Policy) -> None:
        """Take up the student as it is now.

        Called at the first step of a run, after an interruption too, and whenever another run has
        used the sampler in between.

        Args:
            student: The policy that learns.
        """
        ...

    def update(self, student: Policy, step: int) -> None:
        """Take up the student's weights after an update.

        Args:
            student: The same policy as at `start`.
            step: Number of updates done.
        """
        ...

    def close(self) -> None:
        """Give back memory, files and connections. A run does not call it: its owner does."""
        ...


@runtime_checkable
class SoleTeachers(Protocol):
    """Several teachers, of which each prompt has one that reads texts in its own tokens."""

    def sole_teacher(self, prompt: Prompt) -> tuple[str, Policy]:
        """Return the teacher of a prompt.

        Args:
            prompt: The prompt.

        Returns:
            Its name, and the teacher.
        """
        ...

    def charging(self, name: str) -> AbstractContextManager[None]:
        """Charge the time of a block to a teacher.

        Args:
            name: The teacher's name.

        Returns:
            The context of the block.
        """
        ...


@runtime_checkable
class RemoteGrader(Grader, Protocol):
    """Grade on another machine, so that this process can work in the meantime."""

    def begin(self, rollout: Rollout) -> Callable[[], Graded]:
        """Prepare the grading of a rollout.

        Args:
            rollout: The completions.

        Returns:
            A function that has them graded and gives what `grade` gives. It may run in another
            thread while this process uses its models and tokenizers.
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
