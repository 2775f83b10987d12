"""Records in every format in which data sets come: understood, or refused with their number and
column.
"""

from __future__ import annotations

import copy
import gzip
import json
import math
import warnings
from collections import OrderedDict

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from opdlab import Policy, Prompt
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.tasks import from_records
from opdlab.tasks.records import read_prompts

ASK = {"role": "user", "content": "Hi"}
SAY = {"role": "assistant", "content": "4"}
PLAIN = Prompt("Hi", answer="4", id="0")
CHAT = Prompt(messages=(ASK,), answer="4", id="0")


@pytest.fixture(autouse=True)
def no_warnings():
    """No format that is understood warns of anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


FORMATS = {
    "prompt and answer": ([{"prompt": "Hi", "answer": "4"}], PLAIN),
    "text": ([{"text": "Hi", "answer": 4}], PLAIN),
    "texts alone": (["Hi"], Prompt("Hi", id="0")),
    "prompts": ([Prompt("Hi", id="a")], Prompt("Hi", id="a")),
    "messages that end with the answer": ([{"messages": [ASK, SAY]}], CHAT),
    "prompt messages that end with the answer": ([{"prompt": [ASK, SAY]}], CHAT),
    "prompt and completion": ([{"prompt": "Hi", "completion": "4"}], PLAIN),
    "prompt and completion, conversational": ([{"prompt": [ASK], "completion": [SAY]}], CHAT),
    "an answer as a message": ([{"prompt": [ASK], "answer": SAY}], CHAT),
    "ShareGPT": (
        [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "4"}]}],
        CHAT,
    ),
    "ShareGPT under messages": (
        [{"messages": [{"from": "human", "value": "Hi"}], "answer": "4"}],
        CHAT,
    ),
    "content in parts": (
        [
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}],
                    }
                ],
                "answer": "4",
            }
        ],
        CHAT,
    ),
    "dict of columns": ({"prompt": ["Hi"], "answer": ["4"]}, PLAIN),
    "dict of arrays": ({"prompt": np.array(["Hi"]), "answer": np.array([4])}, PLAIN),
    "DataFrame": (pd.DataFrame({"prompt": ["Hi"], "answer": [4]}), PLAIN),
    "DataFrame of chats": (pd.DataFrame({"messages": [np.array([ASK, SAY], dtype=object)]}), CHAT),
    "Arrow": (pa.table({"prompt": ["Hi"], "answer": [4]}), PLAIN),
    "data set": (Dataset.from_list([{"prompt": [ASK], "answer": "4"}]), CHAT),
    "generator": (({"prompt": "Hi", "answer": "4"} for _ in range(1)), PLAIN),
    "other mappings": ([OrderedDict(prompt="Hi", answer="4")], PLAIN),
    "hint of texts": ([{"prompt": "Hi", "hint": ["a", "b"]}], Prompt("Hi", hint="a\nb", id="0")),
    "hint of messages": (
        [{"prompt": "Hi", "hint": [{"role": "user", "content": "a"}]}],
        Prompt("Hi", hint="a", id="0"),
    ),
    "missing cells": (
        [{"prompt": "Hi", "answer": math.nan, "hint": pd.NA, "id": None}],
        Prompt("Hi", id="0"),
    ),
    "empty cells": ([{"prompt": "Hi", "answer": "", "hint": " "}], Prompt("Hi", id="0")),
    "ids that pandas made floats": ([{"prompt": "Hi", "id": 7.0}], Prompt("Hi", id="7")),
    "an answer with more digits than int() takes": (
        [{"prompt": "Hi", "answer": 10**5000}],
        Prompt("Hi", answer="1" + "0" * 5000, id="0"),
    ),
    "no answer in the first column": ([{"prompt": None, "text": "Hi", "answer": "4"}], PLAIN),
    "extra keys of messages": (
        [{"messages": [{**ASK, "name": "ana", "tool_calls": None}], "answer": "4"}],
        Prompt(messages=({**ASK, "name": "ana"},), answer="4", id="0"),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_understood(name):
    records, want = FORMATS[name]
    assert read_prompts(records) == [want]


LINES = {
    "plain": b'{"prompt": "Hi", "answer": "4"}\n',
    "byte order mark": b'\xef\xbb\xbf{"prompt": "Hi", "answer": "4"}\n',
    "CRLF": b'{"prompt": "Hi", "answer": "4"}\r\n\r\n',
    "gzip": gzip.compress(b'{"prompt": "Hi", "answer": "4"}\n'),
    "UTF-16": '{"prompt": "Hi", "answer": "4"}'.encode("utf-16"),
    "a JSON list": b'[\n  {"prompt": "Hi",\n   "answer": 4}\n]\n',
    "NaN": b'{"prompt": "Hi", "answer": "4", "hint": NaN}\n',
}


@pytest.mark.parametrize("name", LINES)
def test_a_file_is_understood(name, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(LINES[name])
    assert read_prompts(path) == read_prompts(str(path)) == [PLAIN]


def test_numbers_of_a_file_keep_their_digits(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(
        '{"prompt": "Hi", "answer": 0.12345678901234567890}\n{"prompt": "Ho", "answer": %s}\n'
        % ("9" * 5000)
    )
    assert [prompt.answer for prompt in read_prompts(path)] == [
        "0.12345678901234567890",
        "9" * 5000,
    ]


WRONG = {
    "nothing": (None, "from_records got None"),
    "a number": (7, "from_records got 7"),
    "bytes": (b"{}", "from_records got b'{}'"),
    "one record": ({"prompt": "Hi"}, "got one record, with the columns prompt. Put it into a list"),
    "one chat": ({"messages": [ASK]}, "got one record"),
    "splits": ({"train": [{"prompt": "Hi"}], "test": []}, r"keys train, test.*records\['train'\]"),
    "a DatasetDict": (
        DatasetDict(train=Dataset.from_list([{"prompt": "Hi"}])),
        r"keys train.*records\['train'\]",
    ),
    "columns of different lengths": (
        {"prompt": ["a", "b"], "answer": ["1"]},
        "different lengths: prompt 2, answer 1",
    ),
    "a list as record": ([["Hi", "4"]], r"Record 0 is \['Hi', '4'\]"),
    "no prompt": (
        [{"prompt": "a"}, {"question": "b"}],
        "Record 1 has no prompt; its columns are question",
    ),
    "an empty prompt": ([{"prompt": "   "}], "Record 0 has no prompt.*Its prompt is ' '"),
    "a prompt that is NaN": ([{"prompt": math.nan}], "Record 0 has no prompt.*nan"),
    "a prompt that is a number": (
        [{"prompt": "a"}, {"prompt": 7}],
        "Record 1, column prompt: it is 7. Use a text",
    ),
    "a prompt that is a dict": ([{"prompt": ASK}], "Record 0, column prompt: it is {"),
    "messages that are texts": (
        [{"messages": ["Hi"]}],
        r"Record 0, column messages: messages\[0\] is 'Hi'",
    ),
    "no role": ([{"messages": [{"content": "Hi"}]}], r"column messages: messages\[0\] has no role"),
    "an unknown role": (
        [{"messages": [{"role": "narrator", "content": "Hi"}]}],
        r"messages\[0\] has the role 'narrator'",
    ),
    "an unknown sender": (
        [{"conversations": [{"from": "narrator", "value": "Hi"}]}],
        r"column conversations: .*from 'narrator'",
    ),
    "no content": (
        [{"messages": [{"role": "user", "content": None}]}],
        r"messages\[0\] has no content",
    ),
    "an image": (
        [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}],
        r"\.content\[0\] is a part of type 'image'",
    ),
    "an answer alone": ([{"messages": [SAY]}], "asks nothing before its answer"),
    "an answer that is a list": (
        [{"prompt": "Hi", "answer": ["4", "5"]}],
        r"Record 0, column answer: the answer is \['4', '5'\]",
    ),
    "an answer of several messages": (
        [{"prompt": "Hi", "completion": [ASK, SAY]}],
        "column completion: 2 messages are no answer",
    ),
    "a hint that is a set": (
        [{"prompt": "Hi", "hint": {1}}],
        r"Record 0, column hint: Prompt got hint=\{1\}",
    ),
    "an id that is a list": ([{"prompt": "Hi", "id": ["a"]}], "Record 0, column id"),
    "equal ids": (
        [{"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}],
        "Records 0 and 1 have the same id '1'",
    ),
    "a lone surrogate": (
        [{"prompt": "a\ud800"}],
        r"Record 0, column prompt: text holds the lone surrogate U\+D800 at character 1",
    ),
    "a lone surrogate in a chat": (
        [{"prompt": [{"role": "user", "content": "\udcff"}]}],
        r"content holds the lone surrogate U\+DCFF",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_record_is_refused_with_its_number_and_column(name):
    records, message = WRONG[name]
    with pytest.raises(OpdlabError, match=message):
        read_prompts(records)


BAD_FILES = {
    "cut": (b'{"prompt": "a"}\n\n{"prompt": "b"', "line 3 is not a JSON object"),
    "repeated keys": (
        b'{"prompt": "a", "prompt": "b"}',
        "line 1 is not a JSON object .it has the key 'prompt' twice",
    ),
    "nested deeply": (b"[" * 100_000 + b"]" * 100_000, "line 1 is nested too deeply"),
    "no UTF-8": (b'{"prompt": "a"}\n{"prompt": "\xff"}', "line 2 is no UTF-8"),
    "gzip, cut": (gzip.compress(b'{"prompt": "a"}' * 9)[:20], "cannot be read"),
    "parquet": (b"PAR1rest", "is a parquet file.*datasets library"),
    "surrogate escape": (
        b'{"prompt": "\\ud800"}',
        "Record 0, column prompt: text holds the lone surrogate",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_with_its_line(name, tmp_path):
    content, message = BAD_FILES[name]
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    with pytest.raises(OpdlabError, match=message):
        read_prompts(path)


@pytest.mark.parametrize("path", ["nope.jsonl", ".", "a\0b", "x" * 5000, '{"prompt": "a"}'])
def test_a_path_without_file_is_refused(path):
    with pytest.raises(OpdlabError, match=r"cannot be read: .*Give the path of a JSONL file"):
        from_records(path)


def test_columns_that_nothing_reads_are_named_once():
    records = [{"prompt": f"a{i}", "answer": "1", "level": 3, "source": "x"} for i in range(4)] + [
        {"prompt": "b", "answer": "1", "note": 1}
    ]
    with pytest.warns(UserWarning, match="Nothing reads the columns level, source, note") as caught:
        from_records(records)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_an_answer_in_the_chat_beside_a_column_is_left_out_and_said():
    with pytest.warns(
        UserWarning,
        match="2 chats end with an assistant's message although there is a column for the answer",
    ):
        prompts = read_prompts(
            [{"messages": [ASK, {**SAY, "content": "it is 4"}], "answer": "4"}] * 1
            + [{"messages": [ASK, SAY], "answer": 5}]
        )
    assert [(prompt.messages, prompt.answer) for prompt in prompts] == [
        ((ASK,), "4"),
        ((ASK,), "5"),
    ]


def test_answers_for_some_records_only_are_refused():
    records = [
        {"prompt": "a", "answer": "1"},
        {"prompt": "b", "answer": None, "id": "late"},
        {"prompt": "c", "answer": "2"},
    ]
    with pytest.raises(
        InvalidValue, match=r"records: 1 of 3 records have no answer \('late'\).*verify="
    ):
        from_records(records)
    assert from_records(records, verify=lambda prompt, text: 1.0, test=0).prompts(3)


def test_a_hint_of_messages_stands_before_the_students(make_policy, words):
    turns = [{"role": "user", "content": "ana has 4"}, {"role": "assistant", "content": "total 4"}]
    chat = [{"role": "system", "content": "sum"}, {"role": "user", "content": "ben has 2"}]
    (prompt,) = read_prompts([{"prompt": chat, "hint": turns}])
    assert copy.deepcopy(prompt) == prompt
    seen = words.decode(make_policy(0).seeing().encode(copy.deepcopy(prompt)))
    assert seen == "<system> sum<user> ana has 4<assistant> total 4<eos><user> ben has 2<assistant>"
    assert prompt.hint == "ana has 4\ntotal 4"


def test_files_of_tool_calls_render(make_policy, words, tmp_path):
    """Numbers within messages are Python's own, which templates can write as JSON."""
    call = {"name": "add", "arguments": {"a": 1, "b": 0.5}}
    chat = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1.5"},
    ]
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"messages": chat}))
    (prompt,) = read_prompts(path)
    assert prompt.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert json.loads(json.dumps(prompt.messages)) == list(prompt.messages)
    tokenizer = copy.deepcopy(words)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {{ m.tool_calls | tojson if m.tool_calls }} {%"
        " endfor %}"
    )
    assert Policy.of(make_policy(0).weights.model, tokenizer).encode(prompt)
