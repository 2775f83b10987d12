"""A run in several processes, one of which is ended: `ended_run.py FOLDER RANK HOW STEP SHARE`.

Process RANK is ended once STEP steps are done and a SHARE of the next one is under way: HOW is the
number of a signal, or `raise`. With HOW `never` the run is taken up where it stopped, or begins.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import ClassVar

import torch

import opdlab as opd

torch.set_num_threads(1)
STEPS = 5
SETTINGS = {"steps": STEPS, "batch": 4, "max_new_tokens": 12, "seed": 3, "lr": 1e-3, "quiet": True}


class Fails(opd.OPD):
    """OPD whose loss raises in one process."""

    now: ClassVar[bool] = False

    def loss(self, rows):
        if Fails.now:
            raise ValueError("the loss of this process failed")
        return super().loss(rows)


def main(folder: Path, rank: int, how: str, step: int, share: float) -> None:
    """Train until this process is ended, or to the end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
    student, teacher, task = opd.load("market")
    if how == "never" and list(folder.glob("step-*")):
        opd.resume(folder, student, teacher, task, quiet=True).train()
        return
    method = Fails() if how == "raise" else opd.OPD()
    options = {**SETTINGS, "save": folder, "save_every": 1}
    run = opd.distill(student, teacher, task, method=method, **options)
    if run.accelerator.process_index == rank and how != "never":
        for _ in range(step):
            next(run)
        usual = run.metrics[-1]["seconds"] if run.metrics else 1.0
        if how == "raise":
            Fails.now = True
        else:
            end = threading.Timer(share * usual, os.kill, [os.getpid(), int(how)])
            end.daemon = True
            end.start()
    run.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
