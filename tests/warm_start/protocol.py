"""What client and server tell each other: one request, then the number and the end of a process."""

from __future__ import annotations

import os

# Variables that libraries read while they are loaded. A program that is to see others than the
# server did is run by Python itself.
AT_LOADING = (
    "HF_",
    "HOME",
    "HUGGINGFACE_",
    "KMP_",
    "LD_",
    "MKL_",
    "OMP_",
    "OPENBLAS_",
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTORCH_",
    "TORCH_",
    "TRANSFORMERS_",
    "XDG_",
)
LATER = ("TORCH_NCCL_",)  # read when processes meet


def at_loading(variables: dict[str, str]) -> dict[str, str]:
    """Choose the variables that libraries read while they are loaded."""
    return {
        name: value
        for name, value in variables.items()
        if name.startswith(AT_LOADING) and not name.startswith(LATER)
    }


def can_run(arguments: list[str]) -> bool:
    """Say whether the arguments are of a kind that the server runs: -c, -m or a file."""
    rest = [word for word in arguments[:1] if word == "-u"]
    first = arguments[len(rest) :][:1]
    return bool(first) and (first[0] in ("-c", "-m") or os.path.isfile(first[0]))
