"""Gates that the shipped models must pass; `build.py` prints them, and tests measure `data/`."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from opdlab.models.policy import Policy
from opdlab.tasks.market import world
from opdlab.tasks.market.agent_task import market_with_tools

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
    "clerk greedy success": (0.9, 1.0),
    "trainee greedy success": (0.05, 0.4),
}


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer.

    Attributes:
        model: The language model.
        tokenizer: Its tokenizer, with a chat template.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def greedy_accuracy(loaded: Loaded, n: int, seed: int) -> float:
    """Measure the share of `n` fresh plain problems whose greedy completion has the right total.

    Args:
        loaded: The model to measure.
        n: Number of problems.
        seed: Decides which problems are drawn.

    Returns:
        The share, from 0 to 1.
    """
    return share_right(loaded, _problems(n, seed, secret=False))


def share_right(loaded: Loaded, problems: Sequence[world.Problem]) -> float:
    """Measure the share of problems whose greedy completion has the right total.

    Args:
        loaded: The model to measure.
        problems: The problems.

    Returns:
        The share, from 0 to 1.
    """
    texts = _write_greedily(loaded, [_encode_chat(loaded, problem) for problem in problems])
    pairs = zip(problems, texts, strict=True)
    right = sum(world.total(text) == problem.results()[-1] for problem, text in pairs)
    return right / len(problems)


def measure(folder: Path, n: int = 400, seed: int = 12345) -> dict[str, float]:
    """Measure every gate on fresh problems.

    Training draws none of them on purpose, and there are millions.

    Args:
        folder: A folder with one folder per model.
        n: Problems for each measurement.
        seed: Seed of the problems.

    Returns:
        Values by the names of `BANDS`.
    """
    models = {name: load(folder / name) for name in ("teacher", "student", "novice", "scribe")}
    out = {
        f"{name} greedy accuracy": greedy_accuracy(loaded, n, seed)
        for name, loaded in models.items()
    }
    problems = _problems(n, seed + 1, secret=True)
    student = models["student"]
    texts = _write_greedily(student, [_encode_chat(student, problem) for problem in problems])
    pairs = list(zip(problems, texts, strict=True))
    vocabulary = student.tokenizer.get_vocab()
    letters = [vocabulary[f"▁{word}"] for word in world.LETTERS]
    right = []
    for problem, text in pairs:
        logp = _log_probs(models["teacher"], problem, text, problem.hint("secret"))
        for place, symbol in zip(_places(text, "secret"), problem.receipt, strict=False):
            right.append(logp[place].argmax().item() == letters[world.LETTERS.index(symbol)])
    share = sum(right) / max(len(right), 1)
    out["teacher + hint on secret tokens of the student's prefixes"] = share
    for name in ("teacher", "student"):
        plain = [_log_probs(models[name], problem, text, "") for problem, text in pairs]
        for kind, label in (("secret", "secret tokens, no hint"), ("noise", "noise tokens")):
            rows = torch.cat(
                [logp[_places(text, kind)] for logp, text in zip(plain, texts, strict=True)]
            )
            entropy = -(rows.exp() * rows).sum(-1).mean().item()
            out[f"{name} entropy / uniform, {label}"] = entropy / math.log(len(world.LETTERS))
    for name in ("clerk", "trainee"):
        out[f"{name} greedy success"] = measure_success(folder / name, n, seed)
    return out


def measure_success(folder: Path, n: int, seed: int) -> float:
    """Measure the share of errands that a model settles rightly with the tool's help.

    Args:
        folder: A folder with one model that talks to the tool.
        n: Number of errands; at most 100 are drawn.
        seed: Decides which errands are drawn.

    Returns:
        The share, from 0 to 1.
    """
    task = market_with_tools()
    errands = task.prompts(min(n, 100), seed=seed, split="test")
    rollout = Policy.load(folder, device="cpu").sample(
        errands, max_new_tokens=task.max_new_tokens, temperature=0, **task.sample_options
    )
    scores = task.scores(errands, rollout.texts)
    return sum(scores) / len(scores)


def check(folder: Path) -> str:
    """Measure the models in a folder and return a table of the gates.

    Args:
        folder: A folder with one folder per model.

    Returns:
        One line per gate, with its value and its bounds.

    Raises:
        SystemExit: A gate is missed.
    """
    lines, missed = [], []
    for name, value in measure(folder).items():
        least, most = BANDS[name]
        ok = least <= value <= most + 1e-3
        missed += [] if ok else [name]
        lines.append(f"{'ok  ' if ok else 'MISS'} {value:.3f} in [{least}, {most}]  {name}")
    if missed:
        raise SystemExit("\n".join(lines) + "\nThe models miss a gate and must not be shipped.")
    return "\n".join(lines)


def load(folder: Path) -> Loaded:
    """Load a model with its tokenizer.

    Args:
        folder: A folder that `save_pretrained` wrote.

    Returns:
        The model with its tokenizer.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)  # nosec B615  # a folder of this build
    return Loaded(model, AutoTokenizer.from_pretrained(folder))  # nosec B615  # the same


def _problems(n: int, seed: int, secret: bool) -> list[world.Problem]:
    rng = random.Random(seed)
    return [world.generate(rng, secret) for _ in range(n)]


def _places(text: str, kind: str) -> list[int]:
    return [i for i, t in enumerate(world.token_types(text.split())) if t == kind]


def _encode_chat(loaded: Loaded, problem: world.Problem, hint: str = "") -> list[int]:
    messages = [{"role": "system", "content": hint}] if hint else []
    messages.append({"role": "user", "content": problem.prompt()})
    template = loaded.tokenizer.apply_chat_template
    return list(template(messages, add_generation_prompt=True, return_dict=False))


@torch.no_grad()
def _write_greedily(loaded: Loaded, prompts: list[list[int]]) -> list[str]:
    # Padding is on the left, as the tokenizer says.
    batch = loaded.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    # mypy takes `generate` for a tensor, since modules have attributes of any name.
    generate: Any = loaded.model.generate
    ids = generate(**batch, max_new_tokens=64, do_sample=False)
    written = ids[:, batch["input_ids"].shape[1] :]
    return list(loaded.tokenizer.batch_decode(written, skip_special_tokens=True))


@torch.no_grad()
def _log_probs(loaded: Loaded, problem: world.Problem, text: str, hint: str) -> Tensor:
    """Log-probs [T, V] at the places of the completion `text`."""
    start = _encode_chat(loaded, problem, hint)
    ids = torch.tensor([start + loaded.tokenizer(text)["input_ids"]])
    logits: Tensor = loaded.model(ids).logits
    return logits[0, len(start) - 1 : -1].log_softmax(-1)
