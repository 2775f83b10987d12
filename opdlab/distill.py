"""The loop: write, grade, plan, learn. `distill(...)` returns a `Run`, and `for step in run:` trains.

A `Run` is an iterator that holds its own state, so `break` (or an interrupted cell) stops it between two updates and
looping again goes on. All randomness of a step is made from (seed, step), so a resumed run repeats the uninterrupted one
bit for bit on a CPU. Left out: distributed code. Processes and trackers are Accelerate's, adapters PEFT's.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType
from torch import Tensor

from opdlab import checkpoint, roles, signals
from opdlab.batch import Batch, rehearse
from opdlab.errors import InvalidValue, MissingPolicy, NonFinite, OpdlabError
from opdlab.evaluate import evaluate
from opdlab.expect import expect_teacher
from opdlab.methods import OPD, Method
from opdlab.methods.contract import as_method, name_of
from opdlab.policy import Policy, Prompt, check_same_tokens
from opdlab.progress import Progress
from opdlab.rollout import Rollout, joined, sample, written
from opdlab.rows import Pass, States, gradient
from opdlab.settings import Settings, check_settings, make_settings, seed_of
from opdlab.tasks import Task
from opdlab.trace import Trace, record
from opdlab.validation import ByName, Flag, Folder, shortened, validate_arguments


@dataclass(frozen=True, eq=False)
class Step:
    """One update: its number (from 1), its `metrics`, what was written, and every token's numbers and plan columns."""

    number: int
    metrics: dict[str, float]
    rollout: Rollout
    columns: dict[str, Tensor]
    plan: dict[str, Tensor]
    policies: dict[str, Any] = field(repr=False)
    notes: dict[str, Any] = field(default_factory=dict, repr=False)

    def trace(self) -> Trace:
        """The step's tokens as a `Trace`; without top tokens (`opdlab.score` on `step.rollout` adds them)."""
        graded = {name: self.policies[name] for name in roles.graded(self.policies)}
        return record(self.rollout, graded, self.columns, step=self.number, plan=self.plan, notes=self.notes)

    def __repr__(self) -> str:
        return f"Step({self.number}: " + ", ".join(f"{k} {v:.3g}" for k, v in self.metrics.items() if k != "step") + ")"


@validate_arguments
def distill(student: Policy, teacher: Any = None, task: Task | None = None, *, method: Any = None,
            needs: Sequence[str] | str | None = None, policies: ByName | None = None,
            save: Folder | None = None, log_with: Any = None, quiet: Flag = False, **settings: Any) -> Run:  # fmt: skip
    """Prepare a run; iterating over it trains the student in place. Checks everything that can be checked beforehand.

    teacher: a Policy, or one of `opdlab.teachers` (a server, a model that only writes), or None for methods that need none.
    method: OPD with the reverse KL by default; a method, the class of one, or a loss function of rows, for which `needs` names the
    policies that it reads (the teacher by default). policies: replaces what a name in the method's `needs` stands for, as
    `{"student+hint": student.frozen().seeing()}`. save: folder for checkpoints (`save_every` steps). log_with: a tracker of
    Accelerate. settings: fields of `Settings`; what is left out comes from the method's recipe, then the task's.

    Raises:
        InvalidValue: An argument is not what it must be, or a setting would be ignored.
        TokenizerMismatch, MissingPolicy, MissingHint, ContextTooLong: The models, the prompts and the method do not fit each
            other. All are raised before any compute is spent.
    """
    if teacher is not None:
        expect_teacher(teacher, "distill")
    if task is None:
        raise OpdlabError("distill needs a task, the supply of prompts. Use opdlab.tasks.market(), from_records(…) or reasoning_gym(…).")
    chosen = OPD() if method is None and needs is None else as_method(method, needs=needs)
    policies = {} if policies is None else policies
    _check_writers(chosen, teacher)
    roles.check_given(chosen, policies)
    made = make_settings(settings, chosen, task)
    check_settings(made, settings, chosen, task, saves=bool(save))
    return Run(student, teacher, task, chosen, made, policies, save, log_with, quiet)


class Run:
    """A training run: an iterator over `Step`s. `history` is a data frame, `save` and `opdlab.resume` keep it."""

    def __init__(self, student: Policy, teacher: Any, task: Task, method: Method, settings: Settings,
                 policies: Mapping[str, Any], save: str | os.PathLike[str] | None, log_with: Any, quiet: bool) -> None:  # fmt: skip
        self.student, self.task, self.method, self.settings = student, task, method, settings
        self.done = 0
        self.rows: list[dict[str, float]] = []
        self.snapshots: dict[int, dict[str, Tensor]] = {}
        self.last: Step | None = None
        self.folder = Path(save) if save else None
        self.policies = roles.cast(student, teacher, method.needs, policies)
        self.writer = teacher
        self._check(teacher)
        self.accelerator = _accelerator(log_with)
        if log_with is not None:
            self.accelerator.init_trackers("opdlab", asdict(settings))
        self.parameters = self._trainable()
        self.averages = roles.start_average(student, self.policies, policies)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        if settings.snapshot_every:
            self._keep()  # step 0, the student before any update
        self._progress = Progress(settings.steps, name_of(method), quiet=quiet or not self.accelerator.is_main_process)

    @property
    def history(self) -> pd.DataFrame:
        """One row a step: loss, reverse_kl, entropy, length, cut, reward, grad_norm, lr, seconds, …"""
        return pd.DataFrame(self.rows)

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        if self.done >= self.settings.steps:
            self._progress.close()
            raise StopIteration
        self.last = step = self._step()
        keep = {k: v for k, v in step.metrics.items() if k in ("loss", "reverse_kl", "reward", "length", "accuracy")}
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
                f"No snapshot of step {step}; there are {', '.join(map(str, self.snapshots)) or 'none'}. Set snapshot_every=…."
            )
        policy = self.student.frozen()
        policy.weights.set_adapter_state(str(policy.adapter), self.snapshots[step])
        return policy

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write a checkpoint, atomically: a crash at any moment leaves the earlier ones and a complete new one or none."""
        folder = Path(path) if path else self.folder
        if folder is None:
            raise OpdlabError("Where to? Give run.save(path), or distill(…, save=path).")
        return checkpoint.write(self, folder)

    def __repr__(self) -> str:
        return f"Run({name_of(self.method)}, step {self.done} of {self.settings.steps})"

    # One step, from prompts to updated weights.

    def _step(self) -> Step:
        began = time.perf_counter()
        self.optimizer.zero_grad()
        rollout = self._write()
        wrote = time.perf_counter()
        batch = Batch(rollout, self.policies, self.task, self.done)
        plan: Mapping[str, Tensor] = self.method.plan(batch) if hasattr(self.method, "plan") else {}
        columns = {name: batch.flat(name, column) for name, column in plan.items()}
        weight = self._weight(rollout)
        passes = [self._backward(batch, rows, columns, weight) for rows in self._micro_batches(len(rollout))]
        tokens = {key: torch.cat([p.columns[key] for p in passes]) for key in passes[0].columns}
        tokens["loss"] = torch.cat([p.loss for p in passes])
        self._reduce()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip or math.inf)
        if not math.isfinite(norm.item()):
            raise NonFinite(f"Step {self.done + 1}: the gradient is {norm.item()}. Lower the learning rate; the weights are as they were.")
        metrics = self._measure(batch, tokens, weight) | {"grad_norm": norm.item()}
        self._commit(metrics, began, wrote, rollout.tokens)
        return Step(self.done, metrics, rollout, tokens, columns, self.policies, batch.notes)

    def _write(self) -> Rollout:
        """The step's rollout: the student's, but for the share that the method gives to a teacher or to the answers."""
        s, world, rank = self.settings, self.accelerator.num_processes, self.accelerator.process_index
        prompts = self.task.prompts(s.batch * world, seed=seed_of(s.seed, self.done, 0))[rank * s.batch :][: s.batch]
        share = getattr(self.method, "on_policy", 1.0)
        coin = torch.rand((), generator=torch.Generator().manual_seed(seed_of(s.seed, self.done, 1))).item()
        own = min(s.batch, math.floor(share * s.batch + coin)) if share < 1 else s.batch
        options: dict[str, Any] = {"max_new_tokens": s.max_new_tokens, "temperature": s.temperature, "top_p": s.top_p,
                                   "seed": seed_of(s.seed, self.done, 2 + rank)}  # fmt: skip
        parts = []
        with self._autocast():
            if own:
                parts.append(sample(self.student, prompts[:own], s.n, **options))
            if own < s.batch:
                parts.append(self._written_by_others(prompts[own:], options))
        return joined(parts)

    def _written_by_others(self, prompts: list[Prompt], options: dict[str, Any]) -> Rollout:
        """What each of the method's writers answers to all the prompts, one writer after the other."""
        return joined([self._written_by(name, prompts, dict(options)) for name in _writers(self.method)])

    def _written_by(self, name: str, prompts: list[Prompt], options: dict[str, Any]) -> Rollout:
        if name == "answer":
            return written(self.student, prompts, _answers(prompts))
        writer = self.writer if name == "teacher" else self.policies[name]
        if not isinstance(writer, Policy):
            options.pop("top_p")
            texts = writer.write(prompts, self.settings.n, **options)
            repeated = [prompt for prompt in prompts for _ in range(self.settings.n)]
            return written(self.student, repeated, [text for row in texts for text in row], writer=name)
        return sample(writer, prompts, self.settings.n, writer=name, **options)

    def _micro_batches(self, rows: int) -> list[range]:
        size = self.settings.micro_batch or rows
        return [range(i, min(i + size, rows)) for i in range(0, rows, size)]

    def _backward(self, batch: Batch, rows: range, columns: Mapping[str, Tensor], weight: Tensor) -> Pass:
        """Gradient of some completions, added to the parameters; other policies' states are computed once a batch."""
        lengths = batch.rollout.lengths
        a, b = int(lengths[: rows.start].sum()), int(lengths[: rows.stop].sum())
        part = batch.rollout if len(rows) == len(lengths) else batch.rollout.rows(rows)
        with self._autocast():
            others = {name: batch.states(name) for name in batch.distributions if name != "student"}
            with torch.enable_grad(), self._recomputing():
                hidden = self.student.hidden(part)
        states = {"student": States(hidden, self.student.weights.head)}
        states |= {name: s.part(slice(a, b)) for name, s in others.items()}
        token = part.ids[part.mask]
        piece = {name: column[a:b] for name, column in columns.items()}
        try:
            result = gradient(self.method.loss, states, token, weight[a:b], piece, watch=signals.cheap)
        except NonFinite as error:
            raise NonFinite(self._where(error, part)) from None
        with self.student.weights.using(self.student.adapter), self._recomputing():
            hidden.backward(result.gradient.to(hidden.dtype))
        return result

    def _autocast(self) -> torch.autocast:
        """Not Accelerate's: that is one for the life of a process, and a notebook may hold runs of both precisions."""
        return torch.autocast(self.student.weights.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Gradient checkpointing runs in train mode only; dropout stays off (`_trainable`)."""
        model = self.student.weights.model
        model.train(self.settings.checkpointing)
        try:
            yield
        finally:
            model.eval()

    def _weight(self, rollout: Rollout) -> Tensor:
        """Each token's share of the mean, `[tokens]`: counted over all processes, so the split does not matter."""
        rule, lengths = self.settings.normalize, rollout.lengths
        local = torch.tensor([len(rollout), rollout.tokens], device=lengths.device, dtype=torch.float64)
        completions, tokens = self.accelerator.reduce(local, "sum").tolist()
        per_row = {"token": torch.full_like(lengths, 1, dtype=torch.float64) / max(tokens, 1),
                   "sequence": 1 / (completions * lengths.clamp(min=1).double()),
                   "constant": torch.full_like(lengths, 1, dtype=torch.float64) / (completions * self.settings.max_new_tokens)}  # fmt: skip
        return per_row[rule].float().repeat_interleave(lengths)

    def _reduce(self) -> None:
        for p in self.parameters.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if self.accelerator.num_processes > 1:
                p.grad = self.accelerator.reduce(p.grad, "sum")

    def _measure(self, batch: Batch, tokens: Mapping[str, Tensor], weight: Tensor) -> dict[str, float]:
        rollout = batch.rollout
        out = {"step": float(self.done + 1), "loss": float((tokens["loss"] * weight).sum())}
        kl = next((key for key in tokens if key.endswith("_reverse_kl")), None)
        out |= {"reverse_kl": float(tokens[kl].mean())} if kl else {}
        out["entropy"] = float(tokens["student_entropy"].mean())
        out["length"] = float(rollout.lengths.float().mean())
        out["cut"] = sum(f == "length" for f in rollout.finish) / len(rollout)
        out["empty"] = float((rollout.lengths == 0).float().mean())
        if self.task.verify is not None and all(w == "student" for w in rollout.writer):
            out["reward"] = float(batch.rewards.mean())
        return out

    def _commit(self, metrics: dict[str, float], began: float, wrote: float, tokens: int) -> None:
        """Move the weights and count the step; an interrupt waits until both are done."""
        s = self.settings
        metrics["lr"] = lr = s.rate(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with _uninterrupted():
            self.optimizer.step()
            for policy in self.averages:
                roles.average(policy, self.student, s.ema_rate)
            self.done += 1
            metrics |= {"tokens": float(tokens), "generate_s": wrote - began, "seconds": time.perf_counter() - began}
            self.rows.append(metrics)
        if s.evaluate_every and self.done % s.evaluate_every == 0:
            metrics["accuracy"] = evaluate(self.student, self.task).accuracy
        if s.snapshot_every and self.done % s.snapshot_every == 0:
            self._keep()
        if s.save_every and self.folder and self.done % s.save_every == 0 and self.accelerator.is_main_process:
            self.save()
        self.accelerator.log(metrics, step=self.done)

    def _keep(self) -> None:
        """Remember the adapter as it is now; full training keeps none, since every copy would be a whole model."""
        if self.student.adapter:
            state = self.student.weights.adapter_state(self.student.adapter)
            self.snapshots[self.done] = {k: v.detach().cpu().clone() for k, v in state.items()}

    # Preparation.

    def _check(self, teacher: Any) -> None:
        first = self.task.prompts(self.settings.batch, seed=seed_of(self.settings.seed, 0, 0))
        for name in self.method.needs:
            if name not in self.policies:
                raise roles.missing(self.method, name)
        writes = getattr(self.method, "on_policy", 1.0) < 1
        if writes and "answer" in _writers(self.method):
            _answers(first)
        rehearse(self.method, self.policies, self.task, first[0])
        everyone = self.policies | ({"writer": teacher} if writes and teacher is not None else {})
        for name, policy in everyone.items():
            if not isinstance(policy, Policy):  # a teacher of another kind knows best what it can take
                getattr(policy, "check", lambda *_: None)(self.student, first, self.settings.max_new_tokens)
                continue
            if not name.endswith(".spans"):
                check_same_tokens(self.student, policy, name)
            policy.encode_all(first, room=self.settings.max_new_tokens)

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        """Parameters by name: the adapter's (made here if there is none), or all of them in full training."""
        s, weights = self.settings, self.student.weights
        if s.lora is not None and self.student.adapter is None:
            self.student.adapt(s.lora, seed=s.seed)
        if s.lora is None:
            if self.student.adapter is not None:
                raise OpdlabError(
                    f"The student looks through the adapter {self.student.adapter!r}, which lora=None would leave beside the weights that "
                    "it trains. Leave lora as it is to train the adapter on, or load a student without one."
                )
            copies: dict[int, Policy] = {}  # full training would move what shares the weights; one copy serves all views of one policy
            for name, policy in self.policies.items():
                if isinstance(policy, Policy) and policy.weights is weights and policy._adapter is not self.student._adapter:
                    key = id(policy._adapter)
                    copy = copies[key] = copies.get(key) or policy.copied()
                    self.policies[name] = Policy(copy.weights, policy.context, copy._adapter)
            weights.model.requires_grad_(True)
        weights.use(self.student.adapter)
        if s.checkpointing:
            for module in weights.model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            weights.model.activation_checkpointing_enable()
        return {name: p for name, p in weights.model.named_parameters() if p.requires_grad}

    def _where(self, error: NonFinite, part: Rollout) -> str:
        """The step, prompt and token of an engine's error, in words."""
        row = getattr(error, "row", 0)
        ends = part.lengths.cumsum(0)
        b = int((ends <= row).sum())
        t = row - int(ends[b] - part.lengths[b])
        token = self.student.tokenizer.convert_ids_to_tokens(int(part.ids[b, t]))
        return (
            f"Step {self.done + 1}, prompt {part.prompts[b].id or b!r}, token {t} ({token!r}): {error} The weights are as they were "
            "and earlier checkpoints are intact. Lower the learning rate, or look at the loss on this token."
        )


def _accelerator(log_with: Any) -> Accelerator:
    """Accelerate's helper with the trackers that the user names; it would leave out in silence those that are not installed."""
    try:
        accelerator = Accelerator(log_with=log_with)
    except (ValueError, TypeError) as error:
        raise InvalidValue(
            f"distill got log_with={shortened(log_with)}, which Accelerate refuses: {str(error).rstrip('.')}. "
            "Use the name of a tracker, or an object of a class of accelerate.tracking."
        ) from None
    asked = log_with if isinstance(log_with, (list, tuple)) else [log_with]
    found = {str(one) for one in accelerator.log_with}
    known = {str(one) for one in LoggerType} - {"all"}
    for name in map(str, asked):
        if name in known and name not in found:
            raise InvalidValue(f"distill got log_with={shortened(log_with)}, but {name} is not installed. Install it.")
    return accelerator


def _check_writers(method: Method, teacher: Any) -> None:
    """Raise MissingPolicy where a method has a teacher write and there is none that can."""
    if getattr(method, "on_policy", 1.0) == 1 or "teacher" not in _writers(method):
        return
    if teacher is None:
        raise MissingPolicy(f"{name_of(method)} lets a teacher write, but there is none. Give distill a teacher.")
    if not (isinstance(teacher, Policy) or hasattr(teacher, "write")):
        raise MissingPolicy(f"{name_of(method)} lets the teacher write, but {type(teacher).__name__} only grades. Use one that writes.")


def _writers(method: Method) -> tuple[str, ...]:
    writer = getattr(method, "writer", "teacher")
    return (writer,) if isinstance(writer, str) else tuple(writer)


def _answers(prompts: list[Prompt]) -> list[str]:
    for prompt in prompts:
        if prompt.answer is None:
            raise OpdlabError(f"Prompt {prompt.id!r} has no answer to train on. SFT needs an `answer` in every record.")
    return [prompt.answer or "" for prompt in prompts]


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C (and the notebook's stop button) until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *caught: waiting.append(caught))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting and callable(before):
            before(*waiting[0])
