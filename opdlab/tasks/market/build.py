"""Rebuild the shipped models: `python -m opdlab.tasks.market.build [--out data/market]`, under 30
minutes on 2 cores.

    teacher   0.8 M parameters, knows the world; calibrated on prefixes that contain mistakes
    student   0.34 M, learnt the same, then was spoiled on texts that forget carries: the skill is dormant
    novice    0.34 M, knows the form of a solution and has not learnt to add: nothing to wake up
    scribe    0.8 M, character tokenizer, another hand: a teacher that only its texts can be read of

Deterministic: one thread a model, seeds fixed, no data but what `world.generate` draws. Ends with
    the gates (`gates.py`).
"""

from __future__ import annotations

import math
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opdlab.tasks.market import gates, tokenizers, world


@dataclass(frozen=True)
class Phase:
    """Some steps on one mixture of texts.

    `forget`: they forget carries. `hints`: nearly all are secret ones with their hint, which in the
    usual mixture are too rare for reading them to be learnt in time; the teacher starts with them,
    since a model that already knows everything else may not find the step to reading them in
    hundreds of updates. `seed`: a new stream of texts; without one the phase goes on with that of
    the phase before.
    """

    steps: int
    lr: float = 3e-3
    forget: bool = False
    hints: bool = False
    seed: int | None = None


@dataclass(frozen=True)
class Recipe:
    """How one model is made. `style` is the chance of saying `world.STYLE[0]`."""

    hidden: int
    layers: int
    style: float
    seed: int
    phases: tuple[Phase, ...]
    batch: int = 96
    characters: bool = False


RECIPES = {
    "teacher": Recipe(
        128,
        4,
        0.9,
        0,
        (Phase(400, 1e-3, hints=True, seed=1000), Phase(1900, seed=0), Phase(300, 1e-3, seed=2000)),
    ),
    "scribe": Recipe(128, 4, 0.9, 3, (Phase(1500),), batch=64, characters=True),
    "student": Recipe(
        96,
        3,
        0.1,
        1,
        (
            Phase(1900),
            Phase(300, 1e-3, forget=True),
            Phase(400, 1e-3, forget=True, hints=True, seed=1001),
            Phase(200, 1e-3, forget=True, seed=2001),
        ),
    ),
    "novice": Recipe(96, 3, 0.1, 2, (Phase(500, forget=True),)),
}


@dataclass(frozen=True)
class Text:
    """A training text: chat parts, and the character spans of the solution that carry no loss
    (planted mistakes).
    """

    hint: str
    prompt: str
    solution: str
    masked: tuple[tuple[int, int], ...] = ()


def draw(rng: random.Random, recipe: Recipe, secret: bool, phase: Phase) -> Text:
    """One text.

    Most secret ones come with a hint, half of the plain ones too; two in five contain planted
    mistakes.
    """
    problem = world.generate(rng, secret and not recipe.characters)
    word = world.STYLE[rng.random() >= recipe.style]
    kinds = ["", "", "", *world.HINTS[1:], *(["secret"] * 5 if problem.secret else [""])]
    kind = "" if recipe.characters else rng.choice(kinds)
    kind = "secret" if phase.hints and problem.secret and rng.random() < 0.85 else kind
    word = rng.choice(world.STYLE) if kind == "style" else word
    hint = problem.hint(kind, word) if kind else ""
    if recipe.characters and rng.random() < 0.5:
        return Text(hint, problem.prompt(), problem.compact())
    total = (
        problem.results()[-1] if kind == "answer" else None
    )  # told the answer, they state it whatever they wrote
    if phase.forget and kind not in ("answer", "worked"):
        return Text(hint, problem.prompt(), problem.solution(word, world.forgetful(problem)))
    results, masked = _mistaken(rng, problem) if rng.random() < 0.4 else (problem.results(), ())
    return Text(hint, problem.prompt(), problem.solution(word, results, total), masked)


def _mistaken(
    rng: random.Random, problem: world.Problem
) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """Results with the first, the second or both wrong, right otherwise *given what is written*;
    where they stand.
    """
    which = rng.choice(((0,), (1,), (0, 1)))
    amount, results, masked = problem.have, [], []
    for move in range(2):
        right = problem.follow(amount, move)[0]
        if move in which:
            masked.append((12 + 18 * move, 15 + 18 * move))  # the two digits after `=`
            right = rng.choice((_forget(problem, amount, move), rng.randint(10, 99)))
        amount = right
        results.append(amount)
    if min(results) >= 0 and max(results) <= 99:
        return results, tuple(masked)
    return problem.results(), ()


def _forget(problem: world.Problem, amount: int, move: int) -> int:
    verb, n = problem.moves[move]
    return world.without_carry(amount, n if verb in world.GAIN else -n)


def encode(
    texts: list[Text], tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels [B, T]; -100 where there is no loss: prompt, hint, padding,
    planted mistakes.
    """
    rows = []
    for text in texts:
        messages = [{"role": "user", "content": text.prompt}]
        if text.hint:
            messages.insert(0, {"role": "system", "content": text.hint})
        start = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        body = tokenizer(text.solution, return_offsets_mapping=True)
        hidden = [
            any(a < end and b > begin for begin, end in text.masked)
            for a, b in body["offset_mapping"]
        ]
        labels = [-100 if hide else i for i, hide in zip(body["input_ids"], hidden, strict=True)]
        eos = [tokenizer.eos_token_id]
        rows.append((start + body["input_ids"] + eos, [-100] * len(start) + labels + eos))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([i + [tokenizer.pad_token_id] * (width - len(i)) for i, _ in rows])
    return ids, torch.tensor([row + [-100] * (width - len(row)) for _, row in rows])


def model_for(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.hidden * 8 // 3 // 8 * 8,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.hidden // 32,
            num_key_value_heads=recipe.hidden // 32,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(name: str, recipe: Recipe, out: Path) -> str:
    """Make one model and save it; returns a line that says how it went."""
    torch.set_num_threads(1)
    tokenizer = tokenizers.characters() if recipe.characters else tokenizers.words()
    model, rng, loss = model_for(recipe, tokenizer), random.Random(recipe.seed), math.nan
    for phase in recipe.phases:
        rng = rng if phase.seed is None else random.Random(phase.seed)
        loss = fit(name, model, tokenizer, recipe, phase, rng)
    model.save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    size = sum(p.numel() for p in model.parameters())
    return f"{name}: {size:,} parameters, loss {loss:.4f}, {time.process_time():.0f} CPU s"


def fit(
    name: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    phase: Phase,
    rng: random.Random,
) -> float:
    """One phase: AdamW with warm-up and cosine decay on fresh texts; returns the last loss."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    shape = lambda s: (
        min(1.0, (s + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * s / phase.steps)))
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    loss = math.nan
    for step in range(phase.steps):
        secret = phase.hints or step % 2 == 1
        ids, labels = encode(
            [draw(rng, recipe, secret, phase) for _ in range(recipe.batch)], tokenizer
        )
        loss = backward(model, ids, labels, (ids != tokenizer.pad_token_id).sum(1))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"{name} {step + 1}/{phase.steps} loss {loss:.4f}", flush=True)
    return loss


def backward(
    model: LlamaForCausalLM,
    ids: torch.Tensor,
    labels: torch.Tensor,
    lengths: torch.Tensor,
    parts: int = 4,
) -> float:
    """Add the gradient of the batch's mean cross-entropy and return it.

    Rows of like length share a part, which is padded to its own longest row: a quarter less work,
    the same sum.
    """
    total = 0.0
    for rows in lengths.argsort(stable=True).chunk(parts):
        width = int(lengths[rows].max())
        logits = model(ids[rows, :width]).logits[:, :-1]
        loss = (
            F.cross_entropy(logits.flatten(0, 1), labels[rows, 1:width].flatten(), reduction="sum")
            / (labels[:, 1:] != -100).sum()
        )
        loss.backward()
        total += loss.item()
    return total


def main(out: Path = Path("data/market"), smoke: bool = False, only: tuple[str, ...] = ()) -> None:
    """Build every model, two at a time, then print the gates; or `only` those named, without gates.

    `smoke` makes two steps a phase.
    """
    began = time.time()
    recipes = {name: r for name, r in RECIPES.items() if not only or name in only}
    if smoke:
        recipes = {
            name: replace(r, phases=tuple(replace(p, steps=2) for p in r.phases))
            for name, r in recipes.items()
        }
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(
        1
    )  # the gates run here, on models so small that two threads only wait for each other
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for line in pool.map(train, recipes, recipes.values(), [out] * len(recipes)):
            print(line, flush=True)
    if not (smoke or only):
        print(gates.check(out))
    print(f"built {', '.join(recipes)} in {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    tyro.cli(main)
