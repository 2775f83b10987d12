"""Tasks of reasoning-gym, judged by its own verifier."""

from __future__ import annotations

import sys

import pytest

from opdlab import evaluate
from opdlab.errors import OpdlabError
from opdlab.tasks import reasoning_gym

gym = pytest.importorskip("reasoning_gym")


def test_chain_sum_is_scored_by_its_own_verifier():
    task = reasoning_gym("chain_sum", min_terms=2, max_terms=3)
    for prompt in task.prompts(5, seed=3) + task.prompts(5, seed=3, split="test"):
        (message,) = prompt.messages
        assert message["role"] == "user"
        total = eval(message["content"].split(":")[1].strip(" =.\n"), {"__builtins__": {}})  # noqa: S307
        assert prompt.answer == str(total)
        assert task.verify(prompt, f" {prompt.answer}\n") == 1
        assert task.verify(prompt, str(total + 1)) < 0.5
        assert task.verify(prompt, "") == 0


def test_scores_equal_the_packages():
    task = reasoning_gym("chain_sum", chat=False)
    entry = gym.create_dataset("chain_sum", size=1, seed=0)
    for prompt in task.prompts(3):
        for text in (prompt.answer, f"The sum is {prompt.answer}.", "12"):
            own = entry.score_answer(answer=text, entry={"answer": prompt.answer, "metadata": {}})
            assert task.verify(prompt, text) == own


def test_seeds_repeat_and_splits_differ():
    task = reasoning_gym("chain_sum", min_digits=4, max_digits=4)
    asked = lambda **how: [p.messages[0]["content"] for p in task.prompts(50, **how)]
    assert asked(seed=1) == asked(seed=1)
    assert (
        reasoning_gym("chain_sum", min_digits=4, max_digits=4).prompts(3)[2] == task.prompts(3)[2]
    )
    everything = [*asked(), *asked(seed=1), *asked(split="test"), *asked(seed=1, split="test")]
    assert len(set(everything)) == 200


def test_plain_text():
    assert (
        reasoning_gym("chain_sum", chat=False)
        .prompts(1)[0]
        .text.startswith("State the final answer")
    )


def test_a_policy_can_be_evaluated(student):
    got = evaluate(student, reasoning_gym("chain_sum", max_new_tokens=3), n=4)
    assert got.accuracy < 0.5
    assert got.key[0] == "chain_sum"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(OpdlabError, match=r"not installed\. Install it: pip install"):
        reasoning_gym("chain_sum")
