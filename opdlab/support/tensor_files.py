"""Read files of named tensors, and fit them to the tensors that they are for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from opdlab.errors import DamagedFile


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file.

    Args:
        path: A safetensors file.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        DamagedFile: It cannot be read.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DamagedFile(
            f"{path} cannot be read ({error}). Resume from an earlier checkpoint: step=N."
        ) from error


def check_same_tensors(
    there: Mapping[str, Tensor], values: Mapping[str, Tensor], path: Path
) -> None:
    """Refuse saved tensors that are not those of the run, name by name and shape by shape.

    Args:
        there: The tensors of the run.
        values: The saved tensors.
        path: Their file, for errors.

    Raises:
        DamagedFile: Names the first tensor that is missing, unknown or of another shape.
    """
    if missing := sorted(there.keys() - values.keys()):
        raise DamagedFile(
            f"{path} has nothing for {missing[0]} ({len(missing)} of {len(there)} tensors are"
            " missing). It does not fit this run."
        )
    if unknown := sorted(values.keys() - there.keys()):
        raise DamagedFile(
            f"{path} holds {unknown[0]}, which this run does not have ({len(unknown)} such"
            " tensors). It does not fit this run."
        )
    for name, value in values.items():
        if value.shape != there[name].shape:
            raise DamagedFile(
                f"{path} holds {name} of shape {list(value.shape)}, but the run has"
                f" {list(there[name].shape)}. It does not fit this run."
            )


def copy_tensors(there: Mapping[str, Tensor], values: Mapping[str, Tensor], path: Path) -> None:
    """Copy saved tensors into those of the run, all of them or none.

    Args:
        there: The tensors of the run, which are written to.
        values: The saved tensors.
        path: Their file, for errors.

    Raises:
        DamagedFile: They do not fit; see `check_same_tensors`.
    """
    check_same_tensors(there, values, path)
    with torch.no_grad():
        for name, value in values.items():
            there[name].copy_(value)
