"""Looking back: exactly what the student was at each step, from memory or disk, and the run none
the wiser.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import opdlab as opd
from opdlab import errors
from opdlab.training import snapshots


def market_run(tmp_path=None, **settings) -> tuple[opd.Run, opd.Policy, opd.Task]:
    student, teacher, task = opd.load("market")
    options = {"batch": 2, "steps": 4, "seed": 3, "lr": 0.02, "save": tmp_path, **settings}
    return opd.distill(student, teacher, task, quiet=True, **options), teacher, task


def test_rescored_is_score_at_that_step():
    run, teacher, task = market_run(snapshot_every=2)
    rollout = run.student.sample(task.prompts(2), seed=0, max_new_tokens=8)
    seen = {0: opd.score(rollout, run.student, teacher)}
    seen |= {
        step.number: opd.score(rollout, run.student, teacher)
        for step in run
        if step.number % 2 == 0
    }
    traces = snapshots.rescore(run, rollout, teacher)
    assert snapshots.steps(run) == list(traces) == list(seen) == [0, 2, 4]
    for step, want in seen.items():
        assert traces[step].meta == want.meta
        assert traces[step].table.drop_columns(["step"]).equals(want.table.drop_columns(["step"]))
        assert set(traces[step].column("step")) == {step}
    assert not np.array_equal(traces[0].column("student_logp"), traces[4].column("student_logp"))


def test_rewritten_is_what_each_student_wrote():
    run, teacher, task = market_run(snapshot_every=2)
    prompts, width = task.prompts(2, split="test"), run.settings.max_new_tokens
    write = lambda: opd.sample(run.student, prompts, temperature=0, max_new_tokens=width).texts
    seen = {0: write()} | {step.number: write() for step in run}
    traces = snapshots.rewrite(run, prompts, teacher, at=[0, 4])
    assert list(traces) == [0, 4]
    assert all(list(trace.meta["texts"]) == list(seen[step]) for step, trace in traces.items())
    assert seen[0] != seen[4]


def test_looking_back_leaves_no_adapter_and_does_not_move_the_run():
    weights = []
    for look in (False, True):
        run, teacher, task = market_run(snapshot_every=1)
        next(run), next(run)
        names = set(run.student.weights.model.peft_config)
        if look:
            snapshots.rescore(run, run.student.sample(task.prompts(1), max_new_tokens=4), teacher)
        assert set(run.student.weights.model.peft_config) == names
        run.train()
        weights.append(
            {
                k: v.clone()
                for k, v in run.student.weights.adapter_state(run.student.adapter).items()
            }
        )
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_checkpoints_on_the_disk_count_and_survive_the_process(tmp_path):
    run, teacher, task = market_run(tmp_path, save_every=2)
    run.train()
    rollout = run.student.sample(task.prompts(1), seed=0, max_new_tokens=6)
    want = opd.score(rollout, run.student, teacher).column("student_logp")
    student, teacher, task = opd.load("market")
    again = opd.resume(tmp_path, student, teacher, task)
    traces = snapshots.rescore(again, rollout, teacher)
    assert list(traces) == [2, 4]
    np.testing.assert_array_equal(traces[4].column("student_logp"), want)


def test_what_was_not_kept_is_said():
    run, teacher, task = market_run()
    run.train()
    rollout = run.student.sample(task.prompts(1), max_new_tokens=4)
    with pytest.raises(
        errors.OpdlabError, match=r"kept no student but the last\. Train a LoRA with snapshot_every"
    ):
        snapshots.rescore(run, rollout, teacher)
    run, teacher, task = market_run(snapshot_every=2)
    with pytest.raises(errors.OpdlabError, match=r"kept no step 3; it kept 0\. Give at="):
        snapshots.rewrite(run, task.prompts(1), at=[3])
