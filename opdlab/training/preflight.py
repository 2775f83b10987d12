"""Checks before the first step: models, method, and every prompt of the task.

Without this, one bad record among thousands stops a run hours after its start, and every attempt to
go on stops there again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from opdlab.data.conversation import FinalText
from opdlab.data.prompt import Prompt, name_of, own_hint
from opdlab.engine.columns import OF_POLICIES, OF_TRACES
from opdlab.engine.needs import HINT, Access, parse_need
from opdlab.errors import ContextTooLong, InvalidValue, MissingHint, MissingPolicy, OpdlabError
from opdlab.methods import Method
from opdlab.methods.contract import name_of as name_of_method
from opdlab.methods.contract import student_share, tells_hints, writer_names
from opdlab.methods.formulas import formula_of
from opdlab.models.policy import Policy, as_policy, find_too_long
from opdlab.models.protocols import Checked, Sampler, Writer
from opdlab.models.same_tokens import check_same_tokens
from opdlab.models.text_rollouts import rollout_from_texts
from opdlab.tasks import Task
from opdlab.teachers.writing import options_for
from opdlab.training.rehearsal import rehearse
from opdlab.training.resolution import missing_policy_error
from opdlab.training.sampler_checks import check_sampler, check_turns
from opdlab.training.settings import Settings
from opdlab.training.state import RunState

DRAWN = 128  # prompts that are looked at where a task draws new ones without end
NAMED = 5  # prompts that an error names


def check_run(run: RunState) -> None:
    """Check models, method and every prompt of the task, before any compute is spent.

    Args:
        run: A run whose policies are resolved.

    Raises:
        MissingPolicy: The method needs a policy that nobody gave, or an ability that the policy
            lacks.
        TokenizerMismatch: A policy that grades does not share the student's tokens.
        MissingHint: A policy reads hints, and a prompt has none.
        ContextTooLong: A prompt does not fit a policy's context.
        InvalidValue: The method declares something that is no formula, or `trace_k` is larger than
            the vocabulary.
        OpdlabError: The method trains on answers, and a prompt has none.
    """
    settings, method = run.settings, run.method
    # A formula that cannot be read is refused here, not by the first trace. Without a plan, its
    # columns are known, and names that are none of them are warned of.
    has_plan = getattr(method, "planner", getattr(method, "plan", None)) is not None
    formula_of(method, None if has_plan else _usual_columns(run.policies))
    for name in method.needs:
        if name not in run.policies:
            raise missing_policy_error(method, name)
    if settings.trace_k > run.student.weights.vocab_size:
        raise InvalidValue(
            f"distill got trace_k={settings.trace_k} for a student of"
            f" {run.student.weights.vocab_size} tokens. Use as many at most; 8 show what a policy"
            " wants at a token."
        )
    prompts = prompts_to_check(run.task, settings)
    share = student_share(method)
    writers = writer_names(method) if share < 1 else ()
    answers = check_answers(prompts) if "answer" in writers else None
    if answers is not None and run.task.environment is not None:
        _check_conversations(prompts, run.task)
    if run.task.environment is not None and any(
        parse_need(name).access is Access.SPANS for name in method.needs
    ):
        raise InvalidValue(
            f"{name_of_method(method)} aligns one text with a teacher's tokens, and {run.task.name}"
            " has an environment that replies between turns, in the student's own template. Use a"
            " teacher with the student's tokens and OPD, or a task without environment."
        )
    _check_sampling(run, writers)
    check_sampler(run, prompts)
    rehearse(method, run.policies, run.task, prompts[0])
    everyone = dict(run.policies)
    if writers and run.teacher is not None:
        everyone["writer"] = run.teacher
    local = _check_tokens(run, everyone, prompts)
    if tells_hints(method):  # the prompts' own hints are not read
        local = {name: one for name, one in local.items() if not name.endswith(HINT)}
    if answers is not None:
        lengths = rollout_from_texts(run.student, prompts, answers).lengths.tolist()
        check_prompts(local, prompts, dict.fromkeys(local, lengths))
    if answers is None or share > 0 or len(writers) > 1:
        check_prompts(local, prompts, settings.max_new_tokens)
    if settings.evaluate_every and run.task.pool.get("test"):
        check_prompts({"student": run.student}, run.task.pool["test"], run.task.max_new_tokens)


def _usual_columns(policies: Iterable[str]) -> list[str]:
    """The columns of a trace that no plan made."""
    return [*OF_TRACES, *(f"{name}_{one}" for name in policies for one in OF_POLICIES)]


def _check_sampling(run: RunState, writers: Sequence[str]) -> None:
    """Refuse sampling settings that one of the method's writers cannot be told."""
    config = run.settings.sampling(seed=0)
    for name in writers:
        writer = run.teacher if name == "teacher" else run.policies.get(name)
        if name != "answer":
            check_turns(writer, run.task, "distill")
        if isinstance(writer, Writer) and not isinstance(writer, Sampler):
            options_for(writer, config)


def _check_tokens(
    run: RunState, everyone: Mapping[str, Any], prompts: Sequence[Prompt]
) -> dict[str, Policy]:
    """Compare the tokens of all policies with the student's; returns the local ones by name.

    Teachers of other kinds look at the student and the prompts themselves.
    """
    local: dict[str, Policy] = {}
    for name, teacher in everyone.items():
        policy = as_policy(teacher)
        if policy is not None:
            if name == "writer" or parse_need(name).access is not Access.SPANS:
                check_same_tokens(run.student, policy, name)
            local[name] = policy
        elif isinstance(teacher, Checked):
            teacher.check(run.student, prompts, run.settings.max_new_tokens)
    return local


def check_writers(method: Method, teacher: Any) -> None:
    """Check that a method that lets the teacher write has one that can.

    Args:
        method: The method.
        teacher: As it was given to `distill`; None for none.

    Raises:
        MissingPolicy: There is no teacher, or it only grades.
    """
    if student_share(method) == 1 or "teacher" not in writer_names(method):
        return
    if teacher is None:
        raise MissingPolicy(
            f"{name_of_method(method)} lets a teacher write, but there is none. Give distill a"
            " teacher."
        )
    if not isinstance(teacher, (Sampler, Writer)):
        raise MissingPolicy(
            f"{name_of_method(method)} lets the teacher write, but {type(teacher).__name__} only"
            " grades. Use one that writes."
        )


def prompts_to_check(task: Task, settings: Settings) -> list[Prompt]:
    """List all training prompts of a task that lists them, else those of the first steps.

    Args:
        task: The task.
        settings: The run's settings: batch, steps and seed.

    Returns:
        The prompts; of a task that draws them, those of enough steps for `DRAWN` prompts.
    """
    if task.pool.get("train"):
        return list(task.pool["train"])
    steps = min(settings.steps, -(-DRAWN // settings.batch))
    drawn: list[Prompt] = []
    for step in range(max(1, steps)):
        drawn += task.training_batch(settings.batch, step, settings.seed)
    return drawn


def check_answers(prompts: Sequence[Prompt]) -> list[str]:
    """Return the answers of prompts that are trained on.

    Args:
        prompts: The prompts, with their answers.

    Returns:
        One answer per prompt.

    Raises:
        OpdlabError: A prompt has none.
    """
    missing = [prompt for prompt in prompts if prompt.answer is None]
    if missing:
        raise OpdlabError(
            f"Prompt {name_of(missing[0])} has no answer to train on{_others(missing, prompts)}."
            " SFT needs an `answer` in every record: give one, or leave these records out."
        )
    return [prompt.answer or "" for prompt in prompts]


def _check_conversations(prompts: Sequence[Prompt], task: Task) -> None:
    """Refuse answers without the turns that lead to them."""
    bare = [prompt for prompt in prompts if not isinstance(prompt.answer, FinalText)]
    if bare:
        raise InvalidValue(
            f"Prompt {name_of(bare[0])} has a bare answer{_others(bare, prompts)}, and {task.name}"
            " has an environment: trained on it, the student would learn to answer without asking."
            " Give records whose messages hold the whole conversation, to from_records(…,"
            " environment=…), or leave the environment out."
        )


def check_prompts(
    policies: Mapping[str, Policy],
    prompts: Sequence[Prompt],
    room: int | Mapping[str, Sequence[int]],
) -> None:
    """Check that every policy can read every prompt, in its own context and template.

    Args:
        policies: The policies by the names that the method gives them.
        prompts: The prompts that they will be asked.
        room: Number of new tokens that must fit behind every prompt; or, for given texts, how many
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
    """Say how many other prompts lack the same, and name the first of them."""
    if len(missing) == 1:
        return ""
    names = ", ".join(name_of(prompt) for prompt in missing[1:NAMED]) + (
        ", …" if len(missing) > NAMED else ""
    )
    return f" (nor have {names}: {len(missing)} of {len(prompts)} prompts)"
