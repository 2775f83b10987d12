"""Exposure bias against enumeration: every text of a small table, with its probability."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from opdlab import Prompt, Task, exact
from opdlab.diagnose import exposure
from opdlab.diagnose.exposure import continuation, excess_error, kls
from opdlab.errors import MissingPolicy, OpdlabError
from opdlab.models.text_rollouts import rollout_from_texts
from opdlab.teachers import TextOnly


def tables(prompts: int = 1, eos: int | None = None) -> tuple[exact.Table, exact.Table]:
    return tuple(exact.Table.random(3, 3, prompts, seed=seed, eos=eos) for seed in (0, 1))


def enumerated(student: exact.Table, teacher: exact.Table):
    """Forward KLs on every text of each side, and the texts' probabilities."""
    out = []
    for by in (student, teacher):
        rollout = exact.everything(by.prompts, by.vocab, by.length, eos=by.eos, by=by)
        out.append(
            (kls(student, teacher, rollout)["forward_kl"], exact.law(by, rollout) / len(by.prompts))
        )
    return out


@pytest.mark.parametrize("eos", [None, 2])
def test_the_accumulated_errors_are_the_definitions(eos):
    """R(l) by the prefixes that the student passes through; l eps(l) as the KL between the laws of
    whole texts.
    """
    student, teacher = tables(eos=eos)
    (own, weight), (other, teacher_weight) = enumerated(student, teacher)
    got = excess_error(own, other, weight, teacher_weight)["excess"].tolist()
    kl = (teacher.logp.exp() * (teacher.logp - student.logp)).sum(-1)[0]  # [prefixes]
    law, logs = (
        exact.law(teacher, rollout := exact.everything(teacher.prompts, 3, 3, eos=eos)),
        exact.law(student, rollout).log(),
    )
    whole = float((law * (law.log() - logs)).sum())
    for length, ends in ((1, 1), (2, 4), (3, 13)):
        accumulated, expected = (
            float((exact.visits(by)[0] * kl)[:ends].sum()) for by in (student, teacher)
        )
        assert got[length - 1] == pytest.approx(100 * (accumulated - expected) / expected, abs=1e-9)
    assert expected == pytest.approx(whole, abs=1e-12)
    assert got[0] == pytest.approx(0, abs=1e-9)  # both begin at the prompt
    assert abs(got[2]) > 1


def test_sampled_texts_come_near_the_enumeration():
    student, teacher = tables(prompts=40)
    (own, weight), (other, teacher_weight) = enumerated(student, teacher)
    want = excess_error(own, other, weight, teacher_weight)["excess"].iloc[-1]
    result = exposure(student, teacher, prompts=student.prompts, n=40)
    assert result.excess == pytest.approx(want, abs=3)
    low, high = result.table[["low", "high"]].iloc[-1]
    assert low < result.excess < high < low + 25
    assert result.probe is None
    assert f"ExAccErr over 3 tokens is {result.excess:+.1f} %" in str(result)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Of 40 repetitions on fresh samples of the same prompts, at least 30 intervals hold the exact
    value.
    """
    student, teacher = tables(prompts=24)
    (own, weight), (other, teacher_weight) = enumerated(student, teacher)
    want = excess_error(own, other, weight, teacher_weight)["excess"].iloc[-1]
    hits = 0
    for seed in range(40):
        mine, theirs = (
            kls(student, teacher, by.sample(by.prompts, 2, seed=seed))["forward_kl"]
            for by in (student, teacher)
        )
        low, high = excess_error(mine, theirs, group=2, resamples=200)[["low", "high"]].iloc[-1]
        hits += low <= want <= high
    assert hits >= 30


def test_kls_by_position_count_what_is_still_open():
    student, teacher = tables(prompts=8, eos=2)
    table = exposure(student, teacher, prompts=student.prompts, n=4).table
    rollout = student.sample(student.prompts, 4, max_new_tokens=64, seed=0)
    both = kls(student, teacher, rollout)
    assert table["tokens"].tolist() == rollout.mask.sum(0).tolist()
    assert table["tokens"].iloc[-1] < table["tokens"].iloc[0]
    want = [float(both["reverse_kl"][rollout.mask[:, t], t].mean()) for t in range(3)]
    assert table["reverse_kl"].tolist() == pytest.approx(want)
    assert not np.allclose(table["reverse_kl"], table["forward_kl"])


def test_a_student_equal_to_its_teacher_has_no_error_to_pile_up():
    student, _ = tables(prompts=3)
    result = exposure(student, student, prompts=student.prompts)
    assert math.isnan(result.excess)
    assert "ExAccErr is undefined" in str(result)


PROMPTS = [Prompt("a b", id="0"), Prompt("c", id="1"), Prompt("f e d", id="2")]


@pytest.fixture(scope="module")
def world(make_policy, make_tokenizer):
    """Two policies on letters, and a task whose score is the share of the letter `c`."""
    pair = [make_policy(seed, make_tokenizer(), eos=[]) for seed in (0, 1)]
    share = lambda prompt, text: text.split().count("c") / max(1, len(text.split()))
    return *pair, Task("letters", lambda n, seed, split: (PROMPTS * n)[:n], share, max_new_tokens=8)


def test_the_probe_lets_the_teacher_go_on_from_the_students_prefix(world):
    student, teacher, task = world
    rollout = student.sample(PROMPTS, max_new_tokens=8, seed=3)
    probe = continuation(rollout, student, teacher, task, at=[0, 3, 8]).set_index("length")
    assert probe.index.tolist() == [0, 3]  # nothing is longer than 8
    begun = [row[:3] for row in rollout.completions()]
    more = teacher.sample(PROMPTS, temperature=0, max_new_tokens=5, prefixes=begun).completions()
    texts = [student.tokenizer.decode(a + b) for a, b in zip(begun, more, strict=True)]
    assert probe.loc[3, "teacher"] == pytest.approx(
        np.mean([task.verify(None, text) for text in texts])
    )
    alone = teacher.sample(PROMPTS, temperature=0, max_new_tokens=8).texts
    assert probe.loc[0, "teacher"] == pytest.approx(
        np.mean([task.verify(None, text) for text in alone])
    )
    assert probe["student"].tolist() == pytest.approx(
        [np.mean([task.verify(None, text) for text in rollout.texts])] * 2
    )


def test_a_teacher_that_only_writes_goes_on_from_the_text(world):
    student, teacher, task = world
    rollout = rollout_from_texts(
        student, PROMPTS, ["a b c d e f", "f f c", "c a b d e c"]
    )  # letters only: special tokens are none in a text
    direct, text = (
        continuation(rollout, student, who, task, at=[0, 2, 5])
        for who in (teacher, TextOnly(teacher))
    )
    assert direct["teacher"].tolist() == pytest.approx(text["teacher"].tolist())
    assert direct["texts"].tolist() == [3, 3, 2]
    assert direct["teacher"].max() > 0


def test_what_cannot_be_probed_is_an_error(world):
    student, teacher, task = world
    rollout = student.sample(PROMPTS, max_new_tokens=4)
    with pytest.raises(OpdlabError, match="prefix of -1 tokens"):
        continuation(rollout, student, teacher, task, at=[-1])
    with pytest.raises(MissingPolicy, match="has no verifier"):
        continuation(rollout, student, teacher, Task("mute", task.draw))


def test_the_whole_on_real_policies(world):
    student, teacher, task = world
    result = exposure(student, teacher, task, prompts=3, n=2)
    assert result.probe is not None
    assert "The teacher scores" in str(result)
    assert result.table["tokens"].tolist() == [6] * 8
    assert result.excess == pytest.approx(float(result.table["excess"].iloc[-1]))
    assert torch.isfinite(torch.tensor(result.table["excess"].tolist())).all()
