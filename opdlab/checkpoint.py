"""Checkpoints: complete or absent, checked on reading, and exact.

    run/step-000020/   adapter_model.safetensors, adapter_config.json (what PEFT reads; or model.safetensors in full training)
                       optimizer.safetensors, ema.safetensors (where a method needs `ema`), run.json, history.json,
                       manifest.json (a checksum of every file)

Written beside its final name and renamed. Nothing is pickled. No random state is needed: every step makes its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opdlab import divergence, methods, roles
from opdlab.errors import DamagedFile, OpdlabError
from opdlab.policy import Policy
from opdlab.tasks import Task

if TYPE_CHECKING:
    from opdlab.distill import Run

_PEFT = "base_model.model."  # the prefix under which PEFT stores adapters


def write(run: Run, folder: Path) -> Path:
    """Save `run` as `folder/step-NNNNNN`; returns that path."""
    final = folder / f"step-{run.done:06d}"
    partial = folder / f".{final.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _weights(run, partial)
        save_file(_optimizer_state(run), partial / "optimizer.safetensors")
        for average in run.averages:
            save_file({k: v.detach().contiguous() for k, v in roles.state(average).items()}, partial / "ema.safetensors")
        _json(partial / "run.json", _description(run))
        _json(partial / "history.json", run.rows)
        _json(partial / "manifest.json", {p.name: _checksum(p) for p in sorted(partial.iterdir())})
        _flush(partial)
        if final.exists():  # the same step saved twice: make room, then take the name
            final.rename(folder / f".{final.name}.{os.getpid()}.old")
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder / f".{final.name}.{os.getpid()}.old", ignore_errors=True)
    return final


def resume(path: str | os.PathLike[str], student: Policy, teacher: Policy | None = None, task: Task | None = None, *,
           method: Any = None, step: int | None = None, **options: Any) -> Run:  # fmt: skip
    """Take up a saved run where it was: `path` is its folder, `step` one of its checkpoints (the newest by default).

    Give the same untrained student, teacher and task as before. A method of your own must be given too; opdlab's are
    rebuilt from their settings. Raises DamagedFile for a checkpoint that is not what was written.
    """
    from opdlab.distill import distill

    folder = find(Path(path), step)
    said = _read_json(folder / "run.json")
    run = distill(student, teacher, task, method=method or _method(said["method"]), save=folder.parent, **{**said["settings"], **options})
    if said["tokenizer"] != _fingerprint(student):
        raise OpdlabError(
            f"{folder} was trained with another tokenizer than {student!r} has. Load the student it began with: {said['student']!r}."
        )
    load_weights(run.student, folder)
    _set_optimizer_state(run, _tensors(folder / "optimizer.safetensors"))
    for average in run.averages:
        _copy_into(roles.state(average), _tensors(folder / "ema.safetensors"))
    run.done, run.rows = said["step"], _read_json(folder / "history.json")
    return run


def find(path: Path, step: int | None = None) -> Path:
    """The checkpoint of `step` (or the newest) under a run's folder, its checksums verified."""
    if (path / "manifest.json").exists():
        return _verified(path)
    steps = sorted(path.glob("step-*"))
    if step is not None:
        steps = [p for p in steps if p.name == f"step-{step:06d}"]
    if not steps:
        there = ", ".join(p.name for p in sorted(path.glob("step-*"))) or "none"
        raise OpdlabError(f"{path} holds no checkpoint{'' if step is None else f' of step {step}'}; there are {there}.")
    return _verified(steps[-1])


def load_weights(student: Policy, folder: Path) -> None:
    """Put a checkpoint's weights into a policy that has the same adapter (or the same model, in full training)."""
    if (folder / "adapter_model.safetensors").exists():
        student.weights.set_adapter_state(str(student.adapter), adapter(folder))
    else:
        _copy_into(dict(student.weights.model.named_parameters()), _tensors(folder / "model.safetensors"))


def adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's adapter, as `Weights.set_adapter_state` takes them."""
    return {k.removeprefix(_PEFT): v for k, v in _tensors(folder / "adapter_model.safetensors").items()}


def _copy_into(there: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            there[name].copy_(value)


def _weights(run: Run, folder: Path) -> None:
    weights, adapter = run.student.weights, run.student.adapter
    if adapter is None:
        save_file({k: p.detach().contiguous() for k, p in run.parameters.items()}, folder / "model.safetensors")
        return
    state = {_PEFT + k: v.detach().contiguous() for k, v in weights.adapter_state(adapter).items()}
    save_file(state, folder / "adapter_model.safetensors")
    config = weights.model.peft_config[adapter].to_dict()
    config = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
    _json(folder / "adapter_config.json", config | {"inference_mode": True})


def _optimizer_state(run: Run) -> dict[str, Tensor]:
    names = {id(p): name for name, p in run.parameters.items()}
    return {
        f"{key}/{names[id(p)]}": value.detach().contiguous() for p, state in run.optimizer.state.items() for key, value in state.items()
    }


def _set_optimizer_state(run: Run, flat: Mapping[str, Tensor]) -> None:
    for name, p in run.parameters.items():
        state = {key.split("/", 1)[0]: value.to(p.device) for key, value in flat.items() if key.split("/", 1)[1] == name}
        if state:
            run.optimizer.state[p] = state


def _description(run: Run) -> dict[str, Any]:
    import opdlab

    method: Any = run.method
    options = asdict(method) if type(method).__name__ in methods.__all__ else {}
    return {
        "step": run.done, "settings": asdict(run.settings), "student": run.student.weights.source, "task": run.task.name,
        "tokenizer": _fingerprint(run.student), "method": {"name": type(method).__name__, "options": options},
        "opdlab": opdlab.__version__, "torch": torch.__version__,
    }  # fmt: skip


def _method(said: Mapping[str, Any]) -> Any:
    kind = getattr(methods, said["name"], None) if said["name"] in methods.__all__ else None
    if kind is None or said["name"] in ("Method", "method"):
        raise OpdlabError(f"The run used {said['name']}, a method of your own. Give it: opdlab.resume(path, …, method=…).")
    options = dict(said["options"])
    if options.get("top_k"):
        options["top_k"] = divergence.TopK(**options["top_k"])
    return kind(**options)


def _fingerprint(policy: Policy) -> str:
    return hashlib.sha256(json.dumps(sorted(policy.tokenizer.get_vocab().items())).encode()).hexdigest()


def _verified(folder: Path) -> Path:
    for name, checksum in _read_json(folder / "manifest.json").items():
        if not (folder / name).exists() or _checksum(folder / name) != checksum:
            raise DamagedFile(
                f"{folder / name} is missing or not what was written. Resume from an earlier one: opdlab.resume(path, …, step=N)."
            )
    return folder


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{path} cannot be read ({error}). Resume from an earlier checkpoint: step=N.") from error


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, default=str), encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{path} cannot be read ({error}). Resume from an earlier checkpoint: step=N.") from error


def _flush(folder: Path) -> None:
    """To the disk before the rename, so that a power cut leaves no empty files under the final name."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
