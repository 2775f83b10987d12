"""Two turns with a tool between them, written down: gradients against finite differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opdlab import GRPO, OPD, OPDPlus, Rollout, Task, exact
from opdlab.engine.batch import return_to_go
from opdlab.exact.table import make_rollout
from opdlab.losses.divergences import reverse_kl

VOCAB = 3


def tool(token: int) -> int:
    """What the tool says to a first turn; the student could have written it too."""
    return (token + 1) % VOCAB


@pytest.fixture
def tables() -> dict[str, exact.Table]:
    shape = {"vocab": VOCAB, "length": 4, "prompts": 2}
    return {
        "student": exact.Table.random(**shape, seed=4),
        "teacher": exact.Table.random(**shape, seed=5),
    }


def conversations(table: exact.Table) -> Rollout:
    """Every conversation: one token, the tool's answer, and a second turn of two tokens."""
    bodies = [[a, tool(a), b, c] for a in range(VOCAB) for b in range(VOCAB) for c in range(VOCAB)]
    asked = [prompt for prompt in table.prompts for _ in bodies]
    rollout = make_rollout(
        asked, bodies * len(table.prompts), table.tokenizer, len(bodies), "student"
    )
    learn = torch.tensor([True, False, True, True]).expand_as(rollout.ids)
    turn = torch.tensor([0, 0, 1, 1]).expand_as(rollout.ids)
    rollout = replace(table.own(rollout), learn=learn, turn=turn)
    return replace(rollout, logp=rollout.logp * learn, entropy=rollout.entropy * learn)


def law(table: exact.Table, rollout: Rollout) -> torch.Tensor:
    """The probability of each conversation: that of the student's own tokens."""
    logp = table.logp[table.where(rollout)].gather(-1, rollout.ids[rollout.mask][:, None])[:, 0]
    return (logp.view(rollout.ids.shape) * rollout.learn).sum(1).exp()


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    assert want.norm() > 1e-2


def test_the_laws_sum_to_one(tables):
    rollout = conversations(tables["student"])
    sums = law(tables["student"], rollout).view(2, -1).sum(1)
    torch.testing.assert_close(sums, torch.ones(2, dtype=torch.float64))


def test_opd_descends_its_divergence_on_the_turns_that_the_student_reaches(tables):
    student, teacher = tables["student"], tables["teacher"]
    rollout = conversations(student)
    weight = law(student, rollout).detach()

    def value(table: exact.Table) -> torch.Tensor:
        at = table.where(rollout)
        kl = reverse_kl(table.logp[at], teacher.logp[at]).view(rollout.ids.shape)
        return (weight * (kl * rollout.learn).sum(1)).sum()

    got = exact.gradient_on(OPD(), tables, rollout, weight)
    near(got, exact.differences(value, student))


@pytest.mark.parametrize("baseline", [None, "value"])
@pytest.mark.parametrize("method", [OPD, OPDPlus])
def test_returns_descend_the_divergence_of_whole_conversations(tables, baseline, method):
    """Credit reaches the first turn from the second, past what the tool said."""
    student, teacher = tables["student"], tables["teacher"]
    rollout = conversations(student)
    theirs = law(teacher, rollout)

    def value(table: exact.Table) -> torch.Tensor:
        ours = law(table, rollout)
        return (ours * (ours / theirs).log()).sum()

    options = {"estimator": "sampled"} if method is OPD else {"divergence": "reverse_kl"}
    rule = method(discount=1.0, baseline=baseline, **options)
    got = exact.gradient_on(rule, tables, rollout, law(student, rollout).detach())
    near(got, exact.differences(value, student))


def test_a_verifier_of_the_last_turn_moves_the_first(tables):
    student = tables["student"]
    rollout = conversations(student)
    task = Task("ends with a", lambda n, seed, split: [], lambda prompt, text: text.endswith("a"))
    reward = torch.tensor(task.scores(rollout.prompts, rollout.texts), dtype=torch.float64)
    weight = law(student, rollout).detach()
    got = exact.gradient_on(GRPO(), {"student": student}, rollout, weight, task=task)
    first = exact.gradient_on(
        GRPO(),
        {"student": student},
        replace(rollout, learn=rollout.learn & (rollout.turn == 0)),
        weight,
        task=task,
    )
    assert reward.unique().numel() == 2
    assert first.norm() > 1e-3
    assert (got - first).norm() > 1e-3


def test_a_tool_token_has_no_gradient_whatever_it_is(tables):
    student = tables["student"]
    rollout = conversations(student)
    weight = law(student, rollout).detach()
    where = student.where(rollout)
    at_tool = torch.zeros_like(student.logits, dtype=torch.bool)
    is_tool = ~rollout.learned
    at_tool[where[0][is_tool], where[1][is_tool]] = True
    for method in (OPD(), OPD(estimator="sampled", discount=1.0), OPDPlus()):
        got = exact.gradient_on(method, tables, rollout, weight)
        assert (got[at_tool] == 0).all()
        assert (got[~at_tool] != 0).any()


def test_a_longer_reply_takes_no_time_in_discounted_returns():
    reward = torch.tensor([[1.0, 2.0, 3.0]])
    plain = return_to_go(reward, torch.ones(1, 3, dtype=torch.bool), 0.5)
    longer = torch.tensor([[1.0, 7.0, 7.0, 2.0, 3.0]])
    mask = torch.tensor([[True, False, False, True, True]])
    assert torch.equal(return_to_go(longer, mask, 0.5)[mask], plain[0])
    assert (return_to_go(longer, mask, 0.5)[~mask] == 0).all()
