"""Compare vLLM in this process with the student's own loop: seconds per sampling, and the gap.

Both write the same number of tokens after the same prompts with the same LoRA, on this machine's
CPU or GPU. Each case runs in a process of its own, and the cases take turns. Seconds are wall
seconds of one `sample` call after a first one that warms up, so an idle machine is needed. `update`
is the time to hand the next adapter over. The gap is log p(y) − log s(y) in nats, with p of the
trainer and s of the sampler, over all sampled tokens.

It runs where vLLM is installed (`make .venv-vllm/vllm.done`):

    .venv-vllm/bin/python -m benchmarks.vllm

writes `benchmarks/results/vllm.json`; with the name of a case it runs one and prints a JSON line.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import opdlab as opd
from opdlab.data.rollout import Rollout
from opdlab.tasks.by_name import load_model

RESULTS = Path(__file__).parent / "results" / "vllm.json"
REPEATS = 3
SIZES = {"market": ("student", 64, 16), "small": ("small", 16, 64)}  # model, prompts, new tokens
SAMPLERS = ("own loop", "vLLM float32", "vLLM bfloat16")
CASES = [f"{size}, {sampler}" for size in SIZES for sampler in SAMPLERS]


def run_case(case: str) -> dict[str, Any]:
    """Measure one case.

    Args:
        case: A name of `CASES`.

    Returns:
        The tokens of a sampling, its seconds, the seconds of an update, and the gap.
    """
    size, _, sampler = case.partition(", ")
    name, prompts, new_tokens = SIZES[size]
    student = load_model(name, dtype="float32").adapt(16)
    move_adapter(student)
    questions = [opd.Prompt(f"Write about the number {i}.") for i in range(prompts)]
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    writer: Any = student
    found: dict[str, Any] = {"case": case, "threads": torch.get_num_threads()}
    if sampler != "own loop":
        began = time.perf_counter()
        writer = opd.samplers.VLLM(
            dtype=sampler.partition(" ")[2], kv_cache_memory_bytes=2**29, max_num_seqs=prompts
        )
        writer.start(student)
        found["start_s"] = time.perf_counter() - began
    seconds, updates = [], []
    rollout = writer.sample(questions, seed=0, **options)
    for seed in range(1, REPEATS + 1):
        began = time.perf_counter()
        rollout = writer.sample(questions, seed=seed, **options)
        seconds.append(time.perf_counter() - began)
        if sampler != "own loop":
            move_adapter(student, seed)
            began = time.perf_counter()
            writer.update(student, seed)
            updates.append(time.perf_counter() - began)
            rollout = writer.sample(questions, seed=seed, **options)
    found |= {"tokens": rollout.tokens, "seconds": seconds, "update_s": updates}
    found |= measure_gap(student, rollout)
    if sampler != "own loop":
        writer.close()
    return found


def move_adapter(student: opd.Policy, seed: int = 0) -> None:
    """Move the adapter a little away from where it is, as training does."""
    generator = torch.Generator().manual_seed(seed)
    state = student.weights.adapter_state(student.adapter)
    moved = {k: v + 0.01 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
    student.weights.set_adapter_state(student.adapter, moved)


def measure_gap(student: opd.Policy, rollout: Rollout) -> dict[str, float]:
    """Compare the sampler's log-probs of its tokens with the trainer's.

    Args:
        student: The policy that is trained.
        rollout: What the sampler wrote, with its log-probs.

    Returns:
        Mean and maximum of the absolute difference, in nats.
    """
    token = rollout.ids[rollout.mask]
    mine = student.log_probs(rollout)[torch.arange(len(token)), token]
    gap = (mine - rollout.logp[rollout.mask]).abs()
    return {"gap_mean": float(gap.mean()), "gap_max": float(gap.max())}


def main() -> None:
    """Run all cases, or the one that is named."""
    if len(sys.argv) > 1:
        print(json.dumps(run_case(sys.argv[1])))
        return
    results = []
    for case in CASES:
        ran = subprocess.run(
            [sys.executable, "-m", "benchmarks.vllm", case],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        if ran.returncode != 0:
            raise SystemExit(ran.stderr[-3000:])
        found = json.loads(ran.stdout.splitlines()[-1])
        found["tokens_per_second"] = found["tokens"] / min(found["seconds"])
        results.append(found)
        print(
            f"{case}: {found['tokens_per_second']:.0f} tokens/s, gap"
            f" {found['gap_mean']:.1e} (max {found['gap_max']:.1e}), update"
            f" {statistics.median(found['update_s'] or [0]):.2f} s"
        )
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
