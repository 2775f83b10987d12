"""The completions of a step that somebody else than the student writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout
from opdlab.data.sampling_config import SamplingConfig
from opdlab.data.seeds import seed_of
from opdlab.methods.contract import Method, student_share
from opdlab.models.places import seeded
from opdlab.models.policy import Policy
from opdlab.models.protocols import Sampler
from opdlab.models.text_rollouts import rollout_from_texts
from opdlab.teachers.conversing import write_conversations
from opdlab.teachers.writing import write_texts
from opdlab.training.preflight import check_answers


def count_of_student(method: Method, prompts: int, seed: int, step: int) -> int:
    """Decide how many prompts of a step the student answers: the first ones.

    Where the method's share is no whole number of prompts, it is rounded up or down at random, the
    same in every process.

    Args:
        method: The method.
        prompts: Prompts of the step, over all processes.
        seed: The run's seed.
        step: Number of the step, from 0.

    Returns:
        From 0 to `prompts`.
    """
    part = student_share(method)
    if part == 1:
        return prompts
    drawn = torch.rand((), generator=torch.Generator().manual_seed(seed_of(seed, step, 1)))
    return min(prompts, math.floor(part * prompts + drawn.item()))


def write_by(
    name: str,
    writer: Any,
    student: Policy,
    prompts: Sequence[Prompt],
    n: int,
    config: SamplingConfig,
    *,
    places: range | None,
    process: int,
    extra: Mapping[str, Any] | None = None,
) -> Rollout:
    """Let one of a method's writers answer all these prompts.

    Args:
        name: The writer's name; "answer" takes the prompts' reference answers.
        writer: The policy or teacher of that name; not looked at for "answer".
        student: Its tokenizer and device are those of the rollout.
        prompts: The prompts.
        n: Completions of each prompt; answers have one.
        config: How the texts are drawn.
        places: Where the prompts stand in a step that several processes share; None for one
            process.
        process: Number of this process.
        extra: More options of `sample`, such as a task's `environment`.

    Returns:
        The completions, prompt by prompt.
    """
    if name == "answer":
        return rollout_from_texts(student, prompts, check_answers(prompts))
    if isinstance(writer, Sampler):
        random = seeded(writer.sample, config.seed, places, process)
        options: dict[str, Any] = {**config.options(), **random, **(extra or {})}
        written = writer.sample(prompts, n, writer=name, **options)
        return written.to(student.weights.device)  # a teacher may be on another device
    environment = (extra or {}).get("environment")
    texts: Sequence[Sequence[str]]
    if environment is None:
        texts = write_texts(writer, prompts, n, config, places, process)
    else:
        texts = write_conversations(
            writer,
            prompts,
            n,
            environment,
            config,
            places=places,
            process=process,
            count=lambda chats: [len(ids) for ids in student.encode_unchecked(chats)],
        )
    repeated = [prompt for prompt in prompts for _ in range(n)]
    flat = [text for row in texts for text in row]
    rollout = rollout_from_texts(student, repeated, flat, name, limit=config.max_new_tokens)
    return replace(rollout, n=n)
