"""An opdlab method inside TRL, unchanged: TRL's data, generation, servers, callbacks and launchers,
and your loss.

    trainer = MethodTrainer(my_loss, model=…, teacher_model=…, args=DistillationConfig(…),
    train_dataset=…) trainer.train()

A subclass of `trl.DistillationTrainer` (1.16) that replaces its loss alone. TRL runs the backbones;
opdlab's engine runs plan and loss on their hidden states, a chunk of tokens at a time, and its
gradients are handed back to autograd, so accumulation, mixed precision and DDP work as for any
loss. Left out: weights that are sharded (FSDP, ZeRO-3), and policies other than the teacher.
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
from opdlab.methods.contract import name_of
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


class MethodTrainer(DistillationTrainer):
    """`trl.DistillationTrainer` with the plan and loss of an opdlab method in place of its
    divergence (`beta` is not looked at).

    A plan sees one micro-batch on one device, so what compares texts compares
    `per_device_train_batch_size` of them. Raises OpdlabError for methods that need more than a
    teacher that grades, and for a temperature other than 1.
    """

    def __init__(self, method: Any, **arguments: Any) -> None:
        self.method = as_method(method, "MethodTrainer")
        self._loss_is_checked = False
        _check(self.method)
        super().__init__(**arguments)
        if self.temperature != 1:
            raise OpdlabError(
                f"TRL's temperature is {self.temperature}, but opdlab's losses see the"
                " distributions as they are. Set it to 1."
            )
        rows = max(self.processing_class.get_vocab().values()) + 1
        self.heads = {
            name: self._head(model, rows)
            for name, model in (("student", self.model), ("teacher", self.teacher_model))
        }
        if self.heads["student"].lora is not None:
            raise OpdlabError(
                "The student has a LoRA on its output head, to which this bridge hands no gradient."
                " Leave the head out of its target_modules, or use opdlab.distill."
            )

    def _head(self, model: Any, rows: int) -> Head:
        bare = adapters.unwrap(self.accelerator.unwrap_model(model))
        return Head.of(bare, rows, next(iter(adapters.in_force(bare)), None))

    def _compute_loss(
        self,
        unwrapped_student: Any,
        inputs: Mapping[str, Tensor],
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """TRL's hook: the loss, the sum of the student's entropies, and the number of tokens."""
        rollout, mask = self._rollout(inputs), inputs["completion_mask"].bool()
        counted = inputs.get("tool_mask", inputs["completion_mask"])[mask].float()
        hidden = self._hidden(unwrapped_student, inputs)[mask]  # [tokens, H]
        with torch.no_grad():
            self.teacher_model.eval()
            bare = self.accelerator.unwrap_model(self.teacher_model)
            theirs = self._forward_redirection(
                self.teacher_model, bare, self._hidden, bare, inputs
            )[mask]
        weight = counted / (
            counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        )
        states = {
            "student": States(hidden.detach(), _apart(self.heads["student"])),
            "teacher": States(theirs, self.heads["teacher"]),
        }
        with torch.autocast(hidden.device.type, enabled=False):
            found = self._plan(rollout, states).gradient(
                weight, watch=signals.cheap, check=not self._loss_is_checked
            )
            self._loss_is_checked |= found.is_checked
        return (
            self._joined(found, weight, hidden, states["student"].head),
            (found.columns["student_entropy"] * counted).sum(),
            counted.sum(),
        )

    def _hidden(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """`[B, T, H]`, where each completion token is predicted."""
        ids, mask = (
            torch.cat([inputs[f"prompt_{what}"], inputs[f"completion_{what}"]], dim=1)
            for what in ("ids", "mask")
        )
        return self._get_last_hidden_state(model, ids, mask, inputs["completion_ids"].shape[1])

    def _rollout(self, inputs: Mapping[str, Tensor]) -> Rollout:
        ids, mask = inputs["completion_ids"], inputs["completion_mask"].bool()
        lengths = mask.sum(-1)
        prompts = self.processing_class.batch_decode(inputs["prompt_ids"], skip_special_tokens=True)
        pieces = [row[:n] for row, n in zip(ids, lengths.tolist(), strict=True)]
        finish = tuple(
            "stop" if n and int(row[-1]) in self.eos_token_ids else "length"
            for row, n in zip(pieces, lengths, strict=True)
        )
        none = torch.zeros(ids.shape, device=ids.device)
        texts = completion_texts(
            self.processing_class, [row.tolist() for row in pieces], self.eos_token_ids
        )
        return Rollout(
            tuple(Prompt(text) for text in prompts),
            ids,
            lengths,
            none,
            none.clone(),
            finish,
            tuple(texts),
            ("student",) * len(ids),
        )

    def _plan(self, rollout: Rollout, states: Mapping[str, States]) -> Planned:
        """Let the method plan, with the student's own log-probs as those of the sampler."""
        if hasattr(self.method, "plan"):
            student = {"student": states["student"]}
            seen = compute(signals.cheap, student, rollout.ids[rollout.mask])
            logp, entropy = rollout.logp.clone(), rollout.entropy.clone()
            logp[rollout.mask] = seen["student_logp"]
            entropy[rollout.mask] = seen["student_entropy"]
            rollout = replace(rollout, logp=logp, entropy=entropy)
        policies = {name: _Graded(graded) for name, graded in states.items()}
        return run_plan(self.method, Batch(rollout, policies, step=self.state.global_step))

    def _joined(self, found: Pass, weight: Tensor, hidden: Tensor, head: Head) -> Tensor:
        """A scalar with the loss's value, and with the gradients that the engine found for the
        states and for a trainable head.
        """
        own = self.heads["student"]
        known = [
            (own.weight, head.weight.grad),
            (own.bias, None if head.bias is None else head.bias.grad),
        ]
        slope = (hidden.float() * found.gradient).sum() + sum(
            (x * g).sum() for x, g in known if x is not None and g is not None
        )
        return slope + ((found.loss * weight).sum() - slope).detach()


@dataclass(frozen=True)
class _Graded:
    """A policy of which only its states on this rollout are known: it grades, and does not write."""

    states: States

    def grade(self, rollout: Rollout) -> States:
        return self.states


def _apart(head: Head) -> Head:
    """The head on leaves of its own, so that the engine's gradient for it does not go into the
    model's before backward does.
    """
    weight, bias = (
        None if x is None else x.detach().requires_grad_(x.requires_grad)
        for x in (head.weight, head.bias)
    )
    assert weight is not None
    return replace(head, weight=weight, bias=bias)


def _check(method: Method) -> None:
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
    if getattr(method, "on_policy", 1.0) < 1:
        raise OpdlabError(
            f"{name} learns from texts of {getattr(method, 'writer', 'others')} too; here the"
            " student writes all. Use opdlab.distill."
        )
