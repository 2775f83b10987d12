"""The CPU seconds until opdlab can work, beside those of the libraries that it cannot do without.

`python -m benchmarks.imports [--repeats 5]`

Each statement runs in a process of its own; the statements alternate, after one round that only
warms the file cache. Writes every repetition to `results/imports.json`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.run import about_machine

RESULTS = Path(__file__).parent / "results" / "imports.json"
MODELS = "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache"
SIDES = {
    "torch": "import torch",
    "torch and the model classes of transformers": MODELS,
    "those and PEFT": f"{MODELS}\nimport peft",
    "opdlab.distill": "import opdlab\nopdlab.distill",
    "pyarrow, pandas, Plotly": "import pyarrow, pandas, plotly.graph_objects",
    "opdlab.viz": "import opdlab.viz",
    "bare Python": "pass",
    "opdlab --help": (
        "import contextlib, io\n"
        "sys.argv = ['opdlab', '--help']\n"
        "from opdlab.commands.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    main()"
    ),
}
# What is compared with what, and the most that it may take of it.
TARGETS = {
    "opdlab.viz": ("pyarrow, pandas, Plotly", 1.5),
    "opdlab.distill": ("torch", 2.0),
}
# The least that can be had: what is compared needs these libraries.
FLOORS = {"opdlab.distill": "those and PEFT"}
# Runs the statement, and counts what it loaded and the memory that the process then has.
TIMED = """
import json, sys, time
start = time.process_time()
{statement}
seconds = time.process_time() - start
try:
    status = open("/proc/self/status").read()
    memory = int(status.split("VmRSS:")[1].split()[0]) / 1024
except OSError:
    memory = float("nan")
print(json.dumps({{"seconds": seconds, "modules": len(sys.modules), "MiB": memory}}))
"""


def measure(statement: str) -> dict[str, float]:
    """Run a statement in a fresh interpreter."""
    code = TIMED.format(statement=statement)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main(repeats: int = 5) -> None:
    """Measure, print, and write `results/imports.json`.

    Args:
        repeats: Runs of each side.
    """
    for statement in SIDES.values():
        measure(statement)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for _ in range(repeats):
        for name, statement in SIDES.items():
            runs[name].append(measure(statement))
    table = Table("what", "best CPU s", "median", "modules", "MiB")
    best = {}
    for name, found in runs.items():
        seconds = [run["seconds"] for run in found]
        best[name] = min(seconds)
        table.add_row(
            name,
            f"{best[name]:.2f}",
            f"{statistics.median(seconds):.2f}",
            str(found[-1]["modules"]),
            f"{found[-1]['MiB']:.0f}",
        )
    console = Console()
    console.print(table)
    ratios = {}
    for name, (base, target) in TARGETS.items():
        ratios[name] = {"to": base, "ratio": best[name] / best[base], "target": target}
        console.print(f"{name}: {best[name] / best[base]:.2f} times {base}; target {target}")
        if name in FLOORS:
            floor = best[FLOORS[name]]
            ratios[name] |= {"floor": floor / best[base], "to_floor": best[name] / floor}
            console.print(f"    {best[name] / floor:.2f} times what {FLOORS[name]} take")
    result = about_machine() | {"ratios": ratios, "runs": runs}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
