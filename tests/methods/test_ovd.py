"""OVD: scores in words are read exactly or not at all, and are otherwise GRPO's rewards."""

from __future__ import annotations

import pytest
import torch
from plans import plan_values

import opdlab
from opdlab import GRPO, OVD, Prompt
from opdlab.engine.batch import Batch
from opdlab.errors import OpdlabError
from opdlab.methods.ovd import question
from opdlab.tasks import Task, from_records
from opdlab.teachers import TextOnly


class Grader:
    """A teacher that grades by the book: `says` a reply to each question."""

    def __init__(self, says) -> None:
        self.says, self.asked = says, []

    def write(self, prompts, n=1, *, prefixes=None, max_new_tokens=64, temperature=1.0, seed=0):
        self.asked += prompts
        return [[self.says(p, i) for i in range(n)] for p in prompts]


def words(text: str) -> float:
    return min(len(text.split()), 9) / 9


@pytest.fixture(scope="module")
def rollout(student, prompts):
    return student.sample(prompts[:3], n=4, max_new_tokens=8, seed=2)


def plan(method, student, rollout, grader):
    batch = Batch(rollout, {"student": student, "teacher.text": grader})
    return batch, plan_values(method, batch)


def scored(rollout, replies: list[str]) -> Grader:
    """Gives the replies in the order of the questions."""
    left = iter(replies)
    return Grader(lambda prompt, i: next(left))


def test_scores_are_grpos_rewards(student, rollout):
    """The same advantages as GRPO's on a verifier that counts words up to nine."""
    grader = Grader(lambda prompt, i: f"Score: {min(len(prompt.id.split()), 9)}/9.")
    method = OVD(ask=lambda prompt, text: Prompt("how good?", id=text))
    _, got = plan(method, student, rollout, grader)
    task = Task("count", lambda n, seed, split: [], lambda prompt, text: words(text))
    want = plan_values(GRPO(), Batch(rollout, {"student": student}, task))
    torch.testing.assert_close(got["advantage"], want["advantage"], rtol=1e-5, atol=1e-5)
    assert got["advantage"].abs().max() > 0.1
    assert got["sampler_logp"] is want["sampler_logp"]


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("7", 7),
        ("Score: 8.", 8),
        ("I give it 9/9", 9),
        ("(0)", 0),
        ("it is 3, not 5", 3),
        ("10", -1),
        ("8.5", -1),
        ("four", -1),
        ("", -1),
        ("B2", -1),
        ("1st try: 6", 6),
        ("-4-", 4),
        ("0.7 or 7", 7),
    ],
)
def test_which_number_is_the_score(reply, score, student, rollout):
    _, got = plan(OVD(), student, rollout, scored(rollout, [reply, "5", *["1"] * 10]))
    assert got["score"][:2].tolist() == [score, 5]


def test_answers_without_a_score_are_left_out_of_the_mean_and_of_training(student, rollout):
    replies = ["9", "none", "3", "no", "what", "what", "what", "what", "9", "why", "why", "why"]
    _, got = plan(OVD(), student, rollout, scored(rollout, replies))
    unit = (1 / 3) / ((2 / 9) ** 0.5 + 1e-4)  # 1 and 1/3 lie 1/3 from their mean
    assert got["advantage"].tolist() == pytest.approx([unit, 0, -unit, 0, *[0] * 8])
    assert got["score"].tolist() == [9, -1, 3, -1, -1, -1, -1, -1, 9, -1, -1, -1]


def test_ballots_are_averaged(student, rollout):
    batch, got = plan(
        OVD(ballots=3), student, rollout, Grader(lambda prompt, i: ("2", "no idea", "9")[i])
    )
    assert got["score"].tolist() == [5.5] * 12
    assert batch.notes["replies"][0] == ["2", "no idea", "9"]


def test_a_batch_without_scores_or_replies_is_an_error(student, rollout):
    with pytest.raises(
        OpdlabError,
        match=(
            r"No reply names a score from 0 to 9, as 'fine'\. Give OVD\(ask=…\) a clearer question"
        ),
    ):
        plan(OVD(), student, rollout, Grader(lambda prompt, i: "fine"))

    class Lazy(Grader):
        def write(self, prompts, n=1, **options):
            return super().write(prompts, n - 1, **options)

    with pytest.raises(OpdlabError, match="did not give 2 replies to each of 12 questions"):
        plan(OVD(ballots=2), student, rollout, Lazy(lambda prompt, i: "5"))
    with pytest.raises(OpdlabError, match=r"one sample per prompt\. Use n=4 or more"):
        plan(
            OVD(),
            student,
            student.sample([Prompt("ana")], max_new_tokens=2),
            Grader(lambda prompt, i: "5"),
        )


def test_the_question_holds_prompt_and_answer(prompts):
    for prompt in (prompts[0], prompts[2]):
        (message,) = question(prompt, "4 7").messages
        assert (prompt.text or "cleo has 2 pears buys 3") in message["content"]
        assert "4 7" in message["content"]
        assert "9" not in str(question(prompt, "4 7").hint), "hints stay with whoever may see them"


def test_in_a_run(make_policy, prompts):
    """A grader that likes long texts; a text-only model that names no score stops the run before
    its first update.
    """
    task = from_records(
        [{"text": p.text, "id": p.id} for p in prompts if p.text], test=0, max_new_tokens=6
    )
    student, grader = (
        make_policy(0),
        Grader(lambda prompt, i: str(len(prompt.messages[0]["content"]) % 10)),
    )
    step = next(
        opdlab.distill(student, grader, task, method=OVD(), steps=1, batch=2, n=4, quiet=True)
    )
    assert {"advantage", "score"} <= set(step.plan)
    assert len(grader.asked) == 8
    run = opdlab.distill(
        make_policy(0),
        TextOnly(make_policy(1)),
        task,
        method=OVD(max_new_tokens=1, ask=lambda p, t: p),
        batch=2,
        n=2,
        quiet=True,
    )
    with pytest.raises(OpdlabError, match="No reply names a score"):
        next(run)
    assert run.done == 0
