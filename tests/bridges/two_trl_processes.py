"""One step of a method in TRL, in as many processes as it is launched in: `… FOLDER`.

Each process writes its completions, the first one the gradient that DDP makes of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from test_trl import arguments, gated
from transformers import TrainerCallback

from opdlab.bridges.trl import MethodTrainer

torch.set_num_threads(1)


class Keep(TrainerCallback):
    """Writes the gradients before the optimizer uses them."""

    def __init__(self, trainer: MethodTrainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder

    def on_pre_optimizer_step(self, args, state, control, **_):
        parameters = self.trainer.accelerator.unwrap_model(self.trainer.model).named_parameters()
        if self.trainer.accelerator.is_main_process:
            found = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
            torch.save(found, self.folder / "gradients.pt")


folder = Path(sys.argv[1])
trainer = MethodTrainer(gated, **arguments(folder, max_steps=1, max_grad_norm=0.0))
trainer.add_callback(Keep(trainer, folder))
trainer.train()
rollout = trainer._now.planned.batch.rollout
said = {
    "prompts": [prompt.id for prompt in rollout.prompts],
    "completions": rollout.completions(),
}
rank = trainer.accelerator.process_index
(folder / f"rollout-{rank}.json").write_text(json.dumps(said))
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
