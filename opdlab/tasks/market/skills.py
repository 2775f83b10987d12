"""Two teachers for one student: adapters on the shipped student that know one half of its skill.

    addition      carries in every sum, and still forgets to borrow
    subtraction   borrows in every difference, and still forgets to carry

Both are LoRA adapters on the weights of `student`, so that base is in memory once. They are trained
as the models are (`build.py`): on the world's texts, by cross-entropy, from fixed seeds.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from opdlab.tasks.market import build, tokenizers, world

SKILLS = {"addition": world.GAIN, "subtraction": world.LOSS}
RANK = 8
STEPS = 300
LR = 5e-3
BATCH = 64
STYLE = 0.1  # as the student: the chance of saying "total"


def skill_of(problem: world.Problem) -> str | None:
    """Name the skill that a problem asks for.

    Args:
        problem: Any problem.

    Returns:
        "addition", "subtraction", or None where its two moves need one each.
    """
    verbs = [verb for verb, _ in problem.moves]
    for skill, own in SKILLS.items():
        if all(verb in own for verb in verbs):
            return skill
    return None


def results(problem: world.Problem, skill: str) -> list[int]:
    """Return the results of someone who has one of the two skills.

    Args:
        problem: Any problem.
        skill: The skill; moves of the other kind are made without carrying.

    Returns:
        Two numbers.
    """
    out = [problem.have]
    for verb, n in problem.moves:
        change = n if verb in world.GAIN else -n
        right = out[-1] + change
        out.append(right if verb in SKILLS[skill] else world.without_carry(out[-1], change))
    return out[1:]


def train(skill: str, out: Path, steps: int = STEPS) -> str:
    """Make one adapter and save it.

    Args:
        skill: The skill, and the name of the adapter's folder.
        out: The folder of the models, which has the student.
        steps: Updates.

    Returns:
        A line with the number of parameters, the last loss and the CPU seconds.
    """
    torch.set_num_threads(1)
    seed = 10 + list(SKILLS).index(skill)
    torch.manual_seed(seed)
    base = LlamaForCausalLM.from_pretrained(out / "student")  # nosec B615  # a folder of this build
    tokenizer = tokenizers.words()
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = get_peft_model(base, config)  # puts its layers into `base` itself
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    rng, loss = random.Random(seed), float("nan")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 20) * (1 - step / steps)
        ids, labels = build.encode([_draw(rng, skill) for _ in range(BATCH)], tokenizer)
        loss = build.backward(base, ids, labels, (ids != tokenizer.pad_token_id).sum(1))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"{skill} {step + 1}/{steps} loss {loss:.4f}", flush=True)
    # The path of this machine would be no name anywhere else.
    model.peft_config["default"].base_model_name_or_path = "student"
    model.save_pretrained(str(out / skill))
    (out / skill / "README.md").unlink(missing_ok=True)  # PEFT's card has a template's holes
    size = sum(value.numel() for value in trained)
    return f"{skill}: {size:,} parameters, loss {loss:.4f}, {time.process_time():.0f} CPU s"


def _draw(rng: random.Random, skill: str) -> build.Text:
    """A problem whose running amounts stay in range for someone with this skill alone."""
    while True:
        problem = world.generate(rng)
        written = results(problem, skill)
        if min(written) >= 0 and max(written) <= 99:
            word = world.STYLE[rng.random() >= STYLE]
            return build.Text("", problem.prompt(), problem.solution(word, written))
