"""What shapes a teacher's distribution is said in every request, sent as it was asked for, or
refused in words.
"""

from __future__ import annotations

from typing import Any

import pytest

import opdlab as opd
from opdlab import errors
from opdlab.methods import SequenceKD
from opdlab.tasks.market import model
from opdlab.teachers import LogprobServer, TextOnly, TextServer
from opdlab.teachers.sampling import EXTENSIONS, NEUTRAL
from opdlab.teachers.text_only import cut_behind_stop

TASK = opd.tasks.market()
PROMPTS = TASK.prompts(2)


def teacher(url: str, **options: Any) -> TextServer:
    return TextServer(url, **{"cache": None, "quiet": True, **options})


def picky(server, refused, say=lambda names: f"unknown fields {names}"):
    """Make the server refuse these fields, in these words; a server without top_k stays one if it
    was one.
    """
    answer = server.answer

    def choosy(path, body):
        found = sorted(set(body) & set(refused))
        return (
            (400, {"error": {"message": say(found)}})
            if found
            else answer(path, {"temperature": 1.0, **body})
        )

    server.answer = choosy
    return server


def test_every_field_is_sent_with_each_request(wire):
    server, _, url = wire
    one = teacher(url)
    one.write(PROMPTS, temperature=0.5, top_p=0.8, max_new_tokens=3)
    greeting, *texts = [body for _, body, _ in server.requests]
    assert {name: greeting[name] for name in NEUTRAL} == NEUTRAL
    for body in texts:
        assert {name: body[name] for name in NEUTRAL} == NEUTRAL | {
            "temperature": 0.5,
            "top_p": 0.8,
        }
    server.requests.clear()
    grader = LogprobServer(url, cache=None, quiet=True, k=4)
    student = model("student")
    grader.check(student, PROMPTS, 8)
    grader.grade(student.sample(PROMPTS, max_new_tokens=3))
    graded = [body for path, body, _ in server.requests if "prompt_logprobs" in body]
    assert len(graded) >= 3
    assert all({name: body[name] for name in NEUTRAL} == NEUTRAL for body in graded)


def test_every_option_is_sent_as_the_server_names_it(wire):
    """Length, seed and top_k=0 under other names; `stop` with the request to keep it."""
    server, _, url = wire
    one = teacher(url)
    one.write(
        PROMPTS, top_k=7, min_p=0.1, stop=("=", "+"), max_new_tokens=5, seed=3, min_new_tokens=2
    )
    one.write(PROMPTS, top_k=0, max_new_tokens=3, seed=3)
    bodies = [body for _, body, _ in server.requests[1:]]
    shaped, plain = bodies[:2], bodies[2:]
    assert {(body["top_k"], body["min_p"]) for body in shaped} == {(7, 0.1)}
    assert all(body["stop"] == ["=", "+"] for body in shaped)
    assert all(body["include_stop_str_in_output"] is True for body in shaped)
    assert {body["min_tokens"] for body in shaped} == {2}
    assert not any("min_tokens" in body for body in plain)
    assert {body["top_k"] for body in plain} == {-1}
    assert not any({"stop", "include_stop_str_in_output"} & set(body) for body in plain)
    assert [body["max_tokens"] for body in bodies] == [5, 5, 3, 3]
    assert len({body["seed"] for body in bodies}) == 4


def test_bad_options_are_refused_before_anything_is_sent(wire):
    server, _, url = wire
    for one in (
        teacher(url),
        LogprobServer(url, cache=None, quiet=True),
        TextOnly(model("scribe")),
    ):
        with pytest.raises(
            errors.UnknownOption, match=r"write has no option 'temprature'\. It takes"
        ):
            one.write(PROMPTS, temprature=0.5)
        with pytest.raises(errors.InvalidValue, match=r"write got top_k=-1\. Use a whole number"):
            one.write(PROMPTS, top_k=-1)
        with pytest.raises(errors.InvalidValue, match="write got an empty text in stop="):
            one.write(PROMPTS, stop=("a", ""))
    assert server.requests == []


def test_a_text_keeps_the_stop_text_that_ends_it(wire, market_teacher):
    """The same from a server as from the local model, and a prefix of the text without `stop`."""
    _, _, url = wire
    options = {"temperature": 0.0, "max_new_tokens": 24}
    for prefixes in (None, ["7 3 +", "6 8"]):
        local, served = TextOnly(market_teacher), teacher(url)
        wanted = local.write(PROMPTS, prefixes=prefixes, stop="=", **options)
        got = served.write(PROMPTS, prefixes=prefixes, stop="=", **options)
        whole = local.write(PROMPTS, prefixes=prefixes, **options)
        for want, text, all_of_it in zip(wanted, got, whole, strict=True):
            assert want[0].endswith("=")
            assert want[0].finish == text[0].finish == "stop"
            assert want[0].strip() == text[0].strip()
            assert all_of_it[0].startswith(want[0])


def test_a_stop_text_may_end_within_a_token():
    assert cut_behind_stop("4 7\n\n8", ("\n",)) == "4 7\n"
    assert cut_behind_stop("4 7 = 8", ("8", "=")) == "4 7 ="
    assert cut_behind_stop("4 7", ("=",)) == cut_behind_stop("4 7", ()) == "4 7"


def test_a_server_that_cannot_keep_stop_texts_is_refused(serve):
    server, url = serve()
    picky(server, ["include_stop_str_in_output"])
    one = teacher(url)
    with pytest.raises(errors.OpdlabError, match=r"no include_stop_str.*Leave stop= out"):
        one.write(PROMPTS, stop="=", max_new_tokens=5)
    asked = len(server.requests)
    assert all(text for row in one.write(PROMPTS, max_new_tokens=3) for text in row)
    cut = teacher(url, extra={"stop": ["="], "include_stop_str_in_output": False})
    picky(server, ["stop"])  # the server is heard in its own words
    with pytest.raises(errors.TeacherError, match="unknown fields"):
        cut.write(PROMPTS, max_new_tokens=3)
    assert len(server.requests) > asked


def test_extra_wins_and_what_it_would_overrule_is_refused(wire):
    server, _, url = wire
    one = teacher(url, extra={"top_k": 5, "temperature": 0.3})
    one.write(PROMPTS, max_new_tokens=3)
    assert all((body["top_k"], body["temperature"]) == (5, 0.3) for _, body, _ in server.requests)
    with pytest.raises(
        errors.InvalidValue,
        match=r"write got temperature=0\.7, but .* extra=\{'temperature': 0\.3\}",
    ):
        one.write(PROMPTS, temperature=0.7)
    for name in ("model", "n", "seed", "stream", "max_tokens", "messages"):
        with pytest.raises(
            errors.InvalidValue, match=rf"extra=\{{'{name}': …\}}, a field that is set by"
        ):
            teacher(url, extra={name: 1})
    with pytest.raises(errors.InvalidValue, match="which is no JSON"):
        teacher(url, extra={"bias": {1, 2}})


@pytest.mark.parametrize(
    "say",
    [
        lambda names: f"Unrecognized request argument supplied: {names[0]}",
        lambda names: f"unknown fields {names}",
        lambda _: "bad request",
    ],
    ids=["one at a time", "all", "no name"],
)
def test_fields_beyond_the_standard_are_left_out_where_a_server_refuses_them(say, serve):
    server, url = serve()
    picky(server, EXTENSIONS, say)
    one = teacher(url)
    assert [len(row) for row in one.write(PROMPTS, 2, max_new_tokens=3)] == [2, 2]
    answered = [body for _, body, _ in server.requests if not set(body) & set(EXTENSIONS)]
    assert all(body["top_p"] == 1.0 for body in answered)
    assert [body["n"] for body in answered[-2:]] == [2, 2]  # `n` was not the reason, so it stays
    asked = len(server.requests)
    one.write(PROMPTS, 2, max_new_tokens=4)
    assert len(server.requests) == asked + 2  # remembered


def test_another_path_may_refuse_other_fields(serve):
    """The greeting goes to /chat/completions; to go on with a text, /completions is asked, which
    knows less here.
    """
    server, url = serve()
    answer = server.answer

    def choosy(path, body):
        is_odd = path == "/v1/completions" and "min_p" in body
        return (
            (422, {"detail": "min_p: extra fields not permitted"}) if is_odd else answer(path, body)
        )

    server.answer = choosy
    one = teacher(url, continue_by="completion", template=model("student").tokenizer)
    one.write([opd.Prompt("ana has 4 7 apples")], max_new_tokens=3)
    one.write(PROMPTS, prefixes=["4", "6"], max_new_tokens=3)
    paths = [(path, "min_p" in body) for path, body, _ in server.requests]
    assert paths.count(("/v1/completions", True)) == 1
    assert paths[-1] == ("/v1/completions", False)


def test_a_refused_field_is_never_needed(serve):
    """OpenAI's reasoning models take no top_p: at 1 that changes nothing, elsewhere it would."""
    server, url = serve()
    picky(
        server,
        ["top_p", "temperature"],
        lambda names: f"Unsupported parameter: '{names[0]}' is not supported with this model.",
    )
    one = teacher(url)
    assert all(text for row in one.write(PROMPTS, max_new_tokens=3) for text in row)
    asked = len(server.requests)
    with pytest.raises(
        errors.OpdlabError,
        match=r"takes no top_p, so it cannot write at top_p=0\.9\. Use top_p=1, or another",
    ):
        one.write(PROMPTS, top_p=0.9)
    with pytest.raises(errors.OpdlabError, match=r"cannot write at temperature=0\.5"):
        one.write(PROMPTS, temperature=0.5)
    assert len(server.requests) == asked


def test_a_request_that_is_wrong_for_another_reason_loses_no_field(serve):
    """A prompt that is too long is refused with 400 too; fields left out for it are sent again."""
    server, url = serve()
    answer = server.answer
    server.answer = lambda path, body: (
        (400, {"error": {"message": "This model's maximum context length is 4096 tokens."}})
        if body["max_tokens"] > 50
        else answer(path, body)
    )
    one = teacher(url)
    with pytest.raises(errors.TeacherError, match="maximum context length"):
        one.write(PROMPTS, max_new_tokens=60)
    server.requests.clear()
    one.write(PROMPTS, max_new_tokens=3)
    assert all(set(EXTENSIONS) <= set(body) for _, body, _ in server.requests)


def test_settings_reach_the_teacher(wire):
    server, _, url = wire
    settings = {"method": SequenceKD(), "batch": 2, "steps": 1, "max_new_tokens": 3, "quiet": True}
    opd.distill(
        model("student"), teacher(url), TASK, temperature=0.5, top_p=0.7, **settings
    ).train()
    assert {(body["temperature"], body["top_p"]) for _, body, _ in server.requests[1:]} == {
        (0.5, 0.7)
    }
    scribe = model("scribe")
    step = next(
        opd.distill(
            model("student"),
            TextOnly(scribe),
            TASK,
            temperature=3.0,
            top_p=0.01,
            **settings | {"max_new_tokens": 20},
        )
    )
    greedy = TextOnly(scribe).write(list(step.rollout.prompts), max_new_tokens=20, temperature=0.0)
    assert list(step.rollout.texts) == [
        row[0] for row in greedy
    ]  # so small a nucleus holds one token
