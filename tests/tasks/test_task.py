"""Tasks from records: every source, both splits, and what bad records get."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from opdlab import Prompt
from opdlab.errors import EmptyPrompts, OpdlabError
from opdlab.tasks import from_records
from opdlab.tasks.task import same_answer

RECORDS = [
    {"prompt": f"What is {i} plus 1?", "answer": i + 1, "hint": f"count on from {i}", "id": f"q{i}"}
    for i in range(20)
]


@pytest.fixture(params=["list", "generator", "jsonl", "dataset"])
def source(request, tmp_path):
    """The same records as a list, a generator, a file and a data set."""
    path = tmp_path / "records.jsonl"
    path.write_text("\n\n".join(json.dumps(r) for r in RECORDS) + "\n", encoding="utf-8")
    return {
        "list": RECORDS,
        "generator": (r for r in RECORDS),
        "jsonl": str(path),
        "dataset": Dataset.from_list(RECORDS),
    }[request.param]


def test_every_source_gives_the_same_task(source):
    task, want = from_records(source, test=5), from_records(RECORDS, test=5)
    assert task.prompts(15) == want.prompts(15)
    assert task.prompts(5, split="test") == want.prompts(5, split="test")
    first = next(p for p in task.prompts(15) if p.id == "q3")
    assert first == Prompt("What is 3 plus 1?", answer="4", hint="count on from 3", id="q3")


def test_splits_share_no_prompt_and_lose_none():
    task = from_records(RECORDS, test=0.25)
    train, test = (
        {p.id for p in task.prompts(n, split=split)} for n, split in ((15, "train"), (5, "test"))
    )
    assert (len(train), len(test)) == (15, 5)
    assert not train & test


def test_a_repeated_prompt_is_never_in_both_splits():
    task = from_records([*RECORDS, *[{**r, "id": f"again {r['id']}"} for r in RECORDS]], test=10)
    train, test = ({p.text for p in task.prompts(60, split=split)} for split in ("train", "test"))
    assert len(test) > 5
    assert not train & test


def test_seeds_and_rounds():
    task = from_records(RECORDS, test=5)
    assert task.prompts(4, seed=1) == task.prompts(4, seed=1)
    assert task.prompts(8, seed=1)[:4] == task.prompts(4, seed=1)
    assert task.prompts(15, seed=1) != task.prompts(15, seed=2)
    many = [p.id for p in task.prompts(40)]
    assert all(2 <= many.count(i) <= 3 for i in set(many))  # every prompt before any a third time
    assert len(set(many)) == 15


def test_chats():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    for name in ("prompt", "messages"):
        for records in ([{name: chat}] * 2, Dataset.from_list([{name: chat}] * 2)):
            assert from_records(records, test=0).prompts(1)[0].messages == tuple(chat)


def test_lines_end_only_at_newlines(tmp_path):
    """JSON may hold U+2028 and U+0085 as they are."""
    text = "a\u2028b\u0085c"
    path = tmp_path / "r.jsonl"
    path.write_text(
        "\r\n".join(json.dumps({"text": f"{text}{i}"}, ensure_ascii=False) for i in range(3)),
        encoding="utf-8",
    )
    assert {p.text for p in from_records(path, test=0).prompts(3)} == {
        f"{text}{i}" for i in range(3)
    }


def test_what_verifies():
    assert from_records(RECORDS).verify is same_answer
    assert from_records([{"text": "a"}] * 2, test=0).verify is None
    own = lambda prompt, text: 0.5
    assert from_records(RECORDS, verify=own).verify is own


# Bad input.


@pytest.mark.parametrize("line", ['{"prompt": "a"', "[1, 2]", "3", "null", '"text"'])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "r.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(
        OpdlabError, match=r"r\.jsonl line 3 is not a JSON object .*one object a line"
    ):
        from_records(path)


def test_a_record_without_prompt_is_named():
    with pytest.raises(
        OpdlabError, match="Record 1 has no prompt; its columns are question, answer"
    ):
        from_records([{"prompt": "a"}, {"question": "b", "answer": "c"}])


@pytest.mark.parametrize(
    ("records", "test"), [([], 0), ([], 0.1), (RECORDS, 20), (RECORDS[:1], 1.0)]
)
def test_no_prompts_to_train_on_are_refused(records, test):
    with pytest.raises(EmptyPrompts, match=r"records has \d+ prompts and \d+ are kept for testing"):
        from_records(records, test=test)


def test_no_prompts_for_testing_are_refused():
    with pytest.raises(EmptyPrompts, match="keeps no prompts for testing"):
        from_records(RECORDS, test=0).prompts(1, split="test")


def test_less_than_one_prompt_is_refused():
    with pytest.raises(EmptyPrompts, match="Asked sums for 0 prompts"):
        from_records(RECORDS, name="sums").prompts(0)
