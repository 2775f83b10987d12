"""Measure maps of when each method wins.

    python -m benchmarks.maps [--only support topd …] [--seeds 3] [--quick] [--draw]

Results are kept as they come in `results/maps/<map>.json`; a run that was stopped goes on.
`--quick` measures few settings into a folder of its own and prints the tables. `--draw` draws
the pictures of docs/maps.md anew from the files, and measures nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import tyro

from benchmarks.maps import pictures
from benchmarks.maps.plans import PLANS
from opdlab.data.map_results import MapResults

QUICK = Path("runs") / "maps"


def main(
    only: tuple[str, ...] = (), seeds: int | None = None, quick: bool = False, draw: bool = False
) -> None:
    """Measure what is missing, and print each map.

    Args:
        only: Names of maps; all by default.
        seeds: Seeds of each setting; those of the map by default (one with --quick).
        quick: Few settings, kept in runs/maps.
        draw: Draw the pictures of docs/maps.md from the files, and measure nothing.
    """
    torch.set_num_threads(1)
    if unknown := set(only) - set(PLANS):
        raise SystemExit(f"There is no map {sorted(unknown)[0]!r}. Use {', '.join(PLANS)}.")
    for name in only or PLANS:
        plan = PLANS[name]
        path = QUICK / plan.path.name if quick else plan.path
        results = MapResults.load(path) if path.exists() else None
        if draw:
            if results is not None:
                print(f"{name}: {pictures.draw(plan, results)}")
            continue
        one_seed = 1 if quick and seeds is None else seeds
        results = plan.run(results, one_seed, quick, keep=path)
        print(pictures.describe(results))


if __name__ == "__main__":
    tyro.cli(main)
