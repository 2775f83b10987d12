"""Train a LoRA on SmolLM2 for one step, and take the run up for another.

Run by `test_sharding.py` in two processes: `sharded_small.py FOLDER`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

import opdlab as opd

torch.set_num_threads(1)
OPTIONS = {"batch": 2, "max_new_tokens": 4, "seed": 3, "lr": 1e-3, "quiet": True}


def main(folder: Path) -> opd.Run:
    """Train two steps, with a new start between them.

    Returns:
        The second run.
    """
    base, teacher, task = opd.load("small")
    # Shards run the shared beginning of prompts for each of them, so the whole model does here too:
    # Adam would make steps of the difference in rounding.
    base.weights.abilities = replace(base.weights.abilities, shares_prefix=False)
    opd.distill(base.frozen(), teacher, task, steps=1, save=folder, **OPTIONS).train()
    return opd.resume(folder, base.frozen(), teacher, task, steps=2, quiet=True).train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
