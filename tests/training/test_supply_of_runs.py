"""What a run asks, and what it learns from users' verifiers: epochs, groups of samples, refused
scores.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch

import opdlab as opd
from opdlab.data.rollout import concat_rollouts
from opdlab.errors import BadVerifier
from opdlab.methods import GRPO, OPD, SequenceKD
from opdlab.models.text_rollouts import rollout_from_texts
from opdlab.tasks import from_records
from opdlab.teachers import TextOnly

RECORDS = [{"prompt": f"ana has {i} 7 apples", "answer": "4 7", "id": str(i)} for i in range(6)]
QUICK = {"max_new_tokens": 2, "lora": 2, "seed": 3, "quiet": True}


@pytest.fixture
def pair(make_policy):
    return make_policy(0), make_policy(1)


def asked(pair, **settings) -> list[str]:
    task = from_records(RECORDS, test=0)
    run = opd.distill(*pair, task, **{**QUICK, "batch": 4, "steps": 3, **settings})
    return [prompt.id for step in run for prompt in step.rollout.prompts]


def test_a_run_asks_every_prompt_once_before_any_twice(pair):
    ids = asked(pair)
    assert Counter(ids) == Counter({str(i): 2 for i in range(6)})
    assert sorted(ids[:6]) == sorted(ids[6:])
    assert all(len(set(ids[i : i + 4])) == 4 for i in (0, 4, 8))


def test_a_batch_larger_than_the_data_is_said_once_and_filled(pair):
    with pytest.warns(
        UserWarning, match=r"records has 6 training prompts and a step asks 8.*Use batch=6 or less"
    ) as said:
        ids = asked(pair, batch=8, steps=2)
    assert len(said) == 1
    assert max(Counter(ids[:8]).values()) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked(pair, batch=6, steps=1)


@pytest.mark.parametrize(
    ("method", "is_served", "n"),
    [
        (SequenceKD(), True, 2),
        (SequenceKD(), False, 2),
        (OPD(on_policy=0.5), True, 3),
        (OPD(on_policy=0.5), False, 3),
    ],
)
def test_n_is_right_whoever_wrote(pair, method, is_served, n):
    student, teacher = pair
    both = {"policies": {"teacher": teacher}} if is_served and method.needs else {}
    run = opd.distill(
        student,
        TextOnly(teacher) if is_served else teacher,
        from_records(RECORDS, test=0),
        method=method,
        **QUICK,
        **both,
        batch=4,
        n=n,
        steps=1,
    )
    rollout = next(run).rollout
    assert rollout.n == n
    assert len(rollout) == 4 * n
    groups = [rollout.prompts[i : i + n] for i in range(0, len(rollout), n)]
    assert all(len(set(map(id, group))) == 1 for group in groups)


def test_n_is_1_where_prompts_have_different_numbers_of_texts(student, prompts):
    sampled = student.sample(prompts, 3, max_new_tokens=2)
    answers = rollout_from_texts(student, prompts, ["ana"] * len(prompts))
    assert concat_rollouts([sampled, sampled]).n == 3
    assert concat_rollouts([sampled, answers]).n == 1
    assert sampled.select(range(3, 9)).n == 3
    assert [
        sampled.select(which).n for which in ([0, 1], [1, 2, 3], [2, 1, 0], range(0, 12, 3))
    ] == [1] * 4


@pytest.mark.parametrize("method", [GRPO(), OPD()])
@pytest.mark.parametrize(
    "value", [None, "0.5", (1, 2), {}, torch.ones(2), float("nan"), float("inf"), 7, -1]
)
def test_no_step_is_made_with_a_score_that_is_none(pair, method, value):
    task = replace(from_records(RECORDS, test=0), verify=lambda prompt, text: value)
    run = opd.distill(*pair, task, method=method, **QUICK, batch=2, n=2, steps=1)
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    with pytest.raises(BadVerifier, match=r"verifier of records returned .* for prompt '\d'"):
        next(run)
    assert run.done == 0
    assert all(torch.equal(p, before[name]) for name, p in run.parameters.items())


def test_a_verifier_that_raises_names_the_prompt_and_keeps_its_error(pair):
    task = replace(from_records(RECORDS, test=0), verify=lambda prompt, text: 1 / 0)
    with pytest.raises(BadVerifier, match=r"failed on prompt '\d'") as raised:
        next(opd.distill(*pair, task, method=GRPO(), **QUICK, batch=2, n=2, steps=1))
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
