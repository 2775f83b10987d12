"""Compare TurnOPD with OPD on conversations, and RLSD and SDAR with OPD, over seeds.

Each arm of a world trains the same student for the same number of updates on the same prompts, from
each seed. Success is the share of held-out prompts whose greedy answer is right. Differences to the
world's first arm are paired by prompt within a seed. The interval is Student's over the seeds'
differences (3 seeds: it is wide), beside the paired one over the prompts of all seeds, which counts
a seed's prompts as independent and so knows nothing of what another seed would have done.

`python -m benchmarks.turns_and_feedback` runs all arms, one after another, and writes
`benchmarks/results/turns_and_feedback.json` after each; those that are there already are kept.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

import opdlab as opd
from opdlab.training.intervals import paired

RESULTS = Path(__file__).parent / "results" / "turns_and_feedback.json"
SEEDS = (0, 1, 2)
UNTRAINED = "no training"
HELD = 60  # held-out prompts of an evaluation


@dataclass(frozen=True)
class World:
    """A task with the methods that are compared on it.

    Attributes:
        tools: Whether it is the market with a tool, its errands for two goods.
        arms: The methods by name; the others are compared with the first.
        settings: Settings of every run.
    """

    tools: bool
    arms: dict[str, Callable[[], Any]]
    settings: dict[str, Any]


WORLDS = {
    "a verifier and a worked solution as hint": World(
        False,
        {"OPD": opd.OPD, "RLSD": opd.RLSD, "SDAR": opd.SDAR},
        {"steps": 20, "batch": 8, "n": 4, "lr": 2e-3},
    ),
    "errands of two goods, with a tool, 8 updates": World(
        True,
        {"OPD": opd.OPD, "TurnOPD": opd.TurnOPD},
        {"steps": 8, "batch": 10, "lr": 3e-3},
    ),
    "errands of two goods, with a tool, 12 updates": World(
        True,
        {"OPD": opd.OPD, "TurnOPD": opd.TurnOPD},
        {"steps": 12, "batch": 10, "lr": 3e-3},
    ),
}


def two_goods(task: opd.Task) -> opd.Task:
    """Keep the errands for two goods: three turns of the clerk, and short ones.

    Args:
        task: The market with a tool.

    Returns:
        The same task, which draws these errands alone.
    """

    def draw(n: int, seed: int, split: Any) -> list[opd.Prompt]:
        drawn = task.draw(12 * n, seed, split)
        kept = [one for one in drawn if str(one.messages).count(" and ") == 1]
        return kept[:n]

    return replace(task, draw=draw)


def run_arm(world: World, arm: str, seed: int) -> dict[str, Any]:
    """Train one student and measure it.

    Args:
        world: The world.
        arm: The method's name.
        seed: Seed of the run.

    Returns:
        The scores of the held-out prompts, 0 or 1 each, and the CPU seconds of training.
    """
    student, teacher, task = opd.load("market", tools=world.tools)
    task = two_goods(task) if world.tools else task
    began = time.process_time()
    if arm != UNTRAINED:
        method = world.arms[arm]()
        opd.distill(
            student, teacher, task, method=method, seed=seed, quiet=True, **world.settings
        ).train()
    seconds = time.process_time() - began
    scores = opd.evaluate(student, task, n=HELD, k=0, seed=seed, quiet=True).greedy
    return {"scores": [int(one) for one in scores], "train_cpu_s": round(seconds, 1)}


def summarize(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compute the success of each arm, and its difference to the first arm.

    Args:
        runs: The results of each arm by seed.

    Returns:
        By arm: `success` (by seed, and mean), and of all but the first `difference`, with
        `over_seeds` and `over_prompts`, 95 % intervals.
    """
    first, out = next(iter(runs)), dict[str, Any]()
    for arm, by_seed in runs.items():
        shares = [float(np.mean(one["scores"])) for one in by_seed.values()]
        out[arm] = {"success": [round(one, 3) for one in shares], "mean": float(np.mean(shares))}
        if arm == first or set(by_seed) != set(runs[first]):
            continue
        pairs = [(by_seed[seed]["scores"], runs[first][seed]["scores"]) for seed in by_seed]
        each = [float(np.mean(new) - np.mean(old)) for new, old in pairs]
        half = math.nan
        if len(each) > 1:
            spread = float(np.std(each, ddof=1)) / math.sqrt(len(each))
            half = float(stats.t.ppf(0.975, len(each) - 1)) * spread
        mean = float(np.mean(each))
        flat = paired(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
        out[arm] |= {
            "difference": round(mean, 4),
            "over_seeds": [round(mean - half, 4), round(mean + half, 4)],
            "over_prompts": [round(flat.low, 4), round(flat.high, 4)],
        }
    return out


def main() -> None:
    """Run all arms that are not in the file yet, and write their summary."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for seed in SEEDS:  # outermost, so that a run that is stopped has whole seeds of both worlds
        for name, world in WORLDS.items():
            found = kept.setdefault(
                name, {"settings": {**world.settings, "held": HELD}, "runs": {}}
            )
            for arm in (*world.arms, UNTRAINED):
                runs = found["runs"].setdefault(arm, {})
                if str(seed) in runs:
                    continue
                runs[str(seed)] = run_arm(world, arm, seed)
                found["summary"] = summarize(found["runs"])
                RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
                print(name, arm, seed, np.mean(runs[str(seed)]["scores"]), flush=True)
    for name, found in kept.items():
        print(name, json.dumps(found["summary"], indent=1))


if __name__ == "__main__":
    main()
