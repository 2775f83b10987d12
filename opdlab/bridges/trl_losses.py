"""The distillation losses of the installed TRL, as cases for `conform`.

Each case calls TRL's own code. Where a trainer computes its loss in a method, the method runs on a
trainer without its constructor, whose models return the logits that `conform` gives. What a trainer
does around the loss (generation, counting, the optimizer) is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from opdlab.conformance.case import Case
from opdlab.conformance.contract import Kind, Reduction, Sequences
from opdlab.conformance.spec import Spec
from opdlab.losses import TopK

try:
    import trl
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.gold import GOLDTrainer
    from trl.experimental.gold.gold_trainer import ULDLoss
    from trl.experimental.sdft import SDFTTrainer
    from trl.experimental.sdpo import SDPOTrainer
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
except ImportError as error:
    raise ImportError(
        "opdlab.bridges.trl_losses needs TRL 1.16 with its GKD, GOLD, SDFT and SDPO, which cannot"
        " be imported here. Install it: pip install 'opdlab[trl]'."
    ) from error

COUNT = {"count": "num_items_in_batch"}


class _Returns(torch.nn.Module):
    """A model that returns given logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, *_: object, **__: object) -> Any:
        """Return the logits."""
        return SimpleNamespace(logits=self.logits)


def chunked_divergence(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    mask: Tensor,
    **options: Any,
) -> Tensor:
    """Call the fused divergence of `DistillationTrainer`.

    Args:
        student: Hidden states `[B, T, H]`.
        student_head: `[V, H]`.
        teacher: Hidden states `[B, T, H]`.
        teacher_head: `[V, H]`.
        mask: `[B, T]`, bool.
        options: `beta`, `temperature`, `num_items_in_batch`.

    Returns:
        The loss.
    """
    loss: Tensor = _chunked_divergence_loss(
        student, teacher, student_head, teacher_head, mask.long(), **options
    )[0]
    return loss


def generalized_jsd(
    trainer: Any, student: Tensor, teacher: Tensor, mask: Tensor, **options: Any
) -> Tensor:
    """Call `generalized_jsd_loss` of a trainer.

    Args:
        trainer: `GKDTrainer` or `GOLDTrainer`.
        student: Logits `[B, T, V]`.
        teacher: Logits `[B, T, V]`.
        mask: `[B, T]`, bool.
        options: `beta`, `temperature`, `num_items_in_batch`.

    Returns:
        The loss.
    """
    labels = torch.zeros_like(mask, dtype=torch.long).masked_fill(~mask, -100)
    loss: Tensor = trainer.generalized_jsd_loss(student, teacher, labels, **options)
    return loss


def whole_loss(
    trainer: Any,
    student: Tensor,
    teacher: Tensor,
    sequences: Sequences,
    *,
    beta: float,
    temperature: float,
    num_items_in_batch: float,
) -> Tensor:
    """Call `compute_loss` of GKD or GOLD on whole sequences.

    Args:
        trainer: `GKDTrainer` or `GOLDTrainer`.
        student: Logits `[B, L, V]`.
        teacher: Logits `[B, L, V]`.
        sequences: The tokens.
        beta: The trainer's setting.
        temperature: The trainer's setting.
        num_items_in_batch: Tokens that count.

    Returns:
        The loss.
    """
    bare = _bare(trainer, beta=beta, temperature=temperature, use_uld_loss=False)
    bare.teacher_model = _Returns(teacher)
    inputs = {
        "input_ids": sequences.ids,
        "attention_mask": sequences.attention_mask,
        "labels": sequences.labels,
    }
    loss: Tensor = bare.compute_loss(
        _Returns(student), inputs, num_items_in_batch=num_items_in_batch
    )
    return loss


def self_distillation(
    trainer: Any,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    tokens: Tensor,
    temperature: float,
    mode: str,
    alpha: float,
    add_tail: bool = True,
) -> Tensor:
    """Call `compute_loss` of SDFT or SDPO, behind a prompt of one token.

    Args:
        trainer: `SDFTTrainer` or `SDPOTrainer`.
        student: Logits `[B, T, V]`.
        teacher: Logits `[B, T, V]`.
        mask: `[B, T]`, bool.
        tokens: Ids `[B, T]`.
        temperature: The trainer's setting.
        mode: The trainer's `distillation_mode`.
        alpha: The trainer's `distillation_alpha`.
        add_tail: The trainer's `distillation_add_tail`.

    Returns:
        The loss.
    """
    settings = SimpleNamespace(
        distillation_mode=mode,
        distillation_alpha=alpha,
        distillation_topk=3,
        distillation_add_tail=add_tail,
        distillation_is_clip=None,
        distillation_weight=1.0,
        teacher_model_kind="live",
    )
    bare = _bare(
        trainer,
        args=settings,
        temperature=temperature,
        use_teacher_server=False,
        num_loss_tokens_to_skip=0,
        model_kwarg_keys=set(),
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(gather=lambda values: values),
    )
    bare._log_self_distillation_metric = lambda *_: None
    # Rows predict the next token, so those of the completion stand one place before it.
    own, other = (torch.cat([logits, logits[:, :1]], 1) for logits in (student, teacher))
    model, bare.teacher_model = _Returns(own), _Returns(other)
    bare.model = model
    prompt = torch.ones(len(mask), 1, dtype=torch.long)
    both = torch.cat([prompt, mask.long()], 1)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": tokens,
        "completion_mask": mask.long(),
        "tool_mask": mask.long(),
        "teacher_input_ids": torch.cat([prompt, tokens], 1),
        "teacher_attention_mask": both,
    }
    loss: Tensor = bare.compute_loss(model, inputs)
    return loss


def universal_logits(
    student: Tensor, teacher: Tensor, mask: Tensor, *, tokens: Tensor, temperature: float
) -> Tensor:
    """Call GOLD's loss for other tokenizers, with the same tokenizer on both sides.

    Args:
        student: Logits `[B, T, V]`.
        teacher: Logits `[B, T, V]`.
        mask: `[B, T]`, bool.
        tokens: Ids `[B, T]`.
        temperature: Of both sides.

    Returns:
        The loss.
    """
    config = SimpleNamespace(  # nosec B106  # a merging strategy is no password
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=temperature,
        uld_teacher_temperature=temperature,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=False,
        uld_token_merge_strategy="bayesian",
    )
    labels = torch.nn.functional.pad(tokens.masked_fill(~mask, -100), (1, 0), value=-100)
    ids = torch.nn.functional.pad(tokens, (1, 0))
    own, other = (torch.cat([logits, logits[:, :1]], 1) for logits in (student, teacher))
    loss: Tensor = ULDLoss(config)(own, other, labels, labels, ids, ids)
    return loss


def _bare(trainer: Any, **attributes: Any) -> Any:
    """Make a trainer without its constructor."""
    made = trainer.__new__(trainer)
    for name, value in attributes.items():
        setattr(made, name, value)
    made._get_model_forward_kwargs = lambda inputs: {}
    return made


DIVERGENCES_OF_BETA: Mapping[str, tuple[str, float]] = {
    "forward KL": ("forward_kl", 0.0),
    "reverse KL": ("reverse_kl", 1.0),
}


def _betas(
    name: str, loss: Callable[..., Any], spec: Callable[..., Spec], keyword: str = "beta"
) -> list[Case]:
    """Make the cases of a loss at both ends of its beta, and in between."""
    cases = [
        Case(f"{name}, {label}", loss, spec(trains=trains, options={keyword: beta}))
        for label, (trains, beta) in DIVERGENCES_OF_BETA.items()
    ]
    between = spec(
        trains="generalized_jsd", parameters={"beta": 0.5}, keywords_too={"beta": keyword}
    )
    return [*cases, Case(f"{name}, generalised JSD", loss, between)]


def _spec(kind: Kind, keywords: Mapping[str, str], **fixed: Any) -> Callable[..., Spec]:
    def make(keywords_too: Mapping[str, str] | None = None, **more: Any) -> Spec:
        options = {**fixed.get("options", {}), **more.pop("options", {})}
        rest = {name: value for name, value in fixed.items() if name != "options"}
        return Spec(
            kind, keywords={**keywords, **(keywords_too or {})}, options=options, **rest, **more
        )

    return make


def cases() -> list[Case]:
    """List the cases of the installed TRL.

    Returns:
        Cases by trainer, named with TRL's version.
    """
    head = f"TRL {trl.__version__}"
    both = {**COUNT, "temperature": "temperature"}
    found = _betas(
        f"{head} DistillationTrainer",
        chunked_divergence,
        _spec(Kind.HIDDEN, both, reduction=Reduction.TOKEN, dtype="float32"),
    )
    for label, trainer in (("GKD", GKDTrainer), ("GOLD", GOLDTrainer)):
        found += _betas(
            f"{head} {label} loss function",
            partial(generalized_jsd, trainer),
            _spec(Kind.LOGITS, both, reduction=Reduction.TOKEN),
        )
        found += _betas(
            f"{head} {label} compute_loss",
            partial(whole_loss, trainer),
            _spec(Kind.SEQUENCES, both, reduction=Reduction.TOKEN),
        )
    keywords = {"temperature": "temperature", "tokens": "tokens"}
    found.append(Case(f"{head} GOLD universal logits", universal_logits, Spec(keywords=keywords)))
    for label, trainer in (("SDFT", SDFTTrainer), ("SDPO", SDPOTrainer)):
        found += _of_self_distillation(f"{head} {label}", trainer, keywords)
    return found


def _of_self_distillation(head: str, trainer: Any, keywords: Mapping[str, str]) -> list[Case]:
    loss = partial(self_distillation, trainer)
    full = {"mode": "full_logits"}
    found = _betas(
        f"{head} full logits",
        loss,
        _spec(Kind.LOGITS, keywords, reduction=Reduction.SEQUENCE, options=full),
        keyword="alpha",
    )
    for label, add_tail, tail in (("tail", True, "bucket"), ("renormalised", False, "renormalize")):
        options = {"mode": "topk_logits", "alpha": 1.0, "add_tail": add_tail}
        spec = Spec(
            trains="reverse_kl",
            top_k=TopK(3, by="student", tail=tail),  # type: ignore[arg-type]
            reduction=Reduction.SEQUENCE,
            keywords=keywords,
            options=options,
        )
        found.append(Case(f"{head} top-k, {label}", loss, spec))
    sampled = Spec(
        trains="reverse_kl",
        reduction=Reduction.SEQUENCE,
        keywords=keywords,
        options={"mode": "sampled_token", "alpha": 1.0},
    )
    return [*found, Case(f"{head} sampled token", loss, sampled)]
