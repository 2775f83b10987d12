"""The privilege lens without a browser: its split is that of the diagnosis, and what it flags is
what the market made unknowable.
"""

from __future__ import annotations

import numpy as np
import pytest
from viz.traces import NASTY, made

import opdlab
from opdlab.diagnose import privilege
from opdlab.errors import MissingPolicy, OpdlabError
from opdlab.viz import PrivilegeLens

POLICIES = ("student", "teacher", "teacher+hint", "teacher+wrong")


@pytest.fixture(scope="module")
def market():
    """(trace, diagnosis) of the shipped student's texts in the variant with secrets."""
    student, teacher, task = opdlab.load("market", secret=True)
    prompts, wrong = (
        task.prompts(8, split="test"),
        opdlab.tasks.market(secret=True, wrong=True).prompts(8, split="test"),
    )
    other = {prompt.id: prompt.hint for prompt in wrong}
    rollout = student.sample(prompts, max_new_tokens=task.max_new_tokens)
    told = {
        "teacher+hint": teacher.seeing(),
        "teacher+wrong": teacher.seeing(lambda prompt: prompt.with_context(other[prompt.id])),
    }
    trace = opdlab.score(rollout, student, teacher, **told)
    types = [kind for row in task.token_types(rollout, student.tokenizer) for kind in row]
    return trace.with_columns(type=types), privilege(
        student, teacher, task, rollout=rollout, controls=False
    )


def test_the_split_is_that_of_the_diagnosis(market):
    trace, found = market
    for sample, rows in found.tokens.groupby("sample"):
        df = PrivilegeLens(trace, sample=sample).df
        for name in ("gap", "information_teacher", "capability_bare"):
            np.testing.assert_allclose(df[name], rows[name], atol=2e-6)
    table = PrivilegeLens(trace).table
    for kind, row in found.table.iterrows():
        assert table["tokens"][kind] == row["tokens"]
        assert table["gap"][kind] == pytest.approx(row["gap"], abs=1e-5)


def test_what_nobody_can_know_is_flagged_and_what_can_be_learnt_is_not(market):
    table = PrivilegeLens(market[0], wrong="teacher+wrong").table
    assert table["leak"]["secret"] > 0.9
    assert table["leak"]["skill"] == table["leak"]["copy"] == 0
    assert table["information"]["secret"] < -2 < table["capability"]["secret"]
    assert table["capability"]["skill"] < -2 < table["information"]["skill"]
    assert abs(table["wrong"]["secret"]) > 2  # this teacher believes any hint


def test_flags_follow_what_counts_as_undecided():
    trace = made([f"t{i}".encode() for i in range(40)], POLICIES)
    lens = PrivilegeLens(trace, wrong="teacher+wrong")
    df = lens.df
    np.testing.assert_allclose(df.gap, df.information_teacher + df.capability_bare)
    np.testing.assert_allclose(df.information_wrong, df["teacher+wrong_logp"] - df.teacher_logp)
    outweighs = (df.information_teacher.abs() > df.capability_bare.abs()) & (
        df.information_teacher.abs() > 0.1
    )
    for level in (0.0, 1.0, 9.0):
        lens.undecided = level
        assert lens.df.leak.tolist() == (outweighs & (df.teacher_entropy > level)).tolist()
        assert f"{lens.df.leak.sum()} of 40 tokens are flagged" in lens.sentence
    assert outweighs.any()
    assert lens.selected == int(df.gap.abs().argmax())


def test_without_entropies_nothing_is_flagged_and_it_says_so():
    trace = made([b"a", b"b"], POLICIES)
    bare = opdlab.Trace(trace.table.drop_columns(["teacher_entropy"]), trace.meta)
    assert "T- has no entropies" in PrivilegeLens(bare).sentence
    assert not PrivilegeLens(bare).df.leak.any()


def test_a_token_that_all_rule_out_has_no_split():
    trace = made([b"a", b"b"], POLICIES).with_columns(
        teacher_logp=[-np.inf, -1.0], **{"teacher+hint_logp": [-np.inf, -2.0]}
    )
    lens = PrivilegeLens(trace)
    assert lens.df.information_teacher.isna().tolist() == [True, False]
    assert "nan" not in repr(lens)
    assert not lens.df.leak[0]


def test_plain_text_and_markup_carry_the_message(market):
    lens = PrivilegeLens(market[0], wrong="teacher+wrong", title="One")
    lines = repr(lens).splitlines()
    assert lines[0].startswith("PrivilegeLens: One, 33 tokens. Gap −")
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "gap",
        "information",
        "capability",
        "wrong hint",
    ]
    assert "<th>secret</th>" in lens.static()
    nasty = PrivilegeLens(
        made(list(map(str.encode, NASTY)), POLICIES, prompt=NASTY[0]), title=NASTY[2]
    ).static()
    assert "<img" not in nasty
    assert "<script" not in nasty


def test_what_is_not_there_is_named():
    trace = made([b"a"], ("student", "teacher"))
    with pytest.raises(
        MissingPolicy,
        match=r"no policy 'teacher\+hint'; it has student, teacher. Make it with opdlab.score",
    ):
        PrivilegeLens(trace)
    with pytest.raises(OpdlabError, match="The trace has no completion 4; it has 1"):
        PrivilegeLens(made([b"a"], POLICIES), sample=4)
