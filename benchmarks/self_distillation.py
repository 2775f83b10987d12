"""Measure a step in which a model teaches itself: the weights with two views, one of them hinted.

The student is a LoRA on a base, the teacher is the base with a hint; two prompts get four samples
each. The loss is the reverse KL on the full vocabulary. `opdlab.distill` has it as
`SelfDistillation`, TRL as `trl.experimental.sdft.SDFTTrainer` with `distillation_mode`
"full_logits", which also has the weights once. (`trl.DistillationTrainer` knows no hint and needs a
second copy of the model as its teacher.)

The memory of these cases begins before the model is made, so the weights count.
"""

from __future__ import annotations

import os
import random
import tempfile
from typing import Any

from transformers import PreTrainedTokenizerFast

from benchmarks.step import STEPS, Stopwatch, Trainer
from benchmarks.workload import (
    BATCH,
    COMPLETION,
    RANK,
    STUDENT,
    build_model,
    device,
    measured,
    prompts,
)

SAMPLES = 4  # of each prompt


def opdlab_side(tokenizer: PreTrainedTokenizerFast, texts: list[str], watch: Stopwatch) -> Trainer:
    from opdlab import Policy, distill
    from opdlab.data.prompt import Prompt
    from opdlab.methods import SelfDistillation
    from opdlab.tasks import Task

    asked, hints = texts[::2], texts[1::2]
    pool = [Prompt(text, hint=hint) for text, hint in zip(asked, hints, strict=True)]
    task = Task("benchmark", lambda n, seed, split: random.Random(seed).sample(pool, n))
    learner = Policy.of(build_model(STUDENT, tokenizer, 0), tokenizer, eos=())
    run = distill(
        learner,
        None,
        task,
        method=SelfDistillation(divergence="reverse_kl"),
        steps=STEPS,
        batch=BATCH // SAMPLES,
        n=SAMPLES,
        max_new_tokens=COMPLETION,
        lora=RANK,
        quiet=True,
    )
    watch.watch(learner, "sample")

    def train() -> list[float]:
        for _ in range(STEPS):
            watch.start()
            step = next(run)
            watch.stop()
            assert step.rollout.tokens == BATCH * COMPLETION
        assert {id(policy.weights) for policy in run.policies.values()} == {id(learner.weights)}
        return run.history["loss"].tolist()

    return train


def trl_side(tokenizer: PreTrainedTokenizerFast, texts: list[str], watch: Stopwatch) -> Trainer:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            watch.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.stop()

    config = SDFTConfig(
        output_dir=os.path.join(tempfile.gettempdir(), "opdlab-benchmark"),
        use_cpu=device().type == "cpu",
        bf16=False,
        per_device_train_batch_size=BATCH,
        num_generations=SAMPLES,
        max_steps=STEPS,
        max_completion_length=COMPLETION,
        teacher_model_kind="base",
        distillation_mode="full_logits",
        distillation_alpha=1.0,
        learning_rate=1e-4,
        generation_kwargs={"min_new_tokens": COMPLETION},
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = SDFTTrainer(
        model=build_model(STUDENT, tokenizer, 0),
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": texts[::2], "privileged_context": texts[1::2]}),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Steps()],
    )
    watch.watch(trainer, "sample_rollouts")

    def train() -> list[float]:
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    return train


SIDES = {"opdlab": opdlab_side, "trl": trl_side}


def import_libraries(side: str) -> None:
    """Import what a side needs, so that its memory does not count."""
    if side == "trl":
        import datasets  # noqa: F401
        import peft  # noqa: F401
        import trl.experimental.sdft  # noqa: F401
    else:
        import opdlab.methods
        import opdlab.tasks  # noqa: F401


def measure_self_distillation(side: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """Measure one side in this process.

    Returns:
        Seconds of every step after the warm-up, and the peak memory of the whole run, with the
        model, above that before the model was made.
    """
    import_libraries(side)
    watch = Stopwatch()
    texts = prompts(tokenizer, 2 * (BATCH // SAMPLES) * STEPS)
    with measured() as cost:
        losses = SIDES[side](tokenizer, texts, watch)()
    return {
        "side": side,
        "weights": "self-distillation",
        "seconds": watch.steps[1:],
        "generate": watch.generate[1:],
        "peak_mib": cost.peak_mib,
        "losses": losses,
    }
