"""Train with a sharded student, in two processes; run by `test_sharding.py`.

`sharded_runs.py FOLDER [OTHER]`: each run of `runs()` is saved in `FOLDER/NAME`. With `OTHER`, runs
of that folder, by one process, are taken up in `FOLDER/resumed NAME`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import opdlab as opd
from opdlab.models.shards import bytes_of

torch.set_num_threads(1)
LR = 1e-3


@dataclass(frozen=True)
class FailsInOneProcess:
    """A loss that is NaN on the second micro-batch of the first process alone."""

    needs = ("teacher",)

    def loss(self, rows):
        loss = opd.losses.reverse_kl(rows.student, rows.teacher)
        is_first = int(os.environ.get("RANK", "0")) == 0
        return loss * torch.nan if is_first and FAILING else loss


FAILING: list[bool] = []


def runs() -> dict[str, tuple[object, dict[str, object]]]:
    """Runs by name: the method and the settings. Shares of five prompts are unequal, and so are
    the numbers of micro-batches.
    """
    return {
        "lora": (opd.OPD(), {"micro_batch": 2}),
        "lora by itself": (opd.SelfDistillation(anchor="ema"), {"snapshot_every": 1}),
        "full": (opd.OPD(), {"lora": None, "micro_batch": 2, "clip": 0.05}),
        "full by itself": (
            opd.SelfDistillation(anchor="ema"),
            {"lora": None, "checkpointing": True},
        ),
    }


class Memory:
    """The most bytes that parameters, gradients and the optimizer's state take in this process.

    It looks whenever a layer runs, forwards or backwards.
    """

    def __init__(self, run: opd.Run) -> None:
        self.run, self.whole, self.learning = run, 0, 0
        self.hooks = []
        self.models = [run.student.weights.model]
        if run.sharding is not None:
            self.models.append(run.sharding.shards.model)
        for model in self.models:
            for layer in model.base_model.layers:
                self.hooks += [
                    layer.register_forward_hook(self.look),
                    layer.register_full_backward_hook(self.look),
                ]

    def look(self, *_: object) -> None:
        sharding = self.run.sharding
        values = [p for model in self.models for p in model.parameters()]
        values += sharding.shards.parameters.values() if sharding else ()
        values += [p.grad for p in values if p.grad is not None]
        values += [v for state in self.run.optimizer.state.values() for v in state.values()]
        if torch.is_grad_enabled() or any(p.grad is not None for p in values):
            self.learning = max(self.learning, bytes_of(values))
        else:
            self.whole = max(self.whole, bytes_of(values))


def main(folder: Path, other: Path | None) -> None:
    """Train, fail in one process, save in both ways, and take up runs of one process."""
    base, teacher, task = opd.load("market")
    options = {"batch": 5, "max_new_tokens": 12, "seed": 3, "lr": LR, "quiet": True}
    said: dict[str, object] = {}
    for name, (method, settings) in runs().items():
        os.environ["FSDP_STATE_DICT_TYPE"] = (
            "SHARDED_STATE_DICT" if name.startswith("full") else "FULL_STATE_DICT"
        )
        run = opd.distill(
            base.copied(), teacher, task, method=method, steps=2, save=folder / name,
            save_every=1, **options, **settings,
        )  # fmt: skip
        memory = Memory(run)
        run.train()
        for hook in memory.hooks:
            hook.remove()
        after = opd.evaluate(run.student, task, n=4, max_new_tokens=4, processes=run.accelerator)
        said[name] = {"learning": memory.learning, "whole": memory.whole}
        said[name] |= {"length": after.length.tolist(), "sharded": bool(run.sharding)}
        if run.accelerator.is_main_process:  # whatever one process does alone needs no other
            run.student.merged().sample(task.prompts(1), max_new_tokens=2)

    said["failure"] = fail_once(base, teacher, task, options)
    if other is not None:
        for name in ("lora", "full"):
            there = {"save": folder / f"resumed {name}", "quiet": True}
            opd.resume(other / name, base.copied(), teacher, task, step=1, **there).train()
    folder.mkdir(exist_ok=True)
    (folder / f"said-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(said))


def fail_once(base: opd.Policy, teacher: opd.Policy, task: opd.Task, options) -> dict[str, object]:
    """Let a loss fail in one process, and go on after that."""
    run = opd.distill(
        base.copied(), teacher, task, method=FailsInOneProcess(), steps=1, lora=None, **options
    )
    before = {name: p.clone() for name, p in run.student.weights.model.named_parameters()}
    FAILING.append(True)
    try:
        next(run)
        error = ""
    except opd.OpdlabError as failed:
        error = f"{type(failed).__name__}: {failed}"
    FAILING.clear()
    now = dict(run.student.weights.model.named_parameters())
    kept = all(torch.equal(now[name], value) for name, value in before.items())
    step = next(run)
    return {"error": error, "kept": kept, "loss": step.metrics["loss"]}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
