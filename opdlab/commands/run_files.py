"""The files that `opdlab distill` keeps in a run's folder, beside the checkpoints.

    config.toml                 the config, file and flags together
    board.html                  the run board; it loads itself again while the run goes on
    traces/step-000020.parquet  what the student wrote then, graded
    traces/update-000020.parquet  with trace_k: what the step was trained on, with its losses
    measured.json               evaluations, alarms and cost so far
    adapter/                    the trained adapter
    report.html, report.json    what the run changed

All are written atomically, and none is needed to take a run up again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opdlab.diagnose.health import Alarm
from opdlab.errors import OpdlabError
from opdlab.training import run_folder
from opdlab.training.evaluation import Conditions, Evaluation
from opdlab.viz import embed

_TRACE = re.compile(r"step-(\d+)\.parquet")


@dataclass
class Measured:
    """Hold the measurements of a run so far, beside its history.

    Attributes:
        evaluations: By role ("before", "teacher", "after").
        alarms: The alarms of its health so far.
        costs: Seconds and memory by name.
    """

    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    alarms: list[Alarm] = field(default_factory=list)
    costs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFiles:
    """The places of a run's files.

    Attributes:
        folder: The run's folder.
    """

    folder: Path

    @property
    def config(self) -> Path:
        """The config."""
        return self.folder / "config.toml"

    @property
    def board(self) -> Path:
        """The page of the run board."""
        return self.folder / "board.html"

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return self.folder / "adapter"

    @property
    def report(self) -> Path:
        """The page of the report."""
        return self.folder / "report.html"

    @property
    def report_data(self) -> Path:
        """The report as JSON."""
        return self.folder / "report.json"

    @property
    def before_again(self) -> Path:
        """The texts from before training, graded after it."""
        return self.folder / "traces" / "before-again.parquet"

    @property
    def controls(self) -> Path:
        """The result of `opdlab.controls(…, folder="RUN/controls")`, if there is one."""
        return self.folder / "controls" / "controls.json"

    def trace(self, step: int) -> Path:
        """Return the place of the trace after a step.

        Args:
            step: Number of steps done; 0 for the student before training.

        Returns:
            The file's path.
        """
        return self.folder / "traces" / f"step-{step:06d}.parquet"

    def update(self, step: int) -> Path:
        """Return the place of the trace of a step's own texts, with the losses that moved it.

        Args:
            step: The step, from 1.

        Returns:
            The file's path.
        """
        return self.folder / "traces" / f"update-{step:06d}.parquet"

    def traces(self) -> dict[int, Path]:
        """List the traces that there are.

        Returns:
            Their paths by step, in order.
        """
        found = {}
        for path in sorted((self.folder / "traces").glob("step-*.parquet")):
            if match := _TRACE.fullmatch(path.name):
                found[int(match[1])] = path
        return found

    def checkpoint(self) -> Path | None:
        """Find the checkpoint that was written last.

        Returns:
            Its folder; None if there is none.
        """
        there = run_folder.list_checkpoints(self.folder)
        return there[-1].path if there else None

    def read_measured(self) -> Measured:
        """Read what was measured.

        Returns:
            The evaluations, alarms and costs; empty where nothing was written yet.

        Raises:
            OpdlabError: The file is damaged.
        """
        path = self.folder / "measured.json"
        if not path.exists():
            return Measured()
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            return Measured(
                {role: _read_evaluation(one) for role, one in said["evaluations"].items()},
                [Alarm(**one) for one in said["alarms"]],
                dict(said["costs"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise OpdlabError(
                f"{path} is not what a run writes ({error}). Delete it; the run will measure again."
            ) from None

    def write_measured(self, measured: Measured) -> None:
        """Write what was measured.

        Args:
            measured: The evaluations, alarms and costs.
        """
        said = {
            "evaluations": {
                role: _evaluation_as_json(one) for role, one in measured.evaluations.items()
            },
            "alarms": [asdict(alarm) for alarm in measured.alarms],
            "costs": measured.costs,
        }
        embed.write(self.folder / "measured.json", json.dumps(said, indent=1))


def _evaluation_as_json(evaluation: Evaluation) -> dict[str, Any]:
    arrays = ("greedy", "sampled", "length", "cut")
    return {
        "name": evaluation.name,
        "requested": evaluation.requested,
        "key": list(evaluation.key),
        **{name: getattr(evaluation, name).tolist() for name in arrays},
    }


def _read_evaluation(said: Mapping[str, Any]) -> Evaluation:
    key = said["key"]
    if len(key) == len(Conditions._fields):
        settings = tuple((name, value) for name, value in key[1])
        key = Conditions(key[0], settings, *key[2:])
    greedy = np.array(said["greedy"], float)
    return Evaluation(
        said["name"],
        greedy,
        np.array(said["sampled"], float).reshape(len(greedy), -1),
        np.array(said["length"], float),
        np.array(said["cut"], float),
        key=tuple(key) if not isinstance(key, Conditions) else key,
        requested=said["requested"],
    )
