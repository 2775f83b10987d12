"""The market world: every text is right, every label is true, hints say what they should and
nothing more.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdlab.errors import OpdlabError
from opdlab.models.text_rollouts import rollout_from_texts
from opdlab.tasks import from_records, market
from opdlab.tasks.market import model, tokenizers, world

seeds = st.integers(0, 2**32 - 1)


def problem(seed: int, secret: bool = True) -> world.Problem:
    return world.generate(random.Random(seed), secret)


@given(seeds, st.booleans())
def test_solutions_are_right_and_in_range(seed, secret):
    p = problem(seed, secret)
    amount = p.have
    for (verb, n), result in zip(p.moves, p.results(), strict=True):
        amount += n if verb in ("buys", "finds") else -n
        assert result == amount
        assert 10 <= result <= 99
    assert world.total(p.solution()) == world.total(p.compact()) == amount
    assert world.total(p.solution("sum")) == amount
    assert world.receipt(p.solution()) == (p.receipt if secret else ())


def test_an_example_by_hand():
    p = world.Problem(
        "ana", "apples", 47, (("buys", 38), ("sells", 19)), ("k", "q"), 28, "m", secret=True
    )
    assert p.prompt() == "ana has 4 7 apples buys 3 8 sells 1 9 . total and receipt ?"
    assert (
        p.solution()
        == "4 7 + 3 8 = 8 5 ; 8 5 - 1 9 = 6 6 . total 6 6 . receipt k q . pays 9 4 . lot m"
    )
    assert p.compact() == "47+38=85, so 85-19=66, total 66"
    assert world.forgetful(p) == [75, 66]
    assert p.hint("secret") == "hint receipt k q coupon 2 8"
    assert p.hint("worked") == "hint 4 7 + 3 8 = 8 5 ; 8 5 - 1 9 = 6 6"
    assert p.hint("steps") == "hint add 3 8 take 1 9"
    assert p.hint("answer") == "hint total 6 6"
    assert p.hint("style", "sum") == "hint say sum"
    with pytest.raises(ValueError, match="unknown hint kind 'all'"):
        p.hint("all")


@given(seeds)
def test_types_are_ground_truth(seed):
    p = problem(seed)
    words = p.solution().split()
    types = world.token_types(words)
    by_type = {
        kind: [w for w, t in zip(words, types, strict=True) if t == kind] for kind in world.TYPES
    }
    assert "other" not in types
    assert tuple(by_type["secret"]) == p.receipt
    assert by_type["noise"] == [p.lot]
    assert "".join(by_type["mixed"]) == str((p.results()[-1] + p.coupon) % 100).zfill(2)
    assert by_type["style"] == ["total"]
    assert "".join(by_type["derived"]) == f"{p.results()[0]}{p.results()[1]}"
    wrong = p.solution(results=world.forgetful(p)).split()
    first = next((i for i, (a, b) in enumerate(zip(words, wrong, strict=True)) if a != b), None)
    assert (
        first is None or types[first] == "skill"
    )  # forgetting to carry first shows on a skill token


def test_a_text_that_leaves_the_form_is_other_from_there():
    assert world.token_types("4 7 + 3 8 = 8 5 , 8".split())[-2:] == ["other", "other"]
    assert world.token_types([]) == []
    assert world.token_types("4 1 + 3 8 = 7 9".split())[6] == "copy"  # no carry, so no skill needed
    assert world.token_types("4 1 - 3 8 = 0 3".split())[6] == "skill"  # borrows


@given(seeds)
def test_secrets_are_independent_of_the_prompt_and_only_in_their_hint(seed):
    rng = random.Random(seed)
    p = world.generate(rng, True)
    for kind in ("answer", "steps", "worked", "style"):
        assert "receipt" not in p.hint(kind)
    assert not set(p.prompt().split()) & set(world.LETTERS)


def test_hidden_symbols_are_uniform():
    rng = random.Random(0)
    seen = [s for _ in range(4000) for s in world.generate(rng, True).receipt]
    assert all(abs(seen.count(letter) / len(seen) - 1 / 8) < 0.02 for letter in world.LETTERS)


def test_the_task_splits_do_not_meet_and_seeds_repeat():
    task = market(secret=True)
    train, test = task.prompts(300, seed=0), task.prompts(300, seed=0, split="test")
    assert task.prompts(300, seed=0) == train
    assert not {p.messages[0]["content"] for p in train} & {p.messages[0]["content"] for p in test}
    assert all(task.verify(p, p.answer) == 1.0 for p in train)
    assert task.verify(train[0], "no total here") == 0.0


def test_a_wrong_hint_is_anothers():
    right, wrong = market(secret=True).prompts(50), market(secret=True, wrong=True).prompts(50)
    assert sum(r.hint == w.hint for r, w in zip(right, wrong, strict=True)) == 0
    assert [p.hint.split()[1] for p in wrong] == ["receipt"] * 50


@pytest.mark.parametrize("tokenizer", [tokenizers.words(), tokenizers.characters()])
@given(seed=seeds)
def test_tokenizers_round_trip(tokenizer, seed):
    p = problem(seed)
    texts = [
        p.prompt(),
        p.solution(),
        p.solution("sum"),
        p.compact(),
        *(p.hint(k) for k in world.HINTS),
    ]
    for text in texts:
        if text == p.compact() and len(tokenizer) > 60:
            continue  # the word tokenizer has no word for `47+38=85`
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_the_chat_template():
    chat = [
        {"role": "system", "content": "hint say sum"},
        {"role": "user", "content": "ana has 4 7"},
    ]
    text = tokenizers.words().apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<system>hint say sum<user>ana has 4 7<assistant>"


def test_the_task_types_every_token_of_a_rollout():
    policy = model("student")
    problems = market(secret=True).prompts(4, seed=3)
    rollout = rollout_from_texts(policy, problems, [p.answer for p in problems])
    kinds = market(secret=True).token_types(rollout, policy.tokenizer)
    assert [len(row) for row in kinds] == rollout.lengths.tolist()
    assert {row[-1] for row in kinds} == {"end"}
    assert [row[:-1] for row in kinds] == [world.token_types(p.answer.split()) for p in problems]


def test_a_task_without_types_says_so():
    policy = model("student")
    problems = market().prompts(1)
    with pytest.raises(OpdlabError, match="knows no token types"):
        from_records([{"prompt": "a"}]).token_types(
            rollout_from_texts(policy, problems, ["total 1 2"]), policy.tokenizer
        )
