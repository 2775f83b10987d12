"""Several processes, as `accelerate launch` and torchrun start them: the update is that of one
process with the whole batch.
"""

from __future__ import annotations

import os
import re
import subprocess

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from warm_start import python

import opdlab as opd

SCRIPT = """
import sys
import opdlab as opd

options = {"steps": 2, "batch": 8, "seed": 3, "quiet": True, "save": sys.argv[1], "save_every": 2}
run = opd.distill(*opd.load("market"), method=opd.SFT(), **options).train()
assert run.accelerator.num_processes == 2
"""


Histories = dict[float, tuple[pd.DataFrame, pd.DataFrame]]

MEASURED = """
import sys
from dataclasses import dataclass
from typing import ClassVar

import opdlab as opd

student, teacher, _ = opd.load("market")
words = "total 4 7 . 8 5 + 3 9 = 2 1 ; 6 6".split()
records = [
    {"prompt": f"ana has {i} 7 apples", "answer": " ".join(words[: 1 + i]), "id": str(i)}
    for i in range(10)
]


def verify(prompt, text):
    return int(prompt.id) / 10


task = opd.tasks.from_records(records, test=0, verify=verify, max_new_tokens=4)


@dataclass(frozen=True)
class Given(opd.OPD):
    writer: ClassVar[str] = "answer"


batch, processes = int(sys.argv[2]), int(sys.argv[3])
options = {"steps": 3, "batch": batch, "micro_batch": 3, "lr": 1e-3, "seed": 3, "quiet": True}
for own in (0.0, 0.2, 1.0):
    method = Given(on_policy=own)
    run = opd.distill(student.frozen(), teacher, task, method=method, **options).train()
    assert run.accelerator.num_processes == processes
    if run.accelerator.is_main_process:
        run.history.to_json(f"{sys.argv[1]}-{own}.json")
"""


def run_processes(
    script, processes: int, *arguments: object, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [
        python(),
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        str(script),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    env |= {"PYTHON_EXEC": python(), **(variables or {})}  # what torchrun starts
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=1200,
        env=env,
        check=False,
    )


def launched(
    script, processes: int, *arguments: object, variables: dict[str, str] | None = None
) -> str:
    done = run_processes(script, processes, *arguments, variables=variables)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def histories(tmp_path_factory) -> Histories:
    """By the share of prompts that the student answers: the histories of one and of two processes
    with the same batch of 8.
    """
    folder = tmp_path_factory.mktemp("measured")
    script = folder / "measure.py"
    script.write_text(MEASURED)
    for processes in (1, 2):
        launched(script, processes, folder / str(processes), 8, processes)
    return {
        own: tuple(pd.read_json(folder / f"{processes}-{own}.json") for processes in (1, 2))
        for own in (0.0, 0.2, 1.0)
    }


def test_the_history_of_two_processes_is_that_of_one(histories):
    """With texts of 2 to 11 tokens: a mean of the processes' means would differ, as would the first
    process's own share.
    """
    one, two = histories[0.0]
    names = [
        "step",
        "loss",
        "reverse_kl",
        "entropy",
        "length",
        "cut",
        "empty",
        "tokens",
        "grad_norm",
        "lr",
    ]
    assert set(names) < set(one)
    assert one["tokens"].nunique() > 1
    for name in names:
        assert two[name].tolist() == pytest.approx(one[name].tolist(), rel=1e-4), name
    assert "reward" not in two


def test_rewards_are_means_over_the_batch_of_all_processes(histories):
    one, two = histories[1.0]
    assert two["reward"].tolist() == pytest.approx(one["reward"].tolist())
    assert one["reward"].nunique() > 1


def test_a_mixed_batch_has_no_reward_in_any_process(histories):
    one, two = histories[0.2]
    assert "reward" not in one
    assert "reward" not in two


def test_two_processes_make_the_update_of_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launched(script, 2, tmp_path / "two")
    opd.distill(
        *opd.load("market"),
        method=opd.SFT(),
        steps=2,
        batch=8,
        seed=3,
        quiet=True,
        save=tmp_path / "one",
        save_every=2,
    ).train()
    one, two = (
        load_file(tmp_path / n / "step-000002" / "adapter_model.safetensors")
        for n in ("one", "two")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


STATISTICS = """
import sys
import torch
import opdlab as opd

student, teacher, task = opd.load("market")
seen = {}


def plan(batch):
    values = batch.rollout.logp
    everyone = batch.gather(values)
    seen["mean"] = float(batch.mean(values))
    seen["median"] = float(everyone.quantile(0.5, interpolation="nearest"))
    seen["count"] = float(len(everyone))
    seen["none"] = float(len(batch.gather(values, torch.zeros_like(batch.mask))))
    return {}


method = opd.method(needs=("teacher",), plan=plan)(lambda rows: -rows.logp)
processes = int(sys.argv[2])
records = [
    {"prompt": prompt.messages, "answer": prompt.answer[: 4 + 3 * i], "id": str(i)}
    for i, prompt in enumerate(task.prompts(8))
]
answers = opd.tasks.from_records(records, test=0)


class Given(type(method)):
    on_policy, writer = 0.0, "answer"


given = Given(method.function, method.needs, method.planner)
options = {"steps": 1, "batch": 8, "seed": 1, "quiet": True}
run = opd.distill(student, teacher, answers, method=given, **options)
step = next(run)
lengths = step.rollout.lengths.tolist()
told = f"SEEN {run.accelerator.process_index} {sorted(seen.items())} {len(lengths)} "
sys.stdout.write(told + chr(10))
"""


def test_statistics_of_a_plan_are_those_of_all_processes(tmp_path):
    """A mean, a quantile and a count over texts of different length, in each of two processes."""
    script = tmp_path / "global_means.py"
    script.write_text(STATISTICS)
    said = {n: launched(script, n, "-", n) for n in (1, 2)}
    # Two processes may print on one line.
    lines = {n: re.findall(r"SEEN \d+ \[[^]]*\] \d+", out) for n, out in said.items()}
    assert len(lines[1]) == 1
    assert len(lines[2]) == 2
    numbers = [line.split(" ", 2)[2].rpartition(" ")[0] for line in lines[1] + lines[2]]
    assert len(set(numbers)) == 1, numbers
    assert {line.rpartition(" ")[2] for line in lines[2]} == {"4"}
