"""Rebuild the shipped models, in about 30 minutes on 2 cores.

    python -m opdlab.tasks.market.build [--out data/market]

    teacher   0.8 M parameters, knows the world; calibrated on prefixes that contain mistakes
    student   0.34 M, learnt the same, then was spoiled on texts that forget carries: its skill is
              dormant
    novice    0.34 M, knows the form of a solution and has not learnt to add: nothing to wake up
    scribe    0.8 M, character tokenizer, another hand: a teacher for methods that read texts only
    clerk     0.34 M, the student taught to ask a tool for prices and to carry (`build_agent.py`)
    trainee   0.34 M, the clerk after its habits of asking were spoiled

The build is deterministic: one thread per model, fixed seeds, and no data beside the problems that
`world.generate` draws. It ends with the gates (`gates.py`).
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
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opdlab.tasks.market import build_agent, gates, tokenizers, world


@dataclass(frozen=True)
class Phase:
    """Some steps on one mixture of texts.

    Attributes:
        steps: Number of steps.
        lr: The peak learning rate.
        forget: Whether the texts forget carries.
        hints: Whether nearly all texts are secret ones with their hint. In the usual mixture these
            are too rare for reading them to be learnt in time. The teacher starts with them, since
            a model that already knows everything else may not find the step to reading them in
            hundreds of updates.
        seed: Seed of a new stream of texts; without one, the phase goes on with the stream of the
            phase before.
    """

    steps: int
    lr: float = 3e-3
    forget: bool = False
    hints: bool = False
    seed: int | None = None


@dataclass(frozen=True)
class Recipe:
    """The size, the texts and the training of one model.

    Attributes:
        hidden: Its hidden size.
        layers: Its layers.
        style: The chance of saying `world.STYLE[0]`.
        seed: Seed of its weights and texts.
        phases: Its training, in order.
        batch: Texts per step.
        characters: Whether its tokens are characters.
        calls: Whether it talks to a tool, and its tokens are those of `tokenizers.calls`.
        start: The model that its training begins with; "" for a new one.
    """

    hidden: int
    layers: int
    style: float
    seed: int
    phases: tuple[Phase, ...]
    batch: int = 96
    characters: bool = False
    calls: bool = False
    start: str = ""


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
    "clerk": Recipe(
        96,
        3,
        0.0,
        4,
        (Phase(600, 2e-3), Phase(700, 2e-3, seed=6), Phase(500, 1.5e-3, seed=7)),
        batch=32,
        calls=True,
        start="student",
    ),
    "trainee": Recipe(
        96, 3, 0.0, 4, (Phase(150, 1e-3, forget=True, seed=5),), batch=32, calls=True, start="clerk"
    ),
}


@dataclass(frozen=True)
class Text:
    """A training text.

    Attributes:
        hint: The system message, or "".
        prompt: The user's message.
        solution: The assistant's message.
        masked: Character spans of the solution that carry no loss: planted mistakes.
    """

    hint: str
    prompt: str
    solution: str
    masked: tuple[tuple[int, int], ...] = ()


def draw(rng: random.Random, recipe: Recipe, secret: bool, phase: Phase) -> Text:
    """Draw one text.

    Most secret ones come with a hint, half of the plain ones too; two in five contain planted
    mistakes.

    Args:
        rng: Source of all choices.
        recipe: The model's recipe; the characters' one writes no secret problems.
        secret: Whether to draw a problem of the secret variant.
        phase: The phase of training; decides on hints and on forgotten carries.

    Returns:
        A prompt with its solution, its hint ("" for none) and the spans of planted mistakes.
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
    # Told the answer, they state it whatever they wrote.
    total = problem.results()[-1] if kind == "answer" else None
    if phase.forget and kind not in ("answer", "worked"):
        return Text(hint, problem.prompt(), problem.solution(word, world.forgetful(problem)))
    results, masked = _mistaken(rng, problem) if rng.random() < 0.4 else (problem.results(), ())
    return Text(hint, problem.prompt(), problem.solution(word, results, total), masked)


def _mistaken(
    rng: random.Random, problem: world.Problem
) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """Results of which the first, the second or both are wrong, and where these stand.

    A result after a mistake is right given the written amount.
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
    """Make right-padded ids and labels, `[B, T]` each.

    Labels are -100 for tokens without a loss: prompt, hint, padding, planted mistakes.

    Args:
        texts: The batch.
        tokenizer: The model's tokenizer, with a chat template.

    Returns:
        Ids and labels, `[B, T]` each, int64.
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
        labels = [
            -100 if _is_masked(span, text.masked) else token
            for token, span in zip(body["input_ids"], body["offset_mapping"], strict=True)
        ]
        eos = [tokenizer.eos_token_id]
        rows.append((start + body["input_ids"] + eos, [-100] * len(start) + labels + eos))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([i + [tokenizer.pad_token_id] * (width - len(i)) for i, _ in rows])
    return ids, torch.tensor([row + [-100] * (width - len(row)) for _, row in rows])


def _is_masked(span: tuple[int, int], masked: tuple[tuple[int, int], ...]) -> bool:
    """Tell whether a span of characters overlaps one of those that are masked."""
    return any(span[0] < end and span[1] > begin for begin, end in masked)


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make an untrained model of a recipe.

    Args:
        recipe: The size and the seed of the weights.
        tokenizer: Gives the vocabulary size and the special tokens.

    Returns:
        A Llama model with tied embeddings and a context of 256 tokens.
    """
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
    """Make one model and save it.

    Args:
        name: The model's name, and the name of its folder.
        recipe: The size and the phases of training.
        out: The folder to save to, in `out / name`.

    Returns:
        A line with the number of parameters, the last loss and the CPU seconds.
    """
    torch.set_num_threads(1)
    tokenizer = _tokenizer(recipe)
    model, rng, loss = make_model(recipe, tokenizer), random.Random(recipe.seed), math.nan
    if recipe.start:
        build_agent.begin_with(out / recipe.start, model, tokenizer)
    for phase in recipe.phases:
        rng = rng if phase.seed is None else random.Random(phase.seed)
        loss = fit(name, model, tokenizer, recipe, phase, rng)
    model.save_pretrained(out / name)
    tokenizer.save_pretrained(out / name)
    size = sum(p.numel() for p in model.parameters())
    return f"{name}: {size:,} parameters, loss {loss:.4f}, {time.process_time():.0f} CPU s"


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    if recipe.calls:
        return tokenizers.calls()
    return tokenizers.characters() if recipe.characters else tokenizers.words()


def draw_batch(
    rng: random.Random,
    recipe: Recipe,
    secret: bool,
    phase: Phase,
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the texts of one step.

    Args:
        rng: Source of all choices.
        recipe: The model's recipe.
        secret: Whether to draw problems of the secret variant; conversations have none.
        phase: The phase of training.
        tokenizer: The model's tokenizer.

    Returns:
        Ids and labels, `[B, T]` each, int64.
    """
    if recipe.calls:
        drawn = [build_agent.draw(rng, phase.forget) for _ in range(recipe.batch)]
        return build_agent.encode(drawn, tokenizer)
    return encode([draw(rng, recipe, secret, phase) for _ in range(recipe.batch)], tokenizer)


def fit(
    name: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    phase: Phase,
    rng: random.Random,
) -> float:
    """Train a model for one phase: AdamW with warm-up and cosine decay on fresh texts.

    Args:
        name: The model's name, for the printed lines.
        model: The model, which is changed in place.
        tokenizer: The model's tokenizer.
        recipe: The batch size and the kind of texts.
        phase: The steps, the learning rate and the kind of texts.
        rng: Source of the texts.

    Returns:
        The loss of the last step, in nats per token.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.lr, betas=(0.9, 0.98), weight_decay=0.01
    )

    def rate(step: int) -> float:
        decay = 0.02 + 0.49 * (1 + math.cos(math.pi * step / phase.steps))
        return min(1.0, (step + 1) / 50) * decay

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    loss = math.nan
    for step in range(phase.steps):
        secret = phase.hints or step % 2 == 1
        ids, labels = draw_batch(rng, recipe, secret, phase, tokenizer)
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

    Args:
        model: The model, whose gradients are added to.
        ids: Right-padded ids, `[B, T]`.
        labels: Target ids, `[B, T]`; -100 for tokens without a loss.
        lengths: Tokens of each row without padding, `[B]`.
        parts: Number of parts that the batch is cut into.

    Returns:
        The mean cross-entropy, in nats per labelled token.
    """
    total = 0.0
    for rows in lengths.argsort(stable=True).chunk(parts):
        width = int(lengths[rows].max())
        logits = model(ids[rows, :width]).logits[:, :-1]
        targets = labels[rows, 1:width].flatten()
        summed = cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
        loss = summed / (labels[:, 1:] != -100).sum()
        torch.autograd.backward(loss)
        total += loss.item()
    return total


def main(out: Path = Path("data/market"), smoke: bool = False, only: tuple[str, ...] = ()) -> None:
    """Build every model, two at a time, then print the gates.

    Args:
        out: The folder to save to.
        smoke: Whether to make only two steps per phase, without gates.
        only: Names of the models to build, without gates; all by default.
    """
    began = time.time()
    recipes = {name: r for name, r in RECIPES.items() if not only or name in only}
    if smoke:
        for name, recipe in recipes.items():
            short = tuple(replace(phase, steps=2) for phase in recipe.phases)
            recipes[name] = replace(recipe, phases=short)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # The gates run here, on models so small that two threads only wait for each other.
    torch.set_num_threads(1)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        left = dict(recipes)
        while left:  # a model that begins with another one comes after it
            part = {name: recipe for name, recipe in left.items() if recipe.start not in left}
            for line in pool.map(train, part, part.values(), [out] * len(part)):
                print(line, flush=True)
            left = {name: recipe for name, recipe in left.items() if name not in part}
    if not (smoke or only):
        print(gates.check(out))
    print(f"built {', '.join(recipes)} in {(time.time() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    tyro.cli(main)
