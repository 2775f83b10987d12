"""Resume a saved run.

Checks that it is the same run, then puts back what its checkpoint holds.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from opdlab import losses, methods
from opdlab.errors import DamagedFile, InvalidValue, OpdlabError
from opdlab.models.fingerprints import qualified_name
from opdlab.models.policy import Policy
from opdlab.support.expect import shortened
from opdlab.support.tensor_files import copy_tensors, read_tensors
from opdlab.support.validation import CountOrZero, validate
from opdlab.tasks import Task
from opdlab.training import ahead, checkpoint, method_state, run_differences, run_identity
from opdlab.training.processes import is_main_by_environment, warning_once
from opdlab.training.resolution import trained_tensors
from opdlab.training.restoring import SavedRun, fit_adapter, restore_optimizer
from opdlab.training.run import Run, prepare
from opdlab.training.settings import Settings

# Settings that change what is kept and how much memory is used, but no number.
FREE = (
    "steps",
    "micro_batch",
    "checkpointing",
    "evaluate_every",
    "snapshot_every",
    "save_every",
    "trace_k",
)

# What `distill` takes besides settings and what every resumed run is given.
_OPTIONS = ("policies", "save", "log_with", "quiet", "sampler")


def resume(
    path: str | os.PathLike[str],
    student: Policy,
    teacher: Any = None,
    task: Task | None = None,
    *,
    method: Any = None,
    step: int | None = None,
    allow: str | Sequence[str] = (),
    **options: Any,
) -> Run:
    """Take up a saved run where it was.

    Give the student as it was before the run, and the same teacher, task and `policies=`. They are
    compared with what the checkpoint knows of them, by fingerprints of weights, prompts and code.
    On a CPU the run then goes on bit for bit as if it had not been interrupted.

    Args:
        path: The run's folder, or one of its checkpoints.
        student: The student, untrained.
        teacher: As it was given to `distill`.
        task: As it was given to `distill`.
        method: A method of your own must be given again; opdlab's are rebuilt from their options.
        step: The step of the checkpoint to resume; the one written last by default.
        allow: Parts that may differ from those of the run: "student", "tokenizer", "task",
            "teacher", "policies", "method", "sampler".
        options: Options of `distill`; give the same `sampler=`. `save=` another folder to go on
            there. Settings that change the training are taken from then on, with a warning; the
            rank of the adapter is fixed.

    Returns:
        The run, ready for the step after the checkpoint's.

    Raises:
        DamagedFile: The checkpoint is not what was written, or does not fit the run.
        OpdlabError: An argument is not the one of the original run; or `steps` lie behind it.
    """
    with warning_once(is_main_by_environment()):
        saved = _read(_as_folder(path), step)
        allowed = _as_parts(allow)
        options = {"save": saved.folder.parent, **options}
        settings = _settings(saved, options)
        run = prepare(
            student,
            teacher,
            task,
            method=method if method is not None else _rebuild(saved),
            settings={name: value for name, value in options.items() if name not in _OPTIONS},
            recorded=settings,
            admit=lambda run, given: _admit(run, saved, given, allowed),
            **{name: value for name, value in options.items() if name in _OPTIONS},
        )
        restore_optimizer(run, saved)
        checkpoint.load_weights(run.student, saved.folder)
        for average in run.averages:
            path_of_average = saved.folder / "ema.safetensors"
            copy_tensors(trained_tensors(average), read_tensors(path_of_average), path_of_average)
        method_state.restore_state(run.method, saved.folder, run.student.weights.device)
        run.ahead = ahead.read_ahead(run, saved.folder)
        run.restart(
            saved.step, checkpoint.read_json(saved.folder / "history.json"), _snapshots(saved)
        )
        _warn(run, saved)
        return run


def _as_folder(path: Any) -> Path:
    said = f"resume got path={shortened(path)}"
    if not isinstance(path, (str, os.PathLike)) or not str(path).strip() or "\0" in str(path):
        raise InvalidValue(f"{said}. Use the folder of a run, as it was given to distill(save=…).")
    return Path(path).expanduser()


def _as_parts(allow: Any) -> tuple[str, ...]:
    parts = (allow,) if isinstance(allow, str) else tuple(allow)
    if unknown := [part for part in parts if part not in run_identity.PARTS]:
        raise InvalidValue(
            f"resume got allow={shortened(unknown[0])}. Use some of"
            f" {', '.join(run_identity.PARTS)}."
        )
    return parts


def _read(path: Path, step: Any) -> SavedRun:
    if step is not None:
        step = validate("resume", {"step": step}, {"step": CountOrZero})["step"]
    folder = checkpoint.find_checkpoint(path, step)
    said = checkpoint.read_json(folder / "run.json")
    missing = [
        key for key in ("step", "settings", "tokenizer", "method", "task") if key not in said
    ]
    if missing or said.get("format", 1) > checkpoint.FORMAT:
        raise OpdlabError(
            f"{folder} was written by opdlab {said.get('opdlab', '?')}, whose checkpoints this"
            " version cannot read. Use that version."
        )
    if step is not None and said["step"] != step:
        raise OpdlabError(
            f"{folder} is the checkpoint of step {said['step']}, not of step {step}. Give the"
            " folder of the run as path."
        )
    return SavedRun(folder, said)


def _settings(saved: SavedRun, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings to go on with: those saved, and the user's over them.

    Warns of those that change the training.

    Raises:
        OpdlabError: The adapter is to be another one, or the steps lie behind the checkpoint.
    """
    before = dict(saved.said["settings"])
    before["batch"] *= saved.batches
    known = Settings.__dataclass_fields__
    if unknown := sorted(before.keys() - known.keys()):
        raise OpdlabError(
            f"{saved.folder} has the settings {', '.join(unknown)}, which this version does not"
            f" know. Use opdlab {saved.said['opdlab']}."
        )
    if unknown := sorted(options.keys() - known.keys() - set(_OPTIONS)):
        raise InvalidValue(
            f"resume has no option {', '.join(unknown)}. There are"
            f" {', '.join([*_OPTIONS, *known])}."
        )
    now = {**before, **{key: value for key, value in options.items() if key in known}}
    if options["save"] is None and "save_every" not in options:
        now["save_every"] = 0
    Settings(**now)  # values that cannot be right are refused before anything is compared
    if now["lora"] != before["lora"]:
        raise OpdlabError(
            f"resume got lora={now['lora']}, but the run was trained with lora={before['lora']}."
            " Leave lora out, or begin a new run."
        )
    if now["steps"] < saved.step:
        raise OpdlabError(
            f"resume got steps={now['steps']}, but {saved.folder} has done {saved.step}. Give at "
            "least as many steps, or take up an earlier checkpoint with step=…."
        )
    changed = [
        f"{key} {before[key]} → {now[key]}"
        for key in known
        if key in before and key not in FREE and now[key] != before[key]
    ]
    if now["steps"] != before["steps"] and now["schedule"] != "constant":
        changed.append(
            f"steps {before['steps']} → {now['steps']} (the schedule {now['schedule']!r} depends on"
            " them)"
        )
    was_last = saved.step == before["steps"] < now["steps"]
    if before.get("generate_ahead") and now["generate_ahead"] and was_last:
        changed.append(
            f"steps {before['steps']} → {now['steps']} (the last step wrote no texts ahead, so the"
            " next one's are fresh)"
        )
    if changed:
        warnings.warn(
            f"The run goes on from step {saved.step} with other settings: {', '.join(changed)}. It "
            "is no longer the run that was saved; later checkpoints in its folder will be"
            " replaced.",
            stacklevel=3,
        )
    return now


def _rebuild(saved: SavedRun) -> Any:
    """The method of a run that used one of opdlab's, from its options."""
    said = saved.said["method"]
    kind = saved.said["identity"]["method"]["class"] if not saved.is_old else ""
    is_ours = said["name"] in methods.__all__ and said["name"] not in ("Method", "method")
    cls = getattr(methods, said["name"], None) if is_ours else None
    if cls is None or (kind and kind != qualified_name(cls)):
        raise OpdlabError(
            f"The run used {kind or said['name']}, a method of your own. Give it:"
            " opdlab.resume(path, …, method=…)."
        )
    options = {
        key: value for key, value in said["options"].items() if key in cls.__dataclass_fields__
    }
    for key, value in options.items():
        is_old_function = isinstance(value, str) and value.startswith("<function")
        if is_old_function or (
            isinstance(value, dict)
            and ("source" in value or "kind" in value)
            and key not in ("top_k", "options")
        ):
            raise OpdlabError(
                f"The run used {said['name']} with a {key} of your own. Give the method:"
                " opdlab.resume(path, …, method=…)."
            )
    if options.get("top_k"):
        options["top_k"] = losses.TopK(
            **{key: value for key, value in options["top_k"].items() if key != "kind"}
        )
    return cls(**options)


def _admit(run: Run, saved: SavedRun, given: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Refuse a run that is not the saved one, before anything of the student is touched."""
    if saved.is_old:
        _admit_old(run, saved)
    else:
        identity = saved.said["identity"]
        run.identity = run_identity.describe_run(run, given, tuple(identity["drawn"]))
        found = run_differences.find_differences(
            identity, run.identity, saved.said.get("moved", ())
        )
        refused = {part: said for part, said in found.items() if part not in allowed}
        if refused:
            parts = ", ".join(map(repr, refused))
            raise OpdlabError(
                f"{saved.folder} cannot be taken up: {'; '.join(refused.values())}. Give what the "
                "run was trained with, or go on with something else on purpose: resume(…,"
                f" allow=({parts},))."
            )
        if found:
            warnings.warn(
                f"The run goes on from step {saved.step} although {'; '.join(found.values())}.",
                stacklevel=6,
            )
        if saved.batches > 1:
            warnings.warn(
                f"{saved.folder} was written by an earlier version, in which batch counted the"
                f" prompts of each of {saved.batches} processes and each had random numbers of its"
                f" own. The run goes on with batch={run.settings.batch} for all processes together"
                " and draws other texts.",
                stacklevel=6,
            )
    run.lineage = saved.lineage.child(saved.step)
    fit_adapter(run, saved)


def _other_processes(run: Run, saved: SavedRun) -> str:
    """Say how the processes of a run differ from those that saved it; "" where they do not."""
    before, now = saved.said["processes"], run.accelerator.num_processes
    if before != now:
        return f"by {before} process{'es' * (before > 1)} and goes on with {now}"
    ways = ("with whole weights", "with FSDP2")
    was, goes_on = bool(saved.said.get("sharded")), run.sharding is not None
    return f"{ways[was]} and goes on {ways[goes_on]}" if was != goes_on else ""


def _admit_old(run: Run, saved: SavedRun) -> None:
    """Compare what a checkpoint of the first format knows, and say what it does not know."""
    said, folder = saved.said, saved.folder
    tokenizer, name = run.identity["tokenizer"]["vocabulary"], type(run.method).__name__
    if said["tokenizer"] != tokenizer:
        raise OpdlabError(
            f"{folder} was trained with another tokenizer than {run.student!r} has: fingerprint "
            f"{said['tokenizer'][:16]} was saved and {tokenizer[:16]} is given. Load the student it"
            f" began with: {said['student']!r}."
        )
    for what, before, now in (
        ("task", said["task"], run.task.name),
        ("method", said["method"]["name"], name),
    ):
        if before != now:
            raise OpdlabError(
                f"{folder} was trained with the {what} {before!r} and {now!r} is given. Give the"
                " one that it was trained with."
            )
    if run.identity["student"]["adapter"] is not None:
        raise OpdlabError(
            f"The student's adapter is already trained. {folder} goes on from the student as it was"
            " before the run: load it anew."
        )
    warnings.warn(
        f"{folder} was written by an earlier version. The vocabulary, the name of the task and that"
        " of the method fit; whether the student's weights, the prompts, the teacher and the"
        " method's code are those of the run could not be checked.",
        stacklevel=7,
    )


def _snapshots(saved: SavedRun) -> dict[int, dict[str, Tensor]]:
    """Read the snapshots of the run.

    A damaged one is left out with a warning, since the run can go on without it.
    """
    kept = {}
    for step, file in saved.said.get("snapshots", {}).items():
        path = saved.folder.parent / "snapshots" / Path(file["file"]).name
        try:
            kept[int(step)] = checkpoint.read_snapshot(path, file["checksum"])
        except DamagedFile as error:
            warnings.warn(f"The snapshot of step {step} is lost: {error}", stacklevel=3)
    return kept


def _warn(run: Run, saved: SavedRun) -> None:
    is_comparable = not saved.is_old and saved.batches == 1
    if is_comparable and (differing := _other_processes(run, saved)):
        warnings.warn(
            f"The run was trained {differing}. Each step keeps its prompts and its random numbers,"
            " so the run is the same up to the rounding of sums; it is no longer bit-identical.",
            stacklevel=3,
        )
    if forgotten := saved.said.get("forgotten"):
        warnings.warn(
            f"{type(run.method).__name__} had changed {', '.join(forgotten)} by step {saved.step}, "
            "and the checkpoint does not hold that: the method starts with what it is given with"
            " now. Give it state_dict() and load_state_dict(state).",
            stacklevel=3,
        )
