"""How a run trains: the settings of `distill`, and the seeds and learning rates that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from opdlab.errors import OpdlabError


@dataclass(frozen=True)
class Settings:
    """How a run trains. Sizes are per process: `batch` prompts a step, `n` completions a prompt.

    lora: rank of the adapter on all linear layers, or None to train all weights. normalize: what the loss is a mean over,
    "token" (all tokens alike), "sequence" (each completion alike) or "constant" (per completion, over max_new_tokens).
    micro_batch: completions in one backward pass (all by default); changes memory, not the result. precision: "bf16" for
    autocast on float32 weights. temperature, top_p: of the sampler; away from 1 the student is off its own policy. ema_rate: how
    far the policy `ema` moves towards the student after each update (0.05 as in SDPO, arXiv 2601.20802).
    """

    steps: int = 100
    batch: int = 16
    n: int = 1
    max_new_tokens: int = 64
    lr: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    lora: int | None = 16
    normalize: Literal["token", "sequence", "constant"] = "token"
    micro_batch: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    clip: float = 1.0
    weight_decay: float = 0.0
    ema_rate: float = 0.05
    seed: int = 0
    precision: Literal["no", "bf16"] = "no"
    checkpointing: bool = False
    evaluate_every: int = 0
    snapshot_every: int = 0
    save_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "n", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise OpdlabError(f"distill got {name}={getattr(self, name)}. It must be at least 1.")
        if self.normalize not in ("token", "sequence", "constant"):
            raise OpdlabError(f"distill got normalize={self.normalize!r}. Use token, sequence or constant.")

    def rate(self, done: int) -> float:
        """The learning rate of the update after `done` others."""
        warm = min(1.0, (done + 1) / (self.warmup + 1))
        return self.lr * warm * (0.5 * (1 + math.cos(math.pi * done / self.steps)) if self.schedule == "cosine" else 1.0)


def seed_of(seed: int, step: int, use: int) -> int:
    """A seed of its own for every use of randomness in every step: nothing random has a state that could be lost."""
    return (seed * 1_000_003 + step) * 4096 + use
