"""Controls on two worlds with a known answer, and training on the tokens that rules choose.

    python -m benchmarks.controls [--only sharpening market ranking rules] [--seeds 10]

`market`: the student cannot carry, so the gain must be the teacher's. `sharpening`: the student can
do all and breaks off now and then, so most of the gain needs no teacher. `ranking` measures which
tokens decide the outcome in both, and how well each rule of `opdlab.evidence.rules` finds them.
`rules` trains OPD on the 5 % of the tokens that each rule puts highest, at equal updates. Every run
is kept in `runs/bench-controls` as it comes, so the command goes on where it was stopped; the
results are `results/controls.json`. `--show` prints them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console

import opdlab as opd
from opdlab.evidence.rules import RULES, TopTokens
from opdlab.support.files import write_file
from opdlab.tasks.market import model
from opdlab.training.crossed import crossed_mean

RESULTS = Path(__file__).parent / "results" / "controls.json"
KEPT = Path("runs/bench-controls")
VERDICT_ARMS = ["no_teacher"]
SETTINGS: dict[str, dict[str, Any]] = {
    "market": {"steps": 40, "batch": 32},
    "sharpening": {"by": "samples", "samples": 4},
}
RULES_SETTINGS = {"steps": 12, "batch": 32}  # fewer steps: the rule "distance" is slow
PROMPTS = 100
FIRST = 3  # seeds of all arms; the arms that decide the verdict have more


def world(name: str, seeds: int, arms: list[str] | None) -> opd.Controls:
    """Run the controls of one world.

    Args:
        name: "market" or "sharpening".
        seeds: Number of seeds.
        arms: Names of arms; all that apply by default.

    Returns:
        The controls.
    """
    student, teacher, task = opd.load(name)
    weaker = model("novice") if name == "market" and arms is None else None
    options = {**SETTINGS[name], "prompts": PROMPTS, "folder": KEPT / name}
    return opd.controls(student, teacher, task, arms=arms, seeds=seeds, weaker=weaker, **options)


def ranking(texts: int = 48, n: int = 16) -> dict[str, Any]:
    """Measure the credit of each token of held-out texts, and how well the rules find it.

    Args:
        texts: Number of texts, each of its own prompt.
        n: Texts that student and teacher write on with from each place.

    Returns:
        By world, how many tokens matter or lowered the chance to be right, and the ranking's rows
        by what is to be found. On the market that is the known kind "skill", since this student is
        so sure that hardly a token changes its chance.
    """
    out: dict[str, Any] = {"texts": texts, "n": n}
    for name, truths in (("sharpening", ("matters", "harms")), ("market", ("skill",))):
        file = KEPT / "ranking" / f"{name}.json"
        if not file.exists():
            student, teacher, task = opd.load(name)
            rollout = student.sample(
                task.prompts(texts, split="test"), max_new_tokens=task.max_new_tokens
            )
            found = opd.credit(rollout, student, teacher, task, n=n)
            table = found.df
            rows = {truth: found.ranking(truth).to_dict("records") for truth in truths}
            counts = {
                "tokens": len(table),
                "matters": int(table["matters"].sum()),
                "harms": int((table["matters"] & (table["effect"] < 0)).sum()),
            }
            write_file(file, json.dumps(counts | {"rules": rows}).encode())
        out[name] = json.loads(file.read_text())
    return out


def rules(seeds: int) -> dict[str, Any]:
    """Train OPD on the tokens that each rule chooses, on the market.

    Args:
        seeds: Number of seeds.

    Returns:
        Accuracies by rule, with the interval of the gain.
    """
    student, teacher, task = opd.load("market")
    before = opd.evaluate(student, task, n=PROMPTS, quiet=True)
    out: dict[str, Any] = {"before": before.accuracy}
    methods = {"all tokens": opd.OPD(), **{name: TopTokens(name) for name in RULES}}
    for name, method in methods.items():
        file = KEPT / "rules" / f"{name.replace(' ', '-')}.json"
        known = json.loads(file.read_text()) if file.exists() else []
        for seed in range(len(known), seeds):
            pupil = student.frozen()
            opd.distill(
                pupil, teacher, task, method=method, seed=seed, quiet=True, **RULES_SETTINGS
            ).train()
            known.append(opd.evaluate(pupil, task, n=PROMPTS, quiet=True).greedy.tolist())
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(known))
        out[name] = describe_gain(np.asarray(known, float), before.greedy)
    return out


def describe_gain(scores: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """Describe the gain of runs over their start, as the result files write it.

    Args:
        scores: Of held-out prompts after training, `[seeds, prompts]`.
        before: Of the same prompts before training, `[prompts]`.

    Returns:
        The accuracy, the gain with its 95 % interval, and the numbers of prompts and seeds.
    """
    gain = crossed_mean(scores - before)
    return {
        "accuracy": float(scores.mean()),
        "gain": gain.mean,
        "low": gain.low,
        "high": gain.high,
        "prompts": gain.prompts,
        "seeds": gain.seeds,
    }


def summary(found: opd.Controls) -> dict[str, Any]:
    """Describe controls, with the verdict of each seed alone."""
    share, stored = found.share, found.to_json()
    stored["facts"] |= {"student": "as shipped", "teacher": "as shipped"}  # not the folders of here
    return {
        **stored,
        "verdict": share.verdict.value,
        "interval": [share.value, share.low, share.high],
        "by_seed": {seed: found.at_seed(seed).share.verdict.value for seed in found.seeds},
    }


def main(
    only: tuple[str, ...] = ("sharpening", "market", "ranking", "rules"),
    seeds: int = 10,
    show: bool = False,
) -> None:
    """Run what is missing and print the results.

    Args:
        only: Which parts.
        seeds: Seeds of the arms that decide the verdicts.
        show: Whether to print the results so far and run nothing.
    """
    torch.set_num_threads(1)
    done: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in only if not show else ():
        if name == "ranking":
            done[name] = ranking()
        elif name == "rules":
            done[name] = rules(min(seeds, FIRST))
        else:
            done[name] = summary(world(name, seeds, VERDICT_ARMS))
            done[f"{name}, all arms"] = summary(world(name, min(seeds, FIRST), None))
        RESULTS.write_text(json.dumps(done) + "\n")
    console = Console()
    for name, part in done.items():
        console.print(f"[b]{name}[/b]")
        if name in ("ranking", "rules"):
            console.print(part)
        else:
            console.print(opd.Controls.from_json(part), part["by_seed"], markup=False)


if __name__ == "__main__":
    tyro.cli(main)
