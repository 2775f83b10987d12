"""Rebuild two teachers for one student: adapters on it that have one half of the skill each.

    python -m opdlab.tasks.market.skills [--out data/market]

    addition      carries in every sum, and still forgets to borrow
    subtraction   borrows in every difference, and still forgets to carry

Both are LoRA adapters on the weights of `student`, so that base is in memory once. They are trained
as the models are (`build.py`): on the world's texts, by cross-entropy, from fixed seeds.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import torch
import tyro
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from opdlab.tasks.market import build, gates, tokenizers, world

RANK = 8
STEPS = 300
LR = 5e-3
BATCH = 64
STYLE = 0.1  # as the student: the chance of saying "total"


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
    seed = 10 + list(world.SKILLS).index(skill)
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
    model.save_pretrained(str(out / skill))
    (out / skill / "README.md").unlink(missing_ok=True)  # PEFT's card has a template's holes
    path = out / skill / "adapter_config.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    said["base_model_name_or_path"] = "student"  # the path of this machine is no name elsewhere
    said["target_modules"] = sorted(said["target_modules"])  # a set, in another order each time
    path.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    size = sum(value.numel() for value in trained)
    return f"{skill}: {size:,} parameters, loss {loss:.4f}, {time.process_time():.0f} CPU s"


def _draw(rng: random.Random, skill: str) -> build.Text:
    """A problem whose running amounts stay in range for someone with this skill alone."""
    while True:
        problem = world.generate(rng)
        written = world.half_skilled(problem, skill)
        if min(written) >= 0 and max(written) <= 99:
            word = world.STYLE[rng.random() >= STYLE]
            return build.Text("", problem.prompt(), problem.solution(word, written))


def measure(folder: Path, n: int = 200, seed: int = 4321) -> dict[tuple[str, str], float]:
    """Measure the greedy accuracy of both adapters on problems of each skill.

    Args:
        folder: The folder of the models.
        n: Problems for each measurement.
        seed: Seed of the problems.

    Returns:
        Shares from 0 to 1, by adapter and skill.
    """
    out = {}
    rng = random.Random(seed)
    asked: dict[str, list[world.Problem]] = {skill: [] for skill in world.SKILLS}
    while any(len(found) < n for found in asked.values()):
        problem = world.generate(rng)
        skill = world.skill_of(problem)
        if skill is not None and len(asked[skill]) < n:
            asked[skill].append(problem)
    for name in world.SKILLS:
        loaded = gates.load(folder / "student")
        loaded.model.load_adapter(str(folder / name))
        for skill, problems in asked.items():
            out[name, skill] = gates.share_right(loaded, problems)
    return out


def check(folder: Path) -> str:
    """Measure the adapters and return a table of their gates.

    Args:
        folder: The folder of the models.

    Returns:
        One line per gate.

    Raises:
        SystemExit: A gate is missed.
    """
    lines, is_missed = [], False
    for (name, skill), value in measure(folder).items():
        least, most = (0.97, 1.0) if name == skill else (0.0, 0.3)
        ok = least <= value <= most
        is_missed |= not ok
        said = "ok  " if ok else "MISS"
        lines.append(f"{said} {value:.3f} in [{least}, {most}]  {name} on {skill}")
    if is_missed:
        raise SystemExit("\n".join(lines) + "\nThe adapters miss a gate and must not be shipped.")
    return "\n".join(lines)


def main(out: Path = Path("data/market"), smoke: bool = False) -> None:
    """Build both adapters, then print their gates.

    Args:
        out: The folder of the models, which has the student.
        smoke: Whether to make only two steps, without gates.
    """
    for skill in world.SKILLS:
        print(train(skill, out, 2 if smoke else STEPS), flush=True)
    if not smoke:
        print(check(out))


if __name__ == "__main__":
    tyro.cli(main)
