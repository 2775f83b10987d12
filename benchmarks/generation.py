"""Measure writing alone: opdlab's own loop, `generate` of transformers, and the bare products.

`python -m benchmarks.generation CASE TOKENIZER_FOLDER` measures one case and prints a JSON line.
All sides write texts of full length at temperature 1 with a cache.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.products import Products
from benchmarks.workload import (
    BATCH,
    COMPLETION,
    PROMPT,
    RANK,
    STUDENT,
    build_model,
    load_tokenizer,
    measured,
    prompts,
    source_text,
)

REPEATS = 4  # the first is a warm-up
LONG_PROMPT = 512


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        side: Who writes: "opdlab", "transformers" or "products".
        shape: "eight prompts" of 64 tokens, or "one prompt" of 512 tokens with eight samples.
        lora: Whether the model carries a LoRA of rank 16.
    """

    side: str
    shape: str
    lora: bool = False

    @property
    def name(self) -> str:
        return "/".join([self.side, self.shape, *["LoRA"] * self.lora])


CASES = {
    case.name: case
    for case in [
        *(
            Case(side, shape)
            for shape in ("eight prompts", "one prompt")
            for side in ("products", "opdlab", "transformers")
        ),
        *(Case(side, "eight prompts", lora=True) for side in ("opdlab", "transformers")),
    ]
}


def texts_of(case: Case, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The prompts of a case."""
    if case.shape == "eight prompts":
        return prompts(tokenizer, BATCH)
    ids = tokenizer(source_text(40 * LONG_PROMPT))["input_ids"]
    return [str(tokenizer.decode(ids[:LONG_PROMPT]))]


def opdlab_side(
    case: Case, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Callable[[], None]:
    from opdlab import Policy
    from opdlab.data.prompt import Prompt

    policy = Policy.of(model, tokenizer, eos=())  # so no text stops early
    if case.lora:
        policy = policy.adapt(RANK)
    given = [Prompt(text) for text in texts_of(case, tokenizer)]

    def write() -> None:
        rollout = policy.sample(given, n=BATCH // len(given), max_new_tokens=COMPLETION)
        assert rollout.tokens == BATCH * COMPLETION

    return write


def transformers_side(
    case: Case, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Callable[[], None]:
    writer = model
    if case.lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        writer = get_peft_model(model, config)  # type: ignore[assignment]
    ids = tokenizer(texts_of(case, tokenizer), return_tensors="pt")["input_ids"]

    def write() -> None:
        found = writer.generate(
            input_ids=ids.to(model.device),
            max_new_tokens=COMPLETION,
            min_new_tokens=COMPLETION,
            do_sample=True,
            num_return_sequences=BATCH // len(ids),
            pad_token_id=0,
        )
        assert found.shape == (BATCH, ids.shape[1] + COMPLETION)

    return write


def products_side(case: Case, model: LlamaForCausalLM, _: object) -> Callable[[], None]:
    products = Products.of(model)
    shape = (BATCH, PROMPT) if case.shape == "eight prompts" else (1, LONG_PROMPT)
    return lambda: products.generate(BATCH, *shape, COMPLETION)


SIDES = {"opdlab": opdlab_side, "transformers": transformers_side, "products": products_side}


def measure(name: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """Measure one case in this process.

    Returns:
        The seconds of every repetition, and the largest peak.
    """
    case = CASES[name]
    model = build_model(STUDENT, tokenizer, 0).eval()
    write, costs = SIDES[case.side](case, model, tokenizer), []
    for _ in range(REPEATS):
        with measured() as cost:
            write()
        costs.append(cost)
    return {
        **asdict(case),
        "seconds": [cost.seconds for cost in costs[1:]],
        "peak_mib": max(cost.peak_mib for cost in costs),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(sys.argv[1], load_tokenizer(sys.argv[2]))))
