"""The effect of a token: exact by a second way of computing it, and sampled within its interval."""

from __future__ import annotations

import numpy as np
import pytest

import opdlab as opd
from opdlab.errors import InvalidValue, MissingPolicy
from opdlab.evidence.credit import auroc
from opdlab.exact import Table
from opdlab.exact.letters import Letters
from opdlab.tasks import Task

VOCAB, LENGTH = 3, 4


def tables(eos: int | None = None) -> tuple[Table, Table, Task]:
    student = Table.random(VOCAB, LENGTH, 2, seed=1, eos=eos)
    teacher = Table.random(VOCAB, LENGTH, student.prompts, seed=2, eos=eos)
    right = lambda prompt, text: float(text.count("b") >= 2 and text[-1:] != "a")
    task = Task("letters", lambda n, seed, split: list(student.prompts)[:n], right, LENGTH)
    return student, teacher, task


def value(table: Table, place: int, prefix: tuple[int, ...], task: Task) -> float:
    """V by recursion over the next token, which `exact_values` does not do."""
    if len(prefix) == LENGTH or (table.eos is not None and table.eos in prefix):
        text = Letters(VOCAB, table.eos).decode(prefix, skip_special_tokens=True)
        return task.score(table.prompts[place], text)
    chances = table.logp[place, table.start(prefix)].exp().tolist()
    return sum(c * value(table, place, (*prefix, i), task) for i, c in enumerate(chances))


@pytest.mark.parametrize("eos", [None, 2])
def test_exact_effects_are_differences_of_values_found_by_recursion(eos):
    student, teacher, task = tables(eos)
    rollout = student.sample(student.prompts, 3, seed=5)
    found = opd.credit(rollout, student, teacher, task, rules=[])
    assert found.n == 0
    for row in found.df.to_dict("records"):
        body = tuple(rollout.completions()[row["sample"]])
        place = row["sample"] // 3
        t = row["position"]
        before, after = (value(student, place, body[: t + i], task) for i in (0, 1))
        assert (row["before"], row["after"]) == pytest.approx((before, after))
        assert row["effect"] == row["low"] == row["high"] == pytest.approx(after - before)
        theirs = [value(teacher, place, body[: t + i], task) for i in (0, 1)]
        assert row["teacher_effect"] == pytest.approx(theirs[1] - theirs[0])
        assert row["rescue"] == pytest.approx(theirs[0] - before)


def test_the_effects_of_a_text_add_up_to_its_outcome_less_the_chance_of_the_prompt():
    student, _, task = tables()
    rollout = student.sample(student.prompts, 4, seed=3)
    table = opd.credit(rollout, student, None, task, rules=[]).df
    scores = task.scores(rollout.prompts, rollout.texts)
    for sample, part in table.groupby("sample"):
        start = part["before"].iloc[0]
        assert part["effect"].sum() == pytest.approx(scores[sample] - start)


class Sampling:
    """A table that hides that it is one, so that its values are sampled."""

    def __init__(self, table: Table) -> None:
        self.table, self.tokenizer, self.sample = table, table.tokenizer, table.sample


def test_sampled_effects_lie_within_their_intervals_in_at_least_90_of_100_cases():
    student, teacher, task = tables()
    rollout = student.sample(student.prompts, 12, seed=8)
    exact = opd.credit(rollout, student, teacher, task, rules=[]).df
    hidden = (Sampling(student), Sampling(teacher))
    sampled = opd.credit(rollout, *hidden, task, n=40, rules=[], quiet=True).df
    for name, low, high in (
        ("effect", "low", "high"),
        ("teacher_effect", "teacher_effect_low", "teacher_effect_high"),
    ):
        inside = (sampled[low] - 1e-9 <= exact[name]) & (exact[name] <= sampled[high] + 1e-9)
        assert inside.mean() > 0.9
        assert np.abs(sampled[name] - exact[name]).mean() < 0.1
    last = sampled.groupby("sample").tail(1)
    assert set(last["after"]) <= {0.0, 1.0}  # what has ended is known


def test_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    score, wanted = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in score[wanted] for b in score[~wanted]]
    assert auroc(score, wanted) == pytest.approx(np.mean(pairs))
    assert np.isnan(auroc(score, np.zeros(40, bool)))


def test_a_rule_that_knows_the_truth_ranks_first():
    student, teacher, task = tables()
    rollout = student.sample(student.prompts, 10, seed=2)
    found = opd.credit(rollout, student, teacher, task)
    found.scores["truth"] = np.abs(found.df["effect"].to_numpy())
    found = opd.Credit(
        rollout, found.values, found.scores, found.tokens, found.types, found.n, found.least
    )
    ranking = found.ranking()
    assert ranking["rule"][0] == "truth"
    assert ranking["auroc"][0] == 1.0
    assert (ranking["low"] <= ranking["auroc"]).all()
    assert (ranking["auroc"] <= ranking["high"]).all()
    assert {"entropy", "lowest", "tip", "gap", "reverse_kl", "random"} <= set(ranking["rule"])
    assert (ranking["prompts"] == 2).all()
    assert "2 prompts" in repr(found)
    assert found.ranking("harms")["tokens"][0] < ranking["tokens"][0]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"task": None}, MissingPolicy, "verifier"),
        ({"texts": 3}, InvalidValue, "Give a rollout"),
        ({"teacher": 3}, MissingPolicy, "cannot write on"),
        ({"rules": ["best"]}, InvalidValue, "no rule 'best'"),
        ({"prompts": []}, InvalidValue, "beside a rollout"),
        ({"n": 0}, InvalidValue, "n"),
    ],
)
def test_what_cannot_be_forked_is_refused(change, error, match):
    student, teacher, task = tables()
    given = {
        "texts": student.sample(student.prompts, seed=1),
        "student": student,
        "teacher": teacher,
        "task": task,
    }
    with pytest.raises(error, match=match):
        opd.credit(**given | change)


def test_nothing_to_rank_is_said():
    student, _, task = tables()
    rollout = student.sample(student.prompts, 2, seed=1)
    found = opd.credit(rollout, student, None, task, least=1.1)
    with pytest.raises(InvalidValue, match="nothing to rank"):
        found.ranking()
    with pytest.raises(InvalidValue, match="truth='skill'"):
        found.ranking("skill")
