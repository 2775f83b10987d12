"""Look back along a run: one text, or one prompt, under the student of every step that was kept.

    run = opdlab.distill(student, teacher, task, snapshot_every=10).train()
    traces = snapshots.rescored(run, rollout, teacher)         # the same tokens, graded again at steps 0, 10, 20, …
    traces = snapshots.rewritten(run, task.prompts(1), teacher) # what each of these students writes

Kept are the adapters in `run.snapshots` and, where the run saves checkpoints, those on the disk.
All are looked at through one adapter of the shared weights, so looking back costs the memory of
one. Left out: full training, which keeps no adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from opdlab.data.prompt import Prompt, expect_prompts
from opdlab.data.rollout import Rollout
from opdlab.data.trace import Trace
from opdlab.engine import signals
from opdlab.engine.batch import Batch
from opdlab.engine.passes import compute
from opdlab.engine.scoring import record_trace, score
from opdlab.errors import OpdlabError
from opdlab.models.policy import Policy, sample
from opdlab.models.same_tokens import check_same_tokens
from opdlab.support.expect import expect
from opdlab.teachers.contract import expect_teacher
from opdlab.training import checkpoint, run_folder
from opdlab.training.run import Run


def steps(run: Run) -> list[int]:
    """The steps whose student is known, in order: those of `run.snapshots` and of the checkpoints
    in the run's folder.
    """
    return sorted({*run.snapshots, *_saved(run)})


def rescored(
    run: Run,
    rollout: Rollout,
    teacher: Policy | None = None,
    *,
    at: Sequence[int] = (),
    k: int = 8,
    **others: Policy,
) -> dict[int, Trace]:
    """The same rollout under the student of every kept step (or those of `at`): `opdlab.score`,
    step by step.

    What does not move (`teacher`, `others`) runs once. A teacher that follows the student would,
    too: give it `.frozen()`. Raises OpdlabError for a run that kept nothing and for steps that it
    did not keep.
    """
    expect(run, Run, "rescored", "run")
    expect(rollout, Rollout, "rescored", "rollout")
    fixed = {**({"teacher": teacher} if teacher is not None else {}), **others}
    for name, policy in fixed.items():
        expect_teacher(policy, "rescored", name)
    for name, policy in fixed.items():
        check_same_tokens(run.student, policy, name)
    batch = Batch(rollout, fixed)
    still, out = {name: batch.states(name) for name in fixed}, {}
    for step, student in _students(run, at):
        policies = {"student": student, **fixed}
        states = {"student": Batch(rollout, policies).states("student"), **still}
        out[step] = record_trace(
            rollout, policies, compute(signals.full(k), states, batch.token), step=step
        )
    return out


def rewritten(
    run: Run,
    prompts: Sequence[Prompt],
    teacher: Policy | None = None,
    *,
    at: Sequence[int] = (),
    k: int = 8,
    seed: int = 0,
    temperature: float = 0.0,
) -> dict[int, Trace]:
    """What the student of every kept step (or those of `at`) writes to the same prompts, graded.

    Greedy unless told otherwise; with a temperature, all steps draw with the same random numbers.
    """
    expect(run, Run, "rewritten", "run")
    prompts = expect_prompts(prompts, "rewritten")
    width, out = run.settings.max_new_tokens, {}
    for step, student in _students(run, at):
        rollout = sample(student, prompts, max_new_tokens=width, temperature=temperature, seed=seed)
        out[step] = score(rollout, student, teacher, k=k)
    return out


def _students(run: Run, at: Sequence[int]) -> Iterator[tuple[int, Policy]]:
    """(step, the student after it), one policy that is moved from step to step and gone in the end."""
    known = steps(run)
    if not known:
        raise OpdlabError(
            "This run kept no student but the last. Train a LoRA with snapshot_every=…, or with"
            " save= and save_every=…."
        )
    if missing := [step for step in at if step not in known]:
        raise OpdlabError(
            f"The run kept no step {missing[0]}; it kept {', '.join(map(str, known))}. Give at="
            " some of these."
        )
    with _looking_glass(run) as policy:
        for step in at or known:
            policy.weights.set_adapter_state(str(policy.adapter), _state(run, step))
            yield step, policy


@contextmanager
def _looking_glass(run: Run) -> Iterator[Policy]:
    """A policy with an adapter of its own beside the student's."""
    policy = run.student.frozen()
    try:
        yield policy
    finally:
        policy.weights.delete_adapter(str(policy.adapter))


def _state(run: Run, step: int) -> dict[str, Tensor]:
    return (
        run.snapshots[step]
        if step in run.snapshots
        else checkpoint.adapter(checkpoint.find(_saved(run)[step]))
    )


def _saved(run: Run) -> dict[int, Path]:
    """The checkpoints of adapters on the run's path so far, by step: those of other runs in the
    folder do not count.
    """
    found = run_folder.saved_in(run.folder) if run.folder else []
    return {
        saved.step: saved.path
        for saved in found
        if run.lineage.includes(saved.run, saved.step)
        and (saved.path / "adapter_model.safetensors").exists()
    }
