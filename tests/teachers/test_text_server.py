"""A teacher that only writes, over HTTP: how it is asked, that it is counted, remembered and paid
for once.
"""

from __future__ import annotations

import math
import warnings

import pytest

import opdlab as opd
from opdlab import Prompt, errors
from opdlab.data.seeds import seed_of
from opdlab.methods import GRPO, OPD, SequenceKD
from opdlab.tasks.market import model
from opdlab.teachers import Budget, Cache, TextOnly, TextServer
from opdlab.teachers.sampling import NEUTRAL
from opdlab.teachers.ways import cut_in_half

TASK = opd.tasks.market()
PROMPTS = TASK.prompts(3)
HALF = ["7 3 + 2", "6 8", "8 4 - 4 3 ="]


def teacher(url: str, **options) -> TextServer:
    return TextServer(url, **{"cache": None, "quiet": True, **options})


@pytest.fixture(scope="module")
def student() -> opd.Policy:
    return model("student")


def test_greedy_texts_are_those_of_the_local_model(wire, market_teacher, student):
    """With and without an unfinished answer; the space between the two belongs to the text."""
    _, _, url = wire
    local, server = TextOnly(market_teacher), teacher(url)
    server.check(student, PROMPTS, 24)
    for prefixes in (None, HALF):
        options = {"prefixes": prefixes, "max_new_tokens": 24, "temperature": 0.0}
        want, got = (one.write(PROMPTS, 2, **options) for one in (local, server))
        assert [[text.strip() for text in row] for row in got] == [
            [text.strip() for text in row] for row in want
        ]
        assert all(len(row) == 2 for row in got)
    assert got[0][0].startswith(" 6 = ")


@pytest.mark.parametrize("choices", [1, 2, 99])
def test_exactly_as_many_texts_as_asked_for(choices, serve):
    """Servers that give one, two or all of five choices are counted and asked again."""
    server, url = serve(choices=choices)
    texts = teacher(url).write(PROMPTS, 5, max_new_tokens=6, temperature=9.0)
    assert [len(row) for row in texts] == [5, 5, 5]
    assert all(len(set(row)) >= 4 for row in texts)  # samples, not one text five times
    asked = [body.get("n", 1) for _, body, _ in server.requests[1:]]
    # a short reply is taken only when it comes twice, since it may have been an accident
    assert sorted(asked) == sorted({1: [1] * 15, 2: [5, 5, 3, 3, 1] * 3, 99: [5] * 3}[choices])


def test_a_server_without_n_is_asked_for_one_at_a_time(wire):
    server, faults, url = wire
    faults.queue = [(422, {})]  # to the greeting, which asks for two
    assert [len(row) for row in teacher(url).write(PROMPTS[:1], 3, max_new_tokens=2)] == [3]
    assert ["n" in body for _, body, _ in server.requests] == [False] * 4


def test_a_server_that_wants_another_name_for_the_limit_gets_it(serve):
    server, url = serve()
    answer = server.answer

    def newer(path, body):
        if "max_tokens" in body:
            return 400, {
                "error": {
                    "message": (
                        "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
                    )
                }
            }
        return answer(
            path,
            {
                "max_tokens": body["max_completion_tokens"],
                **{k: v for k, v in body.items() if k != "max_completion_tokens"},
            },
        )

    server.answer = newer
    assert len(teacher(url).write(PROMPTS[:1], 2, max_new_tokens=2)[0]) == 2


def test_the_same_question_twice_has_two_answers(wire):
    """And each of them is the same in the next run."""
    _, _, url = wire
    runs = [
        teacher(url).write([PROMPTS[0]] * 3, 2, max_new_tokens=6, temperature=9.0, seed=4)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len({text for row in runs[0] for text in row}) == 6
    assert (
        teacher(url).write([PROMPTS[0]] * 3, 2, max_new_tokens=6, temperature=9.0, seed=5)
        != runs[0]
    )


def test_a_second_run_asks_for_nothing(serve, tmp_path, student):
    """With another object, after the server is gone, for all that was asked: greeting, trials and
    texts.
    """
    server, url = serve()
    file = tmp_path / "c.sqlite"
    ask = lambda one, **more: [
        one.write(PROMPTS, 2, prefixes=p, **{"max_new_tokens": 5, "seed": 3, **more})
        for p in (None, HALF)
    ]
    first = teacher(url, model="market-teacher", cache=file)
    first.check(student, PROMPTS, 24)
    want, asked = ask(first), len(server.requests)
    assert asked > 6
    server.answer = lambda path, body: (500, {})
    again = teacher(url, model="market-teacher", cache=file)
    again.check(student, PROMPTS, 24)
    assert ask(again) == want
    assert len(server.requests) == asked
    assert again.service.budget.spent.tokens == 0
    for other in ({"seed": 4}, {"temperature": 0.5}, {"max_new_tokens": 6}):
        with pytest.raises(errors.TeacherError):
            ask(again, **other)
    with pytest.raises(errors.TeacherError):
        again.write(PROMPTS, 3, max_new_tokens=5, seed=3)


def test_more_samples_pay_for_the_new_ones_only(wire):
    server, _, url = wire
    one = teacher(url)
    three = one.write(PROMPTS, 3, max_new_tokens=5, temperature=2.0)
    server.requests.clear()
    assert [row[:3] for row in one.write(PROMPTS, 5, max_new_tokens=5, temperature=2.0)] == three
    assert [body["n"] for _, body, _ in server.requests] == [2, 2, 2]


def test_two_servers_do_not_share_answers(serve, tmp_path):
    cache = Cache(tmp_path / "c.sqlite")
    for name in ("market-teacher", "other"):
        server, url = serve(name=name)
        teacher(url, cache=cache).write(PROMPTS, max_new_tokens=3)
        assert len(server.requests) == 4


# How to go on.


def lied(student: opd.Policy, template: str):
    """The student's tokenizer with another chat template than the teacher's."""
    tokenizer = type(student.tokenizer).from_pretrained(student.weights.source)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("dialect", "template", "way"),
    [
        ("vllm", None, "completion"),
        ("vllm", "{% for m in messages %}{{ m['content'] }}{% endfor %}", "prefill"),
        ("mistral", None, "prefix"),
    ],
)
def test_the_way_to_go_on_is_found_by_asking(
    dialect, template, way, serve, student, market_teacher
):
    """A template that is not the teacher's shows in what it writes, so another way is found; each
    way gives the same text.
    """
    server, url = serve(dialect=dialect)
    one = teacher(url, template=lied(student, template) if template else None)
    one.check(student, PROMPTS, 24)
    texts = one.write(PROMPTS, prefixes=HALF, max_new_tokens=12, temperature=0.0)
    assert one.way == way
    want = TextOnly(market_teacher).write(
        PROMPTS, prefixes=HALF, max_new_tokens=12, temperature=0.0
    )
    assert [row[0].strip() for row in texts] == [row[0].strip() for row in want]
    asked = len(server.requests)
    one.write(PROMPTS, prefixes=HALF, max_new_tokens=11)
    assert len(server.requests) == asked + 3  # found once


def test_where_no_way_works_it_is_told_to_go_on(serve, student):
    server, url = serve(dialect="chat")
    one = teacher(url)
    one.check(student, PROMPTS, 24)
    with pytest.warns(
        UserWarning,
        match=r"told to go on by an instruction, and what it repeats is cut\. .*continue_by=",
    ):
        one.write(PROMPTS, prefixes=HALF, max_new_tokens=12)
    assert one.way == "instruct"
    assert [m["role"] for m in server.requests[-1][1]["messages"]] == ["user", "assistant", "user"]


def test_a_way_that_the_user_names_is_not_tried_first(serve):
    server, url = serve(dialect="chat")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher(url, continue_by="instruct").write(PROMPTS, prefixes=HALF, max_new_tokens=3)
    refused, greeting, *texts = [
        set(body) for _, body, _ in server.requests
    ]  # this server knows no top_k, and says so once
    assert "top_k" in refused - greeting
    assert len(texts) == 3
    assert not any("top_k" in fields for fields in texts)
    with pytest.raises(
        errors.OpdlabError,
        match=r"continue_by='magic'\. Use auto, completion, prefill, prefix, instruct",
    ):
        teacher(url, continue_by="magic")


def test_plain_prompts_are_completed(serve, student, market_teacher):
    server, url = serve()
    prompts = [Prompt("<user>ana has 4 7 apples buys 3 8 sells 1 9 . total ?<assistant>")]
    texts = teacher(url).write(prompts, prefixes=["4 7 +"], max_new_tokens=9, temperature=0.0)
    assert {path for path, _, _ in server.requests} == {"/v1/completions"}
    assert texts[0][0].strip() == "3 8 = 8 5 ; 8 5 -"


def test_where_an_answer_is_cut():
    assert cut_in_half("4 7 + 3 8 = 8 5") == ("4 7 + 3", " 8 = 8 5")
    assert cut_in_half("abcdefghij") == ("abcde", "fghij")
    assert cut_in_half(" abcdefghij") == (" abcd", "efghij")
    assert cut_in_half("a b") == ("", "")


# Who answers.


def test_the_name_of_the_model_is_the_servers(serve):
    _, url = serve(name="market-teacher-2026-01-01")
    one = teacher(url)
    one.meet(PROMPTS)
    assert one.model == "market-teacher-2026-01-01"
    with pytest.raises(
        errors.TeacherError,
        match=(
            r"answers 404: .*The model `gpt-9` does not exist.*Check the address .* and the model's"
            r" name"
        ),
    ):
        teacher(url, model="gpt-9").meet(PROMPTS)


def test_another_models_name_is_no_answer(serve):
    server, url = serve()
    reply = server.reply
    server.reply = lambda *args: reply(*args) | {"model": "cheaper-model"}
    with pytest.raises(
        errors.TeacherError,
        match=(
            r"the model 'cheaper-model' answered and not 'market-teacher'\. Name it as the server"
            r" does"
        ),
    ):
        teacher(url, model="market-teacher", retries=1).meet(PROMPTS)


def test_nothing_but_prompts_goes_out(wire, student):
    """No hint, no reference answer, and of the key nothing where there is none."""
    server, _, url = wire
    prompts = opd.tasks.market(secret=True).prompts(3)
    assert all(prompt.hint and prompt.answer for prompt in prompts)
    one = teacher(url)
    one.check(student, prompts, 24)
    one.write(prompts, prefixes=HALF, max_new_tokens=3)
    for _, body, headers in server.requests:
        assert set(body) <= {"model", "messages", "prompt", "n", "max_tokens", "seed", *NEUTRAL}
        assert not any(prompt.hint in str(body) or prompt.answer in str(body) for prompt in prompts)
        assert headers["authorization"] == "Bearer none"


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "ftp://x/v1", "http://name:word@x/v1", "http://x/v1?key=abc", "http:///v1"],
)
def test_addresses_that_are_none_or_hold_a_secret(url):
    with pytest.raises(errors.OpdlabError, match="OPDLAB_API_KEY") as caught:
        TextServer(url)
    assert "abc" not in str(caught.value)
    assert "word" not in str(caught.value).replace("password", "")


def test_bad_questions_are_errors(wire):
    _, _, url = wire
    one = teacher(url)
    wrong = {
        "n": 0,
        "max_new_tokens": 2.0,
        "temperature": math.nan,
        "top_p": 0,
        "seed": "1",
        "prefixes": "abc",
    }
    for name, value in wrong.items():
        with pytest.raises(errors.InvalidValue, match=rf"write got {name}="):
            one.write(PROMPTS, **{name: value})
    with pytest.raises(
        errors.InvalidValue, match=r"write got 0 prefixes for 3 prompts\. Use one each"
    ):
        one.write(PROMPTS, prefixes=[])
    with pytest.raises(
        errors.InvalidValue, match=r"holds the lone surrogate U\+D800 at character 1"
    ):
        one.write([Prompt("a\ud800b")])
    with pytest.raises(errors.EmptyPrompts):
        teacher(url).write([])


# What it costs.


def test_the_budget_stops_before_it_is_passed_and_nothing_is_lost(wire):
    server, _, url = wire
    budget = Budget(tokens=1_000)
    one = teacher(url, budget=budget)
    with pytest.raises(
        errors.BudgetSpent,
        match=r"of the budget of 1000 tokens only \d+ tokens are left\. Nothing is lost",
    ):
        one.write(TASK.prompts(40), max_new_tokens=4)
    assert 500 < budget.spent.tokens <= 1_000
    assert budget.spent.requests == len(server.requests) < 41
    budget.tokens = 100_000
    assert len(one.write(TASK.prompts(40), max_new_tokens=4)) == 40
    assert len(server.requests) == 41  # the greeting and one a prompt: none was asked for twice
    assert budget.spent.tokens == sum(server.used)


def test_a_budget_of_requests_counts_the_repeated_ones(wire):
    server, faults, url = wire
    faults.queue = [None, (503, {}), (503, {})]
    with pytest.raises(
        errors.BudgetSpent, match="of the budget of 4 requests only 0 requests are left"
    ):
        teacher(url, budget=Budget(requests=4), concurrency=1).write(PROMPTS, max_new_tokens=2)
    assert len(server.requests) + faults.met == 4


# With distill.


def test_it_teaches_a_student_by_its_texts(wire, student):
    _, _, url = wire
    run = opd.distill(
        model("student"), teacher(url), TASK, method=SequenceKD(), batch=4, steps=2, quiet=True
    )
    step = next(run)
    assert step.rollout.writer == ("teacher",) * 4
    texts = teacher(url).write(list(step.rollout.prompts), max_new_tokens=24, seed=seed_of(0, 0, 2))
    assert list(step.rollout.texts) == [row[0] for row in texts]
    assert run.train().done == 2


def test_a_method_that_needs_grades_says_what_works_instead(wire):
    server, _, url = wire
    with pytest.raises(
        errors.MissingPolicy,
        match=(
            r"TextServer only writes\. Use a method that learns from texts alone \(OmniOPD,"
            r" SequenceKD\)"
        ),
    ):
        opd.distill(model("student"), teacher(url), TASK, method=OPD())
    assert not server.requests


def test_a_method_that_needs_no_teacher_asks_it_nothing(wire):
    server, _, url = wire
    opd.distill(
        model("student"),
        teacher(url),
        TASK,
        method=GRPO(),
        batch=2,
        n=2,
        steps=1,
        quiet=True,
        temperature=2.0,
    ).train()
    assert not server.requests
