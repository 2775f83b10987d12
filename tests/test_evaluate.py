"""Evaluation: pass@k against brute force, pairing, and the bootstrap against the normal law."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdlab import Prompt, Task, evaluate
from opdlab.errors import MissingPolicy, OpdlabError
from opdlab.evaluate import Evaluation, paired
from opdlab.tasks import from_records, market


def make(sampled: np.ndarray) -> Evaluation:
    n = len(sampled)
    return Evaluation("x", np.zeros(n), sampled, np.ones(n), np.zeros(n), ())


@given(st.integers(1, 6).flatmap(lambda k: st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=k, max_size=k), min_size=1, max_size=5)))
def test_pass_at_k_equals_brute_force(rows):
    sampled = np.array(rows)
    for k in range(1, sampled.shape[1] + 1):
        want = np.mean([[max(chosen) for chosen in combinations(row, k)] for row in rows])
        assert make(sampled).pass_at(k) == pytest.approx(want)
    assert make(sampled).avg_at_k == pytest.approx(make(sampled).pass_at(1))


def test_pass_at_k_needs_k_samples():
    with pytest.raises(OpdlabError, match=r"pass@4 needs at least 4 samples a prompt; there are 3\. Evaluate with k=4"):
        make(np.ones((2, 3))).pass_at(4)
    with pytest.raises(OpdlabError, match="needs samples"):
        make(np.ones((2, 0))).avg_at_k  # noqa: B018


def test_the_bootstrap_interval_is_that_of_the_mean():
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
    assert got.low == paired(after, before).low  # the same seed, the same interval


def test_pairing_removes_what_the_prompts_share():
    before = np.random.default_rng(0).random(50) * 100
    got = paired(before + 1, before)
    assert (got.low, got.high) == pytest.approx((1, 1))
    assert paired(before[::-1] + 1, before).high > 2


def test_scores_are_the_verifiers(student):
    task = market()
    judged = Task("lengths", task.draw, lambda prompt, text: min(1.0, len(text.split()) / 8), max_new_tokens=8)
    got = evaluate(student, judged, n=10, k=3, seed=4, batch_size=4)
    prompts = task.prompts(10, 4, "test")
    best = student.sample(prompts, temperature=0, max_new_tokens=8)
    assert got.greedy.tolist() == pytest.approx([judged.verify(p, t) for p, t in zip(prompts, best.texts, strict=True)])
    assert got.length.tolist() == best.lengths.tolist()
    assert got.cut.tolist() == [f == "length" for f in best.finish]
    assert got.sampled.shape == (10, 3)
    assert len(np.unique(got.sampled)) > 1
    assert got.table().keys() == {"accuracy", "length", "cut", "avg@3", "pass@3"}
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
        with pytest.raises(OpdlabError, match=r"different prompts .* do not pair\. Use the same task, n and seed"):
            one - other


def test_tasks_of_the_same_name_pair_only_on_the_same_prompts(student):
    ask = lambda *texts: from_records([{"prompt": t, "answer": "4 7"} for t in texts], test=2, max_new_tokens=2)
    one, same, other = (
        evaluate(student, ask(*texts), n=2) for texts in ("ana ben leo".split(), "ana ben leo".split(), "eva ida jan".split())
    )
    assert (one - same).mean == 0
    with pytest.raises(OpdlabError, match="different prompts"):
        one - other


def test_a_task_without_a_verifier_is_refused(student):
    with pytest.raises(MissingPolicy, match="plain has no verifier"):
        evaluate(student, Task("plain", lambda n, seed, split: [Prompt("ana")] * n))
