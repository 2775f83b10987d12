"""Show where the time of a step goes: a bar for each phase, with the least its work can take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from opdlab.viz import markup

if TYPE_CHECKING:
    from opdlab.diagnose.profile import Profile

LABELS = {"generate": "sampling", "grade": "grading", "learn": "learning"}
HEADING = "where the time of a step goes"  # as in static/board.js
GIB = 2**30


@dataclass(frozen=True)
class PhaseBar:
    """One phase of a step.

    Attributes:
        label: What is done.
        seconds: Mean wall seconds of a step.
        limit: The least seconds that its work takes on this device; NaN where it is not known.
        bytes: Most memory in use; NaN where it was not measured.
    """

    label: str
    seconds: float
    limit: float = math.nan
    bytes: float = math.nan

    @property
    def words(self) -> str:
        """Return the text under the bar, as "sampling 0.41 s, limit 0.22 s, 1.2 GiB"."""
        said = f"{self.label} {markup.format_number(self.seconds)} s"
        if math.isfinite(self.limit):
            said += f", limit {markup.format_number(self.limit)} s"
        if math.isfinite(self.bytes):
            said += f", {markup.format_number(self.bytes / GIB)} GiB"
        return said

    @property
    def reach(self) -> float:
        """Return the limit's share of the bar, from 0 to 1; 0 where it is not known."""
        known = math.isfinite(self.limit) and self.seconds > 0
        return min(1.0, self.limit / self.seconds) if known else 0.0


def bars_of(history: pd.DataFrame, profile: Profile | None = None) -> list[PhaseBar]:
    """Make the bars of a run.

    Args:
        history: The run's history. Its first step is left out if there are others, since it is
            slower.
        profile: What `opdlab.profile` found, whose numbers are drawn in place of the history's.

    Returns:
        A bar for each phase; none where the history has no seconds.
    """
    if profile is not None:
        return [
            PhaseBar(LABELS[phase.name], phase.seconds, phase.limit, phase.bytes)
            for phase in profile.phases
        ]
    columns = {name: f"{name}_s" for name in LABELS}
    if not all(column in history for column in columns.values()):
        return []
    rows = history.iloc[1:] if len(history) > 1 else history
    means = {name: float(rows[column].mean()) for name, column in columns.items()}
    if not all(math.isfinite(mean) for mean in means.values()) or not sum(means.values()) > 0:
        return []
    return [PhaseBar(LABELS[name], mean) for name, mean in means.items()]


def data_of(bars: Sequence[PhaseBar]) -> list[list[Any]]:
    """Return the bars as `static/board.js` reads them: words, share of the step, reach."""
    whole = sum(bar.seconds for bar in bars)
    return [[bar.words, bar.seconds / whole, bar.reach] for bar in bars]


def draw(bars: Sequence[PhaseBar]) -> str:
    """Return the bars as HTML without a script."""
    if not bars:
        return ""
    parts = "".join(
        f'<div class="opd-phase" style="flex-grow:{share:.4f}"><div class="opd-phase-bar">'
        f'<div style="width:{reach:.2%}"></div></div>{markup.escape(words)}</div>'
        for words, share, reach in data_of(bars)
    )
    return f'<div class="opd-soft">{HEADING}</div><div class="opd-phases">{parts}</div>'


def describe(bars: Sequence[PhaseBar]) -> str:
    """Return the bars in words."""
    return "a step: " + "; ".join(bar.words for bar in bars)
