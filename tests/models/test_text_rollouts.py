"""Tests of rollouts that are made of given texts."""

from __future__ import annotations

import warnings

import pytest

import opdlab as opd
from opdlab.models.text_rollouts import rollout_from_texts
from opdlab.tasks.market import model
from opdlab.teachers import TextOnly


def test_warns_once_of_texts_that_the_tokenizer_cannot_write():
    student = model("student")
    prompts = opd.tasks.market().prompts(3)
    texts = ["3 8 + 2 3 = 6 1 . sum 6 1", "38+23=61, so 61-10=51, total 51", "sum 6 1"]
    with pytest.warns(UserWarning, match="1 of 3 given texts .* became '<unk>'.*'38.23=61, so"):
        rollout = rollout_from_texts(student, prompts, texts)
    has_unknown = (rollout.ids == student.tokenizer.unk_token_id).any(1)
    assert has_unknown.tolist() == [False, True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollout_from_texts(student, prompts, texts)


def test_texts_that_spell_the_token_of_unknown_text_are_meant():
    student = model("student")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollout_from_texts(student, opd.tasks.market().prompts(1), ["sum <unk>"])


def test_copying_a_teacher_with_another_alphabet_warns():
    student, _, task = opd.load("market")
    teacher = TextOnly(model("scribe"))
    options = {"method": opd.SequenceKD(), "steps": 1, "batch": 16, "max_new_tokens": 64}
    with pytest.warns(UserWarning, match="teaches the student to write '<unk>'"):
        opd.distill(student, teacher, task, quiet=True, **options).train()
