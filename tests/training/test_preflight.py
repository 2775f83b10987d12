"""Every prompt of a task is checked before the first step, under every policy's own context."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opdlab import Prompt, Task, distill, tasks
from opdlab.errors import ContextTooLong, EmptyPrompts, InvalidValue, MissingHint, OpdlabError
from opdlab.methods import SFT, SelfDistillation, SequenceKD
from opdlab.teachers import TextOnly

OPTIONS = {"steps": 2, "batch": 2, "max_new_tokens": 4, "lora": 2, "quiet": True}


def many(word: str, times: int) -> str:
    return " ".join([word] * times)


def records(count: int = 40, **at_7) -> list[dict]:
    made = [
        {"prompt": f"ana has {i}", "answer": "total 1", "hint": "sum", "id": f"r{i}"}
        for i in range(count)
    ]
    made[7] |= at_7
    return made


@pytest.fixture
def pair(make_policy):
    return make_policy(0, max_position_embeddings=32), make_policy(1, max_position_embeddings=24)


def test_a_long_prompt_is_refused_before_the_first_step(pair):
    student, teacher = pair
    task = tasks.from_records(records(prompt=many("ana", 25)), test=0)
    with pytest.raises(
        ContextTooLong,
        match=(
            r"Prompt 'r7' has 25 tokens for the policy 'teacher' and 4 more are to come, but"
            r" .*context is 24\. "
            r"Shorten the prompt, or leave such prompts out: task\.without_too_long\(teacher\)"
        ),
    ) as caught:
        distill(student, teacher, task, **OPTIONS)
    assert "-" not in str(caught.value).replace("…", "")  # no advice of a negative number
    with pytest.warns(UserWarning, match="records: 1 prompts are too long for 4 new tokens"):
        task = task.without_too_long(student, teacher, max_new_tokens=4)
    assert len(task.pool["train"]) == len({prompt.id for prompt in task.prompts(39)}) == 39
    assert distill(student, teacher, task, **OPTIONS).train().done == 2


def test_the_policy_that_reads_most_is_named(pair):
    student, _ = pair
    task = tasks.from_records(records(hint=many("sum", 40)), test=0)
    with pytest.raises(
        ContextTooLong,
        match=(
            r"'r7' has 42 tokens for the policy 'reference\+hint'.*Shorten the prompt or its hint,"
            r" or leave .*\(reference\.seeing\(\)\)"
        ),
    ):
        distill(student, None, task, method=SelfDistillation(), **OPTIONS)


def test_a_teacher_that_only_writes_is_asked_about_all_prompts(pair):
    student, teacher = pair
    task = tasks.from_records(records(prompt=many("ana", 25)), test=0)
    with pytest.raises(
        ContextTooLong,
        match=(
            r"Prompt 'r7' has 25 tokens and 4 more are to come, but LlamaForCausalLM's context"
            r" is 24"
        ),
    ):
        distill(student, TextOnly(teacher), task, method=SequenceKD(), **OPTIONS)


def test_a_missing_hint_is_found_wherever_it_is(pair):
    task = tasks.from_records(records(hint=None), test=0)
    with pytest.raises(
        MissingHint,
        match=r"Prompt 'r7' has no hint, but '.*hint' reads hints\. Give every prompt a hint=",
    ):
        distill(pair[0], None, task, method=SelfDistillation(), **OPTIONS)


def test_what_many_prompts_lack_is_counted(pair):
    task = tasks.from_records([{"prompt": f"ana {i}", "id": f"r{i}"} for i in range(9)], test=0)
    with pytest.raises(
        MissingHint,
        match=(
            r"Prompt 'r0' has no hint \(nor have 'r1', 'r2', 'r3', 'r4', …: 9 of 9 prompts\), but"
        ),
    ):
        distill(pair[0], None, task, method=SelfDistillation(), **OPTIONS)


def test_held_out_prompts_are_checked_where_they_are_evaluated(pair):
    made = records()
    task = tasks.from_records(made, test=4, max_new_tokens=4)
    task = replace(
        task, pool={**task.pool, "test": [Prompt(many("ana", 40), answer="1", id="late")]}
    )
    assert distill(*pair, task, **OPTIONS).done == 0
    with pytest.raises(
        ContextTooLong, match="Prompt 'late' has 40 tokens for the policy 'student'"
    ):
        distill(*pair, task, **OPTIONS, evaluate_every=1)


@pytest.mark.parametrize("answer", [None, "", " "])
def test_a_missing_answer_is_found_wherever_it_is(pair, answer):
    task = tasks.from_records(records(answer=answer), test=0, verify=lambda prompt, text: 1.0)
    with pytest.raises(
        OpdlabError,
        match=r"Prompt 'r7' has no answer to train on\. SFT needs an `answer` in every record",
    ):
        distill(pair[0], None, task, method=SFT(), **OPTIONS)


def test_an_answer_counts_with_its_own_length(pair):
    student, _ = pair
    fits = tasks.from_records(records(answer=many("total", 28)), test=0)  # 3 tokens, 28 and the end
    assert (
        distill(student, None, fits, method=SFT(), **OPTIONS | {"max_new_tokens": 500}).train().done
        == 2
    )
    task = tasks.from_records(records(answer=many("total", 29)), test=0)
    with pytest.raises(
        ContextTooLong,
        match=(
            r"'r7' has 3 tokens for the policy 'student' and its answer 30, .* is 32\. Shorten the"
            r" prompt or its answer"
        ),
    ):
        distill(student, None, task, method=SFT(), **OPTIONS)


def test_of_an_endless_task_the_first_prompts_are_checked(pair):
    student, teacher = pair
    draw = lambda n, seed, split: [Prompt(many("ana", 20 + seed % 10), id=f"s{seed}")] * n
    with pytest.raises(ContextTooLong, match="Prompt 's"):
        distill(student, teacher, Task("endless", draw), **OPTIONS | {"steps": 50})
    with pytest.raises(OpdlabError, match="endless does not list its prompts but draws new ones"):
        Task("endless", draw).without_too_long(student)


def test_each_row_is_measured_alone(pair):
    """The longest prompt and the longest prefix need not belong together."""
    student, _ = pair
    long, short = Prompt(many("ana", 20)), Prompt("ana")
    rollout = student.sample([long, short], max_new_tokens=8, prefixes=[[6], [6] * 20])
    assert len(rollout) == 2
    with pytest.raises(
        ContextTooLong, match=r"Prompt 1 has 1 tokens and 33 more are to come.*at most 6 new tokens"
    ):
        student.sample([long, short], max_new_tokens=8, prefixes=[[6], [6] * 25])
    with pytest.raises(
        ContextTooLong,
        match=r"Prompt 0 has 40 tokens and 1 more are to come.*Shorten the prompt\.$",
    ):
        student.sample([Prompt(many("ana", 40))], max_new_tokens=1)


def test_what_leaves_nothing_or_is_no_policy_is_refused(pair):
    student, _ = pair
    task = tasks.from_records(records(), test=4)
    assert task.without_too_long(student, max_new_tokens=4).pool == task.pool
    with pytest.raises(
        EmptyPrompts, match="No training prompt of records fits with 256 new tokens"
    ):
        task.without_too_long(student)
    for policies in ((), (TextOnly(student),), ("student",)):
        with pytest.raises(InvalidValue, match=r"without_too_long got .*Give the local policies"):
            task.without_too_long(*policies)


def test_a_hundred_thousand_prompts_are_checked_in_one_pass(pair, monkeypatch):
    """As many prompts are tokenized at once as memory allows, and policies that read the same are
    checked once.
    """
    student, _ = pair
    task = tasks.from_records([f"ana has {i}" for i in range(9000)], test=0)
    calls = []
    encode = type(student).encode_unchecked
    monkeypatch.setattr(
        type(student),
        "encode_unchecked",
        lambda self, prompts: calls.append(len(prompts)) or encode(self, prompts),
    )
    distill(student, student.frozen(), task, **OPTIONS)
    assert [count for count in calls if count > 1] == [4096, 4096, 808]
