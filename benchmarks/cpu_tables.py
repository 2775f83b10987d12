"""Write the tables of speed and memory into benchmarks/README.md, from the results of a CPU.

    python -m benchmarks.cpu_tables

Each table stands between two comments, `<!-- cpu: NAME -->` and `<!-- end -->`. The results are
`results/cpu.json` (`benchmarks.run`), `results/growth.json` and `results/imports.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import growth
from benchmarks.page_tables import PAGE, fill
from benchmarks.run import best, peak, split, targets
from benchmarks.step import SELF

RESULTS = Path(__file__).parent / "results"
LOSSES = {
    "reverse KL, trainable head": "reverse_kl/trainable/1024",
    "reverse KL, frozen head": "reverse_kl/frozen/1024",
    "watched, trainable head": "reverse_kl/trainable/1024/watched",
    "watched, frozen head": "reverse_kl/frozen/1024/watched",
    "Jensen-Shannon, trainable head": "jensen_shannon/trainable/1024",
    "forward KL, trainable head": "forward_kl/trainable/1024",
    "reverse KL, trainable, 256 tokens": "reverse_kl/trainable/256",
    "reverse KL, trainable, 4,096 tokens": "reverse_kl/trainable/4096",
    "reverse KL, frozen, 4,096 × 151,936": "reverse_kl/frozen/4096/V=151936",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """Make a table; the first column is on the left."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(cases: Mapping[str, Any], name: str) -> str:
    """Best CPU seconds and worst peak of a case; empty where it was not run."""
    if name not in cases:
        return ""
    return f"{best(dict(cases), name):.2f} s, {peak(dict(cases), name):,.0f} MiB"


def loss_table(data: Mapping[str, Any]) -> str:
    """The loss and its gradient alone."""
    sides = ("opdlab", "trl", "full logits", "products")
    rows = [
        [label, *(cell(data["cpu"], f"divergence/{side}/{case}") for side in sides)]
        for label, case in LOSSES.items()
    ]
    return table(["", "opdlab", "TRL", "full logits", "products"], rows)


def writing_table(data: Mapping[str, Any]) -> str:
    """Writing alone."""
    shapes = {
        "8 prompts of 64 tokens": "eight prompts",
        "8 texts after one prompt of 512 tokens": "one prompt",
        "8 prompts of 64 tokens, with a LoRA": "eight prompts/LoRA",
    }
    sides = ("opdlab", "transformers", "products")
    rows = [
        [label, *(cell(data["cpu"], f"generation/{side}/{shape}") for side in sides)]
        for label, shape in shapes.items()
    ]
    return table(["128 tokens each", "opdlab", "transformers", "products"], rows)


def step_table(data: Mapping[str, Any]) -> str:
    """A whole step."""
    rows = []
    for weights in ("all weights", "LoRA", SELF):
        for side in ("opdlab", "trl", "products"):
            case = f"step/{side}/{weights}"
            if case not in data["cpu"]:
                continue
            seconds = [best(data["cpu"], case), *split(data["cpu"], case)]
            numbers = [*(f"{s:.2f}" for s in seconds), f"{peak(data['cpu'], case):,.0f}"]
            rows.append([f"{side.replace('trl', 'TRL')}, {weights}", *numbers])
    return table(["", "best CPU s", "writing", "rest", "peak MiB"], rows)


def targets_table(data: Mapping[str, Any]) -> str:
    """The targets, with what was measured."""
    rows = []
    for label, unit, number, limit in targets():
        try:
            value = number(data["cpu"])
        except KeyError:  # a case that was not measured yet
            continue
        said = "met" if value <= limit else "**missed**"
        is_limit = label.strip().startswith("(")  # for comparison, and no target
        end = ["", ""] if is_limit else [f"{limit:g}", said]
        rows.append([label.strip(), unit.replace("x ", "× "), f"{value:.3g}", *end])
    return table(["", "unit", "measured", "at most", ""], rows)


def growth_table(data: Mapping[str, Any]) -> str:
    """The exponents of growth."""
    rows = []
    for name, found in data["growth"].items():
        series = growth.SERIES[name]
        exponents = [growth.exponent(found, column) for column in ("seconds", "products", "mib")]
        ratios = [row["seconds"] / row["products"] for row in found]
        rows.append(
            [
                series.what,
                series.size,
                f"{found[0]['size']:,.0f} to {found[-1]['size']:,.0f}",
                *(f"{number:.2f}" for number in exponents),
                f"{ratios[0]:.2f}, {ratios[-1]:.2f}",
            ]
        )
    head = ["what", "over", "sizes", "CPU seconds", "its products", "memory"]
    return table([*head, "times the products, smallest and largest"], rows)


def imports_table(data: Mapping[str, Any]) -> str:
    """The time until opdlab can work."""
    rows = []
    for name, runs in data["imports"].items():
        seconds = min(run["seconds"] for run in runs)
        rows.append([name, f"{seconds:.2f} s", f"{runs[-1]['MiB']:,.0f} MiB"])
    return table(["", "best CPU s", "memory"], rows)


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "loss": loss_table,
    "writing": writing_table,
    "step": step_table,
    "targets": targets_table,
    "growth": growth_table,
    "imports": imports_table,
}


def read(name: str) -> Any:
    """Read a file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def read_all() -> dict[str, Any]:
    """Read what the tables are made of."""
    return {
        "cpu": read("cpu")["cases"],
        "growth": read("growth")["series"],
        "imports": read("imports")["runs"],
    }


def main() -> None:
    """Replace every table in the page."""
    data = read_all()
    PAGE.write_text(fill(PAGE.read_text("utf-8"), "cpu", TABLES, data), "utf-8")


if __name__ == "__main__":
    main()
