"""Check all prompts of a task before the first step: too long for a context, without a hint,
without an answer.

Without this, one bad record among thousands stops a run hours after its start, and every attempt to
go on stops there again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from opdlab.data.prompt import Prompt, name_of, own_hint
from opdlab.errors import ContextTooLong, MissingHint, OpdlabError
from opdlab.models.policy import Policy, find_too_long
from opdlab.training.settings import Settings

if TYPE_CHECKING:
    from opdlab.tasks import Task

DRAWN = 128  # prompts that are looked at where a task draws new ones without end
NAMED = 5  # prompts that an error names


def prompts_to_check(task: Task, settings: Settings) -> list[Prompt]:
    """All training prompts of a task that lists them, else those of the first steps."""
    if task.pool.get("train"):
        return list(task.pool["train"])
    steps = min(settings.steps, -(-DRAWN // settings.batch))
    drawn: list[Prompt] = []
    for step in range(max(1, steps)):
        drawn += task.training_batch(settings.batch, step, settings.seed)
    return drawn


def check_answers(prompts: Sequence[Prompt]) -> list[str]:
    """Return the answers of prompts that are trained on; raises OpdlabError where one is missing."""
    missing = [prompt for prompt in prompts if prompt.answer is None]
    if missing:
        raise OpdlabError(
            f"Prompt {name_of(missing[0])} has no answer to train on{_others(missing, prompts)}."
            " SFT needs an `answer` in every record: give one, or leave these records out."
        )
    return [prompt.answer or "" for prompt in prompts]


def check_prompts(
    policies: Mapping[str, Policy],
    prompts: Sequence[Prompt],
    room: int | Mapping[str, Sequence[int]],
) -> None:
    """Check that every policy can read every prompt, in its own context and template.

    Args:
        policies: The policies by the names that the method gives them.
        prompts: What they will be asked.
        room: How many new tokens must fit behind every prompt; or, where texts are given, how many
            tokens each has, by the policy's name.

    Raises:
        MissingHint: A policy reads hints, and prompts have none.
        ContextTooLong: Prompts do not fit. The message says whose context it is and how to leave
            them out.
        OpdlabError: A prompt cannot be rendered.
    """
    seen: set[tuple[Any, ...]] = set()
    for name, policy in policies.items():
        key = (id(policy.weights), policy.context, repr(policy.chat_template_kwargs))
        if key in seen:  # as student, reference and moving average, which read the same
            continue
        seen.add(key)
        if policy.context is own_hint and any(prompt.hint is None for prompt in prompts):
            missing = [prompt for prompt in prompts if prompt.hint is None]
            raise MissingHint(
                f"Prompt {name_of(missing[0])} has no hint{_others(missing, prompts)}, but {name!r}"
                " reads hints. Give every prompt a hint=, leave these out, or name one context for"
                " all: policy.seeing('…')."
            )
        behind = [room] * len(prompts) if isinstance(room, int) else list(room[name])
        too_long = find_too_long(policy, prompts, behind)
        if too_long:
            raise _too_long(
                name, policy, prompts, too_long, behind, are_answers=not isinstance(room, int)
            )


def _too_long(
    name: str,
    policy: Policy,
    prompts: Sequence[Prompt],
    too_long: Mapping[int, int],
    behind: Sequence[int],
    are_answers: bool,
) -> ContextTooLong:
    limit = policy.weights.context_length or 0
    worst = max(too_long, key=lambda number: too_long[number] + behind[number])
    left = limit - too_long[worst]
    more = f"its answer {behind[worst]}" if are_answers else f"{behind[worst]} more are to come"
    others = (
        f" ({len(too_long)} of {len(prompts)} prompts are too long)" if len(too_long) > 1 else ""
    )
    shorten = (
        "the prompt"
        + " or its answer" * are_answers
        + " or its hint" * (policy.context is not None)
    )
    if are_answers:
        ways = ", or leave such records out"
    else:
        ask = f", ask for at most {left} new tokens" if left > 0 else ""
        reader = name.removesuffix("+hint") + ".seeing()" * name.endswith("+hint")
        ways = f"{ask}, or leave such prompts out: task.without_too_long({reader})"
    return ContextTooLong(
        f"Prompt {name_of(prompts[worst], worst)} has {too_long[worst]} tokens for the policy"
        f" {name!r} and {more}, but {policy.name}'s context is {limit}{others}. Shorten"
        f" {shorten}{ways}."
    )


def _others(missing: Sequence[Prompt], prompts: Sequence[Prompt]) -> str:
    """How many other prompts lack the same, and which are the first of them."""
    if len(missing) == 1:
        return ""
    names = ", ".join(name_of(prompt) for prompt in missing[1:NAMED]) + (
        ", …" if len(missing) > NAMED else ""
    )
    return f" (nor have {names}: {len(missing)} of {len(prompts)} prompts)"
