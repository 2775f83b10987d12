"""Evaluation: pass@k against brute force, distinct prompts, and what pairs with what.

Intervals: see test_intervals.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdlab import Prompt, Task, evaluate
from opdlab.errors import BadVerifier, InvalidValue, MissingPolicy, OpdlabError
from opdlab.tasks import from_records, market
from opdlab.teachers import TextOnly
from opdlab.training.evaluation import Evaluation, paired


def make(sampled: np.ndarray) -> Evaluation:
    n = len(sampled)
    return Evaluation("x", np.zeros(n), sampled, np.ones(n), np.zeros(n), ())


@given(
    st.integers(1, 6).flatmap(
        lambda k: st.lists(
            st.lists(st.sampled_from([0.0, 1.0]), min_size=k, max_size=k), min_size=1, max_size=5
        )
    )
)
def test_pass_at_k_equals_brute_force(rows):
    sampled = np.array(rows)
    for k in range(1, sampled.shape[1] + 1):
        want = np.mean([[max(chosen) for chosen in combinations(row, k)] for row in rows])
        assert make(sampled).pass_at(k) == pytest.approx(want)
    assert make(sampled).avg_at_k == pytest.approx(make(sampled).pass_at(1))


def test_pass_at_k_needs_k_samples():
    with pytest.raises(
        OpdlabError,
        match=r"pass@4 needs at least 4 samples a prompt; there are 3\. Evaluate with k=4",
    ):
        make(np.ones((2, 3))).pass_at(4)
    with pytest.raises(OpdlabError, match="needs samples"):
        make(np.ones((2, 0))).avg_at_k  # noqa: B018


def test_the_paired_interval_is_that_of_the_mean():
    rng = np.random.default_rng(0)
    before = rng.random(400)
    after = before + rng.normal(0.1, 0.5, 400)
    gap = after - before
    got, half = paired(after, before), 1.96 * gap.std() / 20
    assert got.mean == pytest.approx(gap.mean())
    assert got.low == pytest.approx(gap.mean() - half, abs=0.1 * half)
    assert got.high == pytest.approx(gap.mean() + half, abs=0.1 * half)
    assert got.clear
    assert not paired(before, before + rng.normal(0, 0.5, 400)).clear


def test_pairing_removes_what_the_prompts_share():
    before = np.random.default_rng(0).random(50) * 100
    got = paired(before + 1, before)
    assert got.mean == pytest.approx(1)
    assert (
        0.8 < got.low < got.high <= 1 + 1e-9
    )  # narrow, but 50 prompts that agree do not make certain
    assert paired(before[::-1] + 1, before).high > 2


def test_scores_are_the_verifiers(student):
    task = market()
    judged = Task(
        "lengths", task.draw, lambda prompt, text: min(1.0, len(text.split()) / 8), max_new_tokens=8
    )
    got = evaluate(student, judged, n=10, k=3, seed=4, batch_size=4)
    prompts = task.prompts(10, 4, "test")
    best = student.sample(prompts, temperature=0, max_new_tokens=8)
    assert got.greedy.tolist() == pytest.approx(
        [judged.verify(p, t) for p, t in zip(prompts, best.texts, strict=True)]
    )
    assert got.length.tolist() == best.lengths.tolist()
    assert got.cut.tolist() == [f == "length" for f in best.finish]
    assert got.sampled.shape == (10, 3)
    assert len(np.unique(got.sampled)) > 1
    assert got.table().keys() == {
        "accuracy",
        "low",
        "high",
        "prompts",
        "length",
        "cut",
        "avg@3",
        "pass@3",
    }
    assert got.table()["prompts"] == 10
    assert (got.table()["low"], got.table()["high"]) == (got.interval.low, got.interval.high)
    assert got.table()["avg@3"] == pytest.approx(got.sampled.mean())
    again = evaluate(student, judged, n=10, k=3, seed=4, batch_size=4)
    assert (again - got).mean == 0
    assert (again.sampled == got.sampled).all()
    assert evaluate(student, judged, n=10, seed=4, max_new_tokens=2).length.max() == 2


def test_other_prompts_do_not_pair(student):
    one = evaluate(student, market(), n=3, seed=0, max_new_tokens=2)
    for other in (
        evaluate(student, market(), n=3, seed=1, max_new_tokens=2),
        evaluate(student, market(), n=4, seed=0, max_new_tokens=2),
        evaluate(student, market(secret=True), n=3, seed=0, max_new_tokens=2),
    ):
        with pytest.raises(
            OpdlabError, match=r"different prompts .* do not pair\. Use the same task, n and seed"
        ):
            one - other


def test_tasks_of_the_same_name_pair_only_on_the_same_prompts(student):
    ask = lambda *texts: from_records(
        [{"prompt": t, "answer": "4 7"} for t in texts], test=2, max_new_tokens=2
    )
    one, same, other = (
        evaluate(student, ask(*texts), n=2)
        for texts in ("ana ben leo".split(), "ana ben leo".split(), "eva ida jan".split())
    )
    assert (one - same).mean == 0
    with pytest.raises(OpdlabError, match="different prompts"):
        one - other


RECORDS = [
    {"prompt": text, "answer": "4 7"}
    for text in "ana ben cleo dan eva finn gia hugo ida jan".split()
]


def test_a_prompt_counts_once_however_often_it_is_held_out(student):
    held = [dict(record) for record in RECORDS[:5] for _ in range(3)]
    task = from_records([*held, *RECORDS[5:]], test=5, max_new_tokens=2)
    got = evaluate(student, task, n=200)
    assert (
        got.prompts == got.interval.prompts == (got - evaluate(student, task, n=200)).prompts == 5
    )
    assert got.table()["prompts"] == 5
    assert repr(got).endswith("(5 prompts: all there are of 200 asked for)")
    assert repr(evaluate(student, task, n=5)).endswith("(5 prompts)")


def test_a_users_draw_that_repeats_itself_counts_its_prompts_once(student):
    task = Task(
        "three",
        lambda n, seed, split: [Prompt(f"ana {i % 3}") for i in range(n)],
        lambda p, t: 1.0,
        2,
    )
    before, after = evaluate(student, task, n=50), evaluate(student, task, n=50)
    assert before.prompts == 3
    assert (before.interval.low, before.interval.high) == pytest.approx((0.4385, 1), abs=1e-4)
    assert not (after - before).clear


def test_the_accuracy_has_a_width_at_0(student):
    task = from_records(RECORDS, test=5, verify=lambda prompt, text: 0.0, max_new_tokens=2)
    got = evaluate(student, task, k=2)
    assert got.accuracy == got.interval.low == 0
    assert got.interval.high > 0.4
    assert got.sampled_interval.high == got.interval.high  # the samples of a prompt count as one


def test_no_result_depends_on_the_batch_size(student):
    task = replace(market(), max_new_tokens=4, verify=lambda prompt, text: len(text) % 7 / 7)
    whole, parts = (evaluate(student, task, n=70, k=2, batch_size=size) for size in (64, 9))
    assert (whole.greedy == parts.greedy).all()
    assert (whole.sampled == parts.sampled).all()
    assert (parts - whole).mean == 0


def test_a_pair_differs_in_nothing_but_the_policy(student):
    task = from_records(RECORDS, test=5, max_new_tokens=2)
    one = evaluate(student, task, k=1)
    hinted = from_records([{**record, "hint": "9"} for record in RECORDS], test=5, max_new_tokens=2)
    answered = from_records(
        [{**record, "answer": "9"} for record in RECORDS], test=5, max_new_tokens=2
    )
    judged = replace(task, verify=lambda prompt, text: 1.0)
    for other, differing in (
        (
            evaluate(student, task, k=1, max_new_tokens=3),
            r"under different conditions \(max_new_tokens 2 and 3\).*same max_new_tokens",
        ),
        (evaluate(student, task, k=2), r"under different conditions \(k 1 and 2\)"),
        (evaluate(student, judged, k=1), r"under different conditions \(verifier "),
        (
            evaluate(student, task, k=1, seed=1),
            r"on different prompts \(prompts .*; seed 0 and 1\)",
        ),
        (evaluate(student, hinted, k=1), "on different prompts .*prompts '"),
        (evaluate(student, answered, k=1), "on different prompts .*prompts '"),
    ):
        with pytest.raises(OpdlabError, match=differing):
            one - other
    again = evaluate(
        student,
        from_records(RECORDS, test=5, max_new_tokens=2),
        k=1,
        n=5,
        batch_size=3,
        name="again",
    )
    assert (one - again).mean == 0


def test_an_evaluation_pairs_with_evaluations_only(student):
    one = evaluate(student, market(), n=2, max_new_tokens=2)
    with pytest.raises(InvalidValue, match=r"An evaluation minus 0\.3 is not a paired comparison"):
        one - 0.3
    with pytest.raises(InvalidValue, match=r"An evaluation subtracted from 0\.3"):
        0.3 - one


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 2.5}, "n=2.5. Use a whole number of at least 1"),
        ({"n": 0}, "n=0"),
        ({"k": -1}, "k=-1. Use a whole number of at least 0"),
        ({"k": 1.5}, "k=1.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": "a"}, "seed='a'"),
        ({"seed": -1}, "seed=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"quiet": "yes"}, "quiet='yes'"),
        ({"name": 3}, "name=3"),
        ({"policy": None}, "policy=None. Use a Policy"),
        ({"policy": TextOnly}, "Use a Policy"),
        ({"task": [Prompt("a")]}, "Use an opdlab.Task"),
        ({"temperature": 1.0}, "temperature"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(student, wrong, message):
    given = {"policy": student, "task": market(), "n": 2, "max_new_tokens": 2, **wrong}
    with pytest.raises(InvalidValue) as raised:
        evaluate(**given)
    assert message in str(raised.value)


@pytest.mark.parametrize("k", [0, -1, 1.5, "2"])
def test_pass_at_k_takes_a_count(k):
    with pytest.raises(InvalidValue, match="pass_at got k="):
        make(np.ones((2, 3))).pass_at(k)


def test_a_teacher_that_only_writes_is_evaluated_as_the_policy_behind_it(student):
    task = replace(market(), max_new_tokens=4, verify=lambda prompt, text: len(text) % 7 / 7)
    behind, written = (evaluate(who, task, n=5) for who in (student, TextOnly(student)))
    assert (written - behind).mean == 0
    assert "length" not in written.table()
    assert "length" not in repr(written)


@pytest.mark.parametrize(
    "value", [None, "yes", "0.5", np.ones(2), (1, 2), {}, float("nan"), float("inf"), 7, -1]
)
@pytest.mark.parametrize("k", [0, 2])
def test_a_score_that_is_none_is_refused_whatever_the_batch(student, value, k):
    task = replace(market(), max_new_tokens=2, verify=lambda prompt, text: value)
    for batch_size in (1, 64):
        with pytest.raises(
            BadVerifier, match=r"verifier of market returned .* for prompt 'test-0-0'"
        ):
            evaluate(student, task, n=3, k=k, batch_size=batch_size)


def test_a_task_without_a_verifier_is_refused(student):
    with pytest.raises(MissingPolicy, match="plain has no verifier"):
        evaluate(student, Task("plain", lambda n, seed, split: [Prompt("ana")] * n))
