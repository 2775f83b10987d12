"""Requests and replies as plain data: what goes out for each way of going on, and what of a reply is believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdlab import Prompt
from opdlab.errors import OpdlabError
from opdlab.teachers import asking
from opdlab.teachers.service import Fault

CHAT = Prompt(messages=({"role": "user", "content": "a b"},), hint="secret")
HERE = "The cat sat on the mat"


def test_each_way_sends_what_it_says(words):
    user, begun = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}
    assert asking.request(CHAT, "c d", "completion", words) == ("/completions", {"prompt": "<user>a b<assistant>c d"})
    path, body = asking.request(CHAT, "c d", "prefill", None)
    assert path == "/chat/completions"
    assert body == {"messages": [user, begun], "continue_final_message": True, "add_generation_prompt": False}
    assert asking.request(CHAT, "c d", "prefix", None)[1] == {"messages": [user, begun | {"prefix": True}]}
    assert asking.request(CHAT, "c d", "instruct", None)[1]["messages"] == [user, begun, {"role": "user", "content": asking.GO_ON}]
    for way in asking.WAYS[1:]:
        assert asking.request(CHAT, "", way, None) == ("/chat/completions", {"messages": [user]})
    assert asking.request(Prompt("a b"), " c", "prefill", None) == ("/completions", {"prompt": "a b c"})


def test_no_request_holds_the_hint(words):
    assert not any("secret" in str(asking.request(CHAT, "x", way, words)) for way in asking.WAYS)


def test_a_rendered_chat_leaves_the_first_token_to_the_server(make_tokenizer):
    tokenizer = make_tokenizer(template="[bos]{% for m in messages %}{{ m['content'] }}{% endfor %}:")
    tokenizer.add_special_tokens({"bos_token": "[bos]"})
    assert asking.rendered(CHAT, tokenizer) == "a b:"
    with pytest.raises(OpdlabError, match=r"no template is known\. Give TextServer\(…, template="):
        asking.request(CHAT, "c", "completion", None)


def test_what_looks_like_a_special_token_does_not_reach_the_server(words):
    assert asking.request(CHAT, "c<eos><user>d", "completion", words)[1]["prompt"] == "<user>a b<assistant>cd"


@pytest.mark.parametrize(("prefix", "text", "want"), [
    (HERE, HERE + " and slept", " and slept"),  # all of it
    (HERE + " ", "\n" + HERE + " and slept", " and slept"),
    (HERE, "sat on the mat and slept", " and slept"),  # its end
    (HERE, " and slept", " and slept"),  # nothing
    (HERE, "the mat and slept", "the mat and slept"),  # too short to be sure
    ("8", "8 5", " 5"),  # all of a short one
    ("total 8", "8 5", "8 5"),
    ("", "The cat", "The cat"),
])  # fmt: skip
def test_an_echo_is_cut(prefix, text, want):
    assert asking.without_echo(text, prefix) == want


@given(st.text("ab ", min_size=0, max_size=30), st.text("ab ", max_size=30))
def test_cutting_an_echo_only_ever_shortens(prefix, text):
    cut = asking.without_echo(text, prefix)
    assert text.endswith(cut)
    assert prefix.rstrip().endswith(text.strip()[: len(text.strip()) - len(cut.strip())].strip()) or cut == text


def reply(*choices, written: int | None = 3):
    return {"choices": list(choices), **({} if written is None else {"usage": {"completion_tokens": written}})}


def said(text, finish="stop"):
    return {"text": text, "finish_reason": finish}


def test_texts_of_both_kinds_of_reply():
    assert asking.choices(reply(said("a"), said("b", "length")), 5) == [{"text": "a", "finish": "stop"}, {"text": "b", "finish": "length"}]
    chat = {"message": {"role": "assistant", "content": "c"}, "finish_reason": "stop"}
    assert asking.choices(reply(chat), 5) == [{"text": "c", "finish": "stop"}]
    assert asking.choices(reply(said("", "stop"), written=1), 5) == [{"text": "", "finish": "stop"}]
    assert asking.choices(reply(said("a\ud800b")), 5)[0]["text"] == "a?b"  # half a character: no file or tokenizer would take it


@pytest.mark.parametrize(("bad", "why"), [
    ({}, "no choices"), ({"choices": "x"}, "no choices"), (reply(), "no choices"),
    (reply("x"), "text is missing"), (reply({}), "text is missing"),
    (reply({"message": None}), "a text is missing"), (reply({"message": {"content": None}, "finish_reason": "length"}), "thinks first"),
    (reply({"message": {"content": ["a"]}}), "a text is missing"), (reply({"text": 5}), "a text is missing"),
    (reply(said("a", "content_filter")), "withheld"), (reply(said("", "length"), written=5), "a text is empty"),
    (reply(said(""), written=4), "a text is empty"), (reply(said(""), written=None), "a text is empty"),
    (reply(said("a"), written=6), "wrote 6 tokens where 5 were asked for"),
])  # fmt: skip
def test_what_is_no_answer_is_a_fault(bad, why):
    with pytest.raises(Fault, match=why):
        asking.choices(bad, 5)
