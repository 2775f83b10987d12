"""Measure seconds and peak memory of each phase of a step of the real pair, beside the prediction.

Each precision is measured in a process of its own: `python -m benchmarks.pair_phases PRECISION
STUDENT TEACHER` prints a JSON line. Seconds are CPU seconds of one thread, in the prediction too,
so that other work on the machine does not count. Memory is that above the start of the process.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import pair_tasks, workload
from benchmarks.workload import measured

# Precision of the weights, and of the backbones under autocast.
PRECISIONS = {
    "bfloat16": ("bfloat16", "no"),
    "float32": ("float32", "no"),
    "float32, bf16 autocast": ("float32", "bf16"),
}
STEPS = 3  # the first is a warm-up: it counts for memory, not for seconds
BATCH = 6  # as in the runs of the form
EVALUATED = 16


def measure_all(student: Path, teacher: Path) -> dict[str, Any]:
    """Measure every precision in a fresh process, whose last line is the record."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found = {}
    for name in PRECISIONS:
        command = [sys.executable, "-m", "benchmarks.pair_phases", name, str(student), str(teacher)]
        done = subprocess.run(
            command, env={**os.environ, **quiet}, stdout=subprocess.PIPE, text=True, check=True
        )
        found[name] = json.loads(done.stdout.strip().splitlines()[-1])
        print(name, json.dumps(found[name]), flush=True)
    return found


def measure(precision: str, student: str, teacher: str) -> dict[str, Any]:
    """Measure the phases of the form task in this process, after predicting them."""
    import opdlab
    from opdlab.diagnose.cost import cost

    dtype, autocast = PRECISIONS[precision]
    baseline = workload.memory_now()
    task = pair_tasks.TASKS["form"].task()
    learner = opdlab.Policy.load(student, dtype=dtype)
    guide = opdlab.Policy.load(teacher, dtype=dtype).seeing()
    gc.collect()
    settings = opdlab.Settings(batch=BATCH, max_new_tokens=task.max_new_tokens, precision=autocast)
    rollout = learner.sample(task.prompts(BATCH, seed=1), max_new_tokens=task.max_new_tokens)
    with patch("opdlab.diagnose.cost.time.perf_counter", time.process_time):
        predicted = cost(learner, guide, rollout, settings)
    run = opdlab.distill(
        learner,
        guide,
        task,
        method=opdlab.OPD("forward_kl"),
        steps=STEPS,
        batch=BATCH,
        precision=autocast,
        quiet=True,
    )
    phases = _phases(run, baseline)
    with measured() as evaluating:
        opdlab.evaluate(learner, task, n=EVALUATED)
    phases["evaluate"] = {
        "seconds": evaluating.seconds / EVALUATED,
        "peak_mib": evaluating.peak_mib + evaluating.start_mib - baseline,
    }
    return {
        "measured": phases,
        "predicted": {
            "seconds": predicted.seconds,
            "step": predicted.step,
            "memory_mib": {name: one / 2**20 for name, one in predicted.memory.items()},
            "peak_mib": predicted.peak / 2**20,
        },
    }


def _phases(run: Any, baseline: float) -> dict[str, dict[str, float]]:
    """Run the phases of `opdlab.training.phases` one by one."""
    from opdlab.training.phases import (
        accumulate_gradient,
        grade,
        plan_step,
        update_weights,
        write_rollout,
    )

    seconds: dict[str, list[float]] = {"sample": [], "grade": [], "learn": []}
    peaks: dict[str, list[float]] = {name: [] for name in seconds}
    tokens = []

    def note(name: str, cost: workload.Cost) -> None:
        seconds[name].append(cost.seconds)
        peaks[name].append(cost.peak_mib + cost.start_mib - baseline)

    for _ in range(STEPS):
        run.optimizer.zero_grad()
        with measured() as sampling:
            rollout = write_rollout(run)
        with measured() as grading:
            planned = plan_step(run, rollout)
            grade(run, planned)
        with measured() as learning:
            accumulate_gradient(run, planned)
            update_weights(run)
        note("sample", sampling)
        note("grade", grading)
        note("learn", learning)
        tokens.append(rollout.tokens)
    return {
        name: {"seconds": sum(seconds[name][1:]) / (STEPS - 1), "peak_mib": max(peaks[name])}
        for name in seconds
    } | {"tokens": {"mean": sum(tokens[1:]) / (STEPS - 1)}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(*sys.argv[1:4])))
