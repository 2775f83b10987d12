"""A process of several that is killed, interrupted or fails ends all, and nothing is lost."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import ended_run
import pytest
import torch
from safetensors.torch import load_file
from test_processes import launched, run_processes

import opdlab as opd

SCRIPT = Path(ended_run.__file__)
LAST = f"step-{ended_run.STEPS:06d}"
# Seconds in which all have ended; idle machines need fewer than 10, and the promise is 60.
LIMIT = 600
ENDS = {
    "killed": (str(int(signal.SIGKILL)), "Signal 9 (SIGKILL)"),
    "interrupted": (str(int(signal.SIGINT)), "KeyboardInterrupt"),
    "failed": ("raise", "the loss of this process failed"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The run in one process that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    opd.distill(*opd.load("market"), method=opd.OPD(), save=folder, **ended_run.SETTINGS).train()
    return folder


@pytest.mark.parametrize(("how", "rank"), [("killed", 1), ("interrupted", 0), ("failed", 1)])
def test_one_ends_all_with_the_reason_and_loses_nothing(how, rank, undisturbed, tmp_path):
    number, reason = ENDS[how]
    chance = random.SystemRandom()
    moment = (chance.randint(0, ended_run.STEPS - 2), chance.uniform(0, 1))
    began = time.monotonic()
    done = run_processes(SCRIPT, 2, tmp_path, rank, number, *moment)
    assert done.returncode != 0, moment
    assert reason in done.stderr, (moment, done.stderr[-3000:])
    assert time.monotonic() - began < LIMIT, moment
    if how != "killed":
        return
    launched(SCRIPT, 2, tmp_path, 0, "never", 0, 0)
    ours, theirs = (
        load_file(folder / LAST / "adapter_model.safetensors") for folder in (tmp_path, undisturbed)
    )
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-3, atol=0.05 * ended_run.SETTINGS["lr"], msg=str(moment)
        )
