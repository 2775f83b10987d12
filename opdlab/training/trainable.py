"""Make trainable: the student's adapter, a new LoRA, or all weights.

Decided and prepared before the first step.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from opdlab.errors import InvalidValue, OpdlabError
from opdlab.models import adapters
from opdlab.models.policy import Policy, live_policies
from opdlab.models.quantization import describe_quantization
from opdlab.models.recomputation import recomputable_layers
from opdlab.training.settings import Settings


def read_lora_setting(student: Policy, given: Mapping[str, Any]) -> dict[str, int]:
    """Read the `lora` of a run whose student has an adapter already: that adapter's own rank.

    Args:
        student: The policy to be trained.
        given: The settings that the user passes.

    Returns:
        `{"lora": rank}`, or an empty dict for a student without an adapter.

    Raises:
        InvalidValue: The user asks for another rank, which the adapter cannot take.
    """
    if student.adapter is None:
        return {}
    rank = int(student.weights.config_of(student.adapter).r)
    asked = given.get("lora", rank)
    if asked is not None and asked != rank:
        raise InvalidValue(
            f"distill got lora={asked}, but the student looks through the adapter"
            f" {student.adapter!r} of rank {rank}, which a run trains on. Leave lora out to do"
            f" that, give student.merged() to stack a new LoRA of rank {asked} on it, or"
            " Policy.of(…, adapter=None) to start from the bare model."
        )
    return {"lora": rank}


def prepare_parameters(
    student: Policy, policies: Mapping[str, Any], settings: Settings
) -> dict[str, torch.nn.Parameter]:
    """Make the student's weights trainable.

    Args:
        student: The policy to be trained. It gets a new LoRA (`settings.lora`) if it has no
            adapter.
        policies: The graders of the run, by name. In full training they move to copies of the
            weights.
        settings: The settings of the run.

    Returns:
        The parameters that train, by name: float32 (or float64) all of them.

    Raises:
        OpdlabError: The weights cannot be trained that way.
    """
    model = student.weights.model
    if settings.checkpointing:
        recomputable_layers(model)
    if settings.lora is None:
        _prepare_all_weights(student, policies)
    else:
        if student.adapter is None:
            student.adapt(settings.lora, seed=settings.seed)
        _warn_of_dropout(student)
        adapters.make_trainable(model, str(student.adapter))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _prepare_all_weights(student: Policy, policies: Mapping[str, Any]) -> None:
    weights = student.weights
    if student.adapter is not None:
        raise OpdlabError(
            f"The student looks through the adapter {student.adapter!r}, which lora=None would"
            " leave beside the weights that it trains. Leave lora as it is to train the adapter on,"
            " or fold it in and train all weights: student.merged()."
        )
    if how := describe_quantization(weights.model):
        raise InvalidValue(
            f"lora=None trains the weights themselves, and {weights.name} is {how}, whose weights"
            " cannot move. Train a LoRA on it (leave lora as it is), or load it without"
            " quantization and with dtype=torch.float32."
        )
    if low := sorted(
        {
            str(p.dtype)
            for p in weights.model.parameters()
            if p.dtype not in (torch.float32, torch.float64)
        }
    ):
        raise InvalidValue(
            "lora=None trains the weights themselves, and some of these are"
            f" {low[0].removeprefix('torch.')}, in which most small updates are rounded away. Load"
            " the student with dtype=torch.float32 (precision='bf16' still computes in bfloat16),"
            " or train a LoRA."
        )
    separate_policies(student, policies)
    weights.model.requires_grad_(True)


def separate_policies(student: Policy, policies: Mapping[str, Any]) -> None:
    """Give the policies that share the student's weights copies of them, before these move.

    Args:
        student: The policy whose weights will move.
        policies: The graders of the run, by name; views of the student move with it.

    Raises:
        OpdlabError: The model carries an adapter that no policy looks through.
    """
    weights = student.weights
    gc.collect()  # policies that nobody holds any more need no copy
    weights.tidy()
    others = [
        policy for policy in live_policies(weights.model) if policy._adapter is not student._adapter
    ]
    _refuse_strangers(student, others)
    _move_to_copies(others, {id(policy) for policy in policies.values()})


def _refuse_strangers(student: Policy, others: list[Policy]) -> None:
    known = {policy.adapter for policy in others}
    if strangers := [name for name in student.weights.adapters if name not in known]:
        raise OpdlabError(
            f"The model carries the adapter {strangers[0]!r}, and lora=None would train the weights"
            " under it. Load the model without adapters, or give distill a student on weights of"
            " its own: student.merged()."
        )


def _move_to_copies(others: list[Policy], in_run: set[int]) -> None:
    """Give policies that share the student's weights, and are not to move with it, copies of them.

    Views of one policy stay together. Policies outside the run that are the bare model share one
    copy.
    """
    copies: dict[Any, Policy] = {}
    moving = {id(policy._adapter) for policy in others if id(policy) in in_run}
    for policy in others:
        key = id(policy._adapter) if id(policy._adapter) in moving else policy.adapter
        copies[key] = copies.get(key) or policy.copied()
    for policy in others:
        key = id(policy._adapter) if id(policy._adapter) in moving else policy.adapter
        shared, policy.weights = policy.weights, copies[key].weights
        if policy.adapter is not None:
            shared.delete_adapter(policy.adapter)


def _warn_of_dropout(student: Policy) -> None:
    share = student.weights.config_of(str(student.adapter)).lora_dropout
    if share:
        warnings.warn(
            f"The adapter {student.adapter!r} was made with lora_dropout={share}. opdlab trains"
            " without dropout, so that the policy that is graded is the one that trains. The"
            " setting stays in the adapter's configuration.",
            stacklevel=4,
        )
