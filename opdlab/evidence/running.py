"""Run the arms of controls: train each with each seed, evaluate all on the same prompts.

The seeds are the outer loop, so that an interrupt leaves every arm with the same seeds but for the
last. With a folder every finished run is kept there as a small JSON file; the same call goes on
with what is missing, and refuses files of other controls.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from opdlab.errors import InvalidValue, MissingPolicy, OpdlabError
from opdlab.evidence.arms import ARMS, TEACHER, DoesNotApply, Subject, Treatment
from opdlab.evidence.controls import ArmResult, Controls
from opdlab.methods import OPD
from opdlab.methods.contract import name_of
from opdlab.methods.conversion import as_method
from opdlab.models.fingerprints import digest
from opdlab.models.policy import Policy
from opdlab.support.expect import shortened
from opdlab.support.files import write_file
from opdlab.support.progress import Progress
from opdlab.support.validation import Count, CountOrZero, Flag, Folder, Texts, validate_arguments
from opdlab.tasks.task import Task
from opdlab.teachers.contract import expect_teacher
from opdlab.training.evaluation import Evaluation, evaluate
from opdlab.training.run import Run, distill
from opdlab.training.settings import Settings, make_settings, settings_without_effect

RESULT = "controls.json"  # all of it, in the folder


@validate_arguments
def controls(
    student: Policy,
    teacher: Any = None,
    task: Task | None = None,
    *,
    method: Any = None,
    arms: Texts | None = None,
    seeds: Count = 3,
    prompts: Count = 200,
    samples: CountOrZero = 0,
    by: Literal["greedy", "samples"] = "greedy",
    weaker: Any = None,
    folder: Folder | None = None,
    quiet: Flag = False,
    **settings: Any,
) -> Controls:
    """Train the arms that a sceptical reader asks for, and say what the teacher is good for.

        opd.controls(student, teacher, task, folder="runs/controls")

    Every arm starts from the student as it is, makes the same number of updates on the same
    prompts, and is evaluated on the same held-out prompts. The student that is given stays as it
    is. An interrupt (Ctrl-C, or the stop button) ends the last run early and returns what has
    finished; with a folder the same call goes on later.

    Args:
        student: The student before training.
        teacher: Its teacher, as `distill` takes it; None for methods that teach themselves.
        task: The task; it needs a verifier.
        method: The method; OPD by default.
        arms: Names of arms beside "teacher", which always runs: no_teacher, no_teacher_adaptive
            (`OPSA`), no_teacher_slow, own_texts, shuffled, sign, weaker, other_hint,
            other_direction, teacher_texts, lr_up, lr_down. By default all that apply.
        seeds: Number of seeds, from 0. One seed says nothing about others.
        prompts: Held-out prompts of the evaluation.
        samples: Samples of each prompt, in addition to the greedy completion; 0 for none.
        by: The accuracy that is compared: of greedy completions, or the mean over the samples. A
            gain in samples may need no knowledge, only that the student becomes surer.
        weaker: A teacher that knows less, for the arm "weaker".
        folder: Keeps finished runs, and the result as controls.json.
        quiet: Whether to show no progress.
        settings: Fields of `Settings`, for all arms.

    Returns:
        Scores of all arms, with a table and the teacher's share of the gain.

    Raises:
        InvalidValue: An argument is not what it must be, or the folder holds other controls.
        MissingPolicy: The task has no verifier, or the method lacks a policy.
        OpdlabError: There is no task.
    """
    task = _expect_verifier(task)
    for name in ("seed", "evaluate_every", "save_every", "snapshot_every"):
        if name in settings:
            raise InvalidValue(
                f"controls got {name}={shortened(settings[name])}, which it sets itself: it runs"
                " several seeds, and evaluates and keeps each run at its end. Leave it out."
            )
    if by == "samples" and not samples:
        raise InvalidValue("controls got by='samples' with samples=0. Draw some, as samples=4.")
    for given in (teacher, weaker):
        if given is not None:
            expect_teacher(given, "controls")
    chosen = OPD() if method is None else as_method(method, "controls")
    subject = Subject(student, teacher, task, chosen, weaker)
    treatments, left_out = _choose(subject, arms)
    work = _Work(subject, treatments, make_settings(settings, chosen, task, "controls"))
    place = None if folder is None else Path(folder)
    before = evaluate(_fresh(work), task, n=prompts, k=samples, quiet=True)
    return _run_all(work, left_out, seeds, before, place, by, quiet)


def _expect_verifier(task: Task | None) -> Task:
    """Return the task if there is one whose answers can be scored."""
    if task is None:
        raise OpdlabError(
            "controls needs a task with a verifier. Use opdlab.tasks.market(), from_records(…) or"
            " reasoning_gym(…)."
        )
    if task.verify is None:
        raise MissingPolicy(
            f"controls compares accuracies, and {task.name} has no verifier. Use a task with"
            " verify=."
        )
    return task


@dataclass(frozen=True)
class _Work:
    """Hold what all runs share."""

    subject: Subject
    treatments: Mapping[str, Treatment]
    settings: Settings


@dataclass(frozen=True)
class _Finished:
    """One run that has been evaluated."""

    greedy: list[float]
    sampled: list[float]
    tokens: float
    seconds: float


def _choose(
    subject: Subject, names: Sequence[str] | None
) -> tuple[dict[str, Treatment], dict[str, str]]:
    """The treatments of the arms that apply, and the reasons of the others."""
    wanted = list(ARMS) if names is None else [TEACHER, *names]
    unknown = sorted(set(wanted) - set(ARMS))
    if unknown:
        raise InvalidValue(
            f"controls has no arm {', '.join(map(shortened, unknown))}. Use some of"
            f" {', '.join(ARMS)}."
        )
    treatments: dict[str, Treatment] = {}
    left_out: dict[str, str] = {}
    for name in dict.fromkeys(wanted):
        try:
            treatments[name] = ARMS[name].treat(subject)
        except DoesNotApply as reason:
            if names is not None:  # asked for by name
                raise InvalidValue(
                    f"The arm {name!r} does not apply, since {reason}. Leave it out of arms=."
                ) from None
            left_out[name] = str(reason)
    return treatments, left_out


def _run_all(
    work: _Work,
    left_out: Mapping[str, str],
    seeds: int,
    before: Evaluation,
    folder: Path | None,
    by: str,
    quiet: bool,
) -> Controls:
    jobs = [(name, seed) for seed in range(seeds) for name in work.treatments]
    bar = Progress(len(jobs), "controls", "run", quiet)
    finished: dict[tuple[str, int], _Finished] = {}
    try:
        for number, (name, seed) in enumerate(jobs):
            bar.update(number, arm=f"{name} {seed}")
            finished[name, seed] = _run_one(work, name, seed, before, folder)
            accuracy = float(np.mean(finished[name, seed].greedy))
            bar.update(number + 1, arm=f"{name} {seed}", accuracy=accuracy)
    except KeyboardInterrupt:
        if (TEACHER, 0) not in finished:
            raise
        warnings.warn(
            f"Interrupted after {len(finished)} of {len(jobs)} runs; the result has those."
            + (" Call again with the same folder to go on." if folder is not None else ""),
            stacklevel=4,
        )
    finally:
        bar.close()
    result = replace(_collect(work, left_out, before, finished), by=by)
    if folder is not None:
        write_file(folder / RESULT, json.dumps(result.to_json()).encode())
    return result


def _run_one(
    work: _Work, name: str, seed: int, before: Evaluation, folder: Path | None
) -> _Finished:
    """Train one arm with one seed and evaluate it, or load what was kept."""
    student = _fresh(work)
    try:
        return _train(work, name, seed, student, before, folder)
    finally:
        if student.adapter is not None and work.settings.lora is not None:
            student.weights.delete_adapter(student.adapter)  # the base is the next run's too


def _train(
    work: _Work,
    name: str,
    seed: int,
    student: Policy,
    before: Evaluation,
    folder: Path | None,
) -> _Finished:
    run = _prepare(work, work.treatments[name], student, seed)
    file = None if folder is None else folder / "runs" / f"{name}-{seed}.json"
    identity = digest(json.dumps([run.identity, asdict(run.settings), list(before.key)]))
    if file is not None and file.is_file():
        kept = _load(file, identity)
        if kept is not None:
            return kept
    began = time.perf_counter()
    run.train()
    seconds = time.perf_counter() - began
    k = before.sampled.shape[1]
    after = evaluate(student, work.subject.task, n=before.requested, k=k, quiet=True)
    if after.key != before.key:
        raise OpdlabError(
            "The task gave other held-out prompts at the second call with the same seed, so arms"
            " do not pair. Let its draw depend on n, seed and split alone."
        )
    sampled = after.sampled.mean(1) if k else np.full(after.prompts, np.nan)
    tokens = float(run.history["tokens"].sum())
    done = _Finished(after.greedy.tolist(), sampled.tolist(), tokens, seconds)
    if file is not None:
        write_file(file, json.dumps({"identity": identity, **asdict(done)}).encode())
    return done


def _prepare(work: _Work, treatment: Treatment, student: Policy, seed: int) -> Run:
    made = work.settings
    rate = {"lr": made.lr * treatment.rate, "seed": seed}
    unused = settings_without_effect(made, treatment.method, saves=False)
    given = {
        field.name: getattr(made, field.name)
        for field in fields(Settings)
        if field.name not in unused and field.name != "lora"
    }
    return distill(
        student,
        treatment.teacher,
        treatment.task,
        method=treatment.method,
        policies=treatment.policies(student) or None,
        quiet=True,
        lora=made.lora,
        **{**given, **rate},
    )


def _fresh(work: _Work) -> Policy:
    """The student before training, which may be trained without moving the one that was given."""
    student = work.subject.student
    return student.frozen() if work.settings.lora is not None else student.copied()


def _load(file: Path, identity: str) -> _Finished | None:
    """Read what a file kept; None if it cannot be read, so that the run is made again."""
    try:
        stored = json.loads(file.read_bytes())
        numbers = {field.name: stored[field.name] for field in fields(_Finished)}
        known = stored["identity"]
    except (ValueError, KeyError, TypeError):
        return None
    if known != identity:
        raise InvalidValue(
            f"{file} is of other controls: another student, teacher, task, method, setting or"
            " number of prompts. Use another folder, or remove that file."
        )
    return _Finished(**numbers)


def _collect(
    work: _Work,
    left_out: Mapping[str, str],
    before: Evaluation,
    finished: Mapping[tuple[str, int], _Finished],
) -> Controls:
    arms: dict[str, ArmResult] = {}
    missing = dict(left_out)
    for name in work.treatments:
        seeds = tuple(seed for arm, seed in finished if arm == name)
        if not seeds:
            missing[name] = "it was not reached before the interrupt"
            continue
        runs = [finished[name, seed] for seed in seeds]
        arms[name] = ArmResult(
            name,
            ARMS[name].label,
            ARMS[name].is_teacher_free,
            seeds,
            np.asarray([run.greedy for run in runs], float),
            np.asarray([run.sampled for run in runs], float),
            np.asarray([run.tokens for run in runs], float),
            np.asarray([run.seconds for run in runs], float),
        )
    has_samples = bool(before.sampled.shape[1])
    start = before.sampled.mean(1) if has_samples else np.full(before.prompts, np.nan)
    return Controls(before.greedy, start, arms, missing, _describe(work))


def _describe(work: _Work) -> dict[str, Any]:
    subject, made = work.subject, work.settings
    return {
        "task": subject.task.name,
        "method": name_of(subject.method),
        "student": str(subject.student),
        "teacher": None if subject.teacher is None else shortened(subject.teacher),
        "settings": {"steps": made.steps, "batch": made.batch, "n": made.n, "lr": made.lr},
    }
