"""Let Qwen2.5-Coder-1.5B teach Qwen2.5-Coder-0.5B, by `opdlab distill config.toml`.

    python -m benchmarks.pair [--only form_forward_0 …] [--phases]

Two tasks (`benchmarks/pair_tasks.py`): a form that only the teacher is told, under the forward and
the reverse KL, and a skill that the teacher has more of. A run that was interrupted goes on where
it was, and one that is finished is not run again. After each run, all numbers so far are written to
`results/pair.json`. `--phases` measures seconds and memory of each phase of a step instead, beside
what `opdlab.diagnose.cost` predicts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import tyro

from benchmarks import pair_models, pair_tasks
from benchmarks.run import RESULTS, about_machine
from opdlab.training.intervals import paired, wilson

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "runs" / "pair"
NOTEBOOK = ROOT / "notebooks" / "data" / "pair"  # what notebook 51 looks at
RESULT = RESULTS / "pair.json"
SEEDS = (0, 1, 2)
PROMPTS = {"form": 32, "skill": 48}  # held-out prompts of an evaluation
# One thread: on a machine with other work, two threads mostly wait for each other.
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Experiment:
    """A task with a method; it is run once for each seed."""

    task: str
    divergence: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    method: Mapping[str, Any] = field(default_factory=dict)


EXPERIMENTS = {
    "form_forward": Experiment("form", "forward_kl", {"steps": 14, "lr": 5e-4, "batch": 6}),
    "form_reverse": Experiment("form", "reverse_kl", {"steps": 14, "lr": 5e-4, "batch": 6}),
    "skill": Experiment("skill", "forward_kl", {"steps": 16, "lr": 5e-4, "schedule": "cosine"}),
}

TRACED = ("form_forward_0", "skill_0")  # the runs that notebook 51 looks at


def main(only: tuple[str, ...] = (), phases: bool = False) -> None:
    """Run the experiments, or measure the phases of a step.

    Args:
        only: Names of runs, as form_forward_0; all by default.
        phases: Measure the phases of a step instead.
    """
    student, teacher = (
        pair_models.fetch(one) for one in (pair_models.STUDENT, pair_models.TEACHER)
    )
    if phases:
        from benchmarks import pair_phases

        write_result({"phases": pair_phases.measure_all(student, teacher)})
        return
    # The first seed of each experiment first, so that an early stop leaves something of each.
    names = [f"{name}_{seed}" for seed in SEEDS for name in EXPERIMENTS]
    for name in only or names:
        config = write_config(name, student, teacher)
        distil(name, config)
        collect()


def write_config(name: str, student: Path, teacher: Path) -> Path:
    """Write the records and the config of a run, and return the config's path."""
    experiment, seed = EXPERIMENTS[name.rpartition("_")[0]], int(name.rpartition("_")[2])
    task = pair_tasks.TASKS[experiment.task]
    FOLDER.mkdir(parents=True, exist_ok=True)
    records = FOLDER / f"{experiment.task}.jsonl"
    records.write_text("".join(json.dumps(one) + "\n" for one in task.records()), "utf-8")
    tables = {
        # On this kind of CPU (AMX) bfloat16 is faster than float32; nothing chooses it by itself.
        "student": {"source": str(student), "dtype": "bfloat16"},
        "teacher": {"source": str(teacher), "dtype": "bfloat16", "hint": task.has_hint},
        "task": {
            "records": str(records),
            "name": experiment.task,
            "test": 64,
            "max_new_tokens": task.max_new_tokens,
        },
        "method": {"name": "opd", "divergence": experiment.divergence, **experiment.method},
        "settings": {"batch": 8, "lora": 16, "save_every": 4, **experiment.settings, "seed": seed},
        "run": {
            "folder": str(FOLDER / name),
            "eval_prompts": PROMPTS[experiment.task],
            # The teacher is the same for all runs of a task.
            "eval_teacher": name in TRACED,
            "trace_prompts": 16 if name in TRACED else 1,
        },
    }
    path = FOLDER / f"{name}.toml"
    path.write_text(tomli_w.dumps(tables), "utf-8")
    return path


def distil(name: str, config: Path) -> None:
    """Train by the command line, in a process of its own."""
    task = EXPERIMENTS[name.rpartition("_")[0]].task
    verify = f"{pair_tasks.__file__}:{pair_tasks.TASKS[task].verify.__name__}"
    command = [sys.executable, "-m", "opdlab.commands.cli", "distill", str(config)]
    command += ["--verify", verify]
    print(f"{name}: opdlab distill {config.relative_to(ROOT)}", flush=True)
    done = subprocess.run(command, env={**os.environ, **QUIET}, check=False)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}. The same command takes it up.")


def collect() -> None:
    """Write the numbers of all runs so far into the JSON file."""
    runs: dict[str, Any] = {}
    for name in (f"{name}_{seed}" for name in EXPERIMENTS for seed in SEEDS):
        if (FOLDER / name / "report.json").exists():
            runs[name] = read_run(FOLDER / name)
    write_result({"runs": runs, "summary": summarise(runs)})
    publish(runs)


def publish(runs: Mapping[str, Any]) -> None:
    """Copy what notebook 51 looks at: numbers of all runs, and the traces of the first seeds."""
    NOTEBOOK.mkdir(parents=True, exist_ok=True)
    kept = ("evaluations", "history", "alarms", "settings")
    said = {name: {key: run[key] for key in kept} for name, run in runs.items()}
    (NOTEBOOK / "runs.json").write_text(json.dumps(said) + "\n", "utf-8")
    for name in runs:
        if name not in TRACED:
            continue
        traces = sorted((FOLDER / name / "traces").glob("step-*.parquet"))
        for path, stage in ((traces[0], "before"), (traces[-1], "after")):
            shutil.copyfile(path, NOTEBOOK / f"{name[:-2]}_{stage}.parquet")
        again = FOLDER / name / "traces" / "before-again.parquet"
        shutil.copyfile(again, NOTEBOOK / f"{name[:-2]}_before_again.parquet")


def read_run(folder: Path) -> dict[str, Any]:
    """Read a finished run: evaluations with intervals, history, alarms and cost."""
    report = json.loads((folder / "report.json").read_text("utf-8"))
    measured = json.loads((folder / "measured.json").read_text("utf-8"))
    checkpoint = max(folder.glob("step-*/history.json"))
    return {
        "settings": report["settings"],
        "method": report["method"],
        "evaluations": {
            role: _evaluation(one["greedy"]) for role, one in measured["evaluations"].items()
        },
        "gain": report["gain"],
        "alarms": [one["signature"] for one in report["alarms"]],
        "cost": report["cost"],
        "history": json.loads(checkpoint.read_text("utf-8")),
    }


def _evaluation(scores: list[float]) -> dict[str, Any]:
    interval = wilson(float(np.mean(scores)), len(scores))
    return {
        "accuracy": float(np.mean(scores)),
        "low": interval.low,
        "high": interval.high,
        "greedy": scores,
    }


def summarise(runs: Mapping[str, Any]) -> dict[str, Any]:
    """Pool the seeds of each experiment; a prompt counts once, with the mean of its scores."""
    summary = {}
    for name, experiment in EXPERIMENTS.items():
        seeds = [runs[one] for one in runs if one.rpartition("_")[0] == name]
        if not seeds:
            continue
        scores = {
            role: np.mean([one["evaluations"][role]["greedy"] for one in seeds], axis=0)
            for role in ("before", "after")
        }
        gain = paired(scores["after"], scores["before"])
        teacher = _teacher_of(experiment.task, runs)
        summary[name] = {
            "seeds": len(seeds),
            "after_by_seed": [one["evaluations"]["after"]["accuracy"] for one in seeds],
            **{role: _evaluation(list(map(float, one))) for role, one in scores.items()},
            "teacher": teacher,
            "gain": {"mean": gain.mean, "low": gain.low, "high": gain.high},
        }
        if teacher is not None:
            gap = teacher["accuracy"] - summary[name]["before"]["accuracy"]
            summary[name]["share_of_gap"] = gain.mean / gap if gap else None
    return summary


def _teacher_of(task: str, runs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The teacher's evaluation, which one run of a task has."""
    for name, run in runs.items():
        if EXPERIMENTS[name.rpartition("_")[0]].task == task and "teacher" in run["evaluations"]:
            return run["evaluations"]["teacher"]
    return None


def write_result(parts: Mapping[str, Any]) -> None:
    """Put parts into the JSON file, beside those that are there."""
    before = json.loads(RESULT.read_text("utf-8")) if RESULT.exists() else {}
    RESULT.write_text(json.dumps({**before, **about_machine(), **parts}, indent=1) + "\n", "utf-8")
    print(f"Written: benchmarks/results/{RESULT.name}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
