"""The world of a real model: SmolLM2-135M, its tokenizer, sums of two numbers, and a teacher.

    python -m benchmarks.small_world [--rebuild]

The questions are those of reasoning-gym's `chain_sum` with two numbers from 10 to 39, as plain text
and without a chat template, since the plain model then answers with the number. Their grade of
difficulty is the size of the larger number. The held-out questions are from reasoning-gym's own
held-out split, so neither teacher nor student has trained on them.

The teacher is a LoRA on the same weights, trained by cross-entropy on the verified answers of sums
and differences. It learned the sums, and of the differences about half in the time there was. So
the world is the sums alone. The adapter lies in `benchmarks/data/small_teacher`, in bfloat16, so
that nobody has to train it again; no wheel has it. `--rebuild` trains it; that is saved as it goes,
and the same command takes it up again.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from safetensors.torch import load_file, save_file

import opdlab as opd
from opdlab.data.prompt import Prompt
from opdlab.models.policy import Policy
from opdlab.tasks import Task, from_prompts, reasoning_gym
from opdlab.tasks.profiles import SMALL_OPTIONS, find_smollm2, smollm2
from opdlab.tasks.task import Split

FOLDER = Path("runs") / "bench-small"
SHIPPED = Path(__file__).parent / "data" / "small_teacher"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the adapter's file names as its base
CONFIG, TENSORS, LOG = "adapter_config.json", "adapter_model.safetensors", "teacher.json"
GRADES = {"10 to 19": range(10, 20), "20 to 29": range(20, 30), "30 to 39": range(30, 40)}
DRAWN = 20_000  # questions with numbers from 10 to 99, of which one in ten is small enough
DRAWN_HELD_OUT = 2500
KEPT = 320  # questions of a grade; the first has fewer
TEST, VALIDATION = 64, 48
MAX_NEW_TOKENS = 6  # " -29." and the end
RANK = 8
RECIPE: dict[str, Any] = {"batch": 16, "lr": 1e-3, "lora": RANK, "normalize": "token"}
UPDATES = 140
LEG = 20  # updates between two validations
LEAST = 0.8  # of the held-out questions, that a teacher must solve to be shipped


@dataclass(frozen=True)
class World:
    """Student, teacher and task.

    Attributes:
        student: The plain model.
        teacher: The same weights, through the adapter.
        task: The sums.
        facts: How the teacher was trained, for the results.
    """

    student: Policy
    teacher: Policy
    task: Task
    facts: Mapping[str, Any]


def questions(drawn: int = DRAWN, kept: int = KEPT, split: Split = "train") -> list[Prompt]:
    """List the questions of all grades, with answers in the plain model's own form.

    Args:
        drawn: Questions that are drawn from reasoning-gym.
        kept: The most questions of a grade.
        split: reasoning-gym's split.

    Returns:
        Prompts with the answer " 27.", the worked sum as hint, and the grade as metadata; always
        the same ones in the same order.
    """
    gym = reasoning_gym(
        "chain_sum", chat=False, min_terms=2, max_terms=2, min_digits=2, max_digits=2
    )
    found: dict[str, list[Prompt]] = {grade: [] for grade in GRADES}
    for prompt in {prompt.text: prompt for prompt in gym.prompts(drawn, 0, split)}.values():
        grade = grade_of(prompt)
        if grade is not None and len(found[grade]) < kept:
            sum_ = str(prompt.text).partition(": ")[2]
            hint = f"{sum_} {prompt.answer}."
            answer = f" {prompt.answer}."
            made = replace(prompt, answer=answer, hint=hint, metadata={"grade": grade})
            found[grade].append(made)
    pool = [prompt for prompts in found.values() for prompt in prompts]
    random.Random(0).shuffle(pool)
    return pool


def grade_of(prompt: Prompt) -> str | None:
    """Return the name of a question's grade; None where a number is too large."""
    largest = max(int(number) for number in re.findall(r"\d+", str(prompt.text)))
    return next((name for name, numbers in GRADES.items() if largest in numbers), None)


def is_right(prompt: Prompt, text: str) -> float:
    """Return 1.0 if the text is the answer and nothing else but a period, else 0.0."""
    return float(_number(text) == _number(str(prompt.answer)))


def _number(text: str) -> str:
    return text.strip().removesuffix(".")


def teacher_task(pool: Sequence[Prompt]) -> Task:
    """Make the task that the teacher trains on: sums and differences."""
    task = from_prompts(
        pool, name="small sums", test=TEST, verify=is_right, max_new_tokens=MAX_NEW_TOKENS
    )
    return replace(task, origin={"name": "small sums"})


def make_task(pool: Sequence[Prompt], held_out: Sequence[Prompt]) -> Task:
    """Make the task of the world: sums, with the held-out ones given."""
    sums = {
        "train": [prompt for prompt in pool if " + " in str(prompt.text)],
        "test": [prompt for prompt in held_out if " + " in str(prompt.text)][:TEST],
    }

    def draw(n: int, seed: int, split: Split) -> list[Prompt]:
        order = random.Random(seed).sample(sums[split], len(sums[split]))
        return order[:n] if split == "test" else [order[i % len(order)] for i in range(n)]

    return Task("small sums", draw, is_right, MAX_NEW_TOKENS, origin={"name": "small sums"})


def share_right(policy: Policy, prompts: Sequence[Prompt]) -> float:
    """Return the share of questions that a policy's greedy text answers."""
    rollout = policy.sample(prompts, max_new_tokens=MAX_NEW_TOKENS, temperature=0)
    scores = [is_right(prompt, text) for prompt, text in zip(prompts, rollout.texts, strict=True)]
    return float(np.mean(scores))


def train_teacher(
    student: Policy,
    task: Task,
    validation: Sequence[Prompt],
    folder: Path,
    updates: int = UPDATES,
    leg: int = LEG,
) -> Path:
    """Train the teacher, or go on with it.

    Args:
        student: The plain model, which stays as it is.
        task: The task; its held-out questions are not looked at.
        validation: Questions that are answered every `leg` updates, for the log.
        folder: Keeps checkpoints, and the log as teacher.json.
        updates: Updates in all.
        leg: Updates between two validations.

    Returns:
        The folder of the finished adapter.
    """
    log_file, finished = folder / LOG, folder / "adapter"
    log = json.loads(log_file.read_text()) if log_file.exists() else []
    teacher = student.frozen()
    if log:
        run = opd.resume(folder / "teacher", teacher, None, task, quiet=True)
    else:
        run = opd.distill(
            teacher,
            None,
            task,
            method=opd.SFT(),
            save=folder / "teacher",
            steps=updates,
            save_every=leg,
            quiet=True,
            **RECIPE,
        )
    while run.done < updates:
        began = time.process_time()
        losses = [next(run).metrics["loss"] for _ in range(leg)]
        seconds = time.process_time() - began
        right = share_right(teacher, validation)
        log.append(
            {
                "updates": run.done,
                "loss": round(float(np.mean(losses)), 4),
                "validation": right,
                "cpu_seconds": round(seconds, 1),
            }
        )
        log_file.write_text(json.dumps(log, indent=1) + "\n")
        print("teacher:", json.dumps(log[-1]), flush=True)
    write_adapter(folder / "teacher" / f"step-{run.done:06}", finished, log)
    student.weights.delete_adapter(str(teacher.adapter))
    return finished


def write_adapter(checkpoint: Path, folder: Path, log: Sequence[Mapping[str, Any]]) -> None:
    """Write the adapter of a checkpoint in bfloat16, which halves the file, with its log."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(checkpoint / TENSORS)
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(rounded, folder / TENSORS, metadata={"format": "pt"})
    config = json.loads((checkpoint / CONFIG).read_text())
    config["base_model_name_or_path"] = BASE  # and not where it lies on this machine
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    (folder / LOG).write_text(json.dumps(list(log), indent=1) + "\n")


def load_world(folder: Path = FOLDER, model: str = "", rebuild: bool = False) -> World:
    """Load the model and the teacher, which is trained where there is none, and make the task.

    Args:
        folder: Where a teacher that is trained here is kept.
        model: A model in place of SmolLM2, whose teacher is then trained for one update alone: to
            try the benchmark out.
        rebuild: Train the teacher, although one is shipped.

    Returns:
        The world.
    """
    source = Path(model) if model else find_smollm2()
    student = Policy.load(source, **SMALL_OPTIONS) if model else smollm2()
    pool = questions()
    validation, rest = pool[:VALIDATION], pool[VALIDATION:]
    adapter = SHIPPED
    if model:
        adapter = train_teacher(student, teacher_task(rest), validation[:4], folder, 1, 1)
    elif rebuild or not SHIPPED.exists():
        adapter = train_teacher(student, teacher_task(rest), validation, folder)
    task = make_task(pool, questions(DRAWN_HELD_OUT, split="test"))
    teacher = Policy.load(source, adapter=adapter, prefer_shared=student, **SMALL_OPTIONS)
    training = json.loads((adapter / LOG).read_text())
    facts = {"questions": len(pool), "validation": len(validation), "training": training}
    return World(student, teacher, task, facts)


def main(rebuild: bool = False, ship: bool = False) -> None:
    """Build the world, and print how much of the held-out questions each of the two solves.

    Args:
        rebuild: Train the teacher, although one is shipped.
        ship: Put the trained teacher into benchmarks/data if it solves enough.
    """
    torch.set_num_threads(1)
    world = load_world(rebuild=rebuild or ship)
    for name, policy in (("student", world.student), ("teacher", world.teacher)):
        found = opd.evaluate(policy, world.task, n=TEST, quiet=True)
        print(f"{name}: {found.accuracy:.3f} of {found.prompts} held-out questions", flush=True)
    if ship and found.accuracy < LEAST:
        raise SystemExit(f"The teacher solves {found.accuracy:.2f}, less than {LEAST}.")
    if ship:
        shutil.copytree(FOLDER / "adapter", SHIPPED, dirs_exist_ok=True)


if __name__ == "__main__":
    tyro.cli(main)
