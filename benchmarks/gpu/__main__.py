"""Run the cases of a GPU, print the tables, and write `benchmarks/results/gpu.json`.

    python -m benchmarks.gpu --only limits loss scoring --minutes 9
    python -m benchmarks.gpu --only writing --minutes 9 --resume
    python -m benchmarks.gpu --only step --minutes 9 --resume

Every case is a process of its own with a time limit. One that fails (memory, an error, its time) is
noted with the first line of its error, and the others go on. The results are written after every
case. `--resume` keeps what is there and measures the rest; cases that failed are tried again with
`--retry`. `--minutes` starts no case that would not be done by then, so a machine that is lent for
minutes can be used in pieces. `--size tiny` runs on a CPU, to see that all of it works.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from benchmarks.gpu import sizes, targets
from benchmarks.gpu.cases import CASES, GROUPS
from benchmarks.run import QUIET, RESULTS, about_machine, judge

Group = Literal["limits", "loss", "scoring", "writing", "step", "check"]


@dataclass
class Found:
    """Keep what was measured so far, as it stands in the file.

    Attributes:
        path: The file.
        size: Name of the size.
        cases: Records by case.
        failed: Why a case gave none: the first line of its error.
        left_out: What a case needs that is not there.
        machine: The machine and versions.
    """

    path: Path
    size: str
    cases: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=about_machine)

    @classmethod
    def read(cls, path: Path, size: str) -> Found:
        """Read what an earlier run has written; nothing where there is none of this size."""
        found = cls(path, size)
        if path.exists():
            written = json.loads(path.read_text())
            if written["size"] != size:
                raise SystemExit(f"{path.name} was measured with --size {written['size']}.")
            found.cases, found.failed = written["cases"], written["failed"]
        return found

    def write(self) -> None:
        """Write all of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        numbers = {"size": self.size, "cases": self.cases, "failed": self.failed}
        written = self.machine | numbers | {"left_out": self.left_out}
        self.path.write_text(json.dumps(written, indent=1) + "\n")


def main(
    only: tuple[Group, ...] = ("limits", "loss", "scoring", "writing", "step"),
    size: Literal["full", "tiny"] = "full",
    minutes: float = 60.0,
    limit: float = 300.0,
    resume: bool = False,
    retry: bool = False,
    having: str = "",
    name: str = "gpu",
    python: str = sys.executable,
) -> None:
    """Run cases.

    Args:
        only: Groups of cases, in this order.
        size: "tiny" for a CPU.
        minutes: Minutes for all of it.
        limit: Seconds that a case may take.
        resume: Keep what was measured and go on.
        retry: With resume, try cases again that failed.
        having: Only cases whose name contains this.
        name: Name of the results.
        python: The Python that runs the cases.
    """
    if size == "full" and not torch.cuda.is_available():
        raise SystemExit("No GPU is here. Use --size tiny to try the script on a CPU.")
    console, path = Console(width=110), RESULTS / f"{name}.json"
    found = Found.read(path, size) if resume else Found(path, size)
    if retry:
        found.failed.clear()
    chosen = [case for group in only for case in CASES.values() if case.group == group]
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder:
        sizes.build_wide_tokenizer(sizes.SIZES[size].vocab).save_pretrained(folder)
        for case in chosen:
            known = case.full_name
            if having not in known or known in found.cases or known in found.failed:
                continue
            if lacking := case.lacking():
                found.left_out[known] = lacking
            elif (left := end - time.monotonic()) < (case.about_s if size == "full" else 0):
                console.print(f"{known}: left for --resume, {left:.0f} s are left", style="dim")
                continue
            else:
                _run(
                    found,
                    known,
                    [python, "-m", "benchmarks.gpu.one", size, folder],
                    min(limit, left),
                )
            said = found.failed.get(known) or found.left_out.get(known) or "measured"
            console.print(f"{known}: {said}", style="dim")
            found.write()
    console.print(targets.show(found.cases))
    console.print(judge(found.cases, targets.targets()))
    console.print(f"Written: benchmarks/results/{path.name}")


def _run(found: Found, case: str, command: list[str], limit: float) -> None:
    """Measure a case in a process of its own, and note what came of it."""
    try:
        ran = subprocess.run(
            [*command, case],
            env={**os.environ, **QUIET},
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        found.failed[case] = f"took more than {limit:.0f} s"
        return
    lines = ran.stdout.strip().splitlines()
    if ran.returncode or not lines:
        found.failed[case] = first_line(ran.stderr, ran.returncode)
        return
    record = json.loads(lines[-1])
    if "failed" in record:
        found.failed[case] = record["failed"]
    else:
        found.cases[case] = [record]


def first_line(error: str, code: int) -> str:
    """Find the first line of what a process died of."""
    lines = [
        line for line in error.splitlines() if line and not line.startswith((" ", "Traceback"))
    ]
    said = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "")
    return said[:300] or f"ended with {code}"


if __name__ == "__main__":
    assert set(GROUPS) >= {case.group for case in CASES.values()}
    tyro.cli(main)
