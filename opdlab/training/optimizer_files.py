"""Write and read the optimizer's state of a checkpoint: in one file, or in one for each process.

    optimizer.safetensors                     the whole state
    optimizer-00000-of-00002.safetensors      the rows that process 0 of 2 holds, where the
    optimizer-00001-of-00002.safetensors      launcher asks for sharded checkpoints

Tensors are named `kind/parameter`, as `exp_avg/model.norm.weight`. A file of shares says in its
metadata how many rows each whole tensor has. Either kind is read by any number of processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from opdlab.errors import DamagedFile
from opdlab.models.adapters import files as adapter_files
from opdlab.models.shards import whole_tensor
from opdlab.training.processes import AcceleratedProcesses, failing_together
from opdlab.training.state import RunState

WHOLE = "optimizer.safetensors"
_SHARE = re.compile(r"optimizer-\d{5}-of-\d{5}\.safetensors")


def plain_name(name: str, adapter: str | None) -> str:
    """Strip the adapter from a parameter's name: `….lora_A.lora3.weight` gives `….lora_A.weight`.

    Args:
        name: The parameter's name in the model.
        adapter: The adapter's name; None for a model without one.

    Returns:
        The name, which is the same whatever the adapter is called.
    """
    parts = name.removeprefix(adapter_files.PREFIX).replace(".base_layer.", ".").split(".")
    if adapter in parts:
        del parts[len(parts) - 1 - parts[::-1].index(adapter)]
    return ".".join(parts)


def optimizer_tensors(run: RunState) -> dict[str, Tensor]:
    """List the tensors of the optimizer's state by name.

    Args:
        run: The run.

    Returns:
        The tensors themselves: DTensors where the student is sharded.
    """
    names = {id(p): plain_name(name, run.student.adapter) for name, p in run.parameters.items()}
    return {
        f"{key}/{names[id(p)]}": value.detach()
        for p, state in run.optimizer.state.items()
        for key, value in state.items()
    }


def collect(run: RunState, folder: Path) -> Callable[[Path], None]:
    """Collect the optimizer's state for a checkpoint. Of a sharded run, every process calls it.

    Args:
        run: The run, between two steps.
        folder: The run's folder, in which processes leave their shares for the main one.

    Returns:
        Writes the file or files into a folder; for the main process.
    """
    tensors = optimizer_tensors(run)
    if run.sharding is None:
        return lambda place: _write_whole(tensors, place)
    if run.sharding.saves_whole:
        found = {}
        for name, value in tensors.items():  # one after the other, and kept by the main one alone
            whole = whole_tensor(value)
            if run.accelerator.is_main_process:
                found[name] = whole.cpu()
        return lambda place: _write_whole(found, place)
    # A name that `remove_leftovers` knows, and that all processes know.
    shares = folder / f".optimizer.{run.done}.partial"
    processes = AcceleratedProcesses(run.accelerator)
    with failing_together(processes):
        shares.mkdir(parents=True, exist_ok=True)
        _write_share(tensors, shares, processes.index, processes.count)
    return lambda place: _take_shares(shares, place)


def _write_whole(tensors: dict[str, Tensor], place: Path) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, place / WHOLE)


def _write_share(tensors: dict[str, Tensor], place: Path, index: int, count: int) -> None:
    """Write the rows that this process holds; what is not sharded is written by the first one."""
    found, rows = {}, {}
    for name, value in tensors.items():
        if isinstance(value, DTensor):
            found[name], rows[name] = value.to_local().contiguous(), value.shape[0]
        elif index == 0:
            found[name] = value.contiguous()
    path = place / f"optimizer-{index:05d}-of-{count:05d}.safetensors"
    save_file(found, path, metadata={"rows": json.dumps(rows)})
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _take_shares(shares: Path, place: Path) -> None:
    for path in sorted(shares.iterdir()):
        path.rename(place / path.name)
    shutil.rmtree(shares)


class SavedOptimizer:
    """The optimizer's state in a checkpoint, read one tensor at a time.

    Args:
        folder: The checkpoint's folder.

    Attributes:
        path: The file, or the first of several, for errors.
        shapes: Empty tensors of the saved shapes by name, on torch's device "meta".

    Raises:
        DamagedFile: A file is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        shares = sorted(path for path in folder.glob("optimizer-*") if _SHARE.fullmatch(path.name))
        self.path = shares[0] if shares else folder / WHOLE
        self.shapes: dict[str, Tensor] = {}
        self._files: dict[str, list[Any]] = {}  # which files hold rows of a tensor, in order
        rows: dict[str, int] = {}
        try:
            for path in shares or [self.path]:
                file: Any = safe_open(path, framework="pt")
                rows |= json.loads((file.metadata() or {}).get("rows", "{}"))
                for name in file.keys():  # noqa: SIM118 (the file is no dict)
                    self._files.setdefault(name, []).append(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(f"{path} cannot be read ({error}).") from error
        for name, files in self._files.items():
            parts = [file.get_slice(name).get_shape() for file in files]
            shape = parts[0]
            if name in rows:
                shape = [sum(part[0] for part in parts), *shape[1:]]
                if shape[0] != rows[name]:
                    raise _damaged(
                        f"The files beside {self.path} hold {shape[0]} rows of {name}, which has"
                        f" {rows[name]}."
                    )
            self.shapes[name] = torch.empty(shape, device="meta")

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: One of `shapes`.

        Returns:
            The whole tensor, on the CPU.
        """
        parts = [file.get_tensor(name) for file in self._files[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _damaged(said: str) -> DamagedFile:
    return DamagedFile(f"{said} Resume from an earlier checkpoint: step=N.")
