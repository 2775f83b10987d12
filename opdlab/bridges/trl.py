"""Run an opdlab method inside TRL: everything is TRL's, only the loss is the method's.

    trainer = MethodTrainer(
        my_loss, model=…, teacher_model=…, args=DistillationConfig(…), train_dataset=…
    )
    trainer.train()

`MethodTrainer` is a `trl.DistillationTrainer` (TRL 1.16). TRL reads the data, generates, talks to
servers and runs the backbones; opdlab's engine runs plan and loss on their hidden states, one chunk
of tokens at a time. The engine's gradients are handed back to autograd, so gradient accumulation,
mixed precision and DDP work as for any other loss. Sharded weights (FSDP, ZeRO-3) and policies
other than the teacher are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.data.tokens import completion_texts
from opdlab.engine import signals
from opdlab.engine.batch import Batch
from opdlab.engine.passes import Pass, compute
from opdlab.engine.planned import Planned, run_plan
from opdlab.errors import OpdlabError
from opdlab.methods import Method
from opdlab.methods.contract import name_of, student_share, writer_names
from opdlab.methods.conversion import as_method
from opdlab.models import adapters
from opdlab.models.graded import States
from opdlab.models.head import Head

try:
    from trl import DistillationTrainer
except ImportError as error:
    raise ImportError(
        "opdlab.bridges.trl needs TRL, which cannot be imported here. Install it: pip install"
        " 'opdlab[trl]'."
    ) from error


# TRL is optional, so the type checker does not look into it (pyproject.toml).
class MethodTrainer(DistillationTrainer):  # type: ignore[misc, unused-ignore]
    """Train with an opdlab method in place of TRL's divergence.

    TRL's `beta` is ignored. The plan sees one micro-batch on one device, so a plan that compares
    texts compares `per_device_train_batch_size` of them.

    Args:
        method: A method, as `opdlab.distill` takes it; it may read only a teacher that grades.
        arguments: Arguments of `trl.DistillationTrainer`: `model`, `teacher_model`, `args`,
            `train_dataset`, …

    Attributes:
        method: The method.
        heads: The output heads of "student" and "teacher".

    Raises:
        OpdlabError: The method needs more than a teacher that grades, the temperature is not 1, or
            the student has a LoRA on its output head.
    """

    def __init__(self, method: Any, **arguments: Any) -> None:
        self.method = as_method(method, "MethodTrainer")
        self._loss_is_checked = False
        _check_method(self.method)
        super().__init__(**arguments)
        if self.temperature != 1:
            raise OpdlabError(
                f"TRL's temperature is {self.temperature}, but opdlab's losses see the"
                " distributions as they are. Set it to 1."
            )
        vocab_size = max(self.processing_class.get_vocab().values()) + 1
        self.heads = {
            "student": self._head_of(self.model, vocab_size),
            "teacher": self._head_of(self.teacher_model, vocab_size),
        }
        if self.heads["student"].lora is not None:
            raise OpdlabError(
                "The student has a LoRA on its output head, to which this bridge hands no gradient."
                " Leave the head out of its target_modules, or use opdlab.distill."
            )

    def _head_of(self, model: Any, vocab_size: int) -> Head:
        bare = adapters.unwrap(self.accelerator.unwrap_model(model))
        active = next(iter(adapters.in_force(bare)), None)
        return Head.of(bare, vocab_size, active)

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
        rollout = self._read_rollout(inputs)
        mask, counted = rollout.mask, rollout.learned.float()
        total = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        weight = counted / total

        hidden = self._hidden_states(unwrapped_student, inputs)[mask]  # [tokens, H]
        head = _with_own_leaves(self.heads["student"])
        states = {
            "student": States(hidden.detach(), head),
            "teacher": States(self._teacher_states(inputs)[mask], self.heads["teacher"]),
        }
        with torch.autocast(hidden.device.type, enabled=False):
            planned = self._run_plan(rollout, states)
            found = planned.gradient(weight, watch=signals.cheap, check=not self._loss_is_checked)
        self._loss_is_checked |= found.is_checked
        loss = self._attach_gradient(found, weight, hidden, head)
        return loss, (found.columns["student_entropy"] * counted).sum(), counted.sum()

    def _teacher_states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The teacher's hidden states `[B, T, H]`, without gradient."""
        self.teacher_model.eval()
        bare = self.accelerator.unwrap_model(self.teacher_model)
        with torch.no_grad():
            # TRL's redirection calls a function through the wrapper of DDP, whose hooks then run.
            hidden: Tensor = self._forward_redirection(
                self.teacher_model, bare, self._hidden_states, bare, inputs
            )
        return hidden

    def _hidden_states(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Hidden states `[B, T, H]` at the places where the completion tokens are predicted."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        length = inputs["completion_ids"].shape[1]
        hidden: Tensor = self._get_last_hidden_state(model, ids, mask, length)
        return hidden

    def _read_rollout(self, inputs: Mapping[str, Tensor]) -> Rollout:
        """The rollout in TRL's inputs; its log-probs and entropies are left at zero."""
        ids, mask = inputs["completion_ids"], inputs["completion_mask"].bool()
        lengths = mask.sum(-1)
        prompts = self.processing_class.batch_decode(inputs["prompt_ids"], skip_special_tokens=True)
        completions = [
            row[:length] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)
        ]
        finish = tuple(
            "stop" if completion and completion[-1] in self.eos_token_ids else "length"
            for completion in completions
        )
        texts = completion_texts(self.processing_class, completions, self.eos_token_ids)
        return Rollout(
            prompts=tuple(Prompt(text) for text in prompts),
            ids=ids,
            lengths=lengths,
            logp=torch.zeros(ids.shape, device=ids.device),
            entropy=torch.zeros(ids.shape, device=ids.device),
            finish=finish,
            texts=tuple(texts),
            writer=("student",) * len(ids),
            # Tokens that tools wrote are completion tokens, but the student does not learn them.
            learn=mask & inputs.get("tool_mask", inputs["completion_mask"]).bool(),
        )

    def _run_plan(self, rollout: Rollout, states: Mapping[str, States]) -> Planned:
        """Let the method plan, with the student's own log-probs in place of the sampler's."""
        if hasattr(self.method, "plan"):  # one more pass over the head, only for those who look
            student = {"student": states["student"]}
            seen = compute(signals.cheap, student, rollout.ids[rollout.mask])
            logp, entropy = rollout.logp.clone(), rollout.entropy.clone()
            logp[rollout.mask] = seen["student_logp"]
            entropy[rollout.mask] = seen["student_entropy"]
            rollout = replace(rollout, logp=logp, entropy=entropy)
        graders = {name: _KnownStates(known) for name, known in states.items()}
        return run_plan(self.method, Batch(rollout, graders, step=self.state.global_step))

    def _attach_gradient(self, found: Pass, weight: Tensor, hidden: Tensor, head: Head) -> Tensor:
        """Make a scalar with the value of the loss and the gradients that the engine found.

        Args:
            found: The engine's loss `[tokens]` and its gradient `[tokens, H]`.
            weight: Each token's share of the mean, `[tokens]`.
            hidden: The student's hidden states in TRL's graph, `[tokens, H]`.
            head: The student's head on its own leaves, which hold the head's gradients.
        """
        # The gradient of sum(x * g) with respect to x is g, so this linear form carries what the
        # engine found into autograd; subtracting its detached value leaves the loss itself.
        linear = (hidden.float() * found.gradient).sum()
        own = self.heads["student"]
        for parameter, leaf in ((own.weight, head.weight), (own.bias, head.bias)):
            if parameter is not None and leaf is not None and leaf.grad is not None:
                linear = linear + (parameter * leaf.grad).sum()
        return linear + ((found.loss * weight).sum() - linear).detach()


@dataclass(frozen=True)
class _KnownStates:
    """A grader whose states on this rollout are known already."""

    states: States

    def grade(self, rollout: Rollout) -> States:
        return self.states


def _with_own_leaves(head: Head) -> Head:
    """Copy a head onto leaves of its own, so that the model's gradients wait for TRL's backward."""
    weight = head.weight.detach().requires_grad_(head.weight.requires_grad)
    bias = head.bias
    if bias is not None:
        bias = bias.detach().requires_grad_(bias.requires_grad)
    return replace(head, weight=weight, bias=bias)


def _check_method(method: Method) -> None:
    """Raise OpdlabError for a method that needs more than a teacher that grades."""
    name = name_of(method)
    if others := [need for need in method.needs if need != "teacher"]:
        raise OpdlabError(
            f"{name} needs {', '.join(others)}, and TRL's trainer holds a student and a teacher"
            " alone. Use opdlab.distill."
        )
    if not method.needs:
        raise OpdlabError(
            f"{name} looks at no teacher, which this bridge is for. Use opdlab.distill, or one of"
            " TRL's own trainers."
        )
    if student_share(method) < 1:
        raise OpdlabError(
            f"{name} learns from texts of {', '.join(writer_names(method))} too; here the student"
            " writes all. Use opdlab.distill."
        )
