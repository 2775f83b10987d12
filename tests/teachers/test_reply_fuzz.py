"""Replies of any kind through all readers: each is read by the rules or refused with a `Fault`.

A reply is a good one with parts replaced, left out, doubled or exchanged, or with damaged bytes.
Half a minute in `make test`; `make stress` goes on for `OPDLAB_STRESS` minutes.
"""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stress import for_minutes

from opdlab.teachers import asking, grades
from opdlab.teachers.greeting import read_name
from opdlab.teachers.redaction import plain, without_key
from opdlab.teachers.reply import DEEPEST, Fault, raise_error_of, read_reply

KEY = "sk-opdlab-3141592653589793"
IDS, VOCAB, K = [3, 1, 4, 1], 8, 2
NAMES = grades.Names(tuple("abcdefgh"), {c: (i,) for i, c in enumerate("abcdefgh")})
FUZZ = settings(
    max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**18), 10**18),
    st.sampled_from([10**400, -(10**400), 0, -1, 1, 8, 2**63, -9999]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["stop", "length", "abort", "a", "token_id:3", "token_id:", "3", "03", "²", KEY]
    ),
    st.sampled_from(["\ud800", "\0", "\x1b[2J", "\u202e", "x" * 5000]),
)
NAMED = st.text(max_size=6) | st.sampled_from(["text", "error", "1"])
JSONS = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=6) | st.sampled_from(["text", "error", "1"]), inner, max_size=4
        )
    ),
    max_leaves=10,
)


def good() -> dict[str, Any]:
    """A reply in which every reader finds what it looks for."""
    own = [{str(i): {"logprob": -0.7, "rank": 1, "decoded_token": NAMES.strings[i]}} for i in IDS]
    graded = [None, *({**entry, "7": {"logprob": -1.5}} for entry in own[1:])]
    return {
        "model": "m",
        "usage": {"prompt_tokens": 4, "completion_tokens": 2},
        "choices": [
            {
                "text": "some text",
                "finish_reason": "stop",
                "prompt_logprobs": graded,
                "logprobs": {
                    "tokens": [NAMES.strings[i] for i in IDS],
                    "token_logprobs": [None, -0.7, -0.7, -0.7],
                    "top_logprobs": [None, *({NAMES.strings[i]: -0.7, "h": -1.5} for i in IDS[1:])],
                },
            }
        ],
    }


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values within a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for name, one in inner:
        found.append((*path, name))
        if isinstance(one, (dict, list)):
            found += places(one, (*path, name))
    return found


@st.composite
def replies(draw: Any) -> bytes:
    """Bytes of a reply that went wrong in one to four ways."""
    reply = good()
    for _ in range(draw(st.integers(1, 4))):
        known = places(reply)
        if not known:
            break
        *path, last = draw(st.sampled_from(known))
        holder = reply
        for name in path:
            holder = holder[name]
        way = draw(st.integers(0, 4))
        if way == 0:
            del holder[last]
        elif way == 1 and isinstance(holder, list):
            holder.insert(last, copy.deepcopy(holder[last]))
        elif way == 2:
            other = draw(st.sampled_from(known))
            found: Any = reply
            for name in other:
                found = (
                    found[name]
                    if not isinstance(found, (list, dict))
                    or name in (found if isinstance(found, dict) else range(len(found)))
                    else None
                )
                if found is None:
                    break
            holder[last] = copy.deepcopy(found)
        elif way == 3 and isinstance(holder, dict):
            holder[draw(st.text(max_size=4))] = holder.pop(last)
        else:
            holder[last] = draw(JSONS)
    raw = json.dumps(reply).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(raw) - 1))
        raw = raw[:at] + draw(st.binary(max_size=4)) + raw[at + draw(st.integers(0, 3)) :]
    return raw


def read_everything(raw: bytes) -> list[str]:
    """Let all readers read a reply, and check what they make of it."""
    faults = []

    def attempt(read: Any) -> None:
        try:
            read()
        except Fault as fault:
            faults.append(str(fault))

    try:
        reply = read_reply(raw)
    except Fault as fault:
        return [str(fault)]
    choice = (reply.get("choices") or [None])[0] if isinstance(reply.get("choices"), list) else None
    attempt(lambda: raise_error_of(reply))
    attempt(lambda: asking.check_no_error(choice))
    attempt(lambda: read_name(reply, None, lambda text: without_key(text, KEY)))
    attempt(lambda: check_texts(asking.read_choices(reply, 8)))
    for way in ("prompt_logprobs", "echo"):
        if isinstance(choice, dict):
            attempt(lambda way=way: check_grades(choice, way))
    return faults


def check_texts(texts: list[dict[str, Any]]) -> None:
    for text in texts:
        text["text"].encode()
        assert text["finish"] in ("stop", "length")
        assert len(text["text"]) <= 8 * asking.LONGEST_TOKEN


def check_grades(choice: dict[str, Any], way: str) -> None:
    entries = grades.read_logprobs(choice, IDS, way, NAMES)
    ids, top, sampled = grades.make_table(entries, IDS[1:], K, VOCAB)
    names = grades.read_names(choice, IDS, way)
    assert ids.shape == top.shape == (3, K)
    assert sampled.shape == (3,)
    assert len(names) == 3
    assert bool(((ids >= 0) & (ids < VOCAB)).all())
    for table in (top, sampled):
        assert bool(torch.isfinite(table).all())
        assert bool((table <= 0).all())
    assert bool((top.exp().sum(-1) <= 1 + 2 * grades.SLACK).all())
    assert all(name is None or isinstance(name, str) for name in names)
    assert all(math.isfinite(value) for entry in entries for value in entry.values())


def test_a_good_reply_passes_all_readers():
    assert read_everything(json.dumps(good()).encode()) == []


@given(replies())
@FUZZ
def fuzz_replies(raw: bytes) -> None:
    for said in read_everything(raw):
        assert len(said) < 2000
        assert said.isprintable()


@given(st.binary(max_size=200))
@FUZZ
def fuzz_bytes(raw: bytes) -> None:
    read_everything(raw)


@given(st.text(max_size=60), st.integers(0, 14), st.integers(8, 26), st.text(max_size=60))
@FUZZ
def fuzz_redaction(before: str, start: int, length: int, after: str) -> None:
    """A piece of the key is hidden in any surroundings, and what is printed is printable."""
    piece = KEY[start : start + length]
    said = plain(before + piece + after, KEY)
    assert said.isprintable()
    if len(piece) >= 8:
        assert piece not in without_key(before + piece + after, KEY)


@pytest.mark.parametrize("check", [fuzz_replies, fuzz_bytes, fuzz_redaction])
def test_fuzz(check):
    assert for_minutes(check) >= 1


def test_depth_and_doubles_are_refused():
    deep: Any = 1
    for _ in range(DEEPEST + 1):
        deep = [deep]
    with pytest.raises(Fault, match="nested deeper than 64"):
        read_reply(json.dumps({"a": deep}).encode())
    with pytest.raises(Fault, match="says one name twice"):
        read_reply(b'{"choices": [{"text": "a", "text": "b"}]}')
