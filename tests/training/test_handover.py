"""A run keeps its sampler up to date, whoever else uses it, and says who sampled when resumed."""

from __future__ import annotations

import pytest
from training.test_sampler_gap import Hot, market_run

import opdlab as opd
from opdlab.errors import InvalidValue, OpdlabError


def test_it_is_started_once_and_updated_after_every_update():
    sampler = Hot()
    market_run(sampler, steps=3).train()
    assert sampler.calls == ["start", 1, 2]


def test_two_runs_may_take_turns():
    sampler = Hot()
    one, other = market_run(sampler, steps=3), market_run(sampler, steps=3)
    next(one)
    next(one)
    next(other)
    next(one)
    assert sampler.calls == ["start", 1, "start", "start"]
    assert sampler.student is one.student


def test_a_sampler_that_fails_loses_nothing():
    """The step before stays done, and the next one can be tried again."""
    sampler = Hot()
    run, undisturbed = market_run(sampler, steps=3), market_run(Hot(), steps=3).train()
    next(run)

    def fail(*_):
        raise ConnectionError("gone")

    sampler.update = fail
    with pytest.raises(ConnectionError):
        next(run)
    assert run.done == 1
    assert len(run.history) == 1
    del sampler.update
    run.train()
    columns = [name for name in run.history if not name.endswith(("seconds", "_s"))]
    assert run.history[columns].equals(undisturbed.history[columns])


def test_evaluations_are_sampled_too():
    sampler = Hot()
    run = market_run(sampler, steps=2, evaluate_every=1)
    next(run)
    assert sampler.calls == ["start", "start"]
    found = opd.evaluate(run.student, run.task, n=8, sampler=sampler)
    assert found.prompts == 8
    with pytest.raises(InvalidValue, match="is no Policy whose weights"):
        opd.evaluate(opd.teachers.TextOnly(run.student), run.task, n=8, sampler=sampler)


def test_a_resumed_run_says_who_sampled(tmp_path):
    student, teacher, task = opd.load("market")
    run = opd.distill(
        student, teacher, task, sampler=Hot(), steps=1, batch=4, lora=4, save=tmp_path, quiet=True
    )
    run.train()
    fresh, _, _ = opd.load("market")
    with pytest.raises(OpdlabError, match="the sampler differs: Hot") as refused:
        opd.resume(tmp_path, fresh, teacher, task, steps=2, quiet=True)
    assert "allow=('sampler',)" in str(refused.value)
    again = opd.resume(tmp_path, fresh, teacher, task, steps=2, quiet=True, sampler=Hot())
    assert next(again).number == 2
    fresh, _, _ = opd.load("market")
    with pytest.warns(UserWarning, match="the sampler differs"):
        opd.resume(tmp_path, fresh, teacher, task, steps=2, quiet=True, allow="sampler")


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        ("vllm", "It has no sample and no start"),
        (Hot, "That is a class, and not an object"),
        (opd.Prompt("a"), "It has no sample"),
    ],
)
def test_what_is_no_sampler_is_refused(sampler, said):
    with pytest.raises(InvalidValue, match=said):
        market_run(sampler)


def test_a_sampler_that_would_not_be_used_is_refused():
    with pytest.raises(InvalidValue, match="would change nothing: in SFT the student writes"):
        market_run(Hot(), method=opd.SFT())
