"""Write the next step's texts while a server grades this step's: `Settings.generate_ahead`.

    step t      the server grades texts t        | the student writes texts t + 1, with weights t
                plan, loss, update: weights t + 1
    step t + 1  the server grades texts t + 1    | the student writes texts t + 2
                …

The texts of a step are then one update old (the first step's are fresh, and the last step writes
none ahead). `history` says so in the column `staleness`, in updates. The log-probs that the texts
were drawn with are kept, so the metrics of the sampler gap measure what one update changes, and
`Settings.importance_cap` corrects it. A checkpoint holds the texts that were written ahead by all
processes: each writes its own share, and all keep the whole (`Written.everyone`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors.torch import load, save, save_file
from torch import Tensor

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout, concat_rollouts
from opdlab.engine.needs import Access, parse_need
from opdlab.errors import DamagedFile, InvalidValue
from opdlab.methods.contract import name_of
from opdlab.models.graded import Graded
from opdlab.models.protocols import RemoteGrader
from opdlab.support.tensor_files import read_tensors
from opdlab.teachers.many import MultiTeacher
from opdlab.training.phases import rows_of_step, write_rollout
from opdlab.training.processes import AcceleratedProcesses
from opdlab.training.state import RunState
from opdlab.training.written import Written

TENSORS = ("ids", "lengths", "logp", "entropy", "learn", "turn")


def check_ahead(run: RunState) -> None:
    """Refuse `generate_ahead` where it cannot hold, or would make texts old for nothing.

    Args:
        run: The run, with its policies.

    Raises:
        InvalidValue: No policy of the method grades on a server.
    """
    if not run.settings.generate_ahead:
        return
    name = name_of(run.method)
    if not _remote_graders(run):
        raise InvalidValue(
            f"distill got generate_ahead=True, but no policy that {name} reads grades tokens on a"
            " server, so the texts would be one update old and no step shorter. Use it with a"
            " LogprobServer and a method that reads the log-probs of its teacher, or leave it out."
        )


def _remote_graders(run: RunState) -> dict[str, RemoteGrader]:
    return {
        name: policy
        for name, policy in run.policies.items()
        if parse_need(name).access is Access.LOGITS and _is_remote(policy)
    }


def _is_remote(policy: Any) -> TypeGuard[RemoteGrader]:
    if isinstance(policy, MultiTeacher):
        return policy.asks_servers
    return isinstance(policy, RemoteGrader)


def take_rollout(run: RunState, write: Callable[[RunState], Rollout]) -> Written:
    """Take the texts of the step: those written ahead, or new ones.

    A step that failed and is repeated gets the same texts, and the grades that are under way.

    Args:
        run: The run, between two steps.
        write: Writes the step's rollout now.

    Returns:
        The texts.
    """
    held = [one for one in run.ahead if one.step == run.done]
    if held:
        return held[0]
    rollout = write(run)
    is_kept = run.settings.generate_ahead  # for the case that the step fails
    everyone = _gather_texts(run, run.done, rollout) if is_kept else rollout
    return Written(run.done, run.done, rollout, everyone)


def work_ahead(run: RunState, now: Written) -> dict[str, Callable[[], Graded]]:
    """Let the servers grade the step's texts, and meanwhile write those of the next step.

    Args:
        run: The run.
        now: The texts of the step.

    Returns:
        For each policy that grades on a server, a function that waits for its grades; empty without
        `generate_ahead`.
    """
    if not run.settings.generate_ahead:
        return {}
    grades = {name: one for name, one in now.grades.items() if not _has_failed(one)}
    for name, grader in _remote_graders(run).items():
        if name not in grades:
            grades[name] = _start(grader.begin(now.rollout))
    now = replace(now, grades=grades)
    later = [one for one in run.ahead if one.step > run.done]
    run.ahead = [now, *later]
    following = run.done + 1
    if not later and following < run.settings.steps:
        rollout = write_rollout(run, following)
        everyone = _gather_texts(run, following, rollout)
        run.ahead.append(Written(following, run.done, rollout, everyone))
    return {name: future.result for name, future in grades.items()}


def _start(work: Callable[[], Graded]) -> Future[Graded]:
    """Do one piece of work in a thread of its own."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="grade")
    try:
        return pool.submit(work)
    finally:
        pool.shutdown(wait=False)


def _has_failed(future: Future[Graded]) -> bool:
    return future.cancelled() or (future.done() and future.exception() is not None)


def forget_done(run: RunState) -> None:
    """Drop the texts of steps that are done.

    Args:
        run: The run, after an update.
    """
    run.ahead = [one for one in run.ahead if one.step >= run.done]


# In checkpoints, and between processes.


def _gather_texts(run: RunState, step: int, rollout: Rollout) -> Rollout:
    """Put the texts of all processes together, in the order of the whole step.

    They are gathered when they are written and not when they are saved, so that saving needs one
    process alone.

    Args:
        run: The run.
        step: Number of the step that the texts are for, from 0.
        rollout: The texts of this process; in a run of one process they are returned.

    Returns:
        The texts of the step, the same in every process.
    """
    processes = AcceleratedProcesses(run.accelerator)
    if processes.count == 1:
        return rollout
    prompts = _prompts(run, step)
    said = processes.gather_json(_describe(rollout, prompts))
    files = processes.gather_bytes(save(_tensors(rollout)))
    parts = [_read(one, load(data), prompts) for one, data in zip(said, files, strict=True)]
    row = torch.tensor(rows_of_step(run, step))
    place = torch.cat([rows.cpu() for rows in processes.gather_each(row)])
    return concat_rollouts(parts).select(place.argsort().tolist())


def write_ahead(run: RunState, folder: Path) -> None:
    """Write the texts of the next step into a checkpoint, if there are any.

    Texts of the step behind it, which are there where a step failed, are written again.

    Args:
        run: The run, between two steps.
        folder: The checkpoint's folder.
    """
    for one in run.ahead:
        if one.step == run.done:
            described = _describe(one.everyone, _prompts(run, one.step))
            said = {"step": one.step, "updates": one.updates, **described}
            save_file(_tensors(one.everyone), folder / "ahead.safetensors")
            (folder / "ahead.json").write_text(json.dumps(said), encoding="utf-8")


def read_ahead(run: RunState, folder: Path) -> list[Written]:
    """Read the texts of the next step from a checkpoint.

    Args:
        run: The run that is taken up, in any number of processes.
        folder: The checkpoint's folder.

    Returns:
        The texts; empty if the checkpoint holds none, or the run writes none ahead.

    Raises:
        DamagedFile: The files do not fit each other.
    """
    path = folder / "ahead.json"
    if not run.settings.generate_ahead or not path.exists():
        return []
    said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    tensors = read_tensors(folder / "ahead.safetensors")
    prompts = _prompts(run, said["step"])
    if set(tensors) != set(TENSORS) or max(said["prompts"], default=0) >= len(prompts):
        raise DamagedFile(f"{path} does not fit the texts beside it. Resume from another step.")
    everyone = _read(said, tensors, prompts)
    own = rows_of_step(run, said["step"])
    if max(own, default=-1) >= len(everyone):
        raise DamagedFile(f"{path} holds {len(everyone)} texts, too few. Resume from another step.")
    rollout = everyone.select(own).to(run.student.weights.device)
    return [Written(said["step"], said["updates"], rollout, everyone)]


def _describe(rollout: Rollout, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a rollout holds beside its tensors, as JSON data."""
    return {
        "prompts": [prompts.index(prompt) for prompt in rollout.prompts],
        "finish": rollout.finish,
        "texts": rollout.texts,
        "writer": rollout.writer,
        "n": rollout.n,
        "vocabulary": rollout.vocabulary,
    }


def _tensors(rollout: Rollout) -> dict[str, Tensor]:
    return {name: getattr(rollout, name).cpu().contiguous() for name in TENSORS}


def _read(
    said: Mapping[str, Any], tensors: Mapping[str, Tensor], prompts: Sequence[Prompt]
) -> Rollout:
    return Rollout(
        prompts=tuple(prompts[i] for i in said["prompts"]),
        finish=tuple(said["finish"]),
        texts=tuple(said["texts"]),
        writer=tuple(said["writer"]),
        n=said["n"],
        vocabulary=said["vocabulary"],
        **tensors,
    )


def _prompts(run: RunState, step: int) -> list[Prompt]:
    return list(run.task.training_batch(run.settings.batch, step, run.settings.seed))
