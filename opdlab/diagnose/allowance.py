"""Fit a diagnosis into a number of seconds, and show how far it is.

An `Allowance` is the clock: it knows what is being done, how many passes of a model that took so
far, and how much time is left, and it draws that as one line. A `Pace` is what was measured on the
first few tokens, and `choose_scope` decides by it how much can be asked of each prompt.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from opdlab.models.forward import find_backbone
from opdlab.models.policy import Policy
from opdlab.support.progress import Progress, in_notebook

LEAST_PROMPTS = 8  # prompts that are worth more than many texts of each
FIRST_PROMPTS = 2  # prompts of the first round, on which the speed is measured
SHORTEST = 8  # tokens under which a text shows nothing
SHARE_OF_COST = 0.15  # of the seconds, kept for predicting the cost of a step


@dataclass
class Allowance:
    """The seconds that a diagnosis may take, and the line that shows how far it is.

    Attributes:
        seconds: The allowance; infinity for as long as it takes.
        progress: The line.
        done: Prompts that were asked.
        ends: When the work that is planned will be done, by `time.monotonic`; None until known.
    """

    seconds: float
    progress: Progress
    done: int = 0
    ends: float | None = None
    _began: float = field(default_factory=time.monotonic)
    _drawn: float = -math.inf

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds that are left; negative when the allowance is used up."""
        return self.seconds - self.spent

    @contextmanager
    def stage(
        self, name: str, policies: Sequence[Policy] = (), tokens: int = 0
    ) -> Iterator[Timing]:
        """Name what is being done, count the passes of these models in it, and time it.

        Args:
            name: What is being done, in words.
            policies: The policies that work in it.
            tokens: Tokens that they write at most, one for each pass; 0 where they only read.

        Yields:
            Its timing, which is complete after the block.
        """
        timing = Timing(time.monotonic())

        def note_pass(*_: object) -> None:
            timing.note_pass()
            written = f", token {min(timing.passes, tokens)} of {tokens}" if tokens else ""
            self.draw(f"{name}{written}")

        models = {id(p.weights): find_backbone(p.weights.model) for p in policies}
        hooks = [model.register_forward_hook(note_pass) for model in models.values()]
        self.draw(name, is_due=True)
        try:
            yield timing
        finally:
            timing.stop()
            for hook in hooks:
                hook.remove()

    def finish(self) -> None:
        """End the line; a notebook keeps it, with the time that it took."""
        self.progress.update(self.done, took=f"{self.spent:.0f} s")
        self.progress.close()

    def expect(self, seconds: float) -> None:
        """Note in how many seconds the planned work will be done, for the line.

        Args:
            seconds: Seconds from now.
        """
        self.ends = time.monotonic() + min(seconds, max(self.left, 0))

    def draw(self, now: str, is_due: bool = False) -> None:
        """Redraw the line, a few times a second at most.

        Args:
            now: What is being done.
            is_due: Whether to draw even if it was drawn a moment ago.
        """
        moment = time.monotonic()
        is_seen_live = in_notebook() or sys.stderr.isatty()
        if moment - self._drawn < (0.2 if is_seen_live else 10) and not (is_due and is_seen_live):
            return
        self._drawn = moment
        self.progress.update(self.done, now=now, left=self._show_left(moment))

    def _show_left(self, moment: float) -> str:
        if self.ends is None:
            return "unknown" if math.isinf(self.seconds) else f"at most {max(self.left, 0):.0f} s"
        return f"{max(self.ends - moment, 0):.0f} s"


@dataclass
class Timing:
    """The seconds of one stage.

    Attributes:
        began: When it began, by `time.monotonic`.
        passes: Passes of the models in it.
        first: Seconds until the first pass was done; 0 if there was none.
        seconds: Seconds in all, once it is over.
    """

    began: float
    passes: int = 0
    first: float = 0.0
    seconds: float = 0.0

    def note_pass(self) -> None:
        """Count a pass."""
        self.passes += 1
        if self.passes == 1:
            self.first = time.monotonic() - self.began

    def stop(self) -> None:
        """Note the end."""
        self.seconds = time.monotonic() - self.began

    @property
    def per_token(self) -> float:
        """Seconds per further token of a stage that writes, after the prompts were read."""
        return (self.seconds - self.first) / max(self.passes - 1, 1)


@dataclass(frozen=True)
class Scope:
    """Say how much of each prompt is asked.

    Attributes:
        k: Texts of the student.
        graded: How many of them both grade.
        length: Most tokens of a text.
        asks_teacher: Whether the teacher answers too, so that its scores are known.
        asks_half: Whether the teacher goes on from half of the student's text.
    """

    k: int
    graded: int
    length: int
    asks_teacher: bool
    asks_half: bool

    def missing(self, whole: Scope) -> list[str]:
        """List what was left out of a larger scope, in words.

        Args:
            whole: The scope that was wanted.

        Returns:
            One phrase for each thing.
        """
        out = []
        if self.length < whole.length:
            out.append(
                f"texts were cut after {self.length} of {whole.length} tokens, so they were not"
                " scored"
            )
        if self.k < whole.k:
            out.append(f"{self.k} of {whole.k} texts of each prompt were written")
        if self.graded < min(self.k, whole.graded):
            out.append(f"{self.graded} of each prompt's texts {_were(self.graded)} graded")
        if whole.asks_teacher and not self.asks_teacher:
            out.append("the teacher was not asked to answer")
        elif whole.asks_half and not self.asks_half:
            out.append("the teacher was not asked to go on from the student's text")
        return out


@dataclass(frozen=True)
class Pace:
    """Seconds that the parts of an examination take, measured on `FIRST_PROMPTS` prompts.

    Attributes:
        k: Texts of each prompt that the student's pace was measured with.
        student: Its stage of writing.
        teacher: The teacher's.
        read: Seconds in which both read one token.
        compare: Seconds in which both are compared on one token.
        prompt: Tokens of a prompt, as the longer-winded of both reads it.
    """

    k: int
    student: Timing
    teacher: Timing
    read: float
    compare: float
    prompt: float

    def per_prompt(self, scope: Scope) -> float:
        """Estimate the seconds that one prompt takes.

        Args:
            scope: How much of it is asked.

        Returns:
            Seconds, rather too many: a larger batch takes less for each of its rows.
        """
        texts = max(scope.k / self.k, 0.5)  # a row costs less than its share of the batch
        seconds = (self.student.first + scope.length * self.student.per_token * texts) / (
            FIRST_PROMPTS
        )
        seconds += scope.graded * (
            self.read * (self.prompt + scope.length) + self.compare * scope.length
        )
        answer = (self.teacher.first + scope.length * self.teacher.per_token) / FIRST_PROMPTS
        return seconds + answer * scope.asks_teacher + answer * scope.asks_half


def choose_scope(whole: Scope, pace: Pace, seconds: float, prompts: int) -> tuple[Scope, int]:
    """Choose how much is asked of each prompt, and the number of prompts, within some seconds.

    More prompts say more than more texts of each. So fewer texts are graded first, then fewer are
    written, then the teacher does not go on from the student's text; only where not even two
    prompts would fit are texts cut short.

    Args:
        whole: All that could be asked.
        pace: The measured speed.
        seconds: The seconds that there are.
        prompts: The number of prompts that there are.

    Returns:
        The scope, and how many prompts fit, at least `FIRST_PROMPTS` if there are as many.
    """
    enough = min(LEAST_PROMPTS, prompts)
    one = min(1, whole.graded)  # none where the teacher cannot grade
    ladder = [
        whole,
        replace(whole, graded=max(one, whole.graded // 4)),
        replace(whole, graded=one),
        replace(whole, k=max(1, whole.k // 2), graded=one),
        replace(whole, k=max(1, whole.k // 4), graded=one, asks_half=False),
    ]
    for scope in ladder:
        if pace.per_prompt(scope) * enough <= seconds:
            return scope, min(prompts, _fitting(seconds, pace.per_prompt(scope)))
    least, few = ladder[-1], min(FIRST_PROMPTS, prompts)
    if pace.per_prompt(least) * few <= seconds:
        return least, min(prompts, _fitting(seconds, pace.per_prompt(least)))
    brief = replace(least, asks_teacher=False)
    none, per_token = (pace.per_prompt(replace(brief, length=n)) for n in (0, 1))
    length = int(max(seconds / few - none, 0) / max(per_token - none, 1e-9))
    return replace(brief, length=min(max(length, SHORTEST), whole.length)), few


def _fitting(seconds: float, each: float) -> int:
    return sys.maxsize if math.isinf(seconds) else int(seconds / max(each, 1e-9))


def _were(count: int) -> str:
    return "was" if count == 1 else "were"
