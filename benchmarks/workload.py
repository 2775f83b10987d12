"""Build the workload that both sides get, and measure what it costs.

The workload needs no hub: a byte-level BPE tokenizer of 32,000 tokens is trained on the source of
the standard library, and two models of Llama's shape get random weights, since speed does not
depend on what the weights say. Completions are forced to full length, so all sides do equal work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opdlab.support.memory import PeakMemory

VOCAB, BATCH, PROMPT, COMPLETION, RANK = 32_000, 8, 64, 128, 16
STUDENT: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
}  # 21 M
TEACHER: dict[str, Any] = {
    "hidden_size": 640,
    "intermediate_size": 1664,
    "num_hidden_layers": 8,
    "num_attention_heads": 10,
}  # 59 M


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def source_text(characters: int = 6_000_000) -> str:
    """Text that every Python brings along: its standard library."""
    text = ""
    for path in sorted(Path(os.__file__).parent.glob("[a-z]*/*.py")):
        if path.parent.name not in ("site-packages", "dist-packages"):
            text += path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= characters:
            break
    return text[:characters]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer, in seconds.

    `save_pretrained` and `load_tokenizer` carry it to other processes.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(source_text().splitlines(keepends=True), trainer)
    assert bpe.get_vocab_size() == VOCAB, (
        f"the standard library gave {bpe.get_vocab_size()} tokens only"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
    )


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def build_model(
    shape: dict[str, Any], tokenizer: PreTrainedTokenizerFast, seed: int
) -> LlamaForCausalLM:
    """Random float32 weights, with the head tied to the embedding."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        **shape,
        num_key_value_heads=shape["num_attention_heads"],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).to(device())  # type: ignore[arg-type]


def prompts(tokenizer: PreTrainedTokenizerFast, n: int) -> list[str]:
    """Cut `n` texts of exactly `PROMPT` tokens out of the source.

    Only texts count that have as many tokens when they are encoded again.
    """
    ids = tokenizer(source_text(PROMPT * n * 40))["input_ids"]
    windows = (
        str(tokenizer.decode(ids[i : i + PROMPT])) for i in range(0, len(ids) - PROMPT, PROMPT)
    )
    fitting = [text for text in windows if len(tokenizer(text)["input_ids"]) == PROMPT]
    assert len(fitting) >= n, f"{len(fitting)} prompts of {PROMPT} tokens, {n} needed"
    return fitting[:n]


@dataclass
class Cost:
    """The cost of a block of code.

    Attributes:
        seconds: CPU seconds of this process; on a GPU, synchronised wall seconds.
        peak_mib: Peak memory above that at the start, in MiB.
        start_mib: Memory at the start, in MiB.
    """

    seconds: float = float("nan")
    peak_mib: float = float("nan")
    start_mib: float = float("nan")


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure a block; the cost is filled in when the block is over.

    Memory on a CPU needs Linux with /proc; elsewhere it stays NaN.
    """
    cost = Cost(start_mib=memory_now())
    began = clock()
    yield cost
    cost.seconds = clock() - began
    cost.peak_mib = _peak() - cost.start_mib


def clock() -> float:
    """Read the clock in seconds: wall time on a GPU, CPU time of this process otherwise."""
    if device().type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def memory_now() -> float:
    """Return the memory in use now, in MiB, and set the high-water mark back to it."""
    return PeakMemory(device()).reset() / 2**20


def _peak() -> float:
    return PeakMemory(device()).read() / 2**20
