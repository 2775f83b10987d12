"""The form of a map's measurement: parts that are computed one by one, and kept as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from opdlab.data.map_results import MapRecord, MapResults, Named, Value

RESULTS = Path(__file__).parents[1] / "results" / "maps"
UPDATES = Named("updates", "equal updates", "Every arm takes as many steps.")
TEACHER = Named(
    "teacher",
    "equal teacher tokens",
    "Every arm stops when the teacher has graded and written as many tokens.",
)
BOTH = (UPDATES, TEACHER)
# Where an update costs every arm as many tokens of the teacher.
SAME = (
    Named(
        "updates",
        "equal updates and teacher tokens",
        "An update of each arm has the teacher grade or write as many tokens.",
    ),
)


@dataclass(frozen=True)
class MapPlan:
    """A map to measure.

    Attributes:
        head: The map without records.
        grid: The settings of every knob.
        quick: Fewer settings, for a first look within a minute.
        measure: Takes the settings of a part and its seeds, and gives the records of all arms.
        together: Knobs whose settings one part computes side by side; a part fixes the others.
        shown: Attributes of the picture in docs/maps.md, as those of `MethodMap`.
        seeds: Seeds of a whole map.
    """

    head: MapResults
    grid: Mapping[str, Sequence[Value]]
    quick: Mapping[str, Sequence[Value]]
    measure: Callable[[Mapping[str, Sequence[Value]], Sequence[int]], Iterable[MapRecord]]
    together: tuple[str, ...]
    shown: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 3

    @property
    def name(self) -> str:
        return self.head.name

    @cached_property
    def path(self) -> Path:
        return RESULTS / f"{self.name}.json"

    def parts(self, quick: bool = False) -> Iterator[dict[str, Sequence[Value]]]:
        """Cut the grid into parts, each with one setting of the knobs that are not `together`."""
        grid = self.quick if quick else self.grid
        apart = [name for name in grid if name not in self.together]
        for setting in product(*(grid[name] for name in apart)):
            fixed = {name: (value,) for name, value in zip(apart, setting, strict=True)}
            yield {name: fixed.get(name, grid[name]) for name in grid}

    def run(
        self,
        results: MapResults | None,
        seeds: int | None = None,
        quick: bool = False,
        keep: Path | None = None,
    ) -> MapResults:
        """Measure what `results` lacks, and write the results to `keep` after every part."""
        held = results if results is not None else self.head
        # The words are those of today's program, whatever an old file says.
        results = self.head.add(held.records)
        for part in self.parts(quick):
            wanted = [s for s in range(seeds or self.seeds) if not self._has(results, part, s)]
            if not wanted:
                continue
            began = time.process_time()
            results = results.add(self.measure(part, wanted))
            if keep is not None:
                results.save(keep)
            fixed = {name: values[0] for name, values in part.items() if len(values) == 1}
            print(f"{self.name} {fixed}: {time.process_time() - began:.1f} CPU s", flush=True)
        return results

    def _has(self, results: MapResults, part: Mapping[str, Sequence[Value]], seed: int) -> bool:
        known = {record.key for record in results.records}
        return all(
            (*sorted(zip(part, setting, strict=True)), seed, arm.name) in known
            for setting in product(*part.values())
            for arm in self.head.arms
        )


def head(
    name: str,
    question: str,
    premise: str,
    *,
    knobs: Sequence[Named],
    arms: Sequence[Named],
    metrics: Sequence[Named],
    against: Sequence[str],
    budgets: tuple[Named, ...] = BOTH,
) -> MapResults:
    """Make a map without records."""
    return MapResults(
        name,
        question,
        premise,
        tuple(knobs),
        tuple(arms),
        tuple(metrics),
        budgets,
        tuple(against),
    )


def record(
    knobs: Mapping[str, Value],
    seed: int,
    arm: str,
    updates: Mapping[str, float],
    teacher: Mapping[str, float] | None = None,
) -> MapRecord:
    """Make a record; `teacher=None` where equal updates are equal teacher tokens."""
    scores = {"updates": rounded(updates)}
    if teacher is not None:
        scores["teacher"] = rounded(teacher)
    plain = {k: v if isinstance(v, str) else float(v) for k, v in knobs.items()}
    return MapRecord(plain, seed, arm, scores)


def rounded(scores: Mapping[str, float]) -> dict[str, float]:
    """Five digits are more than any map resolves, and files stay small."""
    return {name: float(f"{float(score):.5g}") for name, score in scores.items()}


def narrowed(plan: MapPlan, **settings: Sequence[Value]) -> MapPlan:
    """Return the plan with other settings of some knobs, for tests and trials."""
    return replace(plan, grid={**plan.grid, **settings})
