"""Run an opdlab method inside TRL: the trainer is TRL's, plan and loss are the method's.

    trainer = MethodTrainer(
        my_method, model=…, teacher_model=…, args=DistillationConfig(…), train_dataset=…
    )
    trainer.train()

`MethodTrainer` is a `trl.DistillationTrainer` (TRL 1.10 to 1.16). TRL reads the data, generates
(also with vLLM and with tools) and runs the student's backbone, its optimizer and its processes:

    TRL       generates the completions of a step, for all of its accumulated batches
    opdlab    the policies grade them, the method plans, once for the whole step of all processes
    TRL       takes one batch after the other and runs the student's backbone on it
    opdlab    runs the loss on the hidden states, one chunk of tokens at a time
    TRL       backward pass, accumulation, DDP or FSDP2, optimizer

So a step has the loss and the gradient of `opdlab.distill` on the same completions. The engine's
gradients are handed back to autograd, so gradient accumulation, mixed precision, DDP and FSDP2 work
as for any other loss (`opdlab.bridges.trl_shards`). `opdlab.bridges.trl_checks` refuses what cannot
be had there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from opdlab.bridges.trl_checks import check_method, check_trainer, check_with_data
from opdlab.bridges.trl_data import PromptsAsRead, pad_inputs, read_prompts, read_rollout
from opdlab.bridges.trl_shards import WholeStudent, shard_on_cpu
from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout, concat_rollouts
from opdlab.data.sampling_config import SamplingConfig
from opdlab.data.seeds import seed_of
from opdlab.engine import signals
from opdlab.engine.batch import Batch
from opdlab.engine.passes import Pass
from opdlab.engine.planned import Planned, run_plan
from opdlab.errors import InvalidValue
from opdlab.methods.contract import recipe_of, writer_names
from opdlab.methods.conversion import as_method
from opdlab.models import adapters
from opdlab.models.graded import States
from opdlab.models.head import Head
from opdlab.models.precision import autocast_backbones
from opdlab.training import others
from opdlab.training.normalization import token_weights
from opdlab.training.processes import AcceleratedProcesses, Share
from opdlab.training.resolution import move_average, resolve_policies, start_average
from opdlab.training.sharding import weights_read_later
from opdlab.training.trainable import separate_policies

try:
    from trl import DistillationTrainer
except ImportError as error:
    raise ImportError(
        "opdlab.bridges.trl needs TRL, which cannot be imported here. Install it: pip install"
        " 'opdlab[trl]'."
    ) from error

ROW = "opdlab_row"  # in TRL's inputs: the number of each completion in this process's step


@dataclass(frozen=True)
class _Step:
    """A step of this process: all completions of its accumulated batches.

    Attributes:
        planned: The completions with the grades and the plan.
        weight: Each token's share in the loss of the step, times the number of processes, over
            which DDP takes the mean, `[tokens]`.
    """

    planned: Planned
    weight: Tensor


# TRL is optional, so the type checker does not look into it (pyproject.toml).
class MethodTrainer(DistillationTrainer):  # type: ignore[misc, unused-ignore]
    """Train with an opdlab method in place of TRL's divergence.

    TRL's `beta` is ignored. Columns `answer`, `hint` and `id` of the dataset become those of the
    prompts. The log-probs of the student's tokens that a plan reads are the trainer's, whoever
    generated them: TRL discards those of vLLM.

    Args:
        method: A method, as `opdlab.distill` takes it.
        teacher: In place of TRL's `teacher_model`: a policy, or one of `opdlab.teachers`.
        policies: As in `opdlab.distill`: replaces what names in the method's `needs` stand for.
        normalize: "token", "sequence" or "constant", as in `opdlab.distill`; by default what the
            method's recipe says, else "token".
        ema_rate: The share of the way that `ema` moves to the student after each update.
        arguments: Arguments of `trl.DistillationTrainer`: `model`, `teacher_model`, `args`,
            `train_dataset`, …

    Attributes:
        method: The method.
        policies: The policies that it reads, by name, the student first.

    Raises:
        OpdlabError: The method, the trainer's settings or the data do not go together. The message
            says why, and what to use.
    """

    def __init__(
        self,
        method: Any,
        *,
        teacher: Any = None,
        policies: Mapping[str, Any] | None = None,
        normalize: str | None = None,
        ema_rate: float = 0.05,
        **arguments: Any,
    ) -> None:
        self.method = as_method(method, "MethodTrainer")
        has_model = arguments.get("teacher_model") is not None
        check_method(self.method, teacher, has_model, policies or {}, bool(arguments.get("tools")))
        self.normalize = normalize or recipe_of(self.method).get("normalize", "token")
        if self.normalize not in ("token", "sequence", "constant"):
            raise InvalidValue(
                f"MethodTrainer got normalize={normalize!r}. Use 'token', 'sequence' or 'constant'."
            )
        self._loss_is_checked = False
        self._now: _Step | None = None
        self._whole: WholeStudent | None = None  # of a student in shards
        super().__init__(**arguments)
        check_trainer(self)
        self._make_policies(teacher, policies or {})
        check_with_data(self, teacher)
        if self.averages:
            self.add_callback(_MovesAverage(self, ema_rate))
        if self._whole is not None:
            self.add_callback(_KeepsWhole(self._whole))

    def _make_policies(self, teacher: Any, overrides: Mapping[str, Any]) -> None:
        """Make policies of TRL's models, which stay as trainable as they are."""
        model = self.accelerator.unwrap_model(self.model)
        seen = model
        if self.is_fsdp_enabled:  # then TRL leaves the model where it was loaded
            model.to(self.accelerator.device)
            self._whole = WholeStudent(model)
            seen = self._whole.model
        with _keeping_mode(model):
            student = PromptsAsRead.of(seen, self.processing_class)
            if self.teacher_model is not None:
                bare = self.accelerator.unwrap_model(self.teacher_model)
                teacher = PromptsAsRead.of(bare, self.processing_class)
                teacher.read = student.read
            self.teacher = teacher
            self.policies = resolve_policies(student, teacher, self.method.needs, overrides)
            if student.adapter is None:
                separate_policies(student, self.policies)
            self.averages = start_average(student, self.policies, overrides)
        self.student: PromptsAsRead = student

    def create_accelerator_and_postprocess(self) -> None:
        """Make the processes, which shard on CPUs too where they are asked to."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled |= shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)

    # A step begins: completions, grades, plan.

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Generate the completions of a step, where TRL asks for it, and let the method plan."""
        if self._whole is None:
            return self._begin_step(inputs)
        self._whole.gather()
        with self._whole.standing_in(self):
            found = self._begin_step(inputs)
        if self.is_in_train and self._now is not None:
            self._whole.release(keep=weights_read_later(self._now.planned.batch))
        return found

    def _begin_step(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Generate, grade and plan, with whole weights."""
        prompts = read_prompts(inputs)
        share = self._share(len(prompts))
        own = len(share.student)
        parts: list[Rollout] = []
        generated: dict[str, Any] = {}
        self.student.read.clear()
        if share.all_student:  # in all processes or in none, since TRL counts over all of them
            generated = super()._generate_and_score_completions(inputs[: max(own, 1)])
        if own:
            parts.append(read_rollout(self.student, prompts[:own], generated))
        model = self.accelerator.unwrap_model(self.model)
        with _keeping_mode(model), autocast_backbones(self.args.bf16):
            parts += self._write_others(prompts[own:], share)
            rollout = concat_rollouts(parts)
            if own < len(rollout):
                generated = pad_inputs(self.student, rollout, self._tokenizer.pad_token_id)
            self._now = self._plan(rollout, share)
        counted = rollout.learn.sum()
        total = AcceleratedProcesses(self.accelerator).sum(counted)
        row = torch.arange(len(rollout), device=rollout.ids.device)
        return {**generated, "num_items_in_batch": total, ROW: row}

    def _share(self, prompts: int) -> Share:
        """Draw which prompts of a step the student answers, as `opdlab.distill` draws them."""
        count = self.accelerator.num_processes
        own = others.count_of_student(
            self.method, prompts * count, self.args.seed, self.state.global_step
        )
        return Share.of(prompts * count, own, self.accelerator.process_index, count)

    def _write_others(self, prompts: list[Prompt], share: Share) -> list[Rollout]:
        """Let the method's writers answer the prompts that the student does not answer."""
        if not prompts:
            return []
        seed = seed_of(self.args.seed, self.state.global_step, 2)
        config = SamplingConfig(max_new_tokens=self.max_completion_length, seed=seed)
        return [
            others.write_by(
                name,
                self.teacher if name == "teacher" else self.policies.get(name),
                self.student,
                prompts,
                1,
                config,
                places=share.others if self.accelerator.num_processes > 1 else None,
                process=self.accelerator.process_index,
            )
            for name in writer_names(self.method)
        ]

    def _plan(self, rollout: Rollout, share: Share) -> _Step:
        """Let the policies grade and the method plan, over all processes."""
        processes = AcceleratedProcesses(self.accelerator)
        row = torch.tensor(share.rows(1, [1] * len(writer_names(self.method))))
        batch = Batch(
            rollout, self.policies, None, self.state.global_step, processes, row[: len(rollout)]
        )
        with torch.no_grad():
            if hasattr(self.method, "plan"):  # only those who look pay one more pass
                batch = _with_own_numbers(batch)
            planned = run_plan(self.method, batch)
            for name in batch.distributions:
                if name != "student":
                    planned.batch.states(name)
        weight = token_weights(rollout, self.normalize, self.max_completion_length, processes.sum)
        return _Step(planned, weight * processes.count)

    # The loss of one accumulated batch.

    def _compute_loss(
        self,
        unwrapped_student: Any,
        inputs: Mapping[str, Tensor],
        num_items_in_batch: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss where TRL's trainer asks for it.

        Returns:
            The loss, the sum of the student's entropies (nats), and the number of counted tokens.
        """
        assert self._now is not None
        rows = inputs[ROW].tolist()
        mask = inputs["completion_mask"].bool()
        hidden = self._hidden_states(unwrapped_student, inputs)[mask]  # [tokens, H]
        head = self._head_in_graph(unwrapped_student)
        own = _with_own_leaves(head)
        with torch.autocast(hidden.device.type, enabled=False), torch.enable_grad():
            found = self._now.planned.gradient(
                self._now.weight,
                student=States(hidden.detach(), own),
                rows=rows,
                watch=signals.cheap,
                check=not self._loss_is_checked,
            )
        self._loss_is_checked |= found.is_checked
        weight = self._now.weight[self._now.planned.tokens_of(rows)]
        loss = _attach_gradient(found, weight, hidden, head, own)
        counted = (weight != 0).float()
        return loss, (found.columns["student_entropy"] * counted).sum(), counted.sum()

    def _hidden_states(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Hidden states `[B, T, H]` at the places where the completion tokens are predicted."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        length = inputs["completion_ids"].shape[1]
        hidden: Tensor = self._get_last_hidden_state(model, ids, mask, length)
        return hidden

    def _head_in_graph(self, model: Any) -> Head:
        """The student's head as TRL's backward pass knows it.

        That of shards is whole between a pass of the backbone and its way back.
        """
        if self._whole is None:
            return self.student.head
        weights = self.student.weights
        return Head.read(adapters.unwrap(model), weights.vocab_size, self.student.adapter)

    # What TRL's checkpoints do not hold.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Take up a checkpoint of TRL, unless the method needs more than it holds."""
        kept = [*(["a moving average"] if self.averages else [])]
        kept += ["a state of the method"] if hasattr(self.method, "state_dict") else []
        if kept:
            raise InvalidValue(
                f"This run needs {' and '.join(kept)}, which TRL's checkpoints do not hold, so it"
                " cannot be taken up. Train in one go, or use opdlab.distill."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)


class _MovesAverage(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Moves the student's average after each update."""

    def __init__(self, trainer: MethodTrainer, rate: float) -> None:
        self._trainer, self._rate = trainer, rate

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move it by one update."""
        trainer = self._trainer
        has_adapter = trainer.student.adapter is not None
        whole = trainer._whole
        with nullcontext() if whole is None else whole.filled(trained_only=has_adapter):
            for average in trainer.averages:
                move_average(average, trainer.student, self._rate)


class _KeepsWhole(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Leaves a sharded student whole for those who use the policies after training."""

    def __init__(self, whole: WholeStudent) -> None:
        self._whole = whole

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Fill the weights."""
        self._whole.gather()


@contextmanager
def _keeping_mode(model: torch.nn.Module) -> Iterator[None]:
    """Leave a model as trainable as it was, and in the mode of training or evaluation.

    Policies grade in evaluation mode, and making one freezes the model.
    """
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for parameter in trains:
            parameter.requires_grad_(True)
        kept = {id(parameter) for parameter in trains}
        for parameter in model.parameters():
            if id(parameter) not in kept:
                parameter.requires_grad_(False)
        for module, mode in modes.items():
            module.training = mode


def _with_own_numbers(batch: Batch) -> Batch:
    """The batch with the student's own log-probs and entropies, as `distill` has them."""
    seen = batch.map(signals.cheap, needs=("student",))
    by_student = torch.tensor([name == "student" for name in batch.rollout.writer])
    own = batch.mask & by_student.to(batch.mask.device)[:, None]
    return batch.with_logp(
        torch.where(own, seen["student_logp"], 0.0), torch.where(own, seen["student_entropy"], 0.0)
    )


def _attach_gradient(
    found: Pass, weight: Tensor, hidden: Tensor, head: Head, leaves: Head
) -> Tensor:
    """Make a scalar with the value of the loss and the gradients that the engine found.

    Args:
        found: The engine's loss `[tokens]` and its gradient `[tokens, H]`.
        weight: Each token's share of the mean, `[tokens]`.
        hidden: The student's hidden states in TRL's graph, `[tokens, H]`.
        head: The student's head.
        leaves: The head on leaves of its own, which hold the head's gradients.
    """
    # The gradient of sum(x * g) with respect to x is g, so this linear form carries what the
    # engine found into autograd; subtracting its detached value leaves the loss itself.
    linear = (hidden.float() * found.gradient).sum()
    for parameter, leaf in ((head.weight, leaves.weight), (head.bias, leaves.bias)):
        if parameter is not None and leaf is not None and leaf.grad is not None:
            linear = linear + (parameter * leaf.grad).sum()
    return linear + ((found.loss * weight).sum() - linear).detach()


def _with_own_leaves(head: Head) -> Head:
    """Copy a head onto leaves of its own, so that the model's gradients wait for TRL's backward."""
    weight = head.weight.detach().requires_grad_(head.weight.requires_grad)
    bias = head.bias
    if bias is not None:
        bias = bias.detach().requires_grad_(bias.requires_grad)
    return replace(head, weight=weight, bias=bias)
