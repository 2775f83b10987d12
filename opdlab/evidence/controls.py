"""The result of `opdlab.controls`: how much of a gain is due to the teacher, with an interval.

    share = (G - max(0, F)) / G

`G` is the gain of the run with its teacher, in accuracy on held-out prompts (of greedy completions,
or of samples). `F` is the gain of the best arm that trains without a teacher. Not to train at all
is such an arm too, which gains 0, so the share is at most 1. It is below 0 where a teacher-free arm
gains more than the teacher does.

The interval is Fieller's, over prompts and seeds (`opdlab.training.crossed`), and it takes account
of the choice of the best arm. Its lower end is the least of the arms' lower ends: the share is
that of one of them, whichever it is. Its upper end is the least of their upper ends, each at a
level that allows for their number (Bonferroni). A gain that is not clearly above zero cannot be
divided: the share is then undefined, and the verdict says so.

The verdict compares the interval with one half. All above: most of the gain is the teacher's. All
below: most of it needs no teacher, so less than half is the teacher's, which need not be none.
Otherwise these runs cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from opdlab.errors import EmptyPrompts, InvalidValue
from opdlab.support.expect import shortened
from opdlab.training.crossed import CrossedInterval, crossed_mean, crossed_ratio, say_counts
from opdlab.training.intervals import LEVEL

Scores = npt.NDArray[np.float64]
TEACHER = "teacher"
START = "start"
MOST = 0.5  # of the gain: an interval above it is "most of the gain", one below it less than most


class Verdict(Enum):
    """Name the conclusion of the controls."""

    TEACHER = "most of the gain is the teacher's"
    NOT_TEACHER = "most of the gain needs no teacher"
    UNCLEAR = "these runs cannot tell whether most of the gain is the teacher's"
    NO_GAIN = "there is no clear gain to explain"


@dataclass(frozen=True)
class Share:
    """The share of the gain that is due to the teacher.

    Attributes:
        value: The share, at most 1; NaN where there is no clear gain.
        low: The lower end of its 95 % interval; -inf where nothing can be excluded.
        high: The upper end, at most 1.
        against: The name of the best teacher-free arm; "" where not to train is as good.
        verdict: What follows from comparing the interval with one half.
        prompts: Number of distinct prompts.
        seeds: Number of seeds.
    """

    value: float
    low: float
    high: float
    against: str
    verdict: Verdict
    prompts: int
    seeds: int

    def __repr__(self) -> str:
        counted = say_counts(self.prompts, self.seeds)
        if self.verdict is Verdict.NO_GAIN:
            return f"{self.verdict.value} (95 %, {counted})"
        return (
            f"{self.value:.2f} of the gain is due to the teacher [{self.low:.2f}, {self.high:.2f}]"
            f" (95 %, {counted}): {self.verdict.value}"
        )


@dataclass(frozen=True, eq=False)
class ArmResult:
    """The scores of one arm.

    Attributes:
        name: The arm's name.
        label: What it does.
        is_teacher_free: Whether it trains without anything that the teacher knows.
        seeds: The seeds of its runs.
        greedy: `[S, P]`, scores of greedy completions after training.
        sampled: `[S, P]`, mean scores of samples of each prompt; NaN where none were drawn.
        tokens: `[S]`, tokens that each run learned from.
        seconds: `[S]`, wall time of each run's training.
    """

    name: str
    label: str
    is_teacher_free: bool
    seeds: tuple[int, ...]
    greedy: Scores
    sampled: Scores
    tokens: Scores
    seconds: Scores

    def of_seeds(self, seeds: tuple[int, ...]) -> ArmResult:
        """Return the runs of some seeds.

        Args:
            seeds: Seeds that the arm has.

        Returns:
            The same arm with these alone, in this order.
        """
        at = [self.seeds.index(seed) for seed in seeds]
        return replace(
            self,
            seeds=seeds,
            greedy=self.greedy[at],
            sampled=self.sampled[at],
            tokens=self.tokens[at],
            seconds=self.seconds[at],
        )


@dataclass(frozen=True, eq=False)
class Controls:
    """The arms of a controlled run with their scores, and what follows from them.

    Attributes:
        before: `[P]`, the student's greedy scores before training.
        before_sampled: `[P]`, its mean scores of samples; NaN where none were drawn.
        arms: The arms that have finished, by name.
        left_out: Arms without a result, each with the reason.
        facts: The task, the method, the models and the settings in words.
        by: "greedy" compares greedy completions, "samples" the mean scores of samples.
    """

    before: Scores
    before_sampled: Scores
    arms: Mapping[str, ArmResult]
    left_out: Mapping[str, str]
    facts: Mapping[str, Any]
    by: str = "greedy"

    @property
    def start(self) -> Scores:
        """`[P]`, the scores before training that gains are measured from."""
        return self.before if self.by == "greedy" else self.before_sampled

    def scores(self, name: str) -> Scores:
        """Return the scores of an arm that are compared.

        Args:
            name: The arm.

        Returns:
            `[S, P]`, of greedy completions or of samples, as `by` says.
        """
        arm = self._arm(name)
        return arm.greedy if self.by == "greedy" else arm.sampled

    @property
    def prompts(self) -> int:
        """Number of distinct prompts that every arm answers."""
        return len(self.before)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that the run with the teacher has finished."""
        return self.arms[TEACHER].seeds if TEACHER in self.arms else ()

    def gain(self, name: str = TEACHER) -> CrossedInterval:
        """Compute the gain of an arm over the start, in accuracy.

        Args:
            name: The arm.

        Returns:
            The mean over prompts and seeds, with its 95 % interval.
        """
        return crossed_mean(self.scores(name) - self.start)

    def difference(self, name: str, other: str = TEACHER) -> CrossedInterval:
        """Compute how much more one arm gains than another, paired over prompts and seeds.

        Args:
            name: The arm.
            other: The arm that it is compared with.

        Returns:
            The mean over the seeds that both have, with its 95 % interval.
        """
        ours, theirs = self._pair(name, other)
        return crossed_mean(self._of(ours) - self._of(theirs))

    @property
    def share(self) -> Share:
        """The share of the gain that is due to the teacher; see the module."""
        whole = self.gain()
        free = [arm.name for arm in self.arms.values() if arm.is_teacher_free]
        if not free:
            raise InvalidValue(
                "These controls have no arm without a teacher, so they cannot say what the teacher"
                " is good for. Run arm 'no_teacher' too."
            )
        pairs = {name: self._pair(name, TEACHER) for name in free}
        seeds = min(len(pair[0].seeds) for pair in pairs.values())
        if not (whole.is_clear and whole.low > 0):
            nothing = (math.nan, -math.inf, 1.0)
            return Share(*nothing, "", Verdict.NO_GAIN, self.prompts, seeds)
        upper = 1 - (1 - LEVEL) / len(free)
        found = {
            name: crossed_ratio(
                self._of(part) - self.start, self._of(run) - self.start, lower=upper, upper=LEVEL
            )
            for name, (part, run) in pairs.items()
        }
        # A share is one less a ratio, so its lower end comes from the ratio's upper one.
        best = max(found, key=lambda name: found[name][0])
        value = min(1.0, 1 - found[best][0])
        low = min(1.0, *(1 - ends[2] for ends in found.values()))
        high = min(1.0, *(1 - ends[1] for ends in found.values()))
        low, high = min(low, value), max(high, value)
        against = best if found[best][0] > 0 else ""
        return Share(value, low, high, against, _verdict(low, high), self.prompts, seeds)

    def at_seed(self, seed: int) -> Controls:
        """Return the controls that one seed alone would have given.

        Args:
            seed: One of `seeds`.

        Returns:
            The arms that have finished that seed.

        Raises:
            InvalidValue: The run with the teacher has no such seed.
        """
        if seed not in self.seeds:
            raise InvalidValue(
                f"There is no seed {shortened(seed)}; there are {', '.join(map(str, self.seeds))}."
            )
        arms = {n: arm.of_seeds((seed,)) for n, arm in self.arms.items() if seed in arm.seeds}
        return replace(self, arms=arms)

    @property
    def table(self) -> pd.DataFrame:
        """One row for each arm, the best first, and one for the start.

        Columns: `arm`, `what`, `accuracy`, `gain`, `low`, `high` (of the gain, 95 %), `share` (of
        the teacher's gain), `greedy`, `sampled` (where drawn), `prompts`, `seeds`,
        `tokens` (learned from, per run), `seconds` (of training, per run).
        """
        whole = float((self.scores(TEACHER) - self.start).mean())
        rows = [
            {
                "arm": START,
                "what": "the student before training",
                "accuracy": float(self.start.mean()),
                "greedy": float(self.before.mean()),
                "sampled": float(self.before_sampled.mean()),
                "prompts": self.prompts,
            }
        ]
        for name, arm in self.arms.items():
            gain = self.gain(name)
            rows.append(
                {
                    "arm": name,
                    "what": arm.label,
                    "accuracy": float(self.scores(name).mean()),
                    "gain": gain.mean,
                    "low": gain.low,
                    "high": gain.high,
                    "share": gain.mean / whole if self.share_is_defined else math.nan,
                    "greedy": float(arm.greedy.mean()),
                    "sampled": float(arm.sampled.mean()),
                    "prompts": gain.prompts,
                    "seeds": gain.seeds,
                    "tokens": float(arm.tokens.mean()),
                    "seconds": float(arm.seconds.mean()),
                }
            )
        table = pd.DataFrame(rows).sort_values("accuracy", ascending=False, kind="stable")
        return table.reset_index(drop=True)

    @property
    def share_is_defined(self) -> bool:
        """Tell whether the gain with the teacher is clearly above zero."""
        gain = self.gain()
        return gain.is_clear and gain.low > 0

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON data, for `from_json`.

        Returns:
            Facts, scores by arm, and the share.
        """
        share = self.share if any(arm.is_teacher_free for arm in self.arms.values()) else None
        return {
            "facts": dict(self.facts),
            "by": self.by,
            "share": None if share is None else repr(share),
            "before": self.before.tolist(),
            "before_sampled": _listed(self.before_sampled),
            "left_out": dict(self.left_out),
            "arms": {
                name: {
                    "label": arm.label,
                    "is_teacher_free": arm.is_teacher_free,
                    "seeds": list(arm.seeds),
                    "greedy": arm.greedy.tolist(),
                    "sampled": _listed(arm.sampled),
                    "tokens": arm.tokens.tolist(),
                    "seconds": arm.seconds.tolist(),
                }
                for name, arm in self.arms.items()
            },
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Controls:
        """Make the controls that `to_json` described.

        Args:
            stored: Its data.

        Returns:
            The controls.

        Raises:
            InvalidValue: It is something else.
        """
        try:
            prompts = len(stored["before"])
            arms = {
                name: ArmResult(
                    name,
                    str(arm["label"]),
                    bool(arm["is_teacher_free"]),
                    tuple(int(seed) for seed in arm["seeds"]),
                    _table_of(arm["greedy"], prompts),
                    _table_of(arm["sampled"], prompts),
                    np.asarray(arm["tokens"], float),
                    np.asarray(arm["seconds"], float),
                )
                for name, arm in stored["arms"].items()
            }
            before = np.asarray(stored["before"], float)
            sampled = np.asarray(_numbers(stored["before_sampled"]), float)
            facts, by = dict(stored["facts"]), str(stored.get("by", "greedy"))
            return cls(before, sampled, arms, dict(stored["left_out"]), facts, by)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidValue(
                f"This is no result of opdlab.controls ({type(error).__name__}: {error}). Give what"
                " Controls.to_json returned."
            ) from None

    def __repr__(self) -> str:
        lines = [self._headline(), ""]
        for row in self.table.to_dict("records"):
            gain = ""
            if row["arm"] != START:
                gain = f"  {row['gain']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            lines.append(f"{row['arm']:<20}{row['accuracy']:.3f}{gain:<26}  {row['what']}")
        counted = say_counts(self.prompts, len(self.seeds))
        lines += ["", f"Accuracy ({self.by}) and gain over the start; 95 %, {counted}."]
        lines += [f"Left out: {name}, since {why}." for name, why in self.left_out.items()]
        return "\n".join(lines)

    def _headline(self) -> str:
        """The share in words."""
        if not any(arm.is_teacher_free for arm in self.arms.values()):
            return "Controls without a teacher-free arm"
        said = repr(self.share)
        return said[0].upper() + said[1:] + "."

    def _arm(self, name: str) -> ArmResult:
        if name not in self.arms:
            raise InvalidValue(
                f"There is no arm {shortened(name)}; there are {', '.join(self.arms)}."
            )
        return self.arms[name]

    def _of(self, arm: ArmResult) -> Scores:
        return arm.greedy if self.by == "greedy" else arm.sampled

    def _pair(self, name: str, other: str) -> tuple[ArmResult, ArmResult]:
        """Two arms with the seeds that both have."""
        ours, theirs = self._arm(name), self._arm(other)
        seeds = tuple(seed for seed in ours.seeds if seed in theirs.seeds)
        if not seeds:
            raise EmptyPrompts(
                f"The arms {name} and {other} have no seed in common. Let the controls go on until"
                " both have finished one."
            )
        return ours.of_seeds(seeds), theirs.of_seeds(seeds)


def _verdict(low: float, high: float) -> Verdict:
    if low > MOST:
        return Verdict.TEACHER
    return Verdict.NOT_TEACHER if high < MOST else Verdict.UNCLEAR


def _listed(values: Any) -> Any:
    """Numbers as JSON has them: NaN becomes None."""
    if isinstance(values, np.ndarray):
        return [_listed(one) for one in values]
    return None if math.isnan(values) else float(values)


def _numbers(values: Any) -> Any:
    """The inverse of `_listed`."""
    if isinstance(values, list):
        return [_numbers(value) for value in values]
    return math.nan if values is None else float(values)


def _table_of(values: Any, prompts: int) -> Scores:
    table = np.asarray(_numbers(values), float)
    if table.ndim != 2 or table.shape[1] != prompts:
        raise ValueError(f"scores of shape {list(table.shape)} for {prompts} prompts")
    return table
