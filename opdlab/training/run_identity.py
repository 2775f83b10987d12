"""Describe what a run is made of: student, tokenizer, prompts, teacher, method.

It is described before the first step, and compared on resuming.

A description holds names for the reader and fingerprints for the comparison, and is JSON. Two runs
with the same description and settings make the same updates.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import transformers

from opdlab.data.prompt import Prompt
from opdlab.data.seeds import seed_of
from opdlab.methods.contract import HasParts
from opdlab.models import fingerprints, model_files
from opdlab.models.policy import Policy, as_policy
from opdlab.tasks import Task
from opdlab.teachers.many import MultiTeacher
from opdlab.training.method_state import keeps_state
from opdlab.training.state import RunState

# What can differ and still be taken up when the user says so: `resume(…, allow=("teacher",))`.
PARTS = ("student", "tokenizer", "task", "teacher", "policies", "method", "sampler")


def describe_run(
    run: RunState, given: Mapping[str, Any], drawn: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Describe a run before its first update.

    Args:
        run: The run.
        given: The user's `policies=`.
        drawn: Number of prompts and seed with which the task is looked at; by default those of the
            first step.

    Returns:
        A description by part, as it is after saving as JSON and loading.
    """
    batch, seed = drawn or (run.settings.batch, run.settings.seed)
    prompts = run.task.prompts(batch, seed=seed_of(seed, 0, 0))
    # Checkpoints of an adapter hold embeddings that were resized, so that their rows need not be
    # equal at the beginning.
    restored = model_files.embedding_names(run.student.weights) if run.has_new_embeddings else set()
    description = {
        "student": describe_student(run.student, restored),
        "tokenizer": describe_tokenizer(run.student, prompts),
        "task": describe_task(run.task, prompts),
        "teacher": describe_teacher(run.teacher, prompts),
        "policies": {
            name: describe_teacher(policy, prompts) for name, policy in sorted(given.items())
        },
        "method": describe_method(run.method),
        "sampler": describe_teacher(run.sampler, prompts),
        "drawn": [batch, seed],
        "transformers": transformers.__version__,
    }
    stored: dict[str, Any] = as_json(description)
    return stored


def as_json(value: Any) -> Any:
    """Turn a description into what it is after saving and loading.

    Args:
        value: JSON data; tuples become lists, and all keys texts.

    Returns:
        A copy.
    """
    return json.loads(json.dumps(value))


def describe_student(policy: Policy, without: Container[str] = ()) -> dict[str, Any]:
    """Describe the model under a policy, and its adapter if that changes anything yet.

    Args:
        policy: The policy.
        without: Names of base tensors that do not count.

    Returns:
        Source, class, dtype, configuration, and digests of weights and adapter.
    """
    weights = policy.weights
    base = {
        name: value
        for name, value in fingerprints.base_tensors(weights.model).items()
        if name not in without
    }
    return {
        "source": weights.source,
        "model": type(weights.model).__name__,
        "dtype": str(weights.model.dtype).removeprefix("torch."),
        "config": fingerprints.model_config(weights.model),
        "weights": fingerprints.tensors_digest(base),
        "adapter": weights.adapter_digest(policy.adapter),
    }


def describe_tokenizer(policy: Policy, prompts: list[Prompt]) -> dict[str, Any]:
    """Describe the tokens, the chat template, the EOS set, and the first prompts as tokens.

    Args:
        policy: The policy whose tokenizer is described.
        prompts: The prompts to encode.

    Returns:
        Digests of vocabulary, chat template and encoded prompts, and the ids that end a text.
    """
    template = getattr(policy.tokenizer, "chat_template", None)
    return {
        "vocabulary": fingerprints.vocabulary_digest(policy.tokenizer),
        "template": (
            None if template is None else fingerprints.digest(json.dumps(template, sort_keys=True))
        ),
        "ends": sorted(policy.weights.eos),
        "rendered": fingerprints.digest(json.dumps([policy.encode(prompt) for prompt in prompts])),
    }


def describe_task(task: Task, prompts: list[Prompt]) -> dict[str, Any]:
    """Describe a task: its name, its settings, the first prompts, and the function that judges.

    Args:
        task: The task.
        prompts: The prompts of the first step.

    Returns:
        The description; of the prompts, a digest.
    """
    read = [
        [p.text, fingerprints.describe(p.messages), p.answer, p.hint]
        + ([dict(p.metadata)] if p.metadata else [])
        for p in prompts
    ]
    return {
        "name": task.name,
        "settings": fingerprints.describe(task.settings),
        "prompts": fingerprints.digest(json.dumps(read)),
        "verify": None if task.verify is None else _judge(task.verify),
        **({"feedback": _judge(task.feedback)} if task.feedback is not None else {}),
    }


def _judge(function: Any) -> Any:
    """Describe a verifier: opdlab's own by name, a user's by its source too.

    So a new version of opdlab is no other task.
    """
    description = fingerprints.function_description(function)
    return description["name"] if description["name"].startswith("opdlab.") else description


def describe_teacher(teacher: Any, prompts: list[Prompt]) -> dict[str, Any] | None:
    """Describe a teacher.

    A local model is described by its weights and by the first prompts as it reads them, a
    server by its kind and its model's name.

    Args:
        teacher: Any grader or writer, or None.
        prompts: The prompts of the first step.

    Returns:
        The description, or None for no teacher.
    """
    if teacher is None:
        return None
    kind = fingerprints.qualified_name(type(teacher))
    if isinstance(teacher, MultiTeacher):
        return {
            "kind": kind,
            "members": {
                name: describe_teacher(member, teacher.prompts_of(name, prompts))
                for name, member in teacher.members.items()
            },
            "route": fingerprints.describe(teacher.route),
            "mixture": teacher.mixture,
        }
    local = as_policy(teacher) or model_behind(teacher)
    if local is not None:
        try:
            rendered = fingerprints.digest(json.dumps([local.encode(prompt) for prompt in prompts]))
        except (
            Exception
        ):  # prompts that it cannot read are refused elsewhere, where it must read them
            rendered = None
        return {"kind": kind, **describe_student(local), "rendered": rendered}
    inner = getattr(teacher, "text", None)
    name = getattr(teacher, "model", None) or getattr(inner, "model", None)
    return {
        "kind": kind,
        "model": name if isinstance(name, str) else None,
        "k": fingerprints.describe(getattr(teacher, "k", None)),
        "fields": _digest_fields(teacher),
    }


def _digest_fields(teacher: Any) -> str | None:
    """A digest of the fields of a user's dataclass; None for teachers of other kinds.

    A digest, and not the values, since a field may be a key.
    """
    if not is_dataclass(teacher) or type(teacher).__module__.startswith("opdlab."):
        return None
    described = {one.name: _describe_field(getattr(teacher, one.name)) for one in fields(teacher)}
    return fingerprints.digest(json.dumps(described, sort_keys=True, default=str))


def _describe_field(value: Any) -> Any:
    """A field's value for comparison; policies by their weights."""
    policy = as_policy(value)
    if policy is not None:
        return describe_student(policy)
    if isinstance(value, (list, tuple)):
        return [_describe_field(one) for one in value]
    return fingerprints.describe(value)


def model_behind(teacher: Any) -> Policy | None:
    """Find the local model of a teacher that is read in another way.

    Args:
        teacher: Any teacher.

    Returns:
        The model of a `TextOnly` or a `ByteTeacher`; None for everything else.
    """
    from opdlab.teachers import byte_teacher, text_only

    if isinstance(teacher, byte_teacher.ByteTeacher):
        return teacher.policy
    return text_only._MODELS.get(teacher) if isinstance(teacher, text_only.TextOnly) else None


def describe_method(method: Any) -> dict[str, Any]:
    """Describe a method: its class, its options, and the source of a user's own.

    Args:
        method: The method.

    Returns:
        Its class, its options, and a digest of the source of a class from outside opdlab.
    """
    kind = type(method)
    if isinstance(method, HasParts):
        return {
            "class": fingerprints.qualified_name(kind),
            "options": {"weights": fingerprints.describe(getattr(method, "weights", None))},
            "parts": {name: describe_method(part) for name, part in method.parts.items()},
            "source": None,
        }
    named = (
        [f.name for f in fields(method)]
        if is_dataclass(method)
        else list(getattr(method, "__dict__", {}))
    )
    options = {name: getattr(method, name) for name in named}
    if keeps_state(method) and not is_dataclass(method):
        # Its tensors come from the checkpoint, so that it need not begin with the same ones.
        options = {
            k: v
            for k, v in options.items()
            if k[:1] != "_" and (v is None or isinstance(v, (bool, int, float, str)))
        }
    name = fingerprints.qualified_name(kind)
    return {
        "class": name,
        "options": {key: fingerprints.describe(value) for key, value in options.items()},
        "source": None if name.startswith("opdlab.") else fingerprints.source_digest(kind),
    }
