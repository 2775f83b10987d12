"""Agreement of two policies against closed forms, brute force and enumeration."""

from __future__ import annotations

import math

import pytest
import torch

from opdlab import exact
from opdlab.diagnose import overlap
from opdlab.diagnose.overlap import agreement
from opdlab.engine.rows import Rows
from opdlab.errors import OpdlabError, TokenizerMismatch


def rows(p: list[float], q: list[float]) -> Rows:
    return Rows(
        {"student": torch.tensor([p]).log(), "teacher": torch.tensor([q]).log()}, torch.tensor([0])
    )


def test_every_number_by_hand():
    got = agreement(2)(
        rows([0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.6, 0.1])
    )  # top two: {0, 1} and {2, 1}
    assert got["overlap"].item() == 0.5
    assert got["acceptance"].item() == pytest.approx(0.1 + 0.2 + 0.15 + 0.05)
    assert got["student_mass"].item() == pytest.approx(0.3 + 0.15)
    assert got["teacher_mass"].item() == pytest.approx(0.1 + 0.2)
    assert got["advantage"].item() == 0  # one common token, renormalised to one on both sides
    entropy = lambda p: -sum(x * math.log(x) for x in p)
    assert got["entropy_gap"].item() == pytest.approx(
        entropy([0.5, 0.3, 0.15, 0.05]) - entropy([0.1, 0.2, 0.6, 0.1]), abs=1e-6
    )


def test_the_advantage_is_minus_a_kl_on_the_common_tokens():
    got = agreement(2)(rows([0.6, 0.3, 0.1], [0.2, 0.7, 0.1]))["advantage"].item()
    p, q = (2 / 3, 1 / 3), (2 / 9, 7 / 9)
    assert got == pytest.approx(
        -sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-5
    )


def test_nothing_in_common_and_tokens_ruled_out():
    apart = agreement(1)(rows([0.9, 0.1, 0.0], [0.1, 0.9, 0.0]))
    assert apart["overlap"].item() == 0
    assert math.isnan(apart["advantage"].item())
    disjoint = agreement(3)(rows([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]))
    assert (disjoint["acceptance"].item(), disjoint["advantage"].item()) == (0, -math.inf)
    same = agreement(3)(rows([0.5, 0.5, 0.0], [0.5, 0.5, 0.0]))
    assert (same["acceptance"].item(), same["advantage"].item(), same["overlap"].item()) == (
        1,
        0,
        1,
    )


def test_acceptance_on_the_students_texts_is_the_expectation_over_all_of_them():
    """E over prefixes of sum min(p, q), by the probability that the student passes through each."""
    student, teacher = exact.Table.random(4, 3, 12, seed=0), exact.Table.random(4, 3, 12, seed=1)
    inside = torch.minimum(student.logp.exp(), teacher.logp.exp()).sum(-1)
    want = float((exact.visits(student) * inside).sum()) / 12 / 3
    result = overlap(student, teacher, prompts=student.prompts, n=200, k=2)
    assert result.mean["acceptance"] == pytest.approx(want, abs=0.01)
    assert result.table["tokens"].tolist() == [2400] * 3
    assert result.table["acceptance"].mean() == pytest.approx(result.mean["acceptance"])


def test_on_real_policies_it_equals_full_log_probs(student, teacher, prompts):
    rollout = student.sample(prompts, 2, max_new_tokens=6, seed=1)
    p, q = (policy.log_probs(rollout) for policy in (student, teacher))
    result = overlap(student, teacher, rollout=rollout, k=5)
    common = [
        len(set(a.topk(5).indices.tolist()) & set(b.topk(5).indices.tolist())) / 5
        for a, b in zip(p, q, strict=True)
    ]
    assert result.tokens["overlap"].tolist() == pytest.approx(common)
    assert result.tokens["position"].tolist() == [
        t for n in rollout.lengths.tolist() for t in range(n)
    ]
    assert overlap(student, student, rollout=rollout).mean["acceptance"] == pytest.approx(
        1, abs=1e-5
    )


def test_it_says_what_it_found_and_escapes_nothing_into_html(student, teacher, prompts):
    result = overlap(student, teacher, prompts=prompts, k=4)
    assert f"with probability {result.mean['acceptance']:.3f}" in str(result)
    assert repr(result).startswith("Overlap(k=4, overlap ")
    assert result._repr_html_().startswith("<p>On the student")
    assert "student&#x27;s" in result._repr_html_()


def test_other_tokens_and_nothing_to_ask_are_errors(make_policy, make_tokenizer, student, prompts):
    with pytest.raises(TokenizerMismatch, match="id 0 is"):
        overlap(student, make_policy(2, make_tokenizer()), prompts=prompts)
    with pytest.raises(
        OpdlabError, match=r"nothing to ask the student. Give a task, prompts=\[…\] or a rollout"
    ):
        overlap(student, student)
