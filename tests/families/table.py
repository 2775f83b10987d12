"""Run all checks on all families and write docs/families.md.

The exit code is 1 if a family is wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers
from family_checks import CHECKS, Elsewhere, Family, Refused, make
from family_zoo import FAMILIES

HEAD = """# Model families

This table shows for which families of transformers {version} opdlab gives right numbers. `make
families` measures it on tiny random models (float32, CPU). Each check compares opdlab with plain
passes of the same model: one text at a time, without padding or cache.

- **scoring**: log-probs of texts of different lengths, with and without a shared prompt prefix
- **sampling**: log-probs that the sampler returns, for one and two samples; greedy sampling takes
  the likeliest token
- **early ends**: the same for texts that end at different steps
- **LoRA gradients**, **full gradients**: the engine's gradients against autograd on full logits
- **LoRA steps**: two steps move adapters in attention (or in the layers that take its place) and in
  the MLP, if that has linear layers
- **teacher = student**: the loss is zero
- **full training**: one step on all weights
- **checkpointing**: gradient checkpointing changes no number, or is refused for a family that does
  not support it
- **PEFT file**: PEFT reads the adapter and gives the same log-probs. "not in PEFT" means that PEFT
  cannot read back what it saved itself; `opdlab.resume` can

The column "without" names shortcuts that would change the family's numbers. opdlab does not take
them, and warns of them when a policy is made. A refused family is refused when a policy is made,
for the given reason. The families in the table are examples: opdlab has no list of names, and
checks every model when a policy is made of it.

| family | {columns} | without |
|---|{rules}---|
"""
WITHOUT = {
    "batches": "batches",
    "pads": "padding on the right",
    "pads_left": "padding on the left",
    "caches": "cache",
    "shares_prefix": "shared prefix",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", default=list(FAMILIES), help="families (all by default)"
    )
    parser.add_argument("--out", type=Path, help="file to write (default: print)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    rows, wrong = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names:
            row, faults = check(name, Path(folder))
            rows.append(row)
            wrong += faults
    text = HEAD.format(
        version=transformers.__version__, columns=" | ".join(CHECKS), rules="---|" * len(CHECKS)
    )
    text += "\n".join(rows) + "\n"
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    else:
        print(text)
    sys.exit(1 if wrong else 0)


def check(name: str, folder: Path) -> tuple[str, int]:
    """A family's row of the table and its number of faults, which are printed."""
    began = time.perf_counter()
    family = make(name, folder)
    if not isinstance(family, Family):
        reason = str(family).split(". ")[0].replace("|", "/")
        print(f"{name}: refused", flush=True)
        return f"| {name} | {' | '.join(['–'] * len(CHECKS))} | refused: {reason} |", 0
    cells, faults = [], 0
    for column, test in CHECKS.items():
        try:
            test(family)
            cells.append("✓")
        except Refused:
            cells.append("refused")
        except Elsewhere:
            cells.append("not in PEFT")
        except Exception as error:
            faults += 1
            cells.append("**wrong**")
            print(
                f"{name}: {column}: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                flush=True,
            )
    missing = [
        words
        for field, words in WITHOUT.items()
        if not getattr(family.policy.weights.abilities, field)
    ]
    print(
        f"{name}: {len(CHECKS) - faults} of {len(CHECKS)} right,"
        f" {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return f"| {name} | {' | '.join(cells)} | {', '.join(missing)} |", faults


if __name__ == "__main__":
    main()
