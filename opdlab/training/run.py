"""A training run: `distill(…)` prepares it, and `for step in run:` trains the student in place.

    distill → Run.__next__ → opdlab.training.phases: write, plan, learn, update → metrics

A `Run` is an iterator that holds its own state, so `break` (or an interrupted cell) stops it
between two updates, and looping again goes on. All randomness of a step is made from (seed, step),
so a resumed run repeats the uninterrupted one bit for bit on a CPU. Processes and trackers are
Accelerate's, adapters PEFT's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.methods import OPD, Method
from opdlab.methods.contract import name_of
from opdlab.methods.conversion import as_method
from opdlab.models import model_files
from opdlab.models.policy import Policy
from opdlab.models.protocols import StudentSampler
from opdlab.support.files import write_file
from opdlab.support.interrupts import hold_interrupts
from opdlab.support.progress import Progress
from opdlab.support.validation import ByName, Flag, Folder, Unchecked, Whole, validate_arguments
from opdlab.tasks import Task
from opdlab.teachers.contract import expect_teacher
from opdlab.training import (
    ahead,
    exporting,
    method_state,
    publishing,
    run_folder,
    run_identity,
    saving,
    start_distance,
    trainable,
)
from opdlab.training.config import write_toml
from opdlab.training.evaluation import Evaluation, evaluate
from opdlab.training.exclusive import Claim
from opdlab.training.folder_lock import FolderLock, remove_leftovers
from opdlab.training.handover import Handover
from opdlab.training.metrics import measure_first_mass, measure_step, measure_teachers
from opdlab.training.own_teacher import warn_of_own_teacher
from opdlab.training.phase_clock import PhaseClock
from opdlab.training.phases import (
    accumulate_gradient,
    backbone_precision,
    grade,
    plan_step,
    update_weights,
    write_rollout,
)
from opdlab.training.preflight import check_run, check_writers
from opdlab.training.processes import (
    AcceleratedProcesses,
    check_batch,
    check_same_run,
    is_main_by_environment,
    warning_once,
)
from opdlab.training.resolution import check_overrides, resolve_policies, start_average
from opdlab.training.sampler_checks import expect_sampler
from opdlab.training.sampler_gap import measure_gap
from opdlab.training.settings import Settings, check_settings, make_settings
from opdlab.training.sharding import check_sharding, shard_student
from opdlab.training.state import RunState
from opdlab.training.step import Step
from opdlab.training.trackers import make_accelerator, start_trackers
from opdlab.training.written import Written

Admit = Callable[["Run", Mapping[str, Any]], None]
SHOWN = ("loss", "reverse_kl", "reward", "length", "accuracy")  # metrics in the line of progress


@validate_arguments
def distill(
    student: Policy,
    teacher: Any = None,
    task: Task | None = None,
    *,
    method: Any = None,
    needs: Sequence[str] | str | None = None,
    policies: ByName | None = None,
    save: Folder | None = None,
    log_with: Any = None,
    quiet: Flag = False,
    sampler: Unchecked[Any] = None,
    **settings: Any,
) -> Run:
    """Prepare a run; iterating over it trains the student in place.

    Everything that can be checked is checked before any compute is spent.

    A student that looks through an adapter already (a second stage) has that one trained on,
    whatever its rank. To stack a new LoRA on it, give `student.merged()`; to start from the bare
    model, `Policy.of(model, tokenizer, adapter=None)`.

    Args:
        student: The policy that learns.
        teacher: A policy, or one of `opdlab.teachers` (a server, a model that only writes); None
            for methods that need none.
        task: The supply of prompts, with a verifier if answers can be checked.
        method: A method, the class of one, or a loss function of rows; OPD with the reverse KL by
            default.
        needs: Names of the policies that a bare loss function reads; the teacher by default.
        policies: Replaces what a name in the method's `needs` stands for, such as
            `{"student+hint": student.frozen().seeing()}`.
        save: Folder for checkpoints. The last step is always saved, and every `save_every` steps
            before it.
        log_with: A tracker of Accelerate.
        quiet: Whether to show no progress.
        sampler: Who writes the student's texts, as `opdlab.samplers.VLLM()` or `VLLMServer(url)`;
            by default the student's own loop. The run keeps it up to date and does not close it.
        settings: Fields of `Settings`. What is left out comes from the method's recipe, then the
            task's.

    Returns:
        The run, before its first step.

    Raises:
        InvalidValue: An argument is not what it must be, or a setting would be ignored.
        TokenizerMismatch: Two models do not share their tokens.
        MissingPolicy: The method needs a policy that nobody gave.
        MissingHint: A policy reads hints, and a prompt has none.
        ContextTooLong: A prompt does not fit a model's context.
    """
    options = {
        "needs": needs,
        "policies": policies,
        "save": save,
        "log_with": log_with,
        "quiet": quiet,
        "sampler": sampler,
    }
    with warning_once(is_main_by_environment()):
        return prepare(student, teacher, task, method=method, settings=settings, **options)


def prepare(
    student: Policy,
    teacher: Any,
    task: Task | None,
    *,
    method: Any = None,
    needs: Sequence[str] | str | None = None,
    policies: Mapping[str, Any] | None = None,
    save: Any = None,
    log_with: Any = None,
    quiet: bool = False,
    sampler: Any = None,
    settings: Mapping[str, Any],
    recorded: Mapping[str, Any] | None = None,
    admit: Admit | None = None,
) -> Run:
    """Make the run that `distill` and `resume` share.

    Args:
        student: As in `distill`, and so are the arguments up to `quiet`.
        teacher: The teacher.
        task: The task.
        method: The method.
        needs: The policies that a bare loss function reads.
        policies: The user's replacements for names in the method's `needs`.
        save: Folder for checkpoints.
        log_with: A tracker.
        quiet: Whether to show no progress.
        sampler: Who writes the student's texts; None for the student's own loop.
        settings: The settings that the user passes.
        recorded: All settings of a run that goes on; the user's go before them.
        admit: Looks at the run before it gets an adapter and an optimizer, with the user's
            policies.

    Returns:
        The run, before its first step.

    Raises:
        OpdlabError: There is no task, or the arguments do not fit together. Its kinds say what is
            wrong: `MissingPolicy`, `InvalidValue`, and others.
    """
    if teacher is not None:
        expect_teacher(teacher, "distill")
    if task is None:
        raise OpdlabError(
            "distill needs a task, the supply of prompts. Use opdlab.tasks.market(),"
            " from_records(…) or reasoning_gym(…)."
        )
    chosen = OPD() if method is None and needs is None else as_method(method, needs=needs)
    policies = {} if policies is None else policies
    check_writers(chosen, teacher)
    check_overrides(chosen, policies)
    rank = trainable.read_lora_setting(student, {**(recorded or {}), **settings})
    made = make_settings({**rank, **(recorded or {}), **settings}, chosen, task)
    check_settings(made, settings, chosen, task, saves=bool(save))
    if sampler is not None:
        expect_sampler(sampler, "distill")
    return Run(
        student, teacher, task, chosen, made, policies, save, log_with, quiet, admit, sampler
    )


class Run(RunState):
    """Iterate over the steps of a training run.

    `history` is a data frame of metrics; `save` writes a checkpoint, and `opdlab.resume` takes one
    up again. Runs are made by `distill` and `resume`. The other attributes are those of `RunState`.

    Args:
        student: The policy that trains.
        teacher: The teacher, or None.
        task: The source of the prompts.
        method: The method.
        settings: The settings of the run.
        policies: The user's `policies=`.
        save: Folder for checkpoints; None for none.
        log_with: A tracker of Accelerate; None for none.
        quiet: Whether to show no progress.
        admit: Looks at the run before it gets an adapter and an optimizer, with the user's
            policies.
        sampler: Who writes the student's texts; None for the student's own loop.

    Attributes:
        last: The step done last; None before the first.
        progress: The line that shows where the run is.
        described: The models as they were given, for `to_config`.
        log_with: The trackers as they were given.
        start: The student before training, where `start_kl` is asked for and needs it.
        is_reference_start: Whether the method's reference is the student before training.
    """

    def __init__(
        self,
        student: Policy,
        teacher: Any,
        task: Task,
        method: Method,
        settings: Settings,
        policies: Mapping[str, Any],
        save: str | os.PathLike[str] | None,
        log_with: Any,
        quiet: bool,
        admit: Admit | None = None,
        sampler: StudentSampler | None = None,
    ) -> None:
        self.sampler = sampler
        self.handover = None if sampler is None else Handover(sampler)
        self.student, self.teacher, self.task = student, teacher, task
        self.method, self.settings = method, settings
        self.done, self.metrics, self.snapshots = 0, [], {}
        self.ahead: list[Written] = []
        self.last: Step | None = None
        self.loss_is_checked = self.is_profiled = False
        self.folder = run_folder.check_folder(save)
        self.lineage = run_folder.Lineage()
        self.policies = resolve_policies(student, teacher, method.needs, policies)
        check_run(self)
        warn_of_own_teacher(student, teacher, method.needs, policies)
        self.accelerator = make_accelerator(log_with, self.folder)
        check_batch(settings.batch, self.accelerator.num_processes)
        check_sharding(student, self.accelerator)
        ahead.check_ahead(self)
        if self.accelerator.is_main_process:
            task.warn_of_repeats(settings.batch)
        if log_with is not None:
            start_trackers(self.accelerator, asdict(settings), self.folder)
        self.memory = method_state.Memory(method)
        # Before an adapter is made or a weight moves, so that this is what was given.
        self.described = exporting.describe_models(student, teacher, policies)
        self.log_with = log_with
        self.has_new_embeddings = model_files.has_new_embeddings(student.weights)
        self.identity = run_identity.describe_run(self, policies)
        check_same_run(
            AcceleratedProcesses(self.accelerator), {**self.identity, "settings": asdict(settings)}
        )
        if admit is not None:
            admit(self, policies)
        self._lock: FolderLock | None = None
        if self.folder is not None:
            if self.accelerator.is_main_process:
                self._lock = FolderLock(self.folder)
            run_folder.check_owner(self.folder, self.lineage)
            if self._lock is not None:
                remove_leftovers(self.folder)
        self.start = start_distance.keep_start(student, self.policies, policies, settings)
        self.is_reference_start = start_distance.has_reference(self.policies, policies)
        self._make_trainable(policies)
        if settings.snapshot_every:
            saving.keep_snapshot(self)  # step 0, the student before any update
        is_quiet = quiet or not self.accelerator.is_main_process
        self.progress = Progress(settings.steps, name_of(method), quiet=is_quiet)

    def _make_trainable(self, policies: Mapping[str, Any]) -> None:
        """Prepare the student's weights and the optimizer; `policies` are the user's."""
        if self.settings.lora is not None:
            saving.check_parameters(self.student)
        self.parameters = trainable.prepare_parameters(self.student, self.policies, self.settings)
        if self.settings.lora is not None:
            saving.check_parameters(self.student)
        self.claim = Claim(self.student.weights, self.student.adapter)
        self.averages = start_average(self.student, self.policies, policies)
        self.sharding = shard_student(self.student, self.accelerator)
        start_distance.check_shards(self.settings, is_sharded=self.sharding is not None)
        if self.sharding is not None:
            self.parameters = self.sharding.parameters
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=self.settings.lr,
            weight_decay=self.settings.weight_decay,
            fused=True,
        )

    @property
    def history(self) -> pd.DataFrame:
        """One row for each step, as a data frame.

        Columns are `loss`, `reverse_kl`, `entropy`, `length`, `cut`, `reward`, `grad_norm`,
        `lr`, `seconds` and others; `start_kl` where the method reads the reference, or by
        `Settings.start_kl`.
        """
        return pd.DataFrame(self.metrics)

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        self._evaluate()  # one that was interrupted is made up for
        if self.done >= self.settings.steps:
            self.progress.close()
            if self._lock is not None:
                self._lock.release()
            raise StopIteration
        self.claim.check(self)
        before = self.done
        with (
            method_state.restoring_on_failure(self.method, is_counted=lambda: self.done > before),
            warning_once(self.accelerator.is_main_process),
        ):
            step = self._step()
        self.last = step
        try:
            self._evaluate()
        finally:
            self.accelerator.log(step.metrics, step=self.done)
        shown = {name: value for name, value in step.metrics.items() if name in SHOWN}
        self.progress.update(self.done, **shown)
        return step

    def _step(self) -> Step:
        """One step: the phases of `opdlab.training.phases`, in order."""
        clock = PhaseClock(self.student.weights.device, self.is_profiled)
        if self.sharding is not None:
            self.sharding.end()  # after a step that was interrupted
        self.optimizer.zero_grad()
        written = ahead.take_rollout(self, write_rollout)
        rollout = written.rollout
        awaited = ahead.work_ahead(self, written)
        clock.end("generate")
        planned = plan_step(self, rollout, awaited)
        grade(self, planned)
        clock.end("grade")
        learned = accumulate_gradient(self, planned, rollout)
        measured = measure_step(planned.batch, learned.columns, learned.weight)
        measured |= measure_gap(planned.batch, learned.columns["sampler_gap"])
        if learned.wanted is not None:
            measured |= measure_first_mass(planned.batch, learned.wanted)
        measured |= measure_teachers(planned.batch, learned.columns)
        with backbone_precision(self):
            measured |= start_distance.measure_start(
                planned.batch, learned.columns, self.start, reference=self.is_reference_start
            )
        metrics = {"step": float(self.done + 1), **measured, "grad_norm": learned.grad_norm}
        if self.settings.generate_ahead:
            metrics["staleness"] = float(self.done - written.updates)
        self.loss_is_checked |= learned.is_checked
        with (
            hold_interrupts()
        ):  # an interrupt waits until the weights have moved and the step is kept
            metrics["lr"] = update_weights(self)
            ahead.forget_done(self)
            clock.end("learn")
            metrics |= clock.read()
            self.metrics.append(metrics)
            if self.settings.snapshot_every and self.done % self.settings.snapshot_every == 0:
                saving.keep_snapshot(self)
            if saving.is_saved(self):
                self.save()
        columns = dict(learned.columns)
        is_own = self.sampler is None and not self.settings.generate_ahead
        if is_own and self.settings.importance_cap is None:
            del columns["sampler_gap"]  # rounding alone, which no picture needs to show
        processes = AcceleratedProcesses(self.accelerator)
        return Step(self.done, metrics, planned, columns, processes)

    def _evaluate(self) -> None:
        """Evaluate where that is due.

        The step is saved by then, so an interrupt here loses nothing.
        """
        if saving.is_evaluation_due(self):
            found = evaluate(
                self.student, self.task, processes=self.accelerator, sampler=self.sampler
            )
            saving.keep_accuracy(self, found)

    def train(self) -> Run:
        """Run all remaining steps.

        Returns:
            The run itself.
        """
        for _ in self:
            pass
        return self

    @validate_arguments
    def at(self, step: Whole) -> Policy:
        """Return the student as it was after `step`, from the snapshots kept by `snapshot_every`.

        Args:
            step: Number of steps done; 0 is the student before any update.

        Returns:
            A frozen policy with the snapshot's adapter, on the same weights.

        Raises:
            OpdlabError: There is no snapshot of that step.
        """
        if step not in self.snapshots:
            kept = ", ".join(map(str, self.snapshots)) or "none"
            raise OpdlabError(
                f"No snapshot of step {step}; there are {kept}. Set snapshot_every=…."
            )
        policy = self.student.frozen()
        policy.weights.set_adapter_state(str(policy.adapter), self.snapshots[step])
        return policy

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write a checkpoint, atomically.

        A crash at any moment leaves the earlier checkpoints, and a complete new one or none. Of
        several processes the main one writes.

        Args:
            path: The folder to write into; the run's own by default.

        Returns:
            The path of the checkpoint.

        Raises:
            OpdlabError: There is no folder, or it holds checkpoints of another run.
        """
        return saving.save_checkpoint(self, path)

    def to_config(self, path: str | os.PathLike[str] | None = None) -> str:
        """Write the run as a config, which `opdlab distill` and `opdlab.from_config` take.

        On a CPU the run that they make trains bit for bit as this one does.

        Args:
            path: The file to write; None writes none.

        Returns:
            The config as TOML, with absolute paths.

        Raises:
            OpdlabError: Something of the run is code or an object in memory, which no config holds.
                The message says what, and what to do.
        """
        text = write_toml(
            exporting.write_config(
                self.described,
                self.task,
                self.method,
                self.settings,
                self.folder,
                self.log_with,
                self.sampler,
            )
        )
        if path is not None:
            write_file(Path(path), text.encode("utf-8"))
        return text

    def save_adapter(
        self,
        path: str | os.PathLike[str],
        *,
        evaluations: Mapping[str, Evaluation] | None = None,
    ) -> Path:
        """Write the trained adapter with its tokenizer and a model card, atomically.

        Plain PEFT loads it: `PeftModel.from_pretrained(base, path)`; so does `Policy.load(path)`.

        Args:
            path: The folder; one that was written in this way before is replaced.
            evaluations: Evaluations for the card, as `{"before": …, "after": …}`.

        Returns:
            The folder.

        Raises:
            InvalidValue: All weights are trained, or the folder holds something else.
        """
        return publishing.save_adapter(self, path, evaluations)

    def export(
        self,
        path: str | os.PathLike[str],
        merged: bool = True,
        *,
        evaluations: Mapping[str, Evaluation] | None = None,
    ) -> Path:
        """Write the whole model with its tokenizer and a model card, atomically.

        Plain transformers loads it: `AutoModelForCausalLM.from_pretrained(path)`.

        Args:
            path: The folder; one that was written in this way before is replaced.
            merged: Whether the adapter is added to the weights (a quantised base becomes plain).
                Otherwise the base model is written, with the adapter in the folder `adapter`.
            evaluations: Evaluations for the card, as `{"before": …, "after": …}`.

        Returns:
            The folder.

        Raises:
            InvalidValue: The folder holds something else, or the base model is quantised and not
                to be merged.
        """
        return publishing.export(self, path, merged, evaluations)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        merged: bool | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        evaluations: Mapping[str, Evaluation] | None = None,
    ) -> str:
        """Upload the adapter, or the whole model, with its card to the Hub.

        Args:
            repo_id: The repository, as "name/model"; it is made if it is not there.
            merged: None uploads the adapter (the model, if all weights were trained); True the
                model with the adapter added to its weights.
            private: Whether a new repository is private; the account's default by default.
            token: The Hub's token; the one that is saved on this machine by default. It is written
                nowhere.
            revision: The branch to upload to; it is made if it is not there.
            evaluations: Evaluations for the card, as `{"before": …, "after": …}`.

        Returns:
            The address of the repository.

        Raises:
            InvalidValue: The name is none.
            OpdlabError: The Hub refuses, or cannot be reached.
        """
        return publishing.push_to_hub(
            self,
            repo_id,
            merged=merged,
            private=private,
            token=token,
            revision=revision,
            evaluations=evaluations,
        )

    def restart(
        self, done: int, metrics: list[dict[str, float]], snapshots: Mapping[int, dict[str, Tensor]]
    ) -> None:
        """Go on after `done` steps, with the history and the snapshots until then.

        For `opdlab.resume`.

        Args:
            done: Number of steps done.
            metrics: The metrics of each of them.
            snapshots: The student's adapter after some of them, by step.
        """
        self.done, self.metrics = done, list(metrics)
        self.snapshots = {**self.snapshots, **snapshots}

    def __repr__(self) -> str:
        return f"Run({name_of(self.method)}, step {self.done} of {self.settings.steps})"
