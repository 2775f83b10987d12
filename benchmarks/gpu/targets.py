"""Compare the numbers of a GPU with what is expected, and draw the tables."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from benchmarks.run import Results, Target, best, peak, ratio

SHARE = 0.6  # of the measured matrix rate, for scoring and the loss
MOST_GIB = 40.0  # of a step of 64 texts of 1,024 tokens


def rate(results: Results, case: str) -> float:
    """Operations per second of the best repetition."""
    return float(results[case][0]["operations"]) / best(results, case)


def times_the_products(case: str) -> Callable[[Results], float]:
    """Divide the time of a case by that of its products at the card's measured rate."""
    return lambda results: rate(results, "limits/square product") / rate(results, case)


def all_gib(case: str) -> Callable[[Results], float]:
    """GiB that PyTorch had of the card, with the models."""
    return lambda results: max(record["all_mib"] for record in results[case]) / 1024


def targets() -> list[Target]:
    """List the targets for a GPU."""
    most = 1 / SHARE
    found: list[Target] = []
    for head in ("frozen", "trainable"):
        ours = f"loss/opdlab/reverse_kl/{head}"
        found += [
            (f"loss, {head} head", "x products", times_the_products(ours), most),
            (f"the same, watched, {head} head", "x s", ratio(best, f"{ours}/watched", ours), 1.05),
            (
                f"loss, {head} head",
                "x TRL's s",
                ratio(best, ours, f"loss/trl/reverse_kl/{head}"),
                1,
            ),
            (
                f"loss, {head} head",
                "x TRL's MiB",
                ratio(peak, ours, f"loss/trl/reverse_kl/{head}"),
                1,
            ),
        ]
    found += [
        ("scoring", "x products", times_the_products("scoring/states and log-probs"), most),
        ("writing", "x transformers", ratio(best, "writing/opdlab", "writing/transformers"), 1),
        (
            "writing, CUDA graphs",
            "x without",
            ratio(best, "writing/opdlab", "writing/opdlab, eager"),
            0.5,
        ),
        (
            "writing with vLLM",
            "x transformers",
            ratio(best, "writing/vllm", "writing/transformers"),
            1,
        ),
    ]
    for many in ("few", "many"):
        ours, theirs = f"step/opdlab/{many}", f"step/TRL/{many}"
        found += [
            (f"step, {many}", "x TRL's s", ratio(best, ours, theirs), 0.5),
            (
                f"step with vLLM, {many}",
                "x TRL's s with vLLM",
                ratio(best, f"step/opdlab, vLLM/{many}", f"step/TRL, vLLM/{many}"),
                1,
            ),
        ]
    found.append(("step, many", "GiB", all_gib("step/opdlab/many"), MOST_GIB))
    return found


def show(results: Results) -> Table:
    """Draw all that was measured."""
    table = Table("case", title="seconds of the best repetition", title_justify="left")
    for column in ("best s", "TFLOP/s or GB/s", "tokens/s", "peak MiB"):
        table.add_column(column, justify="right")
    for case, (record, *_) in results.items():
        seconds = best(results, case)
        speed = ""
        if "operations" in record:
            speed = f"{rate(results, case) / 1e12:.1f} T"
        elif "bytes" in record:
            speed = f"{record['bytes'] / seconds / 1e9:,.0f} G"
        tokens = f"{record['tokens'] / seconds:,.0f}" if "tokens" in record else ""
        table.add_row(case, f"{seconds:.4g}", speed, tokens, f"{peak(results, case):,.0f}")
    return table
