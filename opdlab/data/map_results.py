"""Results of a map: scores of several methods at every setting of a world's knobs, by seed.

A file of results is JSON that others can add to. Each record says where it was measured and with
which seed, so records of other seeds, settings or methods are appended to `records`:

    {"knobs": {"support": 0.01, "updates": 64}, "seed": 3, "arm": "forward_kl",
     "updates": {"accuracy": 0.91}, "teacher": {"accuracy": 0.90}}

The keys beside `knobs`, `seed` and `arm` are the budgets at which the arms are compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opdlab.errors import InvalidValue
from opdlab.support.expect import shortened
from opdlab.support.files import write_file

FORMAT = 1
Value = float | str


@dataclass(frozen=True)
class Named:
    """A knob, an arm, a metric or a budget: its name in records, and its words for people.

    Attributes:
        name: The name in the records.
        label: The name that people read.
        description: One sentence; "" for none.
    """

    name: str
    label: str
    description: str = ""


@dataclass(frozen=True)
class MapRecord:
    """Scores of one arm, at one setting of the knobs, with one seed.

    Attributes:
        knobs: The value of every knob, by name.
        seed: The seed of the world and of its training.
        arm: Name of the method.
        scores: Budget to metric to score.
    """

    knobs: Mapping[str, Value]
    seed: int
    arm: str
    scores: Mapping[str, Mapping[str, float]]

    @property
    def key(self) -> tuple[Any, ...]:
        """Return what identifies the record: its knobs by name, its seed and its arm."""
        return (*sorted(self.knobs.items()), self.seed, self.arm)


@dataclass(frozen=True)
class MapResults:
    """A map: what was compared where, and the scores.

    Attributes:
        name: The map's name, and that of its file.
        question: The question that the map answers, for people.
        premise: What has to hold for the method to help, in a sentence.
        knobs: The knobs of the world. The first two are the axes.
        arms: The methods.
        metrics: The scores. Of all of them more is better.
        budgets: What is held equal, as "updates".
        against: Names of the arms that others are compared with, the usual one first.
        records: The scores.
    """

    name: str
    question: str
    premise: str
    knobs: tuple[Named, ...]
    arms: tuple[Named, ...]
    metrics: tuple[Named, ...]
    budgets: tuple[Named, ...]
    against: tuple[str, ...]
    records: tuple[MapRecord, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if len(self.knobs) < 2 or not self.arms or not self.metrics or not self.budgets:
            raise InvalidValue(
                f"The map {self.name!r} has {len(self.knobs)} knobs, {len(self.arms)} arms,"
                f" {len(self.metrics)} metrics and {len(self.budgets)} budgets. A map needs at"
                " least two knobs and one of each of the others."
            )
        if unknown := set(self.against) - {arm.name for arm in self.arms}:
            raise InvalidValue(
                f"The map {self.name!r} compares with {sorted(unknown)[0]!r}, which is no arm. It"
                f" has {', '.join(arm.name for arm in self.arms)}."
            )
        for record in self.records:
            self._check(record)

    def values(self, knob: str) -> list[Value]:
        """Return the settings of a knob that were measured, in ascending order.

        Args:
            knob: The knob's name.

        Returns:
            Numbers, or words in the order in which they first occur.
        """
        found = list(dict.fromkeys(record.knobs[knob] for record in self.records))
        return found if any(isinstance(value, str) for value in found) else sorted(found)

    def scores(
        self, knobs: Mapping[str, Value], arm: str, metric: str, budget: str
    ) -> dict[int, float]:
        """Return the scores of an arm at one setting.

        Args:
            knobs: The value of every knob.
            arm: The arm's name.
            metric: The metric's name.
            budget: The budget's name.

        Returns:
            The scores by seed; empty where nothing was measured.
        """
        place = tuple(sorted(knobs.items()))
        return {
            record.seed: record.scores[budget][metric]
            for record in self._by_place.get((place, arm), ())
            if metric in record.scores.get(budget, {})
        }

    def add(self, records: Iterable[MapRecord]) -> MapResults:
        """Return the results with more records; those of the same setting, seed and arm give way.

        Args:
            records: The new records.

        Returns:
            New results; these stay as they are.
        """
        merged = {record.key: record for record in self.records}
        merged |= {record.key: record for record in records}
        return replace(self, records=tuple(merged.values()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MapResults:
        """Read a file of results.

        Args:
            path: The file.

        Returns:
            The results.

        Raises:
            InvalidValue: The file holds something else.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise InvalidValue(
                f"MapResults.load got {shortened(path)}. Give the path of a file of results, as"
                " benchmarks/results/maps/support.json."
            )
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidValue(f"{Path(path).name} holds no results of a map: {error}") from None
        return cls.from_json(data)

    @classmethod
    def from_json(cls, data: Any) -> MapResults:
        """Read results from plain data, as `as_json` gives them.

        Args:
            data: The data.

        Returns:
            The results.

        Raises:
            InvalidValue: The data is something else.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise InvalidValue(
                f"Results of a map are a JSON object with format {FORMAT}, not {shortened(data)}."
                " Use a file of benchmarks/results/maps, or see docs/maps.md for its form."
            )
        try:
            return cls(
                name=str(data["name"]),
                question=str(data["question"]),
                premise=str(data["premise"]),
                knobs=_read_named(data["knobs"]),
                arms=_read_named(data["arms"]),
                metrics=_read_named(data["metrics"]),
                budgets=_read_named(data["budgets"]),
                against=tuple(map(str, data["against"])),
                records=tuple(map(_read_record, data["records"])),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidValue(
                f"These results of a map lack a part, or hold something else in its place:"
                f" {error!r}. See docs/maps.md for the form."
            ) from None

    def as_json(self) -> dict[str, Any]:
        """Return the results as plain data.

        Returns:
            What `from_json` reads.
        """
        named = {
            key: [vars(one) for one in getattr(self, key)]
            for key in ("knobs", "arms", "metrics", "budgets")
        }
        head = {key: getattr(self, key) for key in ("name", "question", "premise")}
        records = [
            {"knobs": dict(r.knobs), "seed": r.seed, "arm": r.arm, **r.scores} for r in self.records
        ]
        return {
            "format": FORMAT,
            **head,
            **named,
            "against": list(self.against),
            "records": records,
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the results, one record a line, atomically.

        Args:
            path: The file.

        Returns:
            The path.
        """
        data = self.as_json()
        records = ",\n".join(f"  {json.dumps(record)}" for record in data.pop("records"))
        head = json.dumps(data, indent=1)[:-2]
        text = f'{head},\n "records": [\n{records}\n ]\n}}\n'
        return write_file(Path(path), text.encode())

    @property
    def _by_place(self) -> dict[tuple[Any, str], list[MapRecord]]:
        """The records by setting and arm; made once."""
        found: dict[tuple[Any, str], list[MapRecord]] | None = self.__dict__.get("_places")
        if found is None:
            found = {}
            for record in self.records:
                place = tuple(sorted(record.knobs.items()))
                found.setdefault((place, record.arm), []).append(record)
            object.__setattr__(self, "_places", found)
        return found

    def _check(self, record: MapRecord) -> None:
        """Refuse a record that does not fit the map."""
        known = {knob.name for knob in self.knobs}
        budgets = {budget.name for budget in self.budgets}
        if set(record.knobs) != known or record.arm not in {arm.name for arm in self.arms}:
            raise InvalidValue(
                f"A record of the map {self.name!r} has knobs {sorted(record.knobs)} and arm"
                f" {record.arm!r}. The map has knobs {sorted(known)} and arms"
                f" {[arm.name for arm in self.arms]}."
            )
        if not record.scores or not set(record.scores) <= budgets:
            raise InvalidValue(
                f"A record of the map {self.name!r} has scores at {sorted(record.scores)}. The"
                f" map compares at {sorted(budgets)}."
            )


def _read_named(data: Iterable[Mapping[str, Any]]) -> tuple[Named, ...]:
    """Read knobs, arms, metrics or budgets."""
    return tuple(Named(**{key: str(value) for key, value in one.items()}) for one in data)


def _read_record(data: Mapping[str, Any]) -> MapRecord:
    """Read one record, with numbers as numbers."""
    scores = {
        budget: {str(metric): float(score) for metric, score in values.items()}
        for budget, values in data.items()
        if budget not in ("knobs", "seed", "arm")
    }
    knobs: dict[str, Value] = {
        str(name): value if isinstance(value, str) else float(value)
        for name, value in data["knobs"].items()
    }
    return MapRecord(knobs, int(data["seed"]), str(data["arm"]), scores)
