"""The phases of one training step, in order: write, plan, learn, update, measure.

    rollout = write_rollout(run)              the student writes (or whoever the method lets write)
    planned = plan_step(run, rollout)         the policies grade, the method plans
    grade(run, planned)                       the policies that the plan did not ask grade too
    learned = accumulate_gradient(run, planned, rollout)   the loss runs, gradients are added up
    update_weights(run)                       the optimizer moves the student
    measure_step(…)                           metrics of the whole step (`opdlab.training.metrics`)

Each phase takes the run's state and returns a frozen result; only `update_weights` changes the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opdlab.data.prompt import Prompt
from opdlab.data.rollout import Rollout, concat_rollouts
from opdlab.data.sampling_config import SamplingConfig
from opdlab.data.seeds import seed_of
from opdlab.engine import signals
from opdlab.engine.batch import Batch
from opdlab.engine.kept_tokens import KeptTokens
from opdlab.engine.loss_contract import adding_note
from opdlab.engine.passes import Pass
from opdlab.engine.planned import Planned, run_plan
from opdlab.errors import NonFinite
from opdlab.methods.contract import writer_names
from opdlab.models.forward import may_share
from opdlab.models.graded import Graded, States
from opdlab.models.micro_batches import Limits, arrange, in_order, pass_cost
from opdlab.models.places import seeded
from opdlab.models.precision import autocast_backbones
from opdlab.models.protocols import Sampler
from opdlab.models.recomputation import recompute_layers
from opdlab.models.shards import whole_tensor
from opdlab.training import normalization, others, sampler_gap
from opdlab.training.processes import AcceleratedProcesses, Share, sum_in_place
from opdlab.training.resolution import move_average
from opdlab.training.state import RunState


@dataclass(frozen=True)
class Learned:
    """The numbers of a step's loss pass, before the weights move.

    Attributes:
        columns: `loss`, `grad_norm`, `sampler_gap` and the numbers of `signals.cheap` of every
            token, `[tokens]` each; `importance` where the gap is corrected. With
            `Settings.trace_k` also what `KeptTokens` keeps, `[tokens, S]`.
        weight: Each token's share in the loss of the step, over all processes, `[tokens]`; times
            its importance where the gap is corrected.
        grad_norm: Length of the gradient of all parameters, before clipping.
        is_checked: Whether the loss was found to treat each row alone.
        wanted: The student's probability of each position's likeliest token of the teacher,
            `[tokens]`; None without a teacher that grades.
    """

    columns: dict[str, Tensor]
    weight: Tensor
    grad_norm: float
    is_checked: bool
    wanted: Tensor | None = None


# Write.


def write_rollout(run: RunState, step: int | None = None) -> Rollout:
    """Write a step's rollout: the student's texts, and the share that others write.

    Args:
        run: The run.
        step: Number of the step, from 0; the next one to be done by default.

    Returns:
        The completions of this process, those of the student first.
    """
    settings = run.settings
    step = run.done if step is None else step
    prompts = run.task.training_batch(settings.batch, step, settings.seed)
    share = share_of_step(run, step)
    config = settings.sampling(seed_of(settings.seed, step, 2))
    parts = []
    with backbone_precision(run):
        if share.student:
            for_student = [prompts[place] for place in share.student]
            writer = _writer_of_student(run)
            options: dict[str, Any] = {**config.options(), **run.task.sample_options}
            options |= _seeded(run, writer, config, share.student)
            parts.append(writer.sample(for_student, settings.n, **options))
        if share.others:
            for_others = [prompts[share.all_student + place] for place in share.others]
            for name in writer_names(run.method):
                parts.append(_write_by(run, name, for_others, config, share.others))
    return concat_rollouts(parts)


def _writer_of_student(run: RunState) -> Sampler:
    """The run's sampler with the student's present weights, or the student's own loop."""
    return run.student if run.handover is None else run.handover.bring(run.student, run.done)


def share_of_step(run: RunState, step: int) -> Share:
    """Return this process's share of a step's prompts.

    The number of prompts that the student answers is drawn where it is a fraction, the same in
    every process.

    Args:
        run: The run.
        step: Number of the step, from 0.

    Returns:
        The share.
    """
    prompts = run.settings.batch
    own = others.count_of_student(run.method, prompts, run.settings.seed, step)
    accelerator = run.accelerator
    return Share.of(prompts, own, accelerator.process_index, accelerator.num_processes)


def rows_of_step(run: RunState, step: int) -> list[int]:
    """Number this process's completions in the whole step.

    Args:
        run: The run.
        step: Number of the step, from 0.

    Returns:
        The numbers, in the order of this process's rollout.
    """
    n = run.settings.n
    n_others = [1 if name == "answer" else n for name in writer_names(run.method)]
    return share_of_step(run, step).rows(n, n_others)


def _seeded(
    run: RunState, writer: Sampler, config: SamplingConfig, places: range
) -> dict[str, Any]:
    """The options of `sample` that decide its random numbers."""
    is_shared = run.accelerator.num_processes > 1
    process = run.accelerator.process_index
    return seeded(writer.sample, config.seed, places if is_shared else None, process)


def _write_by(
    run: RunState, name: str, prompts: list[Prompt], config: SamplingConfig, places: range
) -> Rollout:
    """Let one of the method's writers answer all these prompts."""
    processes = run.accelerator
    return others.write_by(
        name,
        run.teacher if name == "teacher" else run.policies.get(name),
        run.student,
        prompts,
        run.settings.n,
        config,
        places=places if processes.num_processes > 1 else None,
        process=processes.process_index,
        extra=run.task.sample_options,
    )


# Grade and plan.


def plan_step(
    run: RunState, rollout: Rollout, awaited: Mapping[str, Callable[[], Graded]] | None = None
) -> Planned:
    """Let the method plan on the whole batch; policies grade it when the plan asks for them.

    Args:
        run: The run.
        rollout: The step's rollout.
        awaited: Functions that wait for grades which are under way, by policy.

    Returns:
        The batch with the columns of the plan. With `Settings.importance_cap`, its rollout has the
        trainer's log-probs in place of the sampler's.
    """
    processes = AcceleratedProcesses(run.accelerator)
    row = torch.tensor(rows_of_step(run, run.done))
    batch = Batch(rollout, run.policies, run.task, run.done, processes, row, awaited)
    with backbone_precision(run):
        if run.settings.importance_cap is not None:
            batch = sampler_gap.with_trainer_logp(batch)
        return run_plan(run.method, batch)


def grade(run: RunState, planned: Planned) -> None:
    """Let all other policies grade the step's rollout, as far as the plan has not asked for it.

    Args:
        run: The run.
        planned: The step's batch with the plan; it keeps the grades.
    """
    with backbone_precision(run):  # once for the whole batch, in the precision of the step
        for name in planned.batch.distributions:
            if name != "student":
                planned.batch.states(name)


# Learn.


def accumulate_gradient(run: RunState, planned: Planned, written: Rollout) -> Learned:
    """Run the loss on all micro-batches and add its gradient to the parameters, over all processes.

    Args:
        run: The run; its parameters get the gradient, clipped by `Settings.clip`.
        planned: The step's batch with the plan.
        written: The step's rollout as it was written, with the sampler's log-probs.

    Returns:
        The numbers of every token, and the length of the gradient before clipping.

    Raises:
        NonFinite: A loss or the gradient is NaN or infinite. The weights are as they were.
    """
    rollout = planned.batch.rollout
    weight = token_weights(run, rollout)
    corrected: dict[str, Tensor] = {}
    if run.settings.importance_cap is not None:
        ratio = sampler_gap.importance(written, rollout.logp, run.settings)[rollout.mask]
        weight, corrected = weight * ratio, {"importance": ratio}
    passes, batches = _run_passes(run, planned, weight)
    lengths = rollout.lengths.tolist()

    def put_together(parts: list[Tensor]) -> Tensor:
        return in_order(parts, batches, lengths)

    columns = {
        name: put_together([one.columns[name] for one in passes]) for name in passes[0].columns
    }
    if run.settings.trace_k:
        columns = KeptTokens(run.settings.trace_k).blank(columns, rollout.learned)
    columns["loss"] = put_together([one.loss for one in passes])
    if corrected:  # the engine gives the norm of each token's gradient without its weight
        columns["grad_norm"] = columns["grad_norm"] * corrected["importance"]
    columns |= corrected | {"sampler_gap": sampler_gap.gap_of(written, columns["student_logp"])}
    reduce_gradients(run)
    norm = _clip_gradients(run)
    if not math.isfinite(norm):
        if run.sharding is not None:
            run.sharding.end()
        raise NonFinite(
            f"Step {run.done + 1}: the gradient is {norm}. Lower the learning rate; the weights are"
            " as they were."
        )
    wanted = columns.pop("wanted", None)  # for the metrics alone
    return Learned(columns, weight, norm, any(one.is_checked for one in passes), wanted)


def _run_passes(
    run: RunState, planned: Planned, weight: Tensor
) -> tuple[list[Pass], list[list[int]]]:
    """Add the gradients of all micro-batches to the parameters.

    With a sharded student every process runs as many passes as the one that has the most.

    Returns:
        What each pass found, and the rows that it had.
    """
    sharding = run.sharding
    batches = micro_batches(run, planned.batch.rollout)
    passes: list[Pass] = []
    idle = 0 if sharding is None else sharding.begin(planned.batch, passes=len(batches))
    for rows in batches:
        is_checked = run.loss_is_checked or any(one.is_checked for one in passes)
        passes.append(_backward(run, planned, rows, weight, check=not is_checked))
    if sharding is not None:
        with backbone_precision(run):
            sharding.idle_passes(idle)
    return passes, batches


def micro_batches(run: RunState, rollout: Rollout) -> list[list[int]]:
    """Choose the completions of each backward pass.

    Completions of similar length stand together, so that there is little padding, and those of one
    prompt, so that the prompt is run once.

    Args:
        run: The run; `Settings.micro_batch` decides where it is set.
        rollout: The step's rollout in this process.

    Returns:
        Row numbers of each pass.
    """
    student = run.student if run.sharding is None else run.sharding.student
    starts, bodies = run.student.encode_all(rollout.prompts), rollout.completions()
    lengths = [len(start) + len(body) for start, body in zip(starts, bodies, strict=True)]
    device = run.student.weights.device
    weights = student.weights
    limits = Limits(
        tokens=run.settings.tokens_per_backward(device),
        rows=run.settings.micro_batch,
        cost=pass_cost(device.type),
        shares=may_share(weights.model, weights.abilities),
    )
    return arrange(starts, lengths, limits)


def _backward(
    run: RunState, planned: Planned, rows: list[int], weight: Tensor, check: bool
) -> Pass:
    """Add the gradient of some completions to the parameters."""
    rollout, sharding = planned.batch.rollout, run.sharding
    part = rollout if len(rows) == len(rollout) else rollout.select(rows)
    student = run.student if sharding is None else sharding.student
    with (
        backbone_precision(run),
        torch.enable_grad(),
        recompute_layers(student.weights.model, run.settings.checkpointing),
    ):
        hidden = student.hidden(part)
    # The student's adapter is in force in both passes: its head gets gradients in the first, layers
    # run again in the second.
    with student.weights.using(student.adapter):
        head = student.head if sharding is None else sharding.head
        states = States(hidden, head, part.ids.device)
        if sharding is None:
            found = _run_loss(run, planned, rows, weight, states, check)
        else:
            with sharding.failing_together():
                found = _run_loss(run, planned, rows, weight, states, check)
        torch.autograd.backward(hidden, found.gradient.to(hidden.dtype))
    return found


def _run_loss(
    run: RunState, planned: Planned, rows: list[int], weight: Tensor, states: States, check: bool
) -> Pass:
    """Run the loss on some completions, and add its gradient to the head."""
    try:
        with adding_note(
            f"Raised by the loss of {type(run.method).__name__} in step {run.done + 1}."
        ):
            return planned.gradient(
                weight, student=states, rows=rows, check=check, **_watch(run.settings.trace_k)
            )
    except NonFinite as error:
        rollout = planned.batch.rollout
        raise NonFinite(_place_of(error, run, rollout, rows)) from None


def _watch(k: int) -> dict[str, Any]:
    """Return what a loss pass notes beside loss and gradient: with `k`, also top tokens."""
    if not k:
        return {"watch": signals.watched}
    top = KeptTokens(k)
    return {
        "watch": lambda rows: signals.watched(rows) | top.measure(rows),
        "slopes": top.slopes,
    }


def token_weights(run: RunState, rollout: Rollout) -> Tensor:
    """Compute each token's share of the step's mean, by `Settings.normalize`.

    Counted over the tokens that the loss sees and over all processes, so neither micro-batches nor
    the split among processes matter. Tokens that the loss does not see have no share.

    Args:
        run: The run.
        rollout: The step's rollout in this process.

    Returns:
        `[tokens]`, zero on tokens that the loss does not see.
    """
    settings, total = run.settings, AcceleratedProcesses(run.accelerator).sum
    return normalization.token_weights(rollout, settings.normalize, settings.max_new_tokens, total)


def reduce_gradients(run: RunState) -> None:
    """Add up the gradients of all processes; parameters without one get zeros.

    Args:
        run: The run; the gradients of its parameters change in place. Those of a sharded student
            were added up when they were made.
    """
    gradients = []
    for parameter in run.parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    if run.accelerator.num_processes > 1 and run.sharding is None:
        sum_in_place(AcceleratedProcesses(run.accelerator), gradients)


def _clip_gradients(run: RunState) -> float:
    """Shorten the gradient to `Settings.clip`, and return its length before."""
    parameters = list(run.parameters.values())
    length = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    length = whole_tensor(length)  # over all shards
    torch.nn.utils.clip_grads_with_norm_(parameters, run.settings.clip or math.inf, length)
    return length.item()


# Update.


def update_weights(run: RunState) -> float:
    """Move the student and its average, and count the step.

    Args:
        run: The run; its parameters have the step's gradient.

    Returns:
        The learning rate that was used.
    """
    rate = run.settings.rate(run.done)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    if run.sharding is not None:
        run.sharding.end()
    for policy in run.averages:
        move_average(policy, run.student, run.settings.ema_rate)
    run.done += 1
    run.claim.count()
    return rate


def backbone_precision(run: RunState) -> AbstractContextManager[None]:
    """Use one precision for all that a step asks of models: writing, grading, the loss pass.

    Args:
        run: The run; `Settings.precision` decides.

    Returns:
        A context: autocast to bf16 for "bf16", else one without effect.
    """
    return autocast_backbones(run.settings.precision == "bf16")


def _place_of(error: NonFinite, run: RunState, rollout: Rollout, rows: list[int]) -> str:
    """The step, prompt and token of an engine's error in a pass of some rows, in words."""
    part = rollout.select(rows)
    row = int(part.learned.nonzero()[error.row, 0]) if error.row is not None else 0
    ends = part.lengths.cumsum(0)
    b = int((ends <= row).sum())
    t = row - int(ends[b] - part.lengths[b])
    token = run.student.tokenizer.convert_ids_to_tokens(int(part.ids[b, t]))
    advice = (
        "" if error.is_explained else " Lower the learning rate, or look at the loss on this token."
    )
    return (
        f"Step {run.done + 1}, prompt {part.prompts[b].id or rows[b]!r}, token {t} ({token!r}):"
        f" {error} The weights are as they were and earlier checkpoints are intact.{advice}"
    )
