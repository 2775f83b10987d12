"""Measure whether the papers' findings show on the shipped world.

    python -m benchmarks.fidelity [--only opd_plus privilege …] [--seeds 3]

Each experiment is a table of arms, and an arm is a function from a seed to numbers. Every pair of
arm and seed runs in a process of its own with one thread, two at a time. Results are kept as they
come in `results/fidelity.json`; `--show` prints their means and 95 % intervals over seeds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from scipy import stats

import opdlab as opd
from benchmarks import fidelity_privilege, fidelity_text, fidelity_windows

RESULTS = Path(__file__).parent / "results" / "fidelity.json"
Arm = Callable[[int], dict[str, float]]


def divergence(seed: int, name: str, stop_gradient: bool, steps: int = 60) -> dict[str, float]:
    """Train on sampled tokens with the weight of a divergence.

    Args:
        seed: Seed of the run.
        name: The divergence.
        stop_gradient: Whether to drop the pathwise term of the weight.
        steps: Updates.
    """
    student, teacher, task = opd.load("market")
    before = opd.evaluate(student, task)
    method = opd.OPDPlus(name, stop_gradient=stop_gradient)
    run = opd.distill(
        student, teacher, task, method=method, steps=steps, seed=seed, quiet=True
    ).train()
    after, last = opd.evaluate(student, task), run.history.tail(10)
    return {
        "before": before.accuracy,
        "accuracy": after.accuracy,
        "teacher reverse KL": last["reverse_kl"].mean(),
        "length": float(after.length.mean()),
        "cut": float(after.cut.mean()),
        "entropy": last["entropy"].mean(),
    }


EXPERIMENTS: Mapping[str, Mapping[str, Arm]] = {
    "opd_plus": {
        f"{name}, {'stop-gradient' if stop else 'OPD+'}": partial(
            divergence, name=name, stop_gradient=stop
        )
        for name in ("forward_kl", "jensen_shannon", "reverse_kl")
        for stop in (True, False)
    },
    "topd": fidelity_windows.ARMS,
    "routes": fidelity_privilege.ROUTES,
    "privilege": fidelity_privilege.ARMS,
    "omniopd": fidelity_text.ARMS,
}


def one(experiment: str, arm: str, seed: int) -> dict[str, float]:
    torch.set_num_threads(1)
    return {key: float(value) for key, value in EXPERIMENTS[experiment][arm](seed).items()}


def main(only: tuple[str, ...] = (), seeds: int = 3, workers: int = 2, show: bool = False) -> None:
    """Run the experiments that have no result yet, and print the tables.

    Args:
        only: Names of experiments; all by default.
        seeds: Seeds per arm.
        workers: Processes at a time.
        show: Whether to print the results so far and run nothing.
    """
    done: dict[str, dict[str, dict[str, Any]]] = (
        json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    )
    wanted = [
        (e, arm, seed)
        for e, arms in EXPERIMENTS.items()
        if not only or e in only
        for arm in arms
        for seed in range(seeds)
    ]
    todo = (
        []
        if show
        else [job for job in wanted if str(job[2]) not in done.get(job[0], {}).get(job[1], {})]
    )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        jobs = {pool.submit(one, *job): job for job in todo}
        for future in as_completed(jobs):
            experiment, arm, seed = jobs[future]
            done.setdefault(experiment, {}).setdefault(arm, {})[str(seed)] = future.result()
            write(done)
            print(f"{experiment} / {arm} / seed {seed}: {future.result()}", flush=True)
    for experiment in only or EXPERIMENTS:
        if experiment in done:
            Console(width=200).print(table(experiment, done[experiment]))


def write(done: Mapping[str, Any]) -> None:
    partial_file = RESULTS.with_suffix(".partial")
    partial_file.write_text(json.dumps(done, indent=1, sort_keys=True) + "\n")
    os.replace(partial_file, RESULTS)


def table(experiment: str, arms: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Make a table of means over seeds, with half-widths of 95 % intervals (Student's t)."""
    columns = list(
        dict.fromkeys(
            key for seeds in arms.values() for numbers in seeds.values() for key in numbers
        )
    )
    out = Table("arm", "seeds", title=experiment, title_justify="left")
    for column in columns:
        out.add_column(column, justify="right")
    order = [arm for arm in EXPERIMENTS[experiment] if arm in arms]
    for arm in order:
        rows = list(arms[arm].values())
        out.add_row(
            arm, str(len(rows)), *(interval([row[c] for row in rows if c in row]) for c in columns)
        )
    return out


def interval(values: list[float]) -> str:
    if not values:
        return ""
    mean, n = float(np.mean(values)), len(values)
    half = (
        stats.t.ppf(0.975, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
        if n > 1
        else math.nan
    )
    return f"{mean:.3f}" + (f" ± {half:.3f}" if n > 1 else "")


if __name__ == "__main__":
    tyro.cli(main)
