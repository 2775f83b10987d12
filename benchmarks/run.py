"""Measure opdlab against TRL.

    python -m benchmarks.run [--only divergence|generation|step] [--repeats 3] [--name …]

Every measurement is a process of its own with one thread. Repetitions go around all cases, so the
sides alternate and a disturbance of the machine hits all of them. The tables are printed, and every
repetition is written to `results/<name>.json`.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import divergence, generation, step, workload

Results = dict[str, list[dict[str, Any]]]  # by case, one record per repetition

RESULTS = Path(__file__).parent / "results"
QUIET = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def best(results: Results, case: str) -> float:
    return min(second for record in results[case] for second in record["seconds"])


def median(results: Results, case: str) -> float:
    return statistics.median(second for record in results[case] for second in record["seconds"])


def peak(results: Results, case: str) -> float:
    """The worst peak of all repetitions, in MiB."""
    return max(record["peak_mib"] for record in results[case])


Number = Callable[[Results, str], float]


def ratio(number: Number, ours: str, theirs: str) -> Callable[[Results], float]:
    """Divide a number of one case by that of another."""
    return lambda results: number(results, ours) / number(results, theirs)


def generating(results: Results, case: str) -> float:
    return split(results, case)[0]


def everything_else(results: Results, case: str) -> float:
    return split(results, case)[1]


# A name, the unit, the number, and the most that it may be.
Target = tuple[str, str, Callable[[Results], float], float]


def targets() -> list[Target]:
    """List the targets for a CPU."""
    return [*targets_of_loss(), *targets_of_writing(), *targets_of_steps()]


def targets_of_loss() -> list[Target]:
    """List the targets of a divergence with its gradient."""
    loss = "divergence/{}/reverse_kl/{}/1024"
    large = f"divergence/{{}}/reverse_kl/frozen/4096/V={divergence.LARGE_VOCAB}"
    found: list[Target] = []
    for head in ("frozen", "trainable"):
        ours, watched = loss.format("opdlab", head), f"{loss.format('opdlab', head)}/watched"
        found += [
            (
                f"divergence, {head} head",
                "x products",
                ratio(best, ours, loss.format("products", head)),
                1.1,
            ),
            (f"the same, watched, {head} head", "x CPU s", ratio(best, watched, ours), 1.05),
            (f"the same, watched, {head} head", "x memory", ratio(peak, watched, ours), 1.1),
        ]
    found += [
        (
            "divergence, 4,096 x 151,936",
            "x products",
            ratio(best, large.format("opdlab"), large.format("products")),
            1.1,
        ),
        ("divergence, 4,096 x 151,936", "MiB", lambda r: peak(r, large.format("opdlab")), 300),
    ]
    return found


def targets_of_writing() -> list[Target]:
    """List the targets of writing alone."""
    found: list[Target] = []
    for shape in ("eight prompts", "one prompt", "eight prompts/LoRA"):
        ours = f"generation/opdlab/{shape}"
        if "LoRA" not in shape:
            found.append(
                (
                    f"writing, {shape}",
                    "x products",
                    ratio(best, ours, f"generation/products/{shape}"),
                    1.2,
                )
            )
        found.append(
            (
                f"writing, {shape}",
                "x transformers",
                ratio(best, ours, f"generation/transformers/{shape}"),
                0.4,
            )
        )
    return found


def targets_of_steps() -> list[Target]:
    """List the targets of whole steps."""
    found: list[Target] = []
    for weights in ("all weights", "LoRA"):
        ours, theirs = (f"step/{side}/{weights}" for side in ("opdlab", "trl"))
        found += [
            (f"step, {weights}", "x TRL's CPU s", ratio(best, ours, theirs), 0.5),
            (f"step, {weights}", "x TRL's memory", ratio(peak, ours, theirs), 0.3),
            (f"  its generation, {weights}", "x TRL's CPU s", ratio(generating, ours, theirs), 0.5),
            (
                f"  everything else, {weights}",
                "x TRL's CPU s",
                ratio(everything_else, ours, theirs),
                0.5,
            ),
            (
                f"  (the products alone, {weights})",
                "x TRL's CPU s",
                ratio(best, f"step/products/{weights}", theirs),
                0.5,
            ),
        ]
    ours, theirs = (f"step/{side}/{step.SELF}" for side in ("opdlab", "trl"))
    found += [
        (f"step, {step.SELF}, with the model", "x TRL's memory", ratio(peak, ours, theirs), 0.5),
        (f"step, {step.SELF}", "x TRL's CPU s", ratio(best, ours, theirs), 0.5),
    ]
    return found


def main(
    only: Literal["divergence", "generation", "step"] | None = None,
    repeats: int = 3,
    name: str = "",
) -> None:
    """Run the cases, print the tables and write results/<name>.json.

    Args:
        only: A third of the cases; all by default.
        repeats: Repetitions of each case.
        name: Name of the results; the kind of device and the date by default.
    """
    console, results = Console(width=110), Results()
    tables: dict[str, Iterable[str]] = {
        "divergence": divergence.CASES,
        "generation": generation.CASES,
        "step": step.CASES,
    }
    cases = [
        f"{part}/{case}" for part, table in tables.items() if only in (None, part) for case in table
    ]
    path = RESULTS / f"{name or f'{workload.device().type}-{date.today()}'}.json"
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        workload.build_tokenizer().save_pretrained(folder)
        for i in range(repeats):
            for case in cases:
                record = one(case, folder)
                results.setdefault(case, []).append(record)
                console.print(
                    f"{i + 1}/{repeats} {case}: {min(record['seconds']):.2f} s,"
                    f" {record['peak_mib']:.0f} MiB",
                    style="dim",
                )
            # Written after each round, so that an interrupt loses one round at most.
            written = about() | {"repeats": i + 1, "cases": results}
            path.write_text(json.dumps(written, indent=1) + "\n")
    for part in tables:
        if any(case.startswith(part) for case in results):
            console.print(show(part, results))
    if workload.device().type == "cpu":
        console.print(judge(results))
    console.print(f"Written: benchmarks/results/{path.name}")


def one(case: str, folder: str) -> dict[str, Any]:
    """Measure one case in a fresh process, whose last line is the record."""
    part, name = case.split("/", 1)
    command = [sys.executable, "-m", f"benchmarks.{part}", name, folder]
    done = subprocess.run(
        command, env={**os.environ, **QUIET}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def about() -> dict[str, Any]:
    """Describe the measurement: date, machine, versions and workload, without hosts or folders."""
    return {
        **about_machine(),
        "workload": {
            "vocabulary": workload.VOCAB,
            "batch": workload.BATCH,
            "prompt": workload.PROMPT,
            "completion": workload.COMPLETION,
            "student": workload.STUDENT,
            "teacher": workload.TEACHER,
            "lora_rank": workload.RANK,
        },
    }


def about_machine() -> dict[str, Any]:
    """Describe date, machine and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": date.today().isoformat(),
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "gpu": gpu,
            "system": platform.system(),
        },
        "seconds": "synchronised wall seconds" if gpu else "CPU seconds of the process, one thread",
        "versions": (
            {"python": platform.python_version()}
            | {p: version(p) for p in ("opdlab", "torch", "transformers", "trl", "peft")}
        ),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor() or "unknown",
    )


def show(part: str, results: Results) -> Table:
    kind = "wall" if torch.cuda.is_available() else "CPU"
    table = Table(
        "case", title=f"{part}: {kind} seconds, memory above the start", title_justify="left"
    )
    for column in (
        "best s",
        "median s",
        "peak MiB",
        *(["generate s", "rest s"] if part == "step" else []),
    ):
        table.add_column(column, justify="right")
    for case in (case for case in results if case.startswith(part)):
        numbers = [
            best(results, case),
            median(results, case),
            peak(results, case),
            *(split(results, case) if part == "step" else []),
        ]
        table.add_row(
            case.removeprefix(f"{part}/"), *(f"{x:.0f}" if x > 30 else f"{x:.2f}" for x in numbers)
        )
    return table


def split(results: Results, case: str) -> tuple[float, float]:
    """Split the seconds of the best step into generation and all the rest."""
    steps = [
        pair
        for record in results[case]
        for pair in zip(record["seconds"], record["generate"], strict=True)
    ]
    total, generate = min(steps)
    return generate, total - generate


def judge(results: Results, rows: Sequence[Target] | None = None) -> Table:
    """Compare the results with the targets; those for a CPU by default."""
    table = Table("target", "unit", title="targets", title_justify="left")
    for column in ("measured", "at most", ""):
        table.add_column(column, justify="right")
    for label, unit, number, limit in targets() if rows is None else rows:
        try:
            value = number(results)
        except KeyError:  # the case was not run
            continue
        table.add_row(
            label, unit, f"{value:.3g}", f"{limit:g}", "met" if value <= limit else "missed"
        )
    return table


if __name__ == "__main__":
    tyro.cli(main)
