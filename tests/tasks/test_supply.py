"""The supply of prompts: epochs, splits that share nothing, what a user's `draw` may give, and what
a verifier may return.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opdlab import Prompt, Task
from opdlab.errors import BadVerifier, EmptyPrompts, InvalidValue, MissingPolicy, OpdlabError
from opdlab.tasks import from_prompts, from_records, market, profiles, reasoning_gym
from opdlab.tasks.epochs import EpochOrder
from opdlab.tasks.splits import question_of

PROMPTS = [Prompt(f"question {i}", answer=str(i), id=f"q{i}") for i in range(12)]


def supply(*given, **more) -> Task:
    """A task whose `draw` gives this, whatever it is asked for."""
    return Task("own", lambda n, seed, split: given[0], **more)


def drawn(task: Task, split: str, n: int) -> set[str]:
    """The questions of a few draws."""
    return {question_of(prompt) for seed in range(4) for prompt in task.prompts(n, seed, split)}


# Epochs.


@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 3))
def test_every_prompt_is_drawn_once_before_any_is_drawn_twice(count, size, seed):
    order = EpochOrder(count, size, seed)
    drawn = [i for step in range(4 * count) for i in order.batch(step)]
    for epoch in range(len(drawn) // count):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 3))
def test_no_batch_holds_a_prompt_twice_unless_it_is_larger_than_the_data(count, size, seed):
    order = EpochOrder(count, size, seed)
    for step in range(3 * count):
        most = max(Counter(order.batch(step)).values())
        assert most == 1 if size <= count else most <= -(-size // count) + 1


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 40))
def test_a_step_is_the_same_whenever_it_is_asked_for(count, size, step):
    straight = EpochOrder(count, size, 5)
    wanted = [straight.batch(i) for i in range(step + 1)][-1]
    resumed = EpochOrder(count, size, 5)
    assert resumed.batch(step) == wanted
    resumed.batch(0)
    assert resumed.batch(step) == wanted


def test_seeds_and_epochs_have_orders_of_their_own():
    first, again, other = (EpochOrder(50, 50, seed) for seed in (0, 0, 1))
    assert first.batch(0) == again.batch(0)
    assert first.batch(0) != other.batch(0)
    assert first.batch(0) != first.batch(1)


def test_records_are_trained_on_in_epochs():
    task = from_prompts(PROMPTS, test=2)
    steps = [task.training_batch(5, step, seed=3) for step in range(4)]
    assert Counter(p.id for batch in steps for p in batch) == Counter(
        {p.id: 2 for p in task.pool["train"]}
    )
    assert task.training_batch(5, 2, seed=3) == steps[2]


def test_endless_tasks_draw_fresh_prompts():
    task = market()
    questions = [question_of(p) for step in range(5) for p in task.training_batch(20, step, seed=0)]
    assert len(set(questions)) > 95
    assert task.training_batch(20, 3, seed=0) == task.training_batch(20, 3, seed=0)


# Splits.


@pytest.mark.parametrize(
    "make",
    [
        market,
        profiles.rule_task,
        lambda: reasoning_gym("chain_sum", max_terms=2, max_digits=1),
        lambda: from_prompts(PROMPTS * 3, test=4),
    ],
)
def test_no_question_is_in_both_splits(make):
    task = make()
    train, test = (drawn(task, split, n) for split, n in (("train", 150), ("test", 60)))
    assert train
    assert test
    assert not train & test


def test_the_markets_variants_share_no_problem_across_splits():
    variants = [
        market(),
        market(secret=True),
        market(secret=True, wrong=True),
        market(hint="steps"),
    ]
    problems = {}
    for split in ("train", "test"):
        problems[split] = {
            question.split(" . ")[0] for task in variants for question in drawn(task, split, 150)
        }
    train, test = problems["train"], problems["test"]
    assert not train & test


def test_the_small_profile_holds_out_what_it_does_not_train_on():
    """16 of the demo's 96 held-out prompts were trained on in its 20 steps of 16."""
    task = profiles.rule_task()
    trained = {question_of(p) for step in range(20) for p in task.training_batch(16, step, seed=0)}
    held = {question_of(p) for p in task.prompts(96, 0, "test")}
    assert len(trained) == 320
    assert len(held) == 96
    assert not trained & held


def test_a_narrow_generator_gives_the_questions_that_it_has():
    task = reasoning_gym(
        "chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1, allow_negation=False
    )
    held = task.prompts(1000, split="test")
    assert 10 < len(held) < 200
    assert len({question_of(p) for p in held}) == len(held)
    assert task.score(held[0], held[0].answer) == 1


def test_held_out_prompts_are_never_repeated_to_reach_a_number():
    task = from_records([{"prompt": f"q {i}", "answer": str(i)} for i in range(20)] * 2, test=5)
    assert len(task.prompts(200, split="test")) == 5
    again = supply([Prompt("a", id="1"), Prompt("a", id="2"), Prompt("b")])
    assert [p.id for p in again.prompts(3, split="test")] == ["1", ""]
    assert len(again.prompts(3)) == 3


def test_a_pool_with_a_question_in_both_splits_is_refused():
    with pytest.raises(
        InvalidValue, match=r"own holds out 1 prompts that it also trains on, as \"a\""
    ):
        supply([], pool={"train": [Prompt("a", id="x")], "test": [Prompt("a", id="y")]})


def test_a_question_with_several_answers_stays_in_one_split_and_any_of_them_is_right():
    records = [
        {"prompt": q, "answer": a} for q, a in (("a", "1"), ("a", "2"), ("b", "3"), ("c", "4"))
    ]
    with pytest.warns(
        UserWarning, match=r"records: 1 prompts come with several different answers .*\['1', '2'\]"
    ):
        task = from_records(records, test=0)
    assert [task.score(Prompt("a", answer="1"), text) for text in "123"] == [1, 1, 0]
    assert [task.score(Prompt("b", answer="3"), text) for text in "23"] == [0, 1]
    assert Counter(p.text for p in task.training_batch(4, 0, 0)) == {"a": 2, "b": 1, "c": 1}


@pytest.mark.parametrize("test", ["10%", -1, -0.1, 1.5, float("nan"), None, True])
def test_a_share_to_hold_out_that_cannot_be_is_refused(test):
    with pytest.raises(
        InvalidValue, match=r"got test=.*Use a whole number of at least 0, or a number from 0 to 1"
    ):
        from_prompts(PROMPTS, test=test)


def test_texts_are_no_prompts():
    with pytest.raises(OpdlabError, match="prompts got 'a' among its prompts"):
        from_prompts(["a", "b"])


# What `draw` may give.


def test_generators_are_understood_even_endless_ones():
    task = Task("own", lambda n, seed, split: (p for p in itertools.cycle(PROMPTS)))
    assert task.prompts(15) == (PROMPTS * 2)[:15]
    assert supply(tuple(PROMPTS)).prompts(12) == PROMPTS


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (None, "its draw returned None. Let it return a list"),
        ("abc", "its draw returned 'abc'"),
        (PROMPTS[0], "its draw returned Prompt"),
        ({"a": 1}, "its draw returned {'a': 1}"),
        ([], "gave none"),
        (PROMPTS, "own was asked for 4 train prompts and its draw gave 12"),
        (PROMPTS[:3], "gave 3. Let it return as many as it is asked for"),
        (["a"] * 4, "gave 'a' among them"),
        ([None] * 4, "gave None among them"),
    ],
)
def test_a_draw_that_breaks_its_contract_is_told(drawn, message):
    with pytest.raises(OpdlabError) as raised:
        supply(drawn).prompts(4)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "how",
    [
        {"n": 2.5},
        {"n": "3"},
        {"n": True},
        {"n": 1, "seed": "a"},
        {"n": 1, "seed": None},
        {"n": 1, "split": "dev"},
    ],
)
def test_asking_for_what_cannot_be_is_refused(how):
    with pytest.raises(InvalidValue, match="market got"):
        market().prompts(**how)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"draw": 7}, "got draw=7, which cannot be called. Use a function draw(n, seed, split)"),
        (
            {"draw": lambda n: []},
            (
                "got a draw that takes (n): too many positional arguments. Use a function draw(n,"
                " seed, split)"
            ),
        ),
        ({"verify": 7}, "got verify=7, which cannot be called"),
        ({"verify": lambda text: 1.0}, "Use a function verify(prompt, text)"),
        ({"verify": lambda prompt, text, third: 1.0}, "missing a required argument: 'third'"),
        ({"max_new_tokens": 0}, "got max_new_tokens=0"),
        ({"max_new_tokens": 1.5}, "got max_new_tokens=1.5"),
        ({"name": None}, "got name=None"),
    ],
)
def test_a_task_is_checked_when_it_is_made(wrong, message):
    with pytest.raises(InvalidValue) as raised:
        replace(market(), **wrong)
    assert message in str(raised.value)


def test_names_that_do_not_exist_are_refused_when_the_task_is_made():
    with pytest.raises(InvalidValue, match=r"market got hint='nope'\. Use one of secret, answer"):
        market(hint="nope")
    with pytest.raises(InvalidValue, match=r"market got secret='yes'"):
        market(secret="yes")
    with pytest.raises(
        InvalidValue, match=r"no dataset 'chain_sums'\. Use one of its \d+ names, as .*chain_sum"
    ):
        reasoning_gym("chain_sums")
    with pytest.raises(InvalidValue, match="refuses the configuration"):
        reasoning_gym("chain_sum", depth=3)


# What a verifier may return.


class ByLength:
    """A verifier that is an object with a bound method."""

    def judge(self, prompt, text, least=3):
        return len(text) >= least


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (True, 1),
        (False, 0),
        (1, 1),
        (0.25, 0.25),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1),
        (np.int64(0), 0),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor(True), 1),
        (np.array(0.5), 0.5),
    ],
)
def test_numbers_from_0_to_1_are_scores(value, score):
    got = supply([], verify=lambda prompt, text: value).score(PROMPTS[0], "x")
    assert (type(got), got) == (float, score)


def test_a_verifier_may_be_any_callable_that_takes_a_prompt_and_a_text():
    assert supply([], verify=ByLength().judge).score(PROMPTS[0], "abc") == 1


NO_SCORES = [
    None,
    "yes",
    "0.5",
    (1, 2),
    {"score": 1},
    [1.0],
    float("nan"),
    float("inf"),
    7,
    -1,
    1.0001,
    10**400,
    1j,
    object(),
]
NO_SCORES += [torch.ones(2), torch.ones(1), np.ones(2), np.float64("nan")]


@pytest.mark.parametrize("value", NO_SCORES)
def test_anything_else_is_refused_with_the_prompt_and_the_value(value):
    task = supply([], verify=lambda prompt, text: value)
    with pytest.raises(
        BadVerifier,
        match=r"(?s)verifier of own returned .* for prompt 'q0'\. Return one number from 0 to 1",
    ):
        task.score(PROMPTS[0], "x")


def test_a_verifier_that_fails_is_told_with_its_prompt_and_its_error_is_the_cause():
    with pytest.raises(
        BadVerifier,
        match=r"failed on prompt 'q0' with the text 'x': ZeroDivisionError: division by zero",
    ) as raised:
        supply([], verify=lambda prompt, text: 1 / 0).score(PROMPTS[0], "x")
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_without_a_verifier_nothing_is_scored():
    with pytest.raises(MissingPolicy, match="own has no verifier"):
        supply([]).score(PROMPTS[0], "x")


def test_no_prompts_to_hold_out_are_told():
    with pytest.raises(EmptyPrompts, match="keeps no prompts for testing"):
        from_prompts(PROMPTS, test=0).prompts(3, split="test")
