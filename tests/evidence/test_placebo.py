"""Placebos keep the form of a signal: grades of other texts, signs alone, other hints."""

from __future__ import annotations

import pytest
import torch

from opdlab import OPD, exact
from opdlab.data.prompt import Prompt
from opdlab.engine.batch import Batch
from opdlab.errors import InvalidValue, PartialDistribution
from opdlab.evidence.placebo import (
    OwnTexts,
    ShuffledTeacher,
    SignOnly,
    exchange,
    exchange_hints,
    with_other_hints,
)
from opdlab.evidence.rules import RULES, TopTokens
from opdlab.exact import Table
from opdlab.models.graded import TopLogprobs
from opdlab.tasks.market import market


def pair() -> tuple[Table, Table]:
    student = Table.random(4, 3, 2, seed=1, eos=3)
    return student, Table.random(4, 3, student.prompts, seed=2, eos=3)


def both(student: Table, teacher: Table) -> dict[str, Table]:
    return {"student": student, "teacher": teacher}


def test_each_token_gets_the_grade_of_another_text_at_the_same_place():
    student, teacher = pair()
    rollout = student.sample(student.prompts, 8, seed=4)
    order = exchange(rollout)
    b, t = rollout.mask.nonzero().T
    assert order.sort().values.tolist() != order.tolist()
    crowded = torch.tensor([int(rollout.mask[:, i].sum()) > 1 for i in t.tolist()])
    assert (b[order] != b)[crowded].all()
    assert (t[order] == t)[crowded].all()
    assert (order != torch.arange(len(order))).all()
    shuffled = ShuffledTeacher(teacher).grade(rollout)
    torch.testing.assert_close(shuffled.logp(), teacher.grade(rollout).logp()[order])
    assert exchange(rollout).tolist() == order.tolist()


def test_a_single_text_of_a_single_token_keeps_its_grade():
    student, _ = pair()
    rollout = student.sample(student.prompts[:1], seed=0, max_new_tokens=1)
    assert exchange(rollout).tolist() == [0]


def test_some_log_probs_cannot_be_shuffled():
    class Server:
        def grade(self, rollout):
            n = rollout.tokens
            some = torch.zeros(n, 2, dtype=torch.long), torch.zeros(n, 2), torch.zeros(n)
            return TopLogprobs(*some, torch.zeros(n, dtype=torch.long), 4)

    student, _ = pair()
    with pytest.raises(PartialDistribution, match="shuffled"):
        ShuffledTeacher(Server()).grade(student.sample(student.prompts, seed=0))


def test_signs_are_those_of_the_log_ratio():
    student, teacher = pair()
    batch = Batch(
        student.sample(student.prompts, 6, seed=1), {"student": student, "teacher": teacher}
    )
    advantage = SignOnly().plan(batch)["advantage"].values[batch.mask]
    logs = [table.grade(batch.rollout).logp() for table in (student, teacher)]
    at = [logp.gather(-1, batch.token[:, None])[:, 0] for logp in logs]
    torch.testing.assert_close(advantage, (at[1] - at[0]).sign().to(advantage))


def test_own_texts_have_no_expected_gradient():
    student, _ = pair()
    assert exact.gradient(OwnTexts(), {"student": student}).abs().max() < 1e-12


def test_hints_are_exchanged_and_answers_stay():
    task = market(hint="worked")
    plain, other = task.prompts(6, seed=1), with_other_hints(task).prompts(6, seed=1)
    assert [p.messages for p in plain] == [p.messages for p in other]
    assert [p.answer for p in plain] == [p.answer for p in other]
    assert all(a.hint != b.hint for a, b in zip(plain, other, strict=True))
    same = [Prompt("a", hint="1"), Prompt("a", hint="2"), Prompt("b", hint="3")]
    assert [p.hint for p in exchange_hints(same)] == ["3", "3", "1"]
    assert exchange_hints(same[:1])[0].hint == "1"


def test_a_rule_trains_its_tokens_alone():
    student, teacher = pair()
    batch = Batch(
        student.sample(student.prompts, 9, seed=1), {"student": student, "teacher": teacher}
    )
    score = RULES["reverse_kl"](batch)[batch.mask]
    chosen = TopTokens("reverse_kl", 0.25).plan(batch)["chosen"].values[batch.mask] == 1
    assert int(chosen.sum()) == int(0.25 * len(score))
    assert score[chosen].min() >= score[~chosen].max()
    whole = exact.gradient(TopTokens(share=1.0), {"student": student, "teacher": teacher})
    want = exact.gradient(OPD(), {"student": student, "teacher": teacher})
    torch.testing.assert_close(whole, want)
    with pytest.raises(InvalidValue, match="no rule"):
        TopTokens("best")


def test_tip_is_a_soft_or_of_entropy_and_divergence():
    student, teacher = pair()
    batch = Batch(
        student.sample(student.prompts, 9, seed=1), {"student": student, "teacher": teacher}
    )
    entropy, kl = (RULES[name](batch)[batch.mask] for name in ("entropy", "reverse_kl"))
    h, d = entropy / entropy.max(), kl / kl.max()
    torch.testing.assert_close(RULES["tip"](batch)[batch.mask], 1 - (1 - h) * (1 - d))
