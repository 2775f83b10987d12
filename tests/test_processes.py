"""Several processes, as `accelerate launch` and torchrun start them: the update is that of one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from safetensors.torch import load_file

import opdlab as opd

SCRIPT = """
import sys
import opdlab as opd

run = opd.distill(*opd.load("market"), method=opd.SFT(), steps=2, batch=4, seed=3, quiet=True, save=sys.argv[1], save_every=2)
run.train()
assert run.accelerator.num_processes == 2
"""


def test_two_processes_make_the_update_of_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), str(tmp_path / "two")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=2000, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    opd.distill(*opd.load("market"), method=opd.SFT(), steps=2, batch=8, seed=3, quiet=True, save=tmp_path / "one", save_every=2).train()
    one, two = (load_file(tmp_path / n / "step-000002" / "adapter_model.safetensors") for n in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
