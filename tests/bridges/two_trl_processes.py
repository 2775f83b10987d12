"""Steps of methods in TRL, in as many processes as it is launched in: `… FOLDER CASE…`.

For each case, each process writes its completions of the first step, and the first one the gradient
that all make of them, its length and, at the end, the trained weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from test_trl import CASES, arguments
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from opdlab.bridges.trl import MethodTrainer
from opdlab.models.shards import bytes_of, whole_tensor
from opdlab.tasks import market

torch.set_num_threads(1)


class Keep(TrainerCallback):
    """Writes the gradients before the optimizer uses them."""

    def __init__(self, trainer: MethodTrainer, folder: Path) -> None:
        self.trainer, self.folder, self.steps = trainer, folder, 0
        self.bytes = 0

    def on_pre_optimizer_step(self, args, state, control, **_):
        trainer, self.steps = self.trainer, self.steps + 1
        rank = trainer.accelerator.process_index
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.bytes = max(self.bytes, bytes_of(held_by(trainer, model)))
        found = {n: whole_tensor(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        if self.steps > 1:
            return
        rollout = trainer._now.planned.batch.rollout
        said = {
            "prompts": [prompt.id for prompt in rollout.prompts],
            "completions": rollout.completions(),
            "writer": rollout.writer,
        }
        (self.folder / f"rollout-{rank}.json").write_text(json.dumps(said))
        if rank == 0:
            torch.save({n: g.clone() for n, g in found.items()}, self.folder / "gradients.pt")


def held_by(trainer, model):
    """The student's parameters and gradients in this process, in shards and whole."""
    values = list(model.parameters())
    if trainer._whole is not None:
        values += trainer._whole.model.parameters()
    return values + [p.grad for p in values if p.grad is not None]


def run(folder: Path, name: str) -> None:
    """Train by one case."""
    folder.mkdir(exist_ok=True, parents=True)
    trainer = make(folder, name)
    keep = Keep(trainer, folder)
    trainer.add_callback(keep)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    is_sharded = all(isinstance(p, DTensor) for p in trainer.model.parameters())
    said = {"losses": losses, "bytes": keep.bytes, "sharded": is_sharded}
    (folder / f"said-{trainer.accelerator.process_index}.json").write_text(json.dumps(said))
    state = weights(trainer)
    is_main = trainer.accelerator.is_main_process
    if trainer._whole is not None and is_main:
        # The policies are whole again after training, also for what one process does alone.
        ours = dict(trainer._whole.model.named_parameters())
        assert all(torch.equal(ours[n], value) for n, value in state.items())
        trainer.student.sample(market().prompts(1), max_new_tokens=2)
    if is_main:
        torch.save(state, folder / "weights.pt")
    if is_sharded and "save_steps" in CASES[name].options:
        again = make(folder / "again", name)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
        state = weights(again)
        if is_main:
            torch.save(state, folder / "resumed.pt")
    trainer.accelerator.wait_for_everyone()


def make(folder: Path, name: str) -> MethodTrainer:
    case = CASES[name]
    options = {"max_steps": 2, "max_grad_norm": 0.0, "learning_rate": 1e-3, **case.options}
    given = arguments(folder, lora=case.lora, teacher=case.teacher, **options)
    if not case.is_tied:
        model = given["model"]
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return MethodTrainer(case.method, **given)


def weights(trainer: MethodTrainer) -> dict[str, torch.Tensor]:
    """The weights that train, gathered from all processes."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {n: whole_tensor(p).clone() for n, p in model.named_parameters() if p.requires_grad}


if __name__ == "__main__":
    for name in sys.argv[2:]:
        run(Path(sys.argv[1]) / name, name)
    torch.distributed.destroy_process_group()
