"""Servers and local teachers conform to the protocols of a teacher."""

from __future__ import annotations

import numpy as np
import pytest

import opdlab as opd
from opdlab import Policy, errors
from opdlab.tasks.market import model
from opdlab.teachers import LogprobServer, TextOnly, TextServer
from opdlab.teachers.contract import Checked, Grader, Writer, expect_teacher

TASK = opd.tasks.market()


def test_teachers_conform():
    """At run time; `opdlab.teachers` states it for mypy."""
    url, options = "http://127.0.0.1:1/v1", {"cache": None, "quiet": True}
    policy = model("student")
    text, server = TextOnly(policy), TextServer(url, **options)
    grader = LogprobServer(url, **options)
    for one in (text, server, grader):
        assert isinstance(one, Writer)
        assert isinstance(one, Checked)
    assert isinstance(grader, Grader)
    assert isinstance(policy, Grader)
    assert not isinstance(text, Grader)
    assert not isinstance(server, Grader)
    assert not isinstance(policy, Writer)


def test_only_what_grades_or_writes_is_a_teacher():
    policy = model("student")
    assert expect_teacher(policy, "distill") is policy
    for wrong in (None, "teacher", Policy, policy.weights.model):
        with pytest.raises(errors.InvalidValue, match="distill got teacher="):
            expect_teacher(wrong, "distill")


def test_a_rollout_is_scored_by_a_server(wire, market_teacher):
    """As by the local model, in all that top log-probs can tell."""
    _, _, url = wire
    student = model("student")
    prompts = TASK.prompts(3)
    server = LogprobServer(url, cache=None, quiet=True, k=6)
    server.check(student, prompts, 8)
    rollout = student.sample(prompts, max_new_tokens=8)
    got = opd.score(rollout, student, server).to_pandas()
    want = opd.score(rollout, student, market_teacher).to_pandas()
    np.testing.assert_allclose(got["teacher_logp"], want["teacher_logp"], atol=1e-4)
    assert (got["teacher_coarse_reverse_kl"] <= want["teacher_reverse_kl"] + 1e-4).all()
    with pytest.raises(errors.MissingPolicy, match=r"TextServer.*no log-probs of given tokens"):
        opd.score(rollout, student, TextServer(url, cache=None, quiet=True))
