"""Decide when a run keeps snapshots, checkpoints and evaluations.

A step is saved before it is evaluated, so that an interrupt during a long evaluation loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from opdlab.errors import OpdlabError
from opdlab.models.fingerprints import base_tensors
from opdlab.models.policy import Policy
from opdlab.support.interrupts import hold_interrupts
from opdlab.training import checkpoint, optimizer_files, run_folder
from opdlab.training.evaluation import Evaluation
from opdlab.training.folder_lock import FolderLock
from opdlab.training.processes import AcceleratedProcesses, failing_together
from opdlab.training.state import RunState


def check_parameters(student: Policy) -> None:
    """Refuse to train weights beside an adapter.

    All policies share these weights, and neither snapshots nor frozen policies hold them.

    Called before the adapter is made, which would freeze them without a word, and after.

    Args:
        student: The policy that will train through an adapter.

    Raises:
        OpdlabError: The base model has parameters that would be trained.
    """
    model = student.weights.model
    base = {
        name: value
        for name, value in base_tensors(model).items()
        if isinstance(value, nn.Parameter)
    }
    beside = [name for name, value in base.items() if value.requires_grad]
    is_left_over = student.adapter is None and len(beside) == len(
        base
    )  # of full training; making an adapter freezes all
    if beside and not is_left_over:
        raise OpdlabError(
            f"Beside the adapter, {beside[0]} is to be trained ({len(beside)} such parameters). "
            "Every policy on this model would move with it. Freeze it, put whole modules into the"
            " adapter (LoraConfig(modules_to_save=[…], bias='none')), or train all weights with"
            " lora=None."
        )


def is_saved(run: RunState) -> bool:
    """Tell whether a checkpoint of the run's latest step is kept: the last one always is.

    Args:
        run: The run.

    Returns:
        True for a run with a folder, where `save_every` or the last step says so: in the main
        process, and of a sharded run in all processes, since each holds a part.
    """
    s = run.settings
    due = run.done == s.steps or (s.save_every > 0 and run.done % s.save_every == 0)
    takes_part = run.accelerator.is_main_process or run.sharding is not None
    return run.folder is not None and due and run.done > 0 and takes_part


def save_checkpoint(run: RunState, path: Any = None) -> Path:
    """Write a checkpoint into `path`, or into the run's folder.

    Of several processes the main one writes; of a sharded run, every process must call it. An
    interrupt waits until the checkpoint is complete.

    Args:
        run: The run.
        path: The folder to write into; the run's own by default.

    Returns:
        The path of the checkpoint, the same in every process.

    Raises:
        OpdlabError: There is no folder, it holds checkpoints of another run, another process uses
            it, or the files cannot be written.
    """
    folder = run.folder if path is None else run_folder.check_folder(path, "save got path")
    if folder is None:
        raise OpdlabError("Where to? Give run.save(path), or distill(…, save=path).")
    if run.sharding is not None:
        with hold_interrupts():
            write_optimizer = optimizer_files.collect(run, folder)
            with failing_together(AcceleratedProcesses(run.accelerator)):
                return _write(run, folder, write_optimizer)
    return _write(run, folder, optimizer_files.collect(run, folder))


def _write(run: RunState, folder: Path, write_optimizer: Callable[[Path], None]) -> Path:
    """Write a checkpoint in the main process."""
    if not run.accelerator.is_main_process:
        return folder / f"step-{run.done:06d}"
    with hold_interrupts(), FolderLock(folder):
        try:
            return checkpoint.write_checkpoint(run, folder, write_optimizer)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OpdlabError(
                f"The checkpoint of step {run.done} could not be written to {folder} ({reason})."
                " Earlier checkpoints are whole, and the run is as it was: make room, then call"
                " run.save() and go on, or run.save(path) for another folder."
            ) from error


def keep_snapshot(run: RunState) -> None:
    """Keep a snapshot of the adapter as it is now.

    Full training keeps none, since every copy would be a whole model.

    Args:
        run: The run; `snapshots` gets an entry on the CPU.
    """
    if run.student.adapter:
        state = run.student.weights.adapter_state(run.student.adapter)
        run.snapshots[run.done] = {k: v.detach().cpu().clone() for k, v in state.items()}


def is_evaluation_due(run: RunState) -> bool:
    """Tell whether the run's latest step is to be evaluated and has not been yet.

    Args:
        run: The run.

    Returns:
        True if `evaluate_every` divides the steps done and their accuracy is not known.
    """
    every = run.settings.evaluate_every
    return (
        bool(every and run.metrics) and run.done % every == 0 and "accuracy" not in run.metrics[-1]
    )


def keep_accuracy(run: RunState, found: Evaluation) -> None:
    """Add the accuracy to the history of the latest step, and to its checkpoint if there is one.

    Args:
        run: The run.
        found: The evaluation after the step. Its number of prompts is kept too, for the interval.
    """
    run.metrics[-1] |= {"accuracy": found.accuracy, "accuracy_prompts": found.prompts}
    if run.folder is None or not run.accelerator.is_main_process:
        return
    # The step may have been saved by the run that this one was resumed from, or not at all.
    for saved in run_folder.list_checkpoints(run.folder):
        if saved.step == run.done and run.lineage.includes(saved.run, saved.step):
            with hold_interrupts():
                checkpoint.update_history(run, saved.path)
