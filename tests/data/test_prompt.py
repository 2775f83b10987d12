"""Prompts: every field is understood, or refused in words."""

from __future__ import annotations

import copy

import pytest

from opdlab import Prompt
from opdlab.data.prompt import ChatHint, own_hint
from opdlab.errors import InvalidValue, MissingHint

ASK = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either text= or messages="),
        ({"text": "a", "messages": (ASK,)}, "either text= or messages="),
        ({"text": 7}, r"Prompt got text=7\. Use a text\."),
        ({"text": b"a"}, r"Prompt got text=b'a'\. Use a text\."),
        ({"text": ["a", "b"]}, "Prompt got text="),
        ({"text": [ASK]}, r"Prompt got text=.*or messages= for a chat"),
        ({"text": "a\ud800"}, r"text holds the lone surrogate U\+D800 at character 1"),
        ({"messages": ()}, "messages is empty"),
        ({"messages": "Hi"}, "messages is 'Hi'"),
        ({"messages": ASK}, r"messages is \{"),
        ({"messages": ["Hi"]}, r"messages\[0\] is 'Hi'"),
        ({"messages": [{"content": "Hi"}]}, r"messages\[0\] has no role; it has content"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no content"),
        ({"messages": [{"role": "user", "content": 7}]}, r"messages\[0\]\.content is 7"),
        ({"messages": [{"role": "user", "content": ["\udc00"]}]}, "lone surrogate"),
        ({"text": "a", "answer": 7}, r"Prompt got answer=7\. Use a text, or None"),
        ({"text": "a", "answer": "\ud800"}, "answer holds the lone surrogate"),
        ({"text": "a", "hint": {1}}, r"Prompt got hint=\{1\}"),
        ({"text": "a", "hint": ["a", 1]}, "Prompt got hint="),
        ({"text": "a", "hint": True}, "Prompt got hint=True"),
        ({"text": "a", "hint": "\ud800"}, "hint holds the lone surrogate"),
        ({"text": "a", "id": 1.5}, r"Prompt got id=1\.5"),
    ],
)
def test_what_is_no_field_is_refused(fields, message):
    with pytest.raises(InvalidValue, match=message):
        Prompt(**fields)


def test_fields_are_read():
    assert Prompt("a", id=7).id == "7"
    assert Prompt("a", hint=47).hint == "47"
    assert Prompt("a", hint=["b", "", "c"]).hint == "b\nc"
    assert (
        Prompt("a", hint="").hint is Prompt("a", hint=" ").hint is Prompt("a", hint=[]).hint is None
    )
    assert Prompt(
        messages=[{**ASK, "content": [{"type": "text", "text": "H"}, "i"], "name": None}]
    ).messages == (ASK,)


def test_an_empty_hint_is_a_missing_one():
    with pytest.raises(MissingHint, match="Prompt 'p' has no hint"):
        own_hint(Prompt("a", hint="", id="p"))


def test_a_hint_of_messages_is_text_for_texts_and_turns_for_chats():
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "r"})
    hint = Prompt("a", hint=turns).hint
    assert hint == "q\nr"
    assert copy.deepcopy(hint).messages == turns
    assert Prompt("a", hint=turns).with_context(hint).text == "q\nr\na"
    system = {"role": "system", "content": "s"}
    assert Prompt(messages=(ASK,)).with_context(hint).messages == (*turns, ASK)
    assert Prompt(messages=(system, ASK)).with_context(hint).messages == (system, *turns, ASK)
    assert Prompt(messages=(system, ASK)).with_context(
        ChatHint([{**system, "content": "t"}, *turns])
    ).messages == (
        {**system, "content": "s\nt"},
        *turns,
        ASK,
    )
