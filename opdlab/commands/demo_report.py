"""Show what a demo found: tables on the terminal, and a page with curves and token strips."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from opdlab import viz
from opdlab.data.notes import Chunks
from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.data.trace import Trace
from opdlab.methods.contract import name_of
from opdlab.training.evaluation import Evaluation, paired
from opdlab.training.run import Run
from opdlab.viz import View

ANSWERS = 4  # texts in the table of answers
CURVES = ("reverse_kl", "reward", "entropy", "length")
SummaryRow = tuple[str, str, str, str]  # label, before, after, teacher


@dataclass(frozen=True, eq=False)
class Measured:
    """One policy as the demo measured it.

    Attributes:
        evaluation: Its scores on held-out prompts.
        rollout: Its texts on the probe prompts; None for a teacher whose tokens are not known.
        is_sampled: Whether its accuracy is that of samples, not of greedy answers.
    """

    evaluation: Evaluation
    rollout: Rollout | None
    is_sampled: bool

    @property
    def accuracy(self) -> float:
        """The share of prompts that it answers right."""
        return self.evaluation.avg_at_k if self.is_sampled else self.evaluation.accuracy

    @property
    def scores(self) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """The score of each prompt, `[P]`."""
        return self.evaluation.sampled[:, 0] if self.is_sampled else self.evaluation.greedy


@dataclass(frozen=True, eq=False)
class Outcome:
    """All that a demo has to show.

    Attributes:
        profile: The profile it ran.
        score: The meaning of a right answer, in words.
        before: The student before training.
        after: The student after training.
        teacher: The teacher.
        trace_before: Texts of the student before training, graded before training.
        trace_after: The same texts, graded after training.
        trace_now: Texts of the student after training.
    """

    profile: str
    score: str
    before: Measured
    after: Measured
    teacher: Measured
    trace_before: Trace
    trace_after: Trace
    trace_now: Trace

    def summary(self) -> list[SummaryRow]:
        """Summarise the demo.

        Returns:
            One row per number: its label, and its value before, after and of the teacher.
        """
        columns = (self.before, self.after, self.teacher)
        accuracy = [f"{measured.accuracy:.3f}" for measured in columns]
        length = [_number(measured.evaluation.length.mean(), ".1f") for measured in columns]
        cut = [_number(measured.evaluation.cut.mean(), ".2f") for measured in columns]
        gain = paired(self.after.scores, self.before.scores)
        shown = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
        return [
            ("accuracy", accuracy[0], accuracy[1], accuracy[2]),
            ("length, tokens", length[0], length[1], length[2]),
            ("cut off", cut[0], cut[1], cut[2]),
            ("gain, 95 % interval, 1 seed", "", shown, ""),
        ]


def print_tables(console: Console, outcome: Outcome, task: str) -> None:
    """Print the summary, and some answers before and after.

    Args:
        console: The console to print to.
        outcome: The measurements and texts to show.
        task: The task's name.
    """
    table = Table("", title=f"{task}: before and after")
    for column in ("before", "after", "teacher"):
        table.add_column(column, justify="right")
    for row in outcome.summary():
        table.add_row(*row)
    console.print(table)
    console.print(_answers(outcome))


def _answers(outcome: Outcome) -> Table:
    old, new = outcome.before.rollout, outcome.after.rollout
    assert old is not None
    assert new is not None
    table = Table(title="the same prompts, answered before and after", show_lines=True)
    for column in ("prompt", "before", "after"):
        table.add_column(column, overflow="fold")
    rows = list(zip(old.prompts, old.texts, new.texts, strict=True))
    for prompt, before, after in rows[:ANSWERS]:
        table.add_row(_cell(_question(prompt)), _cell(before), _cell(after))
    return table


def _question(prompt: Prompt) -> str:
    return str(prompt.messages[-1]["content"]) if prompt.messages else prompt.text or ""


def _cell(text: str) -> str:
    """Model text for a terminal: no control characters, no console markup."""
    return escape("".join(letter if letter.isprintable() else " " for letter in text))


def _number(value: float, form: str) -> str:
    return "–" if np.isnan(value) else format(value, form)


def write_page(path: Path, outcome: Outcome, run: Run) -> Path:
    """Write the demo's page.

    Args:
        path: The file to write.
        outcome: The measurements and texts to show.
        run: The run, for its curves and its last step.

    Returns:
        The file's path.
    """
    note = (
        f"{outcome.profile}: {outcome.score} on {outcome.before.evaluation.prompts} held-out"
        f" prompts; {len(run.metrics)} updates of {name_of(run.method)}."
    )
    keys = [key for key in CURVES if key in run.history]
    return viz.page(
        path,
        title="opdlab demo",
        summary=outcome.summary(),
        figures=[viz.curves(run.history, keys=keys)],
        lenses=[*_lenses(outcome), *_audit_lens(run)],
        note=note,
    )


def _lenses(outcome: Outcome) -> list[tuple[str, View]]:
    """The text with the largest single disagreement, before and after training."""
    is_graded = "teacher_reverse_kl" in outcome.trace_before.table.column_names
    column = "teacher_reverse_kl" if is_graded else "student_entropy"
    worst = int(outcome.trace_before.to_pandas().groupby("sample")[column].max().idxmax())
    graded = ", graded by the teacher" if is_graded else ""
    return [
        (
            f"Before: a text that the student wrote{graded}",
            viz.TokenLens(outcome.trace_before, worst),
        ),
        (
            "After: the same text under the distilled student",
            viz.TokenLens(outcome.trace_after, worst),
        ),
        (
            "After: what the distilled student writes now for the same prompt",
            viz.TokenLens(outcome.trace_now, worst),
        ),
    ]


def _audit_lens(run: Run) -> list[tuple[str, View]]:
    """Show a text of the last step that was compared with the teacher's texts, if one was."""
    if run.last is None:
        return []
    trace = run.last.trace()
    note = trace.note(Chunks)
    if note is None or not note.chunks:
        return []
    first = note.chunks[0]
    texts = ", ".join(map(repr, first["continuations"]))
    caption = f"In training: where the teacher was asked to go on, it wrote {texts} the first time"
    return [(caption, viz.TokenLens(trace, first["sample"], channel="similarity"))]
