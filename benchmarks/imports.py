"""The time of `import opdlab.viz` beside that of what a picture needs.

`python -m benchmarks.imports [--repeats 9]`

A picture needs pyarrow, pandas and Plotly; opdlab is to add at most half of their time, and no
model stack. Each import runs in a process of its own; the sides alternate, after one round that
only warms the file cache. Writes every repetition to `results/imports.json`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "imports.json"
SIDES = {
    "pyarrow, pandas, plotly": "import pyarrow, pandas, plotly.graph_objects",
    "opdlab.viz": "import opdlab.viz",
}
TARGET = 1.5  # times the time of the first side
# Times the statement, and counts what it loaded and the memory that the process then has.
TIMED = """
import json, sys, time
start = time.perf_counter()
{statement}
seconds = time.perf_counter() - start
try:
    status = open("/proc/self/status").read()
    memory = int(status.split("VmRSS:")[1].split()[0]) / 1024
except OSError:
    memory = float("nan")
print(json.dumps({{"seconds": seconds, "modules": len(sys.modules), "MiB": memory}}))
"""


def measure(statement: str) -> dict[str, float]:
    """Run an import in a fresh interpreter."""
    code = TIMED.format(statement=statement)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def main(repeats: int = 9) -> None:
    """Measure, print, and write `results/imports.json`.

    Args:
        repeats: runs of each side.
    """
    for statement in SIDES.values():
        measure(statement)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for _ in range(repeats):
        for name, statement in SIDES.items():
            runs[name].append(measure(statement))
    table = Table("import", "best s", "median s", "modules", "MiB")
    best, median = {}, {}
    for name, found in runs.items():
        seconds = [run["seconds"] for run in found]
        best[name], median[name] = min(seconds), statistics.median(seconds)
        last = found[-1]
        table.add_row(
            name,
            f"{best[name]:.3f}",
            f"{median[name]:.3f}",
            str(last["modules"]),
            f"{last['MiB']:.0f}",
        )
    base, ours = SIDES
    ratio = {"best": best[ours] / best[base], "median": median[ours] / median[base]}
    console = Console()
    console.print(table)
    console.print(
        f"opdlab.viz takes {ratio['best']:.2f} times as long at best, {ratio['median']:.2f} in the"
        f" median; at most {TARGET} is the target."
    )
    result = {
        "date": f"{date.today()}",
        "python": sys.version.split()[0],
        "target": TARGET,
        "ratio": ratio,
        "runs": runs,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
