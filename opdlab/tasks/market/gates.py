"""What the shipped models must do, measured: printed by `build.py` and tested on `data/`."""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opdlab.tasks.market import world

BANDS = {  # name -> (least, most)
    "teacher greedy accuracy": (0.97, 1.0),
    "student greedy accuracy": (0.25, 0.45),
    "scribe greedy accuracy": (0.9, 1.0),
    "novice greedy accuracy": (0.0, 0.1),
    "teacher + hint on secret tokens of the student's prefixes": (0.95, 1.0),
    "teacher entropy / uniform, secret tokens, no hint": (0.95, 1.05),
    "teacher entropy / uniform, noise tokens": (0.95, 1.05),
    "student entropy / uniform, secret tokens, no hint": (0.95, 1.05),
    "student entropy / uniform, noise tokens": (0.95, 1.05),
}


def greedy_accuracy(model, tokenizer, n: int, seed: int) -> float:
    """Share of `n` fresh plain problems whose greedy completion states the right total."""
    problems = _problems(n, seed, secret=False)
    texts = _greedy(model, tokenizer, [_chat(tokenizer, p) for p in problems])
    return sum(world.total(t) == p.results()[-1] for p, t in zip(problems, texts, strict=True)) / n


def measure(folder: Path, n: int = 400, seed: int = 12345) -> dict[str, float]:
    """Every gate's value on fresh problems (training draws none of them on purpose, and the space
    has millions).
    """
    models = {name: load(folder / name) for name in ("teacher", "student", "novice", "scribe")}
    out = {
        f"{name} greedy accuracy": greedy_accuracy(pair[0], pair[1], n, seed)
        for name, pair in models.items()
    }
    problems = _problems(n, seed + 1, secret=True)
    student, tokenizer = models["student"]
    texts = _greedy(student, tokenizer, [_chat(tokenizer, p) for p in problems])
    hinted = [
        _logp(models["teacher"], p, t, p.hint("secret"))
        for p, t in zip(problems, texts, strict=True)
    ]
    letters = tokenizer.convert_tokens_to_ids([f"▁{w}" for w in world.LETTERS])
    right = []
    for problem, text, logp in zip(problems, texts, hinted, strict=True):
        for place, symbol in zip(_places(text, "secret"), problem.receipt, strict=False):
            right.append(logp[place].argmax().item() == letters[world.LETTERS.index(symbol)])
    out["teacher + hint on secret tokens of the student's prefixes"] = sum(right) / max(
        len(right), 1
    )
    for name in ("teacher", "student"):
        plain = [_logp(models[name], p, t, "") for p, t in zip(problems, texts, strict=True)]
        for kind, label in (("secret", "secret tokens, no hint"), ("noise", "noise tokens")):
            rows = torch.stack(
                [row[i] for row, t in zip(plain, texts, strict=True) for i in _places(t, kind)]
            )
            entropy = -(rows.exp() * rows).sum(-1).mean().item()
            out[f"{name} entropy / uniform, {label}"] = entropy / math.log(len(world.LETTERS))
    return out


def check(folder: Path) -> str:
    """A table of the gates; raises SystemExit where one is missed."""
    lines, missed = [], []
    for name, value in measure(folder).items():
        least, most = BANDS[name]
        ok = least <= value <= most + 1e-3
        missed += [] if ok else [name]
        lines.append(f"{'ok  ' if ok else 'MISS'} {value:.3f} in [{least}, {most}]  {name}")
    if missed:
        raise SystemExit("\n".join(lines) + "\nThe models miss a gate and must not be shipped.")
    return "\n".join(lines)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def _problems(n: int, seed: int, secret: bool) -> list[world.Problem]:
    rng = random.Random(seed)
    return [world.generate(rng, secret) for _ in range(n)]


def _places(text: str, kind: str) -> list[int]:
    return [i for i, t in enumerate(world.token_types(text.split())) if t == kind]


def _chat(tokenizer, problem: world.Problem, hint: str = "") -> list[int]:
    messages = [{"role": "system", "content": hint}] if hint else []
    messages.append({"role": "user", "content": problem.prompt()})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@torch.no_grad()
def _greedy(model, tokenizer, prompts: list[list[int]]) -> list[str]:
    batch = tokenizer.pad(
        {"input_ids": prompts}, return_tensors="pt"
    )  # left padding, as the tokenizer says
    ids = model.generate(**batch, max_new_tokens=64, do_sample=False)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def _logp(pair, problem: world.Problem, text: str, hint: str) -> torch.Tensor:
    """Log-probs [T, V] at the places of the completion `text`."""
    model, tokenizer = pair
    start = _chat(tokenizer, problem, hint)
    ids = torch.tensor([start + tokenizer(text)["input_ids"]])
    return model(ids).logits[0, len(start) - 1 : -1].log_softmax(-1)
