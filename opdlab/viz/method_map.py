"""MethodMap: in which region of a world's knobs a method wins."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from opdlab.data.map_results import MapRecord, MapResults, Named
from opdlab.errors import InvalidValue
from opdlab.support.expect import shortened
from opdlab.support.validation import Text, Unchecked, validate_arguments
from opdlab.viz import markup
from opdlab.viz.map_picture import Cell, MapPicture, Selection, draw_table, say_value
from opdlab.viz.traits import Trait
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

LEGEND = (
    "Violet: the first is better; grey: it is worse. Bold, inside the lines: the 95 % interval over"
    " seeds lies beyond ±0.01."
)
Given = MapResults | str | os.PathLike[str]


class MethodMap(View):
    """A heat map over two knobs: how much better a method is than another, with its border.

        viz.MethodMap("benchmarks/results/maps/support.json")

    Every cell has the mean difference over seeds; it is bold where the 95 % interval (paired over
    seeds, Student's t) is on one side of zero. The line is where the difference changes its sign.
    Menus choose the arm, what it is compared with, the metric and what is held equal; sliders turn
    the other knobs. All values are in the page, so it works without Python.

    Args:
        results: Results of a map, or the file that holds them.
        arm: The method whose lead is drawn; by default the first that is not compared with.
        against: The method that it is compared with; by default the map's first.
        metric: The score; by default the map's first.
        budget: What is held equal; by default the map's first.
        title: The title above; by default the map's question.

    Attributes:
        results: The results.
        arm: Name of the method whose lead is drawn.
        against: Name of the method that it is compared with.
        metric: Name of the score.
        budget: Name of what is held equal.
        at: Places of the settings of all knobs after the first two, from 0.
        selected: The cell looked at, a row of `df`.

    Raises:
        InvalidValue: The results are something else, or there is no such arm, metric or budget.
    """

    caption = "Where does a method win?"
    takes = "results of a map, or their file"
    name, scripts, styles = "map", ("method_map.js",), ("method_map.css",)
    arm = Trait("")
    against = Trait("")
    metric = Trait("")
    budget = Trait("")
    at = Trait([])

    @validate_arguments
    def __init__(
        self,
        results: Unchecked[Given],
        arm: Text = "",
        against: Text = "",
        metric: Text = "",
        budget: Text = "",
        title: Text = "",
    ) -> None:
        super().__init__()
        self.results = _read(results)
        self.picture = MapPicture(self.results)
        self.title = title or self.results.question
        self.against = _known(self.results.arms, against or self.results.against[0], "arm")
        others = [one.name for one in self.results.arms if one.name != self.against]
        self.arm = _known(self.results.arms, arm or (others or [self.against])[0], "arm")
        self.metric = _known(self.results.metrics, metric or self.results.metrics[0].name, "metric")
        self.budget = _known(self.results.budgets, budget or self.results.budgets[0].name, "budget")
        self.at = [0] * (len(self.results.knobs) - 2)
        self.selected = 0

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is the results of a map.

        Args:
            given: Anything.
            sample: Not used: results have no completions.

        Returns:
            Whether it is results with at least one record.
        """
        return isinstance(given, MapResults) and bool(given.records)

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make a map of made-up results.

        Args:
            tokens: Not used: a map shows no tokens.
            words: All texts: names of knobs, arms, metrics and budgets, and the question.

        Returns:
            The view.
        """
        return cls(example_results(words), title=words)

    @property
    def selection(self) -> Selection:
        """Return what is drawn at present."""
        for what, named in (
            ("arm", self.results.arms),
            ("against", self.results.arms),
            ("metric", self.results.metrics),
            ("budget", self.results.budgets),
        ):
            _known(named, getattr(self, what), what)
        others = list(self.picture.settings.values())[2:]
        if len(self.at) != len(others) or not all(
            isinstance(place, int) and 0 <= place < len(found)
            for place, found in zip(self.at, others, strict=True)
        ):
            raise InvalidValue(
                f"MethodMap.at is {self.at}. Give a place for each of the other knobs: numbers from"
                f" 0, below {[len(found) for found in others]}."
            )
        return Selection(self.arm, self.against, self.metric, self.budget, tuple(self.at))

    @property
    def df(self) -> pd.DataFrame:
        """One row per cell of the present picture: its knobs, `mean`, `low`, `high` and `seeds`."""
        first, second = (knob.name for knob in self.results.knobs[:2])
        columns, rows = self.picture.axes
        cells = self.picture.cells(self.selection)
        places = [{second: y, first: x} for y in rows for x in columns]
        return pd.DataFrame(
            [{**place, **vars(cell)} for place, cell in zip(places, cells, strict=True)]
        )

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/method_map.js` reads them.
        """
        return {
            "title": self.title,
            "premise": self.results.premise,
            **self.picture.data(),
        }

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with the heat map of the present choice; every foreign string in it is escaped.
        """
        return (
            f"{markup.draw_title(self.title)}"
            f'<div class="opd-soft">{markup.escape(self.results.premise)}</div>'
            f'<div class="opd-mm-said">{markup.escape(self._said())}</div>'
            f'<div class="opd-mm-box">{draw_table(self.picture, self.selection)}</div>'
            f"{markup.draw_words(LEGEND)}"
        )

    def __repr__(self) -> str:
        columns, rows = self.picture.axes
        cells = self.picture.cells(self.selection)
        width = max(7, *(len(say_value(x)) + 1 for x in columns))
        lines = [f"MethodMap: {self.title}", self._said()]
        lines.append(" " * 10 + "".join(say_value(x).rjust(width) for x in columns))
        limit = self.picture.limit(self.selection)
        for y, row in enumerate(rows):
            line = cells[y * len(columns) : (y + 1) * len(columns)]
            bars = "".join(
                markup.draw_bar(abs(cell.mean) / limit if cell.seeds else 0.0) for cell in line
            )
            shown = "".join(_say_cell(cell).rjust(width) for cell in line)
            lines.append(f"{say_value(row):>10}{shown}  {bars}")
        return "\n".join(lines)

    def _said(self) -> str:
        return self.picture.say(self.selection)


def _say_cell(cell: Cell) -> str:
    """A difference in a terminal; a star marks a clear one."""
    if not cell.seeds:
        return "– "
    return f"{cell.mean:+.2f}{'*' if cell.is_clear else ' '}"


def example_results(words: str = "map") -> MapResults:
    """Make results of made-up numbers, three seeds of two arms on a grid of four by three.

    Args:
        words: All labels and descriptions.

    Returns:
        The results.
    """
    named = [Named(name, words, words) for name in ("x", "y", "z")]
    arms = (Named("first", words), Named("second", f"{words} 2"))
    records = [
        MapRecord(
            {"x": 10.0**-x, "y": float(y), "z": z},
            seed,
            arm,
            {
                "updates": {"score": 0.5 + (i * (x - y) + 0.2 * seed) / 10},
                "teacher": {"score": 0.5 + (i * (x - 2 * y) + 0.2 * seed) / 10},
            },
        )
        for x in range(4)
        for y in range(3)
        for z in ("a", "b")
        for seed in range(3)
        for i, arm in enumerate(("first", "second"))
    ]
    budgets = (Named("updates", words, words), Named("teacher", f"{words} 2", words))
    return MapResults(
        "example",
        words,
        words,
        tuple(named),
        arms,
        (Named("score", words, words),),
        budgets,
        ("first",),
        tuple(records),
    )


def _read(given: Any) -> MapResults:
    """Read results from a file, or take them as they are."""
    if isinstance(given, MapResults):
        results = given
    elif isinstance(given, (str, os.PathLike)) and os.path.isfile(given):
        results = MapResults.load(given)
    else:
        raise InvalidValue(
            f"MethodMap got {shortened(given)}. Give results of a map, or the path of their file,"
            " as benchmarks/results/maps/support.json."
        )
    if not results.records:
        raise InvalidValue(
            f"The map {results.name!r} has no records yet. Measure it first: python -m"
            f" benchmarks.maps --only {results.name}"
        )
    return results


def _known(named: Sequence[Named], wanted: str, what: str) -> str:
    """Refuse a name that the map does not have."""
    names = [one.name for one in named]
    if wanted not in names:
        raise InvalidValue(f"The map has no {what} {wanted!r}. It has {', '.join(names)}.")
    return wanted
