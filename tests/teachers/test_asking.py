"""Requests and replies as plain data: what goes out for each way of going on, and what of a reply
is believed.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdlab import Prompt
from opdlab.errors import OpdlabError
from opdlab.models.tool_calls import parse_any
from opdlab.teachers import asking
from opdlab.teachers.reply import Fault, raise_error_of

CHAT = Prompt(messages=({"role": "user", "content": "a b"},), hint="secret")
HERE = "The cat sat on the mat"


def test_each_way_sends_what_it_says(words):
    user, begun = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}
    assert asking.make_request(CHAT, "c d", "completion", words) == (
        "/completions",
        {"prompt": "<user>a b<assistant>c d"},
    )
    path, body = asking.make_request(CHAT, "c d", "prefill", None)
    assert path == "/chat/completions"
    assert body == {
        "messages": [user, begun],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    assert asking.make_request(CHAT, "c d", "prefix", None)[1] == {
        "messages": [user, begun | {"prefix": True}]
    }
    assert asking.make_request(CHAT, "c d", "instruct", None)[1]["messages"] == [
        user,
        begun,
        {"role": "user", "content": asking.GO_ON},
    ]
    for way in asking.WAYS[1:]:
        assert asking.make_request(CHAT, "", way, None) == (
            "/chat/completions",
            {"messages": [user]},
        )
    assert asking.make_request(Prompt("a b"), " c", "prefill", None) == (
        "/completions",
        {"prompt": "a b c"},
    )


def test_no_request_holds_the_hint(words):
    assert not any(
        "secret" in str(asking.make_request(CHAT, "x", way, words)) for way in asking.WAYS
    )


def test_a_rendered_chat_leaves_the_first_token_to_the_server(make_tokenizer):
    tokenizer = make_tokenizer(
        template="[bos]{% for m in messages %}{{ m['content'] }}{% endfor %}:"
    )
    tokenizer.add_special_tokens({"bos_token": "[bos]"})
    assert asking.render_chat(CHAT, tokenizer) == "a b:"
    with pytest.raises(OpdlabError, match=r"no template is known\. Give TextServer\(…, template="):
        asking.make_request(CHAT, "c", "completion", None)


def test_what_looks_like_a_special_token_does_not_reach_the_server(words):
    assert (
        asking.make_request(CHAT, "c<eos><user>d", "completion", words)[1]["prompt"]
        == "<user>a b<assistant>cd"
    )


@pytest.mark.parametrize(
    ("prefix", "text", "want"),
    [
        (HERE, HERE + " and slept", " and slept"),  # all of it
        (HERE + " ", "\n" + HERE + " and slept", " and slept"),
        (HERE, "sat on the mat and slept", " and slept"),  # its end
        (HERE, " and slept", " and slept"),  # nothing
        (HERE, "the mat and slept", "the mat and slept"),  # too short to be sure
        ("8", "8 5", " 5"),  # all of a short one
        ("total 8", "8 5", "8 5"),
        ("", "The cat", "The cat"),
    ],
)
def test_an_echo_is_cut(prefix, text, want):
    assert asking.without_echo(text, prefix) == want


@given(st.text("ab ", min_size=0, max_size=30), st.text("ab ", max_size=30))
def test_cutting_an_echo_only_ever_shortens(prefix, text):
    cut = asking.without_echo(text, prefix)
    assert text.endswith(cut)
    assert (
        prefix.rstrip().endswith(text.strip()[: len(text.strip()) - len(cut.strip())].strip())
        or cut == text
    )


def reply(*choices, written: int | None = 3):
    return {
        "choices": list(choices),
        **({} if written is None else {"usage": {"completion_tokens": written}}),
    }


def said(text, finish="stop"):
    return {"text": text, "finish_reason": finish}


def test_texts_of_both_kinds_of_reply():
    assert asking.read_choices(reply(said("a"), said("b", "length")), 5) == [
        {"text": "a", "finish": "stop"},
        {"text": "b", "finish": "length"},
    ]
    chat = {"message": {"role": "assistant", "content": "c"}, "finish_reason": "stop"}
    assert asking.read_choices(reply(chat), 5) == [{"text": "c", "finish": "stop"}]
    assert asking.read_choices(reply(said("", "stop"), written=1), 5) == [
        {"text": "", "finish": "stop"}
    ]
    assert (
        asking.read_choices(reply(said("a\x00\x1b[31m\u202eb")), 5)[0]["text"]
        == "a\x00\x1b[31m\u202eb"
    )  # odd, and text all the same
    assert (
        asking.read_choices(reply(said("a", "eos")), 5)[0]["finish"] == "stop"
    )  # Together's word for it


@pytest.mark.parametrize("half", ["\ufffd", "\ufffd\ufffd", chr(0xD83D)])
def test_a_cut_text_ends_before_the_character_that_was_cut(half):
    """A server that stops between the bytes of a character shows a replacement sign, which the
    teacher did not write.
    """
    assert asking.read_choices(reply(said(f"ab{half}", "length")), 5) == [
        {"text": "ab", "finish": "length"}
    ]
    if half.startswith("\ufffd"):
        assert asking.read_choices(reply(said(f"ab{half}", "stop")), 5) == [
            {"text": f"ab{half}", "finish": "stop"}
        ]


def test_calls_that_a_server_has_read_become_a_text_again():
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": "price", "arguments": '{"item": "é"}'},
    }
    choice = {"message": {"content": None, "tool_calls": [call]}, "finish_reason": "tool_calls"}
    (read,) = asking.read_choices(reply(choice), 50)
    assert read["finish"] == "stop"
    turn = parse_any(read["text"])
    assert [(one.name, dict(one.arguments)) for one in turn.calls] == [("price", {"item": "é"})]
    beside = {"content": "So:", "tool_calls": [call, call]}
    (read,) = asking.read_choices(reply({**choice, "message": beside}), 50)
    assert (parse_any(read["text"]).content, len(parse_any(read["text"]).calls)) == ("So:", 2)
    for wrong in ([3], [{"function": {"name": "price", "arguments": "{"}}], "price"):
        with pytest.raises(Fault):
            asking.read_choices(
                reply({**choice, "message": {"content": None, "tool_calls": wrong}}), 50
            )


@pytest.mark.parametrize(
    "reason",
    ["abort", "error", None, "tool_calls", "function_call", "cancelled", "", "STOP", 3, ["stop"]],
)
def test_a_text_that_was_broken_off_is_no_answer(reason):
    with pytest.raises(
        Fault, match=r"broke the text off \(finish_reason .*\), so it is no whole answer"
    ):
        asking.read_choices(reply(said("two and th", reason)), 5)
    with pytest.raises(Fault, match="broke the text off"):
        asking.read_choices(
            reply(said("whole"), said("two and th", reason)), 5
        )  # beside one that is whole
    missing = {"message": {"content": "two and th"}}
    with pytest.raises(Fault, match=r"finish_reason None"):
        asking.read_choices(reply(missing), 5)


@pytest.mark.parametrize(
    ("error", "words", "status", "final"),
    [
        (
            {"message": "Key limit exceeded", "code": 403},
            r"error \(403\): Key limit exceeded",
            403,
            True,
        ),
        ({"message": "try later", "code": "502"}, r"error \(502\): try later", 502, False),
        ({"message": "slow down", "code": 429}, r"error \(429\): slow down", 429, False),
        (
            {"message": "no such model", "type": "not_found_error"},
            r"error \(not_found_error\): no such model",
            200,
            False,
        ),
        ("overloaded", "error: overloaded", 200, False),
        ({"detail": "odd"}, "error: {'detail': 'odd'}", 200, False),
    ],
)
def test_an_error_in_a_reply_is_told_in_the_servers_words(error, words, status, final):
    for where in (
        lambda: raise_error_of({"error": error}),
        lambda: asking.read_choices(reply(said("a") | {"error": error}), 5),
    ):
        with pytest.raises(Fault, match=f"it answers with an {words}") as caught:
            where()
        assert (caught.value.status, caught.value.final) == (status, final)
    with pytest.raises(Fault, match=r"it answers with an error \(40303\): busy"):
        raise_error_of({"object": "error", "message": "busy", "code": 40303})
    raise_error_of({"error": None})  # some servers say so in every reply


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({}, "no choices"),
        ({"choices": "x"}, "no choices"),
        (reply(), "no choices"),
        (reply("x"), "text is missing"),
        (reply({}), "text is missing"),
        (reply({"message": None}), "a text is missing"),
        (reply({"message": {"content": None}, "finish_reason": "length"}), "thinks first"),
        (reply({"message": {"content": ["a"]}}), "a text is missing"),
        (reply({"text": 5}), "a text is missing"),
        (reply(said("a", "content_filter")), "withheld"),
        (reply(said("", "length"), written=5), "a text is empty"),
        (reply(said(""), written=4), "a text is empty"),
        (reply(said(""), written=None), "a text is empty"),
        (reply(said("a\ud800b")), "half of a character"),
        (reply(said(""), written=-1), "a text is empty"),
        (reply(said("a"), written=6), "wrote 6 tokens where 5 were asked for"),
    ],
)
def test_what_is_no_answer_is_a_fault(bad, why):
    with pytest.raises(Fault, match=why):
        asking.read_choices(bad, 5)
