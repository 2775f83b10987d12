"""The numbers of a map's picture: differences with intervals for every choice, and its table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from opdlab.data.map_results import MapResults, Value
from opdlab.viz import markup

SMALL = 0.01  # a difference that no reader would act on
# Quantiles 0.975 of Student's t, by degrees of freedom; scipy takes longer to import than to ask.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T_MANY = 1.96


@dataclass(frozen=True)
class Cell:
    """A mean over seeds with its 95 % interval.

    Attributes:
        mean: The mean; NaN where nothing was measured.
        low: The lower end; NaN with fewer than two seeds.
        high: The upper end.
        seeds: Number of seeds.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def side(self) -> int:
        """1 or -1 where the interval lies beyond ±`SMALL` on that side of zero, else 0."""
        return int(self.low > SMALL) - int(self.high < -SMALL)

    @property
    def is_clear(self) -> bool:
        """Tell whether the difference has a side."""
        return self.side != 0


@dataclass(frozen=True)
class Selection:
    """Hold what a picture shows: names, and the settings of the knobs that are no axis."""

    arm: str
    against: str
    metric: str
    budget: str
    at: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class MapPicture:
    """Differences between the arms of a map.

    Attributes:
        results: The results.
    """

    results: MapResults

    @cached_property
    def settings(self) -> dict[str, list[Value]]:
        """The settings of every knob."""
        return {knob.name: self.results.values(knob.name) for knob in self.results.knobs}

    @property
    def axes(self) -> tuple[list[Value], list[Value]]:
        """The settings of the first knob (columns) and of the second (rows, from the top)."""
        columns, rows, *_ = self.settings.values()
        return columns, rows

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """All pairs of an arm and one that arms are compared with."""
        names = [arm.name for arm in self.results.arms]
        return [(a, b) for b in self.results.against for a in names if a != b]

    def cells(self, selection: Selection) -> list[Cell]:
        """Return the differences of all cells, row by row.

        Args:
            selection: What is compared.

        Returns:
            One cell per place; empty ones where a side was not measured.
        """
        return [
            summarize(self._differences(knobs, selection)) for knobs in self._places(selection.at)
        ]

    def own(self, arm: str, selection: Selection) -> list[Cell]:
        """Return an arm's own scores in all cells, row by row.

        Args:
            arm: The arm's name.
            selection: Its metric, budget and settings; its arms do not count.

        Returns:
            One cell per place.
        """
        scores = self.results.scores
        return [
            summarize(list(scores(knobs, arm, selection.metric, selection.budget).values()))
            for knobs in self._places(selection.at)
        ]

    def limit(self, selection: Selection) -> float:
        """Return the difference that gets full colour: the largest of the metric, of any choice.

        Args:
            selection: Its metric counts.

        Returns:
            A number above 0.
        """
        return self._limits[selection.metric]

    def say(self, selection: Selection) -> str:
        """Say in a sentence what the numbers are.

        Args:
            selection: What is compared.

        Returns:
            The sentence, not escaped.
        """
        labels = self._labels
        cells = self.cells(selection)
        wins, losses = (sum(cell.side == side for cell in cells) for side in (1, -1))
        fixed = [
            f"{knob.label} {say_value(self.settings[knob.name][i])}"
            for knob, i in zip(self.results.knobs[2:], selection.at, strict=True)
        ]
        where = f", {', '.join(fixed)}" if fixed else ""
        return (
            f"{labels[selection.metric]}: {labels[selection.arm]} less {labels[selection.against]},"
            f" at {labels[selection.budget]}{where}. Clearly better in {wins} of {len(cells)}"
            f" cells, clearly worse in {losses}."
        )

    def data(self) -> dict[str, Any]:
        """Return the numbers of all choices, as `static/method_map.js` reads them.

        Returns:
            Plain data and numpy arrays. The arrays run over metrics, budgets, settings of the other
            knobs and cells; `mean`, `low`, `high`, `side` over `pairs` before, `own` and `half`
            over arms.
        """
        choices = list(self._choices())
        pairs = [
            self.cells(Selection(arm, against, *choice))
            for arm, against in self.pairs
            for choice in choices
        ]
        owns = [
            self.own(arm.name, Selection("", "", *choice))
            for arm in self.results.arms
            for choice in choices
        ]
        flat = [cell for cells in pairs for cell in cells]
        alone = [cell for cells in owns for cell in cells]
        named = {
            key: [vars(one) for one in getattr(self.results, key)]
            for key in ("knobs", "arms", "metrics", "budgets")
        }
        return {
            **named,
            "settings": [[say_value(x) for x in found] for found in self.settings.values()],
            "pairs": [list(pair) for pair in self.pairs],
            "limits": [self._limits[metric.name] for metric in self.results.metrics],
            "seeds": max(cell.seeds for cell in alone),
            **{
                key: np.array([getattr(cell, key) for cell in flat], np.float16)
                for key in ("mean", "low", "high")
            },
            "side": np.array([cell.side for cell in flat]),
            "own": np.array([cell.mean for cell in alone], np.float16),
            "half": np.array([cell.high - cell.mean for cell in alone], np.float16),
        }

    @cached_property
    def _limits(self) -> dict[str, float]:
        out = {}
        for metric in self.results.metrics:
            sizes = [
                abs(cell.mean)
                for arm, against in self.pairs
                for _, budget, at in self._choices(metric.name)
                for cell in self.cells(Selection(arm, against, metric.name, budget, at))
                if math.isfinite(cell.mean)
            ]
            out[metric.name] = max(sizes, default=0.0) or 1.0
        return out

    @property
    def _labels(self) -> dict[str, str]:
        named = (*self.results.arms, *self.results.metrics, *self.results.budgets)
        return {one.name: one.label for one in named}

    def _choices(self, metric: str = "") -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """All metrics (or one), budgets, and settings of the knobs that are no axis."""
        metrics = [metric] if metric else [one.name for one in self.results.metrics]
        budgets = [one.name for one in self.results.budgets]
        others = [range(len(found)) for found in list(self.settings.values())[2:]]
        return product(metrics, budgets, product(*others))

    def _places(self, at: tuple[int, ...]) -> Iterator[dict[str, Value]]:
        """The knobs of every cell, row by row."""
        names = list(self.settings)
        fixed = {name: self.settings[name][i] for name, i in zip(names[2:], at, strict=True)}
        columns, rows = self.axes
        for y, x in product(rows, columns):
            yield {names[0]: x, names[1]: y, **fixed}

    def _differences(self, knobs: Mapping[str, Value], selection: Selection) -> list[float]:
        """Arm less what it is compared with, of the seeds that both have."""
        scores = self.results.scores
        ours, theirs = (
            scores(knobs, arm, selection.metric, selection.budget)
            for arm in (selection.arm, selection.against)
        )
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def summarize(values: list[float]) -> Cell:
    """Return the mean of numbers with its 95 % interval (Student's t).

    Args:
        values: One number per seed.

    Returns:
        The cell; its interval is NaN with fewer than two.
    """
    n = len(values)
    if n < 2:
        return Cell(values[0] if n else math.nan, math.nan, math.nan, n)
    mean = float(np.mean(values))
    quantile = T[n - 2] if n - 2 < len(T) else T_MANY
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Cell(mean, mean - half, mean + half, n)


def say_value(value: Value) -> str:
    """Return a setting of a knob as text.

    Args:
        value: A number or a word.

    Returns:
        The text, not escaped.
    """
    return value if isinstance(value, str) else f"{value:g}".replace("e-0", "e-")


def draw_table(picture: MapPicture, selection: Selection) -> str:
    """Return the heat map as an HTML table; a line runs around regions of clear difference.

    Args:
        picture: The numbers.
        selection: What is compared.

    Returns:
        Markup; every foreign string in it is escaped.
    """
    cells, limit = picture.cells(selection), picture.limit(selection)
    columns, rows = picture.axes
    first, second = (markup.escape(knob.label) for knob in picture.results.knobs[:2])
    heads = "".join(f'<th scope="col">{markup.escape(say_value(x))}</th>' for x in columns)
    body = []
    for y, row in enumerate(rows):
        drawn = []
        for x in range(len(columns)):
            cell = cells[y * len(columns) + x]
            below = cells[(y + 1) * len(columns) + x] if y + 1 < len(rows) else cell
            right = cells[y * len(columns) + x + 1] if x + 1 < len(columns) else cell
            look = "".join(
                f" opd-mm-{name}"
                for name, is_on in (
                    ("clear", cell.is_clear),
                    ("right", right.side != cell.side),
                    ("below", below.side != cell.side),
                )
                if is_on
            )
            number = markup.format_number(round(cell.mean, 2), sign=True)
            drawn.append(
                f'<td class="opd-mm-cell{look}" style="{_ink(cell.mean, limit)}">{number}</td>'
            )
        label = markup.escape(say_value(row))
        body.append(f'<tr><th scope="row">{label}</th>{"".join(drawn)}</tr>')
    return (
        f'<table class="opd-mm"><caption>{first} → &nbsp; {second} ↓</caption>'
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


def _ink(value: float, limit: float) -> str:
    """The background of a cell: violet where the arm is better, grey where it is worse."""
    if math.isnan(value):
        return ""
    (red, green, blue), strongest = markup.INK["amount" if value > 0 else "minus"]
    alpha = strongest * markup.strength_of(value, limit)
    return f"background:rgba({red},{green},{blue},{alpha:.3f})"
