"""Measure a whole training step: generate, score, learn; with all weights, or with a LoRA.

`opdlab.distill` and `trl.DistillationTrainer` train with the reverse KL on the full vocabulary, one
update per step, without gradient checkpointing. The third side makes the bare matrix products of
such a step (without the small ones of a LoRA). A further case is self-distillation: the teacher is
the base of the student's LoRA and sees a hint (`benchmarks.self_distillation`).
`python -m benchmarks.step CASE TOKENIZER_FOLDER` measures one case and prints a JSON line.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.products import Products
from benchmarks.workload import (
    BATCH,
    COMPLETION,
    PROMPT,
    RANK,
    STUDENT,
    TEACHER,
    Cost,
    build_model,
    clock,
    device,
    load_tokenizer,
    measured,
    prompts,
)

STEPS = 4  # the first is a warm-up: it counts for memory, not for seconds
SELF = "self-distillation"
CASES = {
    f"{side}/{weights}": (side, weights)
    for weights in ("all weights", "LoRA")
    for side in ("products", "opdlab", "trl")
} | {f"{side}/{SELF}": (side, SELF) for side in ("opdlab", "trl")}


class Stopwatch:
    """Seconds of each step, and of the calls of one method within it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.generate: list[float] = []
        self._inner = 0.0

    def watch(self, owner: Any, method: str) -> None:
        """Count the seconds spent in `owner.method` as generation."""
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = clock()
            result = original(*args, **kwargs)
            self._inner += clock() - began
            return result

        setattr(owner, method, timed)

    def start(self) -> None:
        self._inner, self._began = 0.0, clock()

    def stop(self) -> None:
        self.steps.append(clock() - self._began)
        self.generate.append(self._inner)


Trainer = Callable[[], list[float]]  # trains `steps` steps and returns their losses


@dataclass(frozen=True)
class Size:
    """The size of a run.

    Attributes:
        steps: Steps, with the warm-up.
        batch: Texts of a step.
        completion: Tokens of a text.
        ours: Further settings of `opdlab.distill`.
        theirs: Further fields of `trl.DistillationConfig`.
    """

    steps: int = STEPS
    batch: int = BATCH
    completion: int = COMPLETION
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)


def opdlab_side(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    lora: bool,
    watch: Stopwatch,
    size: Size = Size(),
) -> Trainer:
    from opdlab import Policy, distill
    from opdlab.data.prompt import Prompt
    from opdlab.tasks import Task

    texts = prompts(tokenizer, size.batch * size.steps)
    task = Task(
        "benchmark",
        lambda n, seed, split: [Prompt(text) for text in random.Random(seed).sample(texts, n)],
    )
    # Without EOS tokens no completion stops early.
    learner, guide = (Policy.of(model, tokenizer, eos=()) for model in (student, teacher))
    run = distill(
        learner,
        guide,
        task,
        steps=size.steps,
        batch=size.batch,
        max_new_tokens=size.completion,
        lora=RANK if lora else None,
        quiet=True,
        **size.ours,
    )
    watch.watch(size.ours.get("sampler", learner), "sample")

    def train() -> list[float]:
        for _ in range(size.steps):
            watch.start()
            step = next(run)
            watch.stop()
            assert step.rollout.tokens == size.batch * size.completion
        return run.history["loss"].tolist()

    return train


def trl_side(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    lora: bool,
    watch: Stopwatch,
    size: Size = Size(),
) -> Trainer:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            watch.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.stop()

    options: dict[str, Any] = {
        "output_dir": os.path.join(tempfile.gettempdir(), "opdlab-benchmark"),
        "use_cpu": device().type == "cpu",
        "bf16": False,
        "per_device_train_batch_size": size.batch,
        "max_steps": size.steps,
        "max_completion_length": size.completion,
        "beta": 1.0,
        "learning_rate": 1e-4,
        "generation_kwargs": {"min_new_tokens": size.completion},
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    config = DistillationConfig(**options | size.theirs)
    adapter = (
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        if lora
        else None
    )
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": prompts(tokenizer, size.batch * size.steps)}),
        peft_config=adapter,
        callbacks=[Steps()],
    )
    watch.watch(trainer, "_generate_and_score_completions")

    def train() -> list[float]:
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    return train


class BareStep:
    """The matrix products of a step; see `benchmarks.products`."""

    def __init__(self, student: Products, teacher: Products, lora: bool) -> None:
        self.student, self.teacher, self.trains = student, teacher, not lora

    def generate(self) -> None:
        self.student.generate(BATCH, BATCH, PROMPT, COMPLETION)

    def learn(self) -> None:
        rows, graded = BATCH * (PROMPT + COMPLETION), BATCH * COMPLETION
        for products in (self.teacher, self.student):
            products.forward(rows)
            products.head_forward(graded)
        self.student.head_backward(graded, self.trains)
        self.student.backward(rows, self.trains)


def products_side(
    student: LlamaForCausalLM,
    teacher: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    lora: bool,
    watch: Stopwatch,
) -> Trainer:
    step = BareStep(Products.of(student), Products.of(teacher), lora)
    watch.watch(step, "generate")

    def train() -> list[float]:
        for _ in range(STEPS):
            watch.start()
            step.generate()
            step.learn()
            watch.stop()
        return []

    return train


SIDES = {"opdlab": opdlab_side, "trl": trl_side, "products": products_side}


def measure(name: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """Measure one case in this process.

    Returns:
        Seconds of every step after the warm-up, and the peak memory of the whole run above its
        start.
    """
    side, weights = CASES[name]
    if weights == SELF:
        from benchmarks.self_distillation import measure_self_distillation

        return measure_self_distillation(side, tokenizer)
    prepare = SIDES[side]
    student = build_model(STUDENT, tokenizer, 0)
    teacher = build_model(TEACHER, tokenizer, 1)
    watch = Stopwatch()
    train = prepare(student, teacher, tokenizer, weights == "LoRA", watch)
    with measured() as cost:
        losses = train()
    return {"side": side, "weights": weights, **record_of(watch, cost, losses)}


def record_of(watch: Stopwatch, cost: Cost, losses: list[float]) -> dict[str, object]:
    """Put together what was measured, without the first step."""
    return {
        "seconds": watch.steps[1:],
        "generate": watch.generate[1:],
        "peak_mib": cost.peak_mib,
        "losses": losses,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(sys.argv[1], load_tokenizer(sys.argv[2]))))
