"""The shapes that are measured: those of Qwen3-0.6B and Qwen3-4B, or tiny ones for a CPU.

Weights are random, since speed does not depend on what they say, so no hub is needed. The tokenizer
is that of `benchmarks.workload` with names for as many ids as the models have.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.workload import PROMPT, build_tokenizer, device, prompts
from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.models.policy import Policy

CONTEXT = PROMPT  # tokens before a text


@dataclass(frozen=True)
class Size:
    """Set the sizes of models, texts and repetitions that all cases share.

    Attributes:
        vocab: Number of tokens.
        student: Shape of the student.
        teacher: Shape of the teacher.
        square: Side of the square matrices that give the matrix rate.
        copied: Bytes that are copied to measure the memory's bandwidth.
        loss_tokens: Tokens of the cases of the loss.
        texts: Texts and tokens of each of the large cases.
        few: The same of the small step.
        micro_batch: Completions in a backward pass of the large step.
        steps: Steps of the small runs, the first of which is a warm-up.
        repeats: Repetitions of everything else, the first of which is a warm-up.
    """

    vocab: int
    student: dict[str, Any]
    teacher: dict[str, Any]
    square: int
    copied: int
    loss_tokens: int
    texts: tuple[int, int]
    few: tuple[int, int]
    micro_batch: int
    steps: int
    repeats: int


def shape(
    hidden: int, inner: int, layers: int, heads: int, groups: int, width: int
) -> dict[str, Any]:
    """Name the numbers of a model of Qwen3's family."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": width,
    }


SIZES = {
    "full": Size(
        vocab=151_936,
        student=shape(1024, 3072, 28, 16, 8, 128),  # Qwen3-0.6B
        teacher=shape(2560, 9728, 36, 32, 8, 128),  # Qwen3-4B
        square=8192,
        copied=1 << 30,
        loss_tokens=16_384,
        texts=(64, 1024),
        few=(16, 256),
        micro_batch=8,
        steps=3,
        repeats=3,
    ),
    "tiny": Size(
        vocab=33_000,
        student=shape(16, 32, 2, 2, 1, 8),
        teacher=shape(24, 48, 2, 2, 1, 8),
        square=64,
        copied=1 << 16,
        loss_tokens=24,
        texts=(3, 6),
        few=(2, 4),
        micro_batch=2,
        steps=2,
        repeats=2,
    ),
}


@functools.cache
def build_wide_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer of the workload, with names for all ids of a larger vocabulary.

    Args:
        vocab: Number of tokens.

    Returns:
        The tokenizer. It never writes the ids that are only named.
    """
    tokenizer = build_tokenizer()
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    known = inner["model"]["vocab"]
    known |= {f"<unused {i}>": i for i in range(len(known), vocab)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(inner)),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
    )


def build_qwen(
    numbers: dict[str, Any], size: Size, tokenizer: PreTrainedTokenizerFast, seed: int
) -> PreTrainedModel:
    """Build a model of random bfloat16 weights on the device, with its head tied.

    Args:
        numbers: Its shape.
        size: The sizes of the measurement.
        tokenizer: Its tokenizer.
        seed: Seed of the weights.

    Returns:
        The model.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=size.vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **numbers,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device():
            return Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def make_rollout(policy: Policy, texts: int, tokens: int) -> Rollout:
    """Make a rollout of random tokens after prompts of `PROMPT` tokens.

    Args:
        policy: The policy whose tokens they are.
        texts: Number of texts.
        tokens: Tokens of each.

    Returns:
        The rollout.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 30_000, (texts, tokens), generator=generator).to(device())
    return Rollout(
        prompts=tuple(Prompt(text) for text in prompts(policy.tokenizer, texts)),
        ids=ids,
        lengths=torch.full((texts,), tokens, device=ids.device),
        logp=torch.zeros(texts, tokens, device=ids.device),
        entropy=torch.zeros(texts, tokens, device=ids.device),
        finish=("length",) * texts,
        texts=("",) * texts,
        writer=("student",) * texts,
    )
