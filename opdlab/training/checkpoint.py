"""Checkpoints: complete or absent, checked on reading, and exact.

    run/step-000020/
        adapter_model.safetensors, adapter_config.json       what PEFT reads, or, in full training,
        model.safetensors, config.json, tokenizer.json …     what transformers reads
        optimizer.safetensors, or one for each process       opdlab.training.optimizer_files
        ema.safetensors                                      where a method needs `ema`
        method.safetensors                                   where a method keeps a state
        ahead.safetensors, ahead.json                        texts that were written ahead
        run.json, history.json
        manifest.json                                        a checksum of every file
    run/snapshots/
        the adapters kept by snapshot_every; run.json names those of its run, with checksums

A checkpoint is written beside its final name and renamed. Nothing is pickled. No random state is
needed, since every step makes its own. `opdlab.training.resuming` takes a run up again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from opdlab.errors import DamagedFile, OpdlabError
from opdlab.models import model_files
from opdlab.models.adapters import files as adapter_files
from opdlab.models.policy import Policy
from opdlab.support.files import write_file
from opdlab.support.tensor_files import check_same_tensors, copy_tensors, read_tensors
from opdlab.support.version import VERSION
from opdlab.training import ahead, method_state, run_folder
from opdlab.training.resolution import trained_tensors
from opdlab.training.state import RunState

_EARLIER = "Resume from an earlier one: opdlab.resume(path, …, step=N)."
# Of run.json; files without it are of the first. Up to the second, a run's `batch` counted the
# prompts of each process; now it counts those of all processes.
FORMAT = 3


def write_checkpoint(run: RunState, folder: Path, write_optimizer: Callable[[Path], None]) -> Path:
    """Save `run` as `folder/step-NNNNNN`.

    A crash at any moment leaves either the complete checkpoint or none under that name.

    Args:
        run: The run, between two steps.
        folder: The run's folder; it is made if it is missing.
        write_optimizer: Writes the optimizer's state, as `optimizer_files.collect` makes it.

    Returns:
        The path of the checkpoint.

    Raises:
        OpdlabError: The folder holds checkpoints of another run.
    """
    run_folder.check_owner(folder, run.lineage)
    final = folder / f"step-{run.done:06d}"
    partial = folder / f".{final.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(run, partial)
        write_optimizer(partial)
        for average in run.averages:
            save_file(_make_contiguous(trained_tensors(average)), partial / "ema.safetensors")
        method_state.write_state(run.method, partial)
        ahead.write_ahead(run, partial)
        _write_json(partial / "run.json", _describe(run, folder))
        _write_json(partial / "history.json", run.metrics)
        _write_json(partial / "manifest.json", _checksums_of(partial))
        _flush_files(partial)
        if final.exists():  # the same step saved twice: make room, then take the name
            final.rename(folder / f".{final.name}.{os.getpid()}.old")
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder / f".{final.name}.{os.getpid()}.old", ignore_errors=True)
    return final


def update_history(run: RunState, step: Path) -> None:
    """Write what was measured after the checkpoint of this step: an evaluation that came later.

    At every moment the manifest fits the files: it allows the old and the new history while one
    replaces the other.

    Args:
        run: The run, whose metrics are written.
        step: The folder of the checkpoint.

    Raises:
        DamagedFile: The checkpoint's manifest cannot be read.
    """
    history = json.dumps(run.metrics, indent=1).encode()
    manifest = _read_manifest(step)
    new = hashlib.sha256(history).hexdigest()
    both = [*manifest["history.json"], new]  # several old ones: an earlier update was cut short
    _replace_json(step / "manifest.json", {**manifest, "history.json": both})
    write_file(step / "history.json", history, flush=True)
    _replace_json(step / "manifest.json", {**manifest, "history.json": new})


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """Find the checkpoint of a step, or the one written last, and verify its checksums.

    Args:
        path: A run's folder, or one checkpoint, which is then the answer.
        step: The step to look for in a run's folder; the one written last by default.

    Returns:
        The checkpoint's folder.

    Raises:
        OpdlabError: There is no such checkpoint. The message lists those that there are.
        DamagedFile: A file is missing or not what was written.
    """
    if (path / "manifest.json").exists():
        return _verify(path)
    there = run_folder.list_checkpoints(path)
    wanted = there if step is None else [saved for saved in there if saved.step == step]
    if step is None:
        wanted = _without_empty(wanted)
    if not wanted:
        names = ", ".join(sorted(saved.path.name for saved in there)) or "none"
        raise OpdlabError(
            f"{path} holds no checkpoint{'' if step is None else f' of step {step}'}; there are"
            f" {names}."
        )
    return _verify(wanted[-1].path)


def _without_empty(there: list[run_folder.Saved]) -> list[run_folder.Saved]:
    """Leave out newest checkpoints that hold nothing, with a warning, where there are older ones.

    A power cut can leave such a folder: its name is on the disk and its files are not.
    """
    left = list(there)
    while len(left) > 1 and _is_empty(left[-1].path):
        left.pop()
    if len(left) < len(there):
        empty = ", ".join(saved.path.name for saved in there[len(left) :])
        warnings.warn(
            f"{empty} in {there[-1].path.parent} holds no complete checkpoint, as after a power"
            f" cut. {left[-1].path.name} is taken instead.",
            stacklevel=5,
        )
    return left


def _is_empty(folder: Path) -> bool:
    manifest = folder / "manifest.json"
    return not manifest.is_file() or not manifest.stat().st_size


def load_weights(student: Policy, folder: Path) -> None:
    """Put a checkpoint's weights into a policy.

    The policy has the same adapter, or the same model in full training.

    Args:
        student: The policy that gets the weights.
        folder: The checkpoint's folder.

    Raises:
        DamagedFile: A file cannot be read, or its tensors do not fit the policy.
    """
    if (folder / "adapter_model.safetensors").exists():
        path, state, saved = (
            folder / "adapter_model.safetensors",
            read_adapter(folder),
            _read_embeddings(folder),
        )
        there = model_files.embeddings(student.weights, saved)
        check_same_tensors(student.weights.adapter_state(str(student.adapter)), state, path)
        copy_tensors(there, saved, path)
        student.weights.set_adapter_state(str(student.adapter), state)
    else:
        values = model_files.read_model(student.weights, folder)
        copy_tensors(model_files.own_tensors(student.weights), values, folder / "model.safetensors")


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint's adapter, as `Weights.set_adapter_state` takes them.

    Args:
        folder: The checkpoint's folder.

    Returns:
        Tensors by name, without the embeddings that lie beside the adapter in the file.
    """
    beside = _names_beside(folder)
    return {name: value for name, value in _read_adapter_file(folder).items() if name not in beside}


def _read_embeddings(folder: Path) -> dict[str, Tensor]:
    """The model's own embeddings beside the adapter, where the vocabulary was resized."""
    beside = _names_beside(folder)
    return {name: value for name, value in _read_adapter_file(folder).items() if name in beside}


def _read_adapter_file(folder: Path) -> dict[str, Tensor]:
    tensors = read_tensors(folder / "adapter_model.safetensors")
    return {name.removeprefix(adapter_files.PREFIX): value for name, value in tensors.items()}


def _names_beside(folder: Path) -> set[str]:
    return set(read_json(folder / "run.json").get("embeddings", ()))


def _make_contiguous(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in values.items()}


def _write_weights(run: RunState, folder: Path) -> None:
    weights, name = run.student.weights, run.student.adapter
    if name is None:
        model_files.write_model(weights, folder)
        return
    state = {**_new_embeddings(run), **weights.adapter_state(name)}
    adapter_files.write(folder, weights.config_of(name), state, weights.source or None)


def _new_embeddings(run: RunState) -> dict[str, Tensor]:
    """Embeddings that neither a file of the base model nor the adapter holds."""
    weights, name = run.student.weights, run.student.adapter
    if name is None or not run.has_new_embeddings:
        return {}
    trained = weights.adapter_state(name)
    return {
        key: value for key, value in model_files.embeddings(weights).items() if key not in trained
    }


def _describe(run: RunState, folder: Path) -> dict[str, Any]:
    identity = run.identity
    name = type(run.method).__name__
    return {
        "format": FORMAT,
        "step": run.done,
        "settings": asdict(run.settings),
        "student": run.student.weights.source,
        "task": run.task.name,
        "tokenizer": identity["tokenizer"]["vocabulary"],
        "method": {"name": name, "options": identity["method"]["options"]},
        "identity": identity,
        "moved": run.memory.moved(),
        "forgotten": run.memory.forgotten(),
        "run": {
            "name": run.lineage.name,
            "root": run.lineage.family,
            "ancestors": dict(run.lineage.ancestors),
            "serial": run_folder.next_serial(folder),
        },
        "embeddings": sorted(_new_embeddings(run)),
        "processes": run.accelerator.num_processes,
        "sharded": run.sharding is not None,
        "snapshots": _write_snapshots(run, folder / "snapshots"),
        "opdlab": VERSION,
        "torch": torch.__version__,
    }


def _write_snapshots(run: RunState, folder: Path) -> dict[str, dict[str, str]]:
    """Save the snapshots that are not saved yet, and return all their files by step.

    Equal snapshots share a file; different ones never do.
    """
    found = {}
    for step, state in sorted(run.snapshots.items()):
        data = save(_make_contiguous(state))
        checksum = hashlib.sha256(data).hexdigest()
        path = folder / f"step-{step:06d}-{checksum[:12]}.safetensors"
        if not path.exists():
            folder.mkdir(exist_ok=True)
            write_file(path, data, flush=True)
        found[str(step)] = {"file": path.name, "checksum": checksum}
    return found


def read_snapshot(path: Path, checksum: str) -> dict[str, Tensor]:
    """Read the tensors of one snapshot.

    Args:
        path: The snapshot's file.
        checksum: The SHA-256 that the file must have.

    Returns:
        The adapter's tensors by name.

    Raises:
        DamagedFile: The file is missing, not what was written, or cannot be read.
    """
    if not path.exists() or _checksum_of(path) != checksum:
        raise DamagedFile(f"{path} is missing or not what was written.")
    return read_tensors(path)


def _checksums_of(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _checksum_of(path) for path in files}


def _verify(folder: Path) -> Path:
    """Return the folder if every file in it is what was written; raise DamagedFile if not."""
    manifest = _read_manifest(folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name in sorted(files - set(manifest) - {"manifest.json"}):
        if not Path(name).name.startswith("."):  # left by an update of the history that was cut
            raise DamagedFile(f"{folder / name} is not in the manifest. {_EARLIER}")
    for name, allowed in manifest.items():
        if name not in files or _checksum_of(folder / name) not in allowed:
            raise DamagedFile(f"{folder / name} is missing or not what was written. {_EARLIER}")
    return folder


def _read_manifest(folder: Path) -> dict[str, list[str]]:
    """The allowed checksums of each file of a checkpoint."""
    path = folder / "manifest.json"
    said = read_json(path)
    found = {}
    for name, allowed in said.items() if isinstance(said, dict) else ():
        sums = allowed if isinstance(allowed, list) else [allowed]
        if not all(isinstance(one, str) for one in sums):
            raise DamagedFile(f"{path} has no checksum for {name!r}. {_EARLIER}")
        found[name] = sums
    if missing := {"run.json", "history.json"} - set(found):
        raise DamagedFile(f"{path} lacks {', '.join(sorted(missing))}. {_EARLIER}")
    return found


def _checksum_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(
        json.dumps(value, indent=1, default=adapter_files.json_default), encoding="utf-8"
    )


def _replace_json(path: Path, value: Any) -> None:
    """Replace a JSON file that a reader may look at, and flush it to the disk."""
    write_file(path, json.dumps(value, indent=1).encode(), flush=True)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        DamagedFile: The file cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedFile(
            f"{path} cannot be read ({error}). Resume from an earlier checkpoint: step=N."
        ) from error


def _flush_files(folder: Path) -> None:
    """Flush all files to the disk before the rename.

    Otherwise a power cut could leave empty files under the final name.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
