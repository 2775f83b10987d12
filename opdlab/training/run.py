"""The loop: write, grade, plan, learn.

`distill(...)` returns a `Run`, and `for step in run:` trains.

A `Run` is an iterator that holds its own state, so `break` (or an interrupted cell) stops it
between two updates and looping again goes on. All randomness of a step is made from (seed, step),
so a resumed run repeats the uninterrupted one bit for bit on a CPU. Left out: distributed code.
Processes and trackers are Accelerate's, adapters PEFT's.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout, concat_rollouts
from opdlab.data.seeds import seed_of
from opdlab.engine import signals
from opdlab.engine.batch import Batch
from opdlab.engine.columns import run_plan
from opdlab.engine.loss_contract import adding_note
from opdlab.engine.passes import Pass, gradient
from opdlab.engine.scoring import planner_of
from opdlab.errors import MissingPolicy, NonFinite, OpdlabError
from opdlab.methods import OPD, Method
from opdlab.methods.contract import name_of
from opdlab.methods.conversion import as_method
from opdlab.models import model_files
from opdlab.models.graded import States
from opdlab.models.policy import Policy, sample
from opdlab.models.precision import autocast_backbones
from opdlab.models.recomputation import recompute_layers
from opdlab.models.same_tokens import check_same_tokens
from opdlab.models.text_rollouts import rollout_from_texts
from opdlab.support.interrupts import hold_interrupts as _uninterrupted
from opdlab.support.progress import Progress
from opdlab.support.validation import ByName, Flag, Folder, validate_arguments
from opdlab.tasks import Task
from opdlab.teachers.contract import expect_teacher
from opdlab.teachers.writing import writing_options
from opdlab.training import method_state, run_folder, run_identity, saving, trainable
from opdlab.training.evaluation import evaluate
from opdlab.training.exclusive import Turn
from opdlab.training.metrics import measure_step
from opdlab.training.own_teacher import warn_of_own_teacher
from opdlab.training.preflight import check_answers, check_prompts, prompts_to_check
from opdlab.training.rehearsal import rehearse
from opdlab.training.resolution import (
    check_overrides,
    missing_policy_error,
    move_average,
    resolve_policies,
    start_average,
)
from opdlab.training.settings import Settings, check_settings, make_settings
from opdlab.training.step import Step
from opdlab.training.trackers import make_accelerator

Admit = Callable[["Run", Mapping[str, Any]], None]


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
    **settings: Any,
) -> Run:
    """Prepare a run; iterating over it trains the student in place.

    Checks everything that can be checked beforehand.

    teacher: a Policy, or one of `opdlab.teachers` (a server, a model that only writes), or None for
        methods that need none.
    method: OPD with the reverse KL by default; a method, the class of one, or a loss function of
        rows, for which `needs` names the
    policies that it reads (the teacher by default). policies: replaces what a name in the method's
    `needs` stands for, as `{"student+hint": student.frozen().seeing()}`. save: folder for
    checkpoints; the last step is always saved, and every `save_every` steps before it. log_with: a
    tracker of Accelerate. settings: fields of `Settings`; what is left out comes from the method's
    recipe, then the task's.

    A student that looks through an adapter already (a second stage) has that one trained on,
    whatever its rank. To stack a new LoRA on it give `student.merged()`; to start from the bare
    model, `Policy.of(model, tokenizer, adapter=None)`.

    Raises:
        InvalidValue: An argument is not what it must be, or a setting would be ignored.
        TokenizerMismatch, MissingPolicy, MissingHint, ContextTooLong: The models, the prompts and
            the method do not fit each other. All are raised before any compute is spent.
    """
    options = {
        "needs": needs,
        "policies": policies,
        "save": save,
        "log_with": log_with,
        "quiet": quiet,
    }
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
    settings: Mapping[str, Any],
    recorded: Mapping[str, Any] | None = None,
    admit: Admit | None = None,
) -> Run:
    """Make the run that `distill` and `resume` share.

    Args:
        student, teacher, task, method, needs, policies, save, log_with, quiet: As `distill` takes
            them.
        settings: The settings that the user passes.
        recorded: All settings of a run that goes on; the user's go before them.
        admit: Looks at the run before it gets an adapter and an optimizer, with the user's
            policies.
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
    _check_writers(chosen, teacher)
    check_overrides(chosen, policies)
    rank = trainable.lora_setting(student, {**(recorded or {}), **settings})
    made = make_settings({**rank, **(recorded or {}), **settings}, chosen, task)
    check_settings(made, settings, chosen, task, saves=bool(save))
    return Run(student, teacher, task, chosen, made, policies, save, log_with, quiet, admit)


class Run:
    """A training run: an iterator over `Step`s.

    `history` is a data frame, `save` and `opdlab.resume` keep it.
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
    ) -> None:
        self.student, self.task, self.method, self.settings = student, task, method, settings
        self.done = 0
        self.rows: list[dict[str, float]] = []
        self.snapshots: dict[int, dict[str, Tensor]] = {}
        self.last: Step | None = None
        self._loss_is_checked = False  # whether the loss was found to treat each row alone
        self.folder = run_folder.check_folder(save)
        self.lineage = run_folder.Lineage()
        self.policies = resolve_policies(student, teacher, method.needs, policies)
        self.writer = teacher
        self._check(teacher)
        warn_of_own_teacher(student, teacher, method.needs, policies)
        self.accelerator = make_accelerator(log_with, self.folder)
        if self.accelerator.is_main_process:
            task.warn_of_repeats(settings.batch * self.accelerator.num_processes)
        if log_with is not None:
            self.accelerator.init_trackers("opdlab", asdict(settings))
        self.memory = method_state.Memory(method)
        self.has_new_embeddings = model_files.has_new_embeddings(student.weights)
        self.identity = run_identity.describe_run(self, policies)
        if admit is not None:
            admit(self, policies)
        if self.folder is not None:
            run_folder.check_owner(self.folder, self.lineage)
        if settings.lora is not None:
            saving.check_parameters(student)
        self.parameters = trainable.prepare(student, self.policies, settings)
        if settings.lora is not None:
            saving.check_parameters(student)
        self._turn = Turn(student.weights, student.adapter)
        self.averages = start_average(student, self.policies, policies)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        if settings.snapshot_every:
            saving.keep_snapshot(self)  # step 0, the student before any update
        self._progress = Progress(
            settings.steps, name_of(method), quiet=quiet or not self.accelerator.is_main_process
        )

    @property
    def history(self) -> pd.DataFrame:
        """One row a step: loss, reverse_kl, entropy, length, cut, reward, grad_norm, lr, seconds, …"""
        return pd.DataFrame(self.rows)

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        self._evaluate()  # one that was interrupted is made up for
        if self.done >= self.settings.steps:
            self._progress.close()
            raise StopIteration
        self._turn.check(self)
        before = self.done
        with method_state.restored_on_failure(self.method, is_counted=lambda: self.done > before):
            step = self._step()
        self.last = step
        try:
            self._evaluate()
        finally:
            self.accelerator.log(step.metrics, step=self.done)
        keep = {
            k: v
            for k, v in step.metrics.items()
            if k in ("loss", "reverse_kl", "reward", "length", "accuracy")
        }
        self._progress.update(self.done, **keep)
        return step

    def train(self) -> Run:
        """Run all remaining steps; returns itself."""
        for _ in self:
            pass
        return self

    def at(self, step: int) -> Policy:
        """The student as it was after `step`, from the snapshots kept by `snapshot_every`."""
        if step not in self.snapshots:
            raise OpdlabError(
                f"No snapshot of step {step}; there are"
                f" {', '.join(map(str, self.snapshots)) or 'none'}. Set snapshot_every=…."
            )
        policy = self.student.frozen()
        policy.weights.set_adapter_state(str(policy.adapter), self.snapshots[step])
        return policy

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write a checkpoint, atomically: a crash at any moment leaves the earlier ones and a
        complete new one or none.

        Of several processes the main one writes.
        """
        return saving.save(self, path)

    def restart(
        self, done: int, rows: list[dict[str, float]], snapshots: Mapping[int, dict[str, Tensor]]
    ) -> None:
        """Go on after `done` steps, with the history and the snapshots until then.

        For `opdlab.resume`.
        """
        self.done, self.rows = done, list(rows)
        self.snapshots = {**self.snapshots, **snapshots}

    def __repr__(self) -> str:
        return f"Run({name_of(self.method)}, step {self.done} of {self.settings.steps})"

    # One step, from prompts to updated weights.

    def _step(self) -> Step:
        began = time.perf_counter()
        self.optimizer.zero_grad()
        rollout = self._write()
        wrote = time.perf_counter()
        batch = Batch(rollout, self.policies, self.task, self.done)
        with self._backbones():
            columns = run_plan(self.method, batch)
        weight = self._weight(rollout)
        passes = [
            self._backward(batch, rows, columns, weight)
            for rows in self._micro_batches(len(rollout))
        ]
        tokens = {key: torch.cat([p.columns[key] for p in passes]) for key in passes[0].columns}
        tokens["loss"] = torch.cat([p.loss for p in passes])
        self._reduce()
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), self.settings.clip or math.inf
        )
        if not math.isfinite(norm.item()):
            raise NonFinite(
                f"Step {self.done + 1}: the gradient is {norm.item()}. Lower the learning rate; the"
                " weights are as they were."
            )
        measured = measure_step(
            batch, tokens, weight, lambda sums: self.accelerator.reduce(sums, "sum")
        )
        metrics = {"step": float(self.done + 1), **measured, "grad_norm": norm.item()}
        self._commit(metrics, began, wrote)
        return Step(
            self.done,
            metrics,
            rollout,
            tokens,
            columns,
            self.policies,
            batch.notes,
            planner_of(self.method),
        )

    def _write(self) -> Rollout:
        """The step's rollout: the student's, but for the share that the method gives to a teacher
        or to the answers.
        """
        s, world, rank = (
            self.settings,
            self.accelerator.num_processes,
            self.accelerator.process_index,
        )
        prompts = self._prompts(self.done)
        size = len(prompts)
        share = getattr(self.method, "on_policy", 1.0)
        coin = torch.rand(
            (), generator=torch.Generator().manual_seed(seed_of(s.seed, self.done, 1))
        ).item()
        own = min(size, math.floor(share * size + coin)) if share < 1 else size
        # every world-th prompt, so that each process gets its part of what each writer answers
        by_student, by_others = (
            prompts[rank:own:world],
            prompts[own + (rank - own) % world :: world],
        )
        options: dict[str, Any] = {
            "max_new_tokens": s.max_new_tokens,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "seed": seed_of(s.seed, self.done, 2 + rank),
        }
        parts = []
        with self._backbones():
            if by_student:
                parts.append(sample(self.student, by_student, s.n, **options))
            if by_others:
                parts.append(self._written_by_others(by_others, options))
        return concat_rollouts(parts)

    def _prompts(self, done: int) -> list[Prompt]:
        """The prompts of the step after `done` others, for all processes together."""
        s = self.settings
        return self.task.training_batch(s.batch * self.accelerator.num_processes, done, s.seed)

    def _written_by_others(self, prompts: list[Prompt], options: dict[str, Any]) -> Rollout:
        """What each of the method's writers answers to all the prompts, one writer after the other."""
        return concat_rollouts(
            [self._written_by(name, prompts, dict(options)) for name in _writers(self.method)]
        )

    def _written_by(self, name: str, prompts: list[Prompt], options: dict[str, Any]) -> Rollout:
        if name == "answer":
            return rollout_from_texts(self.student, prompts, check_answers(prompts))
        writer = self.writer if name == "teacher" else self.policies[name]
        if not isinstance(writer, Policy):
            texts = writer.write(prompts, self.settings.n, **writing_options(writer, options))
            repeated = [prompt for prompt in prompts for _ in range(self.settings.n)]
            rollout = rollout_from_texts(
                self.student, repeated, [text for row in texts for text in row], writer=name
            )
            return replace(rollout, n=self.settings.n)
        return sample(writer, prompts, self.settings.n, writer=name, **options)

    def _micro_batches(self, rows: int) -> list[range]:
        size = self.settings.micro_batch or rows
        return [range(i, min(i + size, rows)) for i in range(0, rows, size)]

    def _backward(
        self, batch: Batch, rows: range, columns: Mapping[str, Tensor], weight: Tensor
    ) -> Pass:
        """Gradient of some completions, added to the parameters; other policies' states are
        computed once a batch.
        """
        lengths = batch.rollout.lengths
        a, b = int(lengths[: rows.start].sum()), int(lengths[: rows.stop].sum())
        part = batch.rollout if len(rows) == len(lengths) else batch.rollout.rows(rows)
        model = self.student.weights.model
        with self._backbones():
            others = {name: batch.states(name) for name in batch.distributions if name != "student"}
            with torch.enable_grad(), recompute_layers(model, self.settings.checkpointing):
                hidden = self.student.hidden(part)
        states = {"student": States(hidden, self.student.head)}
        states |= {name: s.part(slice(a, b)) for name, s in others.items()}
        token = part.ids[part.mask]
        piece = {name: column[a:b] for name, column in columns.items()}
        note = f"Raised by the loss of {type(self.method).__name__} in step {self.done + 1}."
        # The student's adapter is in force in both passes: its head gets gradients in the first,
        # layers run again in the second.
        with self.student.weights.using(self.student.adapter):
            try:
                with adding_note(note):
                    result = gradient(
                        self.method.loss,
                        states,
                        token,
                        weight[a:b],
                        piece,
                        watch=signals.cheap,
                        check=not self._loss_is_checked,
                    )
            except NonFinite as error:
                raise NonFinite(self._where(error, part)) from None
            self._loss_is_checked |= result.is_checked
            hidden.backward(result.gradient.to(hidden.dtype))
        return result

    def _backbones(self) -> AbstractContextManager[None]:
        """One precision for all that a step asks of models: writing, grading for the plan, and the
        loss pass.
        """
        return autocast_backbones(self.settings.precision == "bf16")

    def _weight(self, rollout: Rollout) -> Tensor:
        """Each token's share of the mean, `[tokens]`: counted over all processes, so the split does
        not matter.
        """
        rule, lengths = self.settings.normalize, rollout.lengths
        local = torch.tensor(
            [len(rollout), rollout.tokens], device=lengths.device, dtype=torch.float64
        )
        completions, tokens = self.accelerator.reduce(local, "sum").tolist()
        per_row = {
            "token": torch.full_like(lengths, 1, dtype=torch.float64) / max(tokens, 1),
            "sequence": 1 / (completions * lengths.clamp(min=1).double()),
            "constant": (
                torch.full_like(lengths, 1, dtype=torch.float64)
                / (completions * self.settings.max_new_tokens)
            ),
        }
        return per_row[rule].float().repeat_interleave(lengths)

    def _reduce(self) -> None:
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if self.accelerator.num_processes > 1:
                p.grad = self.accelerator.reduce(p.grad, "sum")

    def _commit(self, metrics: dict[str, float], began: float, wrote: float) -> None:
        """Move the weights and count the step; an interrupt waits until both are done."""
        s = self.settings
        metrics["lr"] = lr = s.rate(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with _uninterrupted():
            self.optimizer.step()
            for policy in self.averages:
                move_average(policy, self.student, s.ema_rate)
            self.done += 1
            self._turn.count()
            metrics |= {"generate_s": wrote - began, "seconds": time.perf_counter() - began}
            self.rows.append(metrics)
            if s.snapshot_every and self.done % s.snapshot_every == 0:
                saving.keep_snapshot(self)
            if saving.is_saved(self):
                self.save()

    def _evaluate(self) -> None:
        """Evaluate where that is due.

        The step is saved by then, so an interrupt here loses nothing.
        """
        if saving.is_evaluation_due(self):
            saving.keep_accuracy(self, evaluate(self.student, self.task).accuracy)

    # Preparation.

    def _check(self, teacher: Any) -> None:
        """Check models, method and every prompt of the task, before any compute is spent."""
        for name in self.method.needs:
            if name not in self.policies:
                raise missing_policy_error(self.method, name)
        prompts = prompts_to_check(self.task, self.settings)
        share, writers = getattr(self.method, "on_policy", 1.0), _writers(self.method)
        writes = share < 1
        answers = check_answers(prompts) if writes and "answer" in writers else None
        for name in writers if writes else ():
            writer = teacher if name == "teacher" else self.policies.get(name)
            if hasattr(writer, "write"):
                writing_options(
                    writer, {"temperature": self.settings.temperature, "top_p": self.settings.top_p}
                )
        rehearse(self.method, self.policies, self.task, prompts[0])
        everyone = self.policies | ({"writer": teacher} if writes and teacher is not None else {})
        local: dict[str, Policy] = {}
        for name, policy in everyone.items():
            if not isinstance(
                policy, Policy
            ):  # a teacher of another kind knows best what it can take
                getattr(policy, "check", lambda *_: None)(
                    self.student, prompts, self.settings.max_new_tokens
                )
                continue
            if not name.endswith(".spans"):
                check_same_tokens(self.student, policy, name)
            local[name] = policy
        if answers is not None:
            lengths = rollout_from_texts(self.student, prompts, answers).lengths.tolist()
            check_prompts(local, prompts, dict.fromkeys(local, lengths))
        if answers is None or share > 0 or len(writers) > 1:
            check_prompts(local, prompts, self.settings.max_new_tokens)
        if self.settings.evaluate_every and self.task.pool.get("test"):
            check_prompts(
                {"student": self.student}, self.task.pool["test"], self.task.max_new_tokens
            )

    def _where(self, error: NonFinite, part: Rollout) -> str:
        """The step, prompt and token of an engine's error, in words."""
        row = getattr(error, "row", 0)
        ends = part.lengths.cumsum(0)
        b = int((ends <= row).sum())
        t = row - int(ends[b] - part.lengths[b])
        token = self.student.tokenizer.convert_ids_to_tokens(int(part.ids[b, t]))
        advice = (
            ""
            if error.is_explained
            else " Lower the learning rate, or look at the loss on this token."
        )
        return (
            f"Step {self.done + 1}, prompt {part.prompts[b].id or b!r}, token {t} ({token!r}):"
            f" {error} The weights are as they were and earlier checkpoints are intact.{advice}"
        )


def _check_writers(method: Method, teacher: Any) -> None:
    """Raise MissingPolicy where a method has a teacher write and there is none that can."""
    if getattr(method, "on_policy", 1.0) == 1 or "teacher" not in _writers(method):
        return
    if teacher is None:
        raise MissingPolicy(
            f"{name_of(method)} lets a teacher write, but there is none. Give distill a teacher."
        )
    if not (isinstance(teacher, Policy) or hasattr(teacher, "write")):
        raise MissingPolicy(
            f"{name_of(method)} lets the teacher write, but {type(teacher).__name__} only grades."
            " Use one that writes."
        )


def _writers(method: Method) -> tuple[str, ...]:
    writer = getattr(method, "writer", "teacher")
    return (writer,) if isinstance(writer, str) else tuple(writer)
