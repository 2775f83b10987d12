"""Compare what `opdlab.diagnose.plan` predicts with steps in one, two and three processes.

    python -m benchmarks.scaling          writes benchmarks/results/scaling.json

Three sizes of a random Llama learn from one of their own size, by OPD with a LoRA. On one process
two things are measured: the operations per second of a pass, and the seconds that each written
token costs beside its operations. With these the plan predicts CPU seconds, bytes and memory of
each process for every number of processes. Seconds are CPU seconds of the process, since wall time
says nothing on a machine that others use.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import opdlab as opd
from opdlab.diagnose.cost import BESIDE_TENSORS
from opdlab.diagnose.plan import Device, Efficiency, Work, operations_of_token, plan
from opdlab.diagnose.shapes import Shape, shape_of_config
from opdlab.tasks.market import model
from opdlab.training import phases, processes, run

RESULTS = Path(__file__).parent / "results" / "scaling.json"
SIZES = {"3M": (256, 4), "17M": (512, 5), "54M": (768, 7)}  # hidden size, layers
PROCESSES = (1, 2, 3)
BATCH, NEW, RANK = 6, 16, 8
PHASES = {
    "write_rollout": "write",
    "plan_step": "grade",
    "grade": "grade",
    "accumulate_gradient": "learn",
    "update_weights": "update",
}


def make_policy(size: str) -> opd.Policy:
    """Make a random model that reads the market's tokens."""
    tokenizer = model("student").tokenizer
    torch.manual_seed(0)
    return opd.Policy.of(LlamaForCausalLM(make_config(size, len(tokenizer))), tokenizer, eos=1)


def make_config(size: str, vocab: int) -> LlamaConfig:
    """The configuration of a size."""
    hidden, layers = SIZES[size]
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )


def measure(folder: Path) -> None:
    """Train two steps of every size and write what the second one took: the work of one process."""
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent: dict[str, float] = defaultdict(float)
    sent: list[int] = []
    for name, phase in PHASES.items():
        setattr(run, name, _timed(getattr(run, name), spent, phase))
    add = processes.sum_in_place

    def counted(group: Any, tensors: Any) -> None:
        sent.append(sum(tensor.nbytes for tensor in tensors))
        add(group, tensors)

    phases.sum_in_place = counted
    task, found = opd.tasks.market(), {}
    for size in SIZES:  # from small to large, since only the largest memory so far is known
        student, teacher = make_policy(size), make_policy(size)
        settings = {"batch": BATCH, "max_new_tokens": NEW, "lora": RANK, "steps": 2, "quiet": True}
        training = opd.distill(student, teacher, task, **settings)
        next(training)
        spent.clear()
        sent.clear()
        rollout = next(training).rollout
        found[size] = {
            "seconds": dict(spent),
            "bytes": sum(sent),
            "memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024,
            "rows": len(rollout),
            "prompt": max(map(len, student.encode_all(rollout.prompts))),
            "new": rollout.tokens / len(rollout),
        }
        del student, teacher
    rank = os.environ.get("RANK", "0")
    (folder / f"{rank}.json").write_text(json.dumps(found))
    training.accelerator.end_training()


def _timed(work: Callable[..., Any], spent: dict[str, float], phase: str) -> Callable[..., Any]:
    def wrapped(*args: Any, **options: Any) -> Any:
        began = time.process_time()
        try:
            return work(*args, **options)
        finally:
            spent[phase] += time.process_time() - began

    return wrapped


def run_processes(count: int) -> list[dict[str, Any]]:
    """Measure all sizes in so many processes; one result for each process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={count}", "-m", "benchmarks.scaling", folder]
        env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        subprocess.run(command, env=env, check=True)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]


def predict(shape: Shape, alone: dict[str, Any], count: int) -> dict[str, Any]:
    """Predict one process of `count` from what one process alone showed of its device."""
    work = Work(
        batch=BATCH,
        prompt=alone["prompt"],
        new=NEW,
        lora=RANK,
        micro_batch=BATCH,
        checkpointing=False,
        itemsize=4,
    )
    length = work.prompt + work.new
    graded = BATCH * length * operations_of_token(shape, length / 2) + 2 * shape.head * BATCH * NEW
    compute = graded / alone["seconds"]["grade"]
    device = Device("this CPU", 1e12, compute, 1e10, 1e9, beside=0.0, kind="cpu")
    free = Efficiency(passes=1.0, writing=1.0, overhead=0.0, links=1.0)
    (bare, *_) = plan(shape, shape, 1, device, work, free).plans
    left = max(0.0, alone["seconds"]["write"] - bare.seconds["write"])
    measured = Efficiency(1.0, 1.0, left / (NEW * shape.layers), 1.0)
    (copies, *_) = plan(shape, shape, count, device, work, measured).plans
    seconds = {name: copies.seconds[name] for name in ("write", "grade", "learn", "update")}
    share, least = BESIDE_TENSORS  # what a process keeps on a CPU beside its tensors
    memory = (1 + share) * copies.peak + least
    return {"seconds": seconds, "bytes": 4 * RANK * shape.lora, "memory": memory}


def main() -> None:
    """Measure, predict, and write both."""
    vocab = len(model("student").tokenizer)
    found, alone = [], {}
    for count in PROCESSES:
        parts = run_processes(count)
        for size in SIZES:
            shape = shape_of_config(make_config(size, vocab), size)
            mine = [part[size] for part in parts]
            busiest = max(mine, key=lambda part: sum(part["seconds"].values()))
            alone.setdefault(size, busiest)
            row = {"size": size, "parameters": shape.parameters, "processes": count}
            row |= {"measured": busiest, "predicted": predict(shape, alone[size], count)}
            found.append(row)
            print(json.dumps(row), flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(Path(sys.argv[1]))
    else:
        main()
