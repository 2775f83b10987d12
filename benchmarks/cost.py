"""Compare the predicted cost of a step with a real one: seconds by phase, and memory at the peak.

Three pairs of models are built from configurations, with random weights and vocabularies of real
sizes, on this machine's CPU. Each case runs in a process of its own, which first predicts
(`opdlab.diagnose.cost`) and then trains, so both see the same load. Memory is the largest resident
size of the process less that before the models were made.

With one thread (OMP_NUM_THREADS=1) seconds are those of the CPU, which other work on the machine
does not stretch.

`python -m benchmarks.cost` runs all cases and writes `benchmarks/results/cost.json`;
`python -m benchmarks.cost CASE` runs one and prints a JSON line.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import peft  # noqa: F401 (its size is not that of a step)
import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

import opdlab as opd
from opdlab.diagnose.cost import Cost, cost
from opdlab.training.settings import Settings

RESULTS = Path(__file__).parent / "results" / "cost.json"
STEPS = 4  # the first is left out of the seconds: it also makes the optimizer's moments
NEW, PROMPT = 24, 40  # tokens of a text, and of a prompt about
SIZES: dict[str, tuple[type, dict[str, int], int]] = {  # configuration, student, teacher's layers
    "5M": (
        LlamaConfig,
        {
            "vocab_size": 8192,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
        },
        8,
    ),
    "30M": (
        Qwen2Config,
        {
            "vocab_size": 49152,
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
        },
        12,
    ),
    "135M": (
        LlamaConfig,
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
        40,
    ),
}
BATCHES = {"5M": 16, "30M": 8, "135M": 4}
CASES = [f"{size} {weights}" for size in SIZES for weights in ("LoRA", "all weights")]


class Memory:
    """The largest resident size of this process, looked at every few milliseconds.

    Attributes:
        peak: The largest size since the last `start`, in bytes.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._process = psutil.Process()
        threading.Thread(target=self._look, daemon=True).start()

    @property
    def now(self) -> int:
        """The resident size now, with freed pages given back to the system first."""
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return int(self._process.memory_info().rss)

    def start(self) -> None:
        """Forget the peak so far."""
        self.peak = 0

    def _look(self) -> None:
        while True:
            self.peak = max(self.peak, self._process.memory_info().rss)
            time.sleep(0.005)


def make_policy(size: str, layers: int | None, seed: int) -> opd.Policy:
    """Build a random model of a size, with one word for each id of its vocabulary.

    Args:
        size: A name of `SIZES`.
        layers: Number of layers in place of the configuration's.
        seed: Seed of the weights.

    Returns:
        The policy.
    """
    kind, sizes, _ = SIZES[size]
    names = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, sizes["vocab_size"]))]
    vocab = {name: i for i, name in enumerate(names)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    changes = {} if layers is None else {"num_hidden_layers": layers}
    config = kind(**{**sizes, **changes}, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(seed)
    return opd.Policy.of(AutoModelForCausalLM.from_config(config), tokenizer)


def make_prompts(size: str, count: int) -> list[opd.Prompt]:
    """Make prompts of `PROMPT` random words.

    Args:
        size: A name of `SIZES`.
        count: Number of prompts.

    Returns:
        The prompts.
    """
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(3, SIZES[size][1]["vocab_size"], (count, PROMPT), generator=seeded)
    return [opd.Prompt(" ".join(f"w{i}" for i in row), id=str(n)) for n, row in enumerate(ids)]


def measure(case: str) -> dict[str, Any]:
    """Predict a case, then train it for some steps.

    Args:
        case: A name of `CASES`.

    Returns:
        Predicted and real seconds by phase and bytes at the peak, and their ratios.
    """
    if torch.get_num_threads() == 1:
        time.perf_counter = time.process_time
    size, weights = case.split(" ", 1)
    lora = 16 if weights == "LoRA" else None
    memory = Memory()
    before = memory.now
    student, teacher = make_policy(size, None, 0), make_policy(size, SIZES[size][2], 1)
    asked = make_prompts(size, 64)
    task = opd.Task("words", lambda n, seed, split: (asked * n)[:n])
    options = {"batch": BATCHES[size], "max_new_tokens": NEW, "lora": lora, "steps": STEPS}
    predicted = predict(student, teacher, asked, Settings(**options))
    held = memory.now
    memory.start()
    run = opd.distill(student, teacher, task, quiet=True, **options)
    began = time.perf_counter()
    run.train()
    took = time.perf_counter() - began
    peak = memory.peak - before
    real = {
        name: statistics.median(row[f"{key}_s"] for row in run.metrics[1:])
        for name, key in (("write", "generate"), ("grade", "grade"), ("learn", "learn"))
    }
    step = statistics.median(row["seconds"] for row in run.metrics[1:])
    return {
        "case": case,
        "parameters": sum(p.numel() for p in student.weights.model.parameters()),
        "predicted_s": {**predicted.seconds, "step": predicted.step},
        "real_s": {**real, "step": step},
        "predicted_bytes": predicted.peak,
        "real_bytes": peak,
        "models_bytes": held - before,
        "seconds_ratio": predicted.step / step,
        "memory_ratio": predicted.peak / peak,
        "train_s": took,
    }


def predict(
    student: opd.Policy, teacher: opd.Policy, asked: list[opd.Prompt], settings: Settings
) -> Cost:
    """Predict the cost of a step from a few texts, as the doctor does.

    Args:
        student: The policy that will train.
        teacher: The policy that will grade.
        asked: Prompts.
        settings: The settings of the run.

    Returns:
        The prediction.
    """
    rollout = student.sample(asked[:2], 8, max_new_tokens=settings.max_new_tokens, seed=0)
    return cost(student, teacher, rollout, settings)


def show_table(rows: list[dict[str, Any]]) -> str:
    """Show the results as a table in Markdown.

    Args:
        rows: What `measure` gave for each case.

    Returns:
        The table.
    """
    lines = [
        "| case | predicted: write, grade, learn = step | real | ratio | memory predicted | real |"
        " ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        guess, real = row["predicted_s"], row["real_s"]
        parts = [
            f"{one['write']:.2f}, {one['grade']:.2f}, {one['learn']:.2f} = {one['step']:.2f} s"
            for one in (guess, real)
        ]
        sizes = [f"{row[key] / 2**20:,.0f} MiB" for key in ("predicted_bytes", "real_bytes")]
        lines.append(
            f"| {row['case']} | {parts[0]} | {parts[1]} | {row['seconds_ratio']:.2f} | {sizes[0]} |"
            f" {sizes[1]} | {row['memory_ratio']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run one case, or all of them in processes of their own."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    rows = []
    for case in CASES:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.cost", case],
            check=True,
            capture_output=True,
            text=True,
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(show_table(rows[-1:]).splitlines()[-1], flush=True)
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(show_table(rows))


if __name__ == "__main__":
    main()
