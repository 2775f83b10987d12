"""Measure what docs/reliability.md states: alarms on healthy and on broken runs, and memory.

`python -m benchmarks.reliability` takes about a quarter of an hour on two cores and writes
`benchmarks/results/reliability.json`; with `alarms`, `faults` or `memory` it runs one part.

- alarms: 20 healthy runs of the market, with four methods and other seeds, of 60 steps each.
- faults: runs that break in one planted way each; the alarm that is expected, and when it came.
- memory: the resident size of the process over 1,000 steps.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

import opdlab as opd
from opdlab.losses.divergences import entropy
from opdlab.tasks.market import model

RESULTS = Path(__file__).parent / "results" / "reliability.json"
STEPS, SEEDS = 60, range(5)
METHODS: dict[str, Any] = {
    "OPD, reverse KL": opd.OPD(),
    "OPD, forward KL": opd.OPD("forward_kl"),
    "OPDPlus": opd.OPDPlus(),
    "TOPD": opd.TOPD(),
}


def watch_run(
    student: opd.Policy, teacher: opd.Policy | None, method: Any, **settings: Any
) -> opd.diagnose.Health:
    """Train and show every step to a watch.

    Args:
        student: The student.
        teacher: The teacher.
        method: The method.
        settings: Settings of `distill`.

    Returns:
        The watch.
    """
    task = settings.pop("task", None) or opd.tasks.market()
    options = {"batch": 16, "steps": STEPS, **settings}
    run = opd.distill(student, teacher, task, method=method, quiet=True, **options)
    watch = opd.diagnose.health(run)
    for step in run:
        watch(step)
    return watch


def measure_alarms() -> dict[str, Any]:
    """Count the healthy runs in which an alarm goes off.

    Returns:
        One row for each run, and the share with an alarm.
    """
    rows = []
    for name, method in METHODS.items():
        for seed in SEEDS:
            watch = watch_run(model("student"), model("teacher"), method, seed=seed)
            said = sorted({alarm.signature for alarm in watch.alarms})
            rows.append({"method": name, "seed": seed, "alarms": said})
            print(f"{name}, seed {seed}: {', '.join(said) or 'quiet'}", flush=True)
    loud = sum(bool(row["alarms"]) for row in rows)
    return {"runs": rows, "steps": STEPS, "share": loud / len(rows)}


def _swapped_stop() -> opd.Policy:
    """A teacher that ends its texts with another token."""
    teacher = model("teacher")
    weight, (eos,) = teacher.weights.head.weight, teacher.weights.eos
    with torch.no_grad():
        weight[[eos, 0]] = weight[[0, eos]].clone()
    return teacher


def _shuffled_head() -> opd.Policy:
    """A teacher whose tokens mean something else."""
    teacher = model("teacher")
    order = torch.randperm(
        len(teacher.weights.head.weight), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        teacher.weights.head.weight.copy_(teacher.weights.head.weight[order].clone())
    return teacher


def _flat_head() -> opd.Policy:
    """A teacher that finds every token equally likely."""
    teacher = model("teacher")
    with torch.no_grad():
        teacher.weights.head.weight.zero_()
    return teacher


class _WithoutMarker(opd.Policy):
    """A teacher that reads prompts without the marker after which an answer begins."""

    def encode_unchecked(self, prompts: Any) -> list[list[int]]:
        """Leave out the last token of each prompt.

        Args:
            prompts: The prompts.

        Returns:
            Their ids.
        """
        return [row[:-1] for row in super().encode_unchecked(prompts)]


def _few_prompts() -> opd.Task:
    """Eight prompts, again and again; the held-out ones are the market's."""
    market = opd.tasks.market()
    few = market.prompts(8)

    def draw(n: int, seed: int, split: Any) -> list[opd.Prompt]:
        return (few * n)[:n] if split == "train" else market.prompts(n, seed, split)

    return opd.Task("few", draw, market.verify, market.max_new_tokens)


def _again(batch: Any) -> dict[str, torch.Tensor]:
    """Reward saying one of the last two tokens again."""
    ids = batch.rollout.ids
    same = torch.zeros(ids.shape)
    for back in (1, 2):
        same[:, back:] += (ids[:, back:] == ids[:, :-back]).float()
    return {"reward": same - same[batch.mask].mean()}


_loops = opd.method(needs=("teacher",), plan=_again)(lambda rows: -rows.reward * rows.logp)
_surer = opd.method(needs=("teacher",))(lambda rows: entropy(rows.student))
_flatter = opd.method(needs=("teacher",))(lambda rows: -entropy(rows.student))
_away = opd.method(needs=("teacher",))(
    lambda rows: -opd.losses.reverse_kl(rows.student, rows.teacher).clamp(max=20)
)


class _Stale:
    """A sampler that never takes up an update."""

    def start(self, student: opd.Policy) -> None:
        """Remember a copy of the student.

        Args:
            student: The policy that trains.
        """
        self.first = model("student")

    def update(self, student: opd.Policy, step: int) -> None:
        """Ignore the update.

        Args:
            student: The policy that trains.
            step: Steps done.
        """

    def sample(self, prompts: Any, n: int = 1, **options: Any) -> opd.Rollout:
        """Write with the student as it was.

        Args:
            prompts: The prompts.
            n: Completions of each.
            options: Sampling options.

        Returns:
            The completions.
        """
        return self.first.sample(prompts, n, **options)

    def close(self) -> None:
        """Do nothing."""


def _with_stale_sampler() -> opd.diagnose.Health:
    return watch_run(
        model("student"), model("teacher"), opd.OPD(), steps=30, lr=1e-2, sampler=_Stale()
    )


FAULTS: dict[str, Callable[[], opd.diagnose.Health]] = {
    "entropy is minimised": lambda: watch_run(model("novice"), model("teacher"), _surer, steps=12),
    "entropy is maximised": lambda: watch_run(
        model("student"), model("teacher"), _flatter, steps=20
    ),
    "the sign of the loss is wrong": lambda: watch_run(
        model("student"), model("teacher"), _away, steps=20
    ),
    "the teacher stops with another token": lambda: watch_run(
        model("student"), _swapped_stop(), opd.OPD("forward_kl"), steps=12
    ),
    "the teacher reads another template": lambda: watch_run(
        model("student"), _WithoutMarker(model("teacher").weights), opd.OPD(), steps=6
    ),
    "the teacher's tokens are shuffled": lambda: watch_run(
        model("student"), _shuffled_head(), opd.OPD(), steps=20
    ),
    "the teacher knows nothing": lambda: watch_run(
        model("student"), _flat_head(), opd.OPD(), steps=20
    ),
    "a learning rate a thousand times too high": lambda: watch_run(
        model("student"), model("teacher"), opd.OPD(), steps=20, lr=1.0
    ),
    "a learning rate a hundred times too high": lambda: watch_run(
        model("student"), model("teacher"), opd.OPD("forward_kl"), steps=20, lr=0.1
    ),
    "a student that never learnt to answer": lambda: watch_run(
        opd.Policy.of(_fresh(), model("student").tokenizer), model("teacher"), opd.OPD(), steps=12
    ),
    "eight prompts, trained too long": lambda: watch_run(
        model("student"),
        None,
        opd.SFT(),
        steps=15,
        batch=8,
        lr=1e-3,
        lora=None,
        evaluate_every=5,
        task=_few_prompts(),
    ),
    "a reward for loops": lambda: watch_run(
        model("novice"), model("teacher"), _loops, steps=10, n=2, lr=3e-3
    ),
    "a limit that cuts every text": lambda: watch_run(
        model("student"), model("teacher"), opd.OPD(), steps=12, max_new_tokens=6
    ),
    "a sampler with an old adapter": _with_stale_sampler,
}


def _fresh() -> Any:
    """The student's architecture with random weights."""
    made = type(model("student").weights.model)(model("student").weights.model.config)
    return made.eval()


def measure_faults() -> list[dict[str, Any]]:
    """Break runs one by one, and note the first alarm.

    Returns:
        For each fault the alarms, and the step of the first.
    """
    rows = []
    for name, run in FAULTS.items():
        try:
            watch = run()
        except opd.OpdlabError as error:  # refused, which is better than an alarm
            rows.append({"fault": name, "refused": str(error)})
        else:
            said = [{"alarm": alarm.signature, "step": alarm.step} for alarm in watch.alarms]
            rows.append({"fault": name, "alarms": said[:4]})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_memory(steps: int = 1000) -> dict[str, Any]:
    """Follow the resident size over a long run.

    Args:
        steps: Number of steps.

    Returns:
        MiB after every 100 steps, and the growth from step 200 on as a share.
    """
    student, teacher, task = opd.load("market")
    run = opd.distill(student, teacher, task, steps=steps, batch=8, quiet=True)
    process, sizes = psutil.Process(), []
    for step in run:
        if step.number % 100 == 0:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            sizes.append(process.memory_info().rss / 2**20)
            print(f"step {step.number}: {sizes[-1]:.0f} MiB", flush=True)
    return {"every_100_steps_mib": sizes, "growth": max(sizes[1:]) / sizes[1] - 1}


PARTS = {"alarms": measure_alarms, "faults": measure_faults, "memory": measure_memory}


def main() -> None:
    """Run all parts, or the one that is named, and keep the results."""
    kept = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    for part in sys.argv[1:] or PARTS:
        kept[part] = PARTS[part]()
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
