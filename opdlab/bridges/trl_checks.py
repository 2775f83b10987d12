"""Refuse what an opdlab method cannot have inside TRL's trainer, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from opdlab.bridges.trl_data import first_prompts
from opdlab.bridges.trl_shards import check_shards
from opdlab.engine.needs import Access, parse_need
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.methods import Method
from opdlab.methods.contract import (
    fewest_completions,
    name_of,
    needs_verifier,
    student_share,
    tells_hints,
    writer_names,
)
from opdlab.models.policy import as_policy
from opdlab.models.protocols import Checked
from opdlab.models.same_tokens import check_same_tokens
from opdlab.teachers.contract import expect_teacher
from opdlab.training.preflight import check_answers, check_prompts, check_writers
from opdlab.training.rehearsal import rehearse
from opdlab.training.resolution import check_overrides, missing_policy_error
from opdlab.training.sharding import EXAMPLE

LOOKED_AT = 128  # prompts of the dataset that are checked before the run


def check_method(
    method: Method,
    teacher: Any,
    has_teacher_model: bool,
    policies: Mapping[str, Any],
    has_tools: bool,
) -> None:
    """Refuse a method that TRL's trainer cannot feed, before a model is loaded.

    Args:
        method: The method.
        teacher: The user's `teacher=`; None for none.
        has_teacher_model: Whether TRL was given a `teacher_model`.
        policies: The user's `policies=`.
        has_tools: Whether TRL was given tools.

    Raises:
        OpdlabError: It cannot work. The message says why and what to use.
    """
    name = name_of(method)
    if needs_verifier(method):
        raise OpdlabError(
            f"{name} learns from a verifier, and TRL's DistillationTrainer has none. Use"
            " opdlab.distill, or TRL's GRPOTrainer."
        )
    if tells_hints(method):
        raise OpdlabError(
            f"{name} learns from feedback on the student's attempts, which a task of opdlab gives"
            " and a dataset of TRL does not. Use opdlab.distill."
        )
    if fewest_completions(method) > 1:
        raise OpdlabError(
            f"{name} compares the completions of a prompt, and TRL's DistillationTrainer generates"
            " one for each. Use opdlab.distill with n=4."
        )
    if teacher is not None:
        expect_teacher(teacher, "MethodTrainer")
        if has_teacher_model:
            raise InvalidValue("MethodTrainer got teacher and teacher_model. Leave one out.")
    check_overrides(method, policies)
    writers = writer_names(method) if student_share(method) < 1 else ()
    reads_teacher = "teacher" in writers or any(
        parse_need(need).policy == "teacher" for need in method.needs
    )
    if (teacher is not None or has_teacher_model) and not reads_teacher:
        raise InvalidValue(
            f"MethodTrainer got a teacher, and {name} reads none. Leave it out, or use another"
            " method."
        )
    if not has_teacher_model:
        check_writers(method, teacher)
    if has_tools and (writers or any(parse_need(need).hinted for need in method.needs)):
        raise OpdlabError(
            f"{name} renders prompts without TRL's tools, for hints or for other writers than the"
            " student, so its policies would answer other questions. Leave tools out, or use"
            " opdlab.distill, whose policies have tools in their templates."
        )


def check_trainer(trainer: Any) -> None:
    """Refuse settings of a trainer that change what the loss sees, or hide weights from it.

    Args:
        trainer: A `MethodTrainer` whose TRL part is made.

    Raises:
        OpdlabError: A setting cannot work.
    """
    if not isinstance(trainer.processing_class, PreTrainedTokenizerBase):
        raise OpdlabError(
            "MethodTrainer trains on texts, and this model has a processor for images or sound."
            " Give processing_class=processor.tokenizer with a model of texts."
        )
    if trainer.temperature != 1:
        raise OpdlabError(
            f"TRL's temperature is {trainer.temperature}, but opdlab's losses see the"
            " distributions as they are. Set it to 1."
        )
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise OpdlabError(
            "DeepSpeed ZeRO-3 gives each process a part of the student's weights, and the policies"
            " of a method (hinted views, reference, moving average) read them outside of TRL's"
            f" forward pass, where no process has them whole. Use FSDP2 ({EXAMPLE}) or DDP."
        )
    if trainer.is_fsdp_enabled:
        check_shards(trainer.accelerator, trainer.model)
    if trainer.args.fp16:
        raise OpdlabError(
            "TRL's fp16=True computes in float16, in which opdlab's policies are not graded. Use"
            " bf16=True, or neither."
        )


def check_with_data(trainer: Any, teacher: Any) -> None:
    """Check policies, tokens and the first prompts of the dataset.

    Args:
        trainer: A `MethodTrainer` with its policies.
        teacher: The user's `teacher=`; None for none.

    Raises:
        OpdlabError: A policy is missing, has other tokens, or cannot read a prompt.
    """
    method, student, policies = trainer.method, trainer.student, trainer.policies
    if student.head.lora is not None:
        raise OpdlabError(
            "The student has a LoRA on its output head, to which this bridge hands no gradient."
            " Leave the head out of its target_modules, or use opdlab.distill."
        )
    for name in method.needs:
        if name not in policies:
            raise missing_policy_error(method, name)
    if trainer.train_dataset is None:
        raise InvalidValue("MethodTrainer got no train_dataset. Give one with a column 'prompt'.")
    prompts = first_prompts(trainer.train_dataset, LOOKED_AT)
    writers = writer_names(method) if student_share(method) < 1 else ()
    if "answer" in writers:
        check_answers(prompts)
    everyone = dict(policies)
    if writers and trainer.teacher is not None:
        everyone["writer"] = trainer.teacher
    if teacher is not None and isinstance(teacher, Checked):
        teacher.check(student, prompts, trainer.max_completion_length)
    local = {}
    for name, policy in everyone.items():
        found = as_policy(policy)
        if found is None:
            continue
        if name == "writer" or parse_need(name).access is not Access.SPANS:
            check_same_tokens(student, found, name)
        local[name] = found
    rehearse(method, policies, None, prompts[0])
    check_prompts(local, prompts, trainer.max_completion_length)
