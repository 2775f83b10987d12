"""Measure one case in this process: `python -m benchmarks.gpu.one SIZE TOKENIZER_FOLDER CASE`.

Prints a JSON line: the record, or `failed` with the first line of the error.
"""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.gpu.cases import CASES, World
from benchmarks.gpu.sizes import SIZES
from benchmarks.workload import load_tokenizer


def measure(size: str, folder: str, case: str) -> dict[str, object]:
    """Measure a case.

    Args:
        size: Name of the size.
        folder: Folder of the tokenizer.
        case: Name of the case.

    Returns:
        Its record, or why there is none.
    """
    try:
        return CASES[case].run(World(SIZES[size], load_tokenizer(folder)))
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        return {"failed": f"{type(error).__name__}: {line[:300]}"}


if __name__ == "__main__":
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    print(json.dumps(measure(*sys.argv[1:])))
