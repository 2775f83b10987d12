"""Everything that a server and a line can do wrong, while a run trains.

Each fault comes twice. Once or twice in passing: the run must end with the very weights of a run
without it. And for good: the step must fail with an error that says what happened, leave the
weights as they were, and once the fault is gone the same run must go on to the weights of the
undisturbed one. So nothing is ever trained on missing or wrong feedback.
"""

from __future__ import annotations

import math
import threading

import pytest
import torch
from wire import Proxy

import opdlab as opd
from opdlab import OPD, TopK, errors
from opdlab.methods import SequenceKD
from opdlab.tasks.market import model
from opdlab.teachers import LogprobServer, TextServer, service

TASK = opd.tasks.market()
METHODS = {"texts": SequenceKD(), "grades": OPD(top_k=TopK(6, by="teacher"))}


def run_on(url: str, kind: str, **options) -> opd.Run:
    options = {"cache": None, "quiet": True, "retries": 2, **options}
    teacher = TextServer(url, **options) if kind == "texts" else LogprobServer(url, k=6, **options)
    settings = {
        "batch": 2,
        "n": 2,
        "steps": 2,
        "max_new_tokens": 6,
        "temperature": 2.0,
        "quiet": True,
    }
    return opd.distill(model("student"), teacher, TASK, method=METHODS[kind], **settings)


def weights(run: opd.Run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.parameters.values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def undisturbed(_wire) -> dict[str, list[torch.Tensor]]:
    """The weights at the end of a run without faults; they are worth comparing with."""
    _, faults, url = _wire
    faults.clear()
    ends = {}
    for kind in METHODS:
        run = run_on(url, kind)
        start = weights(run)
        ends[kind] = weights(run.train())
        assert not same(start, ends[kind])
    return ends


def choices(change):
    """A fault that changes each choice of a reply."""
    return lambda reply: [change(choice) for choice in reply["choices"]]


def graded(change):
    """A fault that changes the log-probs of the last tokens of a prompt, `{id: {"logprob": …}}`
    each.
    """

    def fault(reply):
        listed = reply["choices"][0]["prompt_logprobs"]
        listed[-2:] = [change(dict(entry)) for entry in listed[-2:]]

    return fault


def own(value):
    """The log-prob of some token becomes `value`."""
    return graded(lambda entry: {**entry, next(iter(entry)): {"logprob": value, "rank": 1}})


LINE = {
    "busy": ((429, {"retry-after": "0.05"}), "answers 429"),
    "down": ((503, {}), "answers 503"),
    "failing": ((500, {}), "answers 500"),
    "cut": ("cut", "no connection"),
    "broken JSON": ("broken", "the reply is not JSON"),
    "a page": ("html", "the reply is not JSON"),
    "a list": ("list", "the reply is not a JSON object"),
    "nothing": ("nothing", "the reply is not"),
    "another model": (
        lambda r: r.update(model="cheaper"),
        "another model answered: 'cheaper' and not 'market-teacher'",
    ),
    "no choices": (lambda r: r.update(choices=[]), "has no choices|has not one choice"),
    "choices null": (lambda r: r.update(choices=None), "has no choices|has not one choice"),
    "an error inside": (
        lambda r: (r.clear(), r.update(error={"message": "out of memory"})),
        "answers with an error: out of memory",
    ),
    "an error in a choice": (
        choices(lambda c: c.update(error={"message": "oom", "code": 502})),
        r"answers with an error \(502\): oom",
    ),
    "broken off": (
        choices(lambda c: c.update(finish_reason="abort")),
        r"broke the text off \(finish_reason abort\)",
    ),
    "no finish": (
        choices(lambda c: c.update(finish_reason=None)),
        r"broke the text off \(finish_reason None\)",
    ),
}
TEXTS = {
    "text null": (
        choices(lambda c: c.update(message={"content": None}, finish_reason="length")),
        "a text is missing",
    ),
    "text a number": (choices(lambda c: c.update(message={"content": 7})), "a text is missing"),
    "too many": (
        lambda r: r["choices"].append(r["choices"][0]),
        "3 texts came where 2 were asked for",
    ),
    "half a character": (
        choices(lambda c: c["message"].update(content="a\ud800b")),
        "holds .*ud800.*, half of a character",
    ),
    "no message": (choices(lambda c: c.pop("message")), "a text is missing"),
    "text empty": (
        choices(lambda c: c.update(message={"content": ""}, finish_reason="length")),
        "a text is empty",
    ),
    "withheld": (choices(lambda c: c.update(finish_reason="content_filter")), "withheld the text"),
    "too long": (
        lambda r: r["usage"].update(completion_tokens=999),
        "wrote 999 tokens where 12 were asked for",
    ),
}
GRADES = {
    "nan": (own(math.nan), "a log-prob is nan"),
    "infinite": (own(-math.inf), "a log-prob is -inf"),
    "null": (own(None), "a log-prob is None"),
    "a sentinel": (
        own(-9999.0),
        r"a log-prob is -9999\.0, which servers send for a token without any probability",
    ),
    "the least number": (own(-3.4e38), "without any probability"),
    "a token twice": (
        graded(lambda e: {**e, "0" + next(iter(e)): {"logprob": -9.0}}),
        r"lists token \d+ twice for one position",
    ),
    "positive": (own(0.5), "a log-prob is 0.5"),
    "a string": (own("-1"), "a log-prob is -1"),
    "true": (own(True), "a log-prob is True"),
    "more than one": (
        graded(lambda e: {i: v | {"logprob": -0.01} for i, v in e.items()}),
        "sum to more than one",
    ),
    "a token missing": (
        lambda r: r["choices"][0]["prompt_logprobs"].pop(),
        r"prompt_logprobs has \d+ entries for \d+ tokens",
    ),
    "a token null": (
        lambda r: r["choices"][0]["prompt_logprobs"].__setitem__(-1, None),
        "a token of the prompt has no log-probs",
    ),
    "no grades": (
        lambda r: r["choices"][0].pop("prompt_logprobs"),
        "prompt_logprobs has no entries",
    ),
    "other ids": (
        graded(lambda e: {str((int(i) + 11) % 70): v for i, v in e.items()}),
        "graded other tokens|and its own",
    ),
    "other tokens said": (
        lambda r: r["choices"][0].update(prompt_token_ids=[1, 2]),
        "graded other token ids than were sent",
    ),
    "shifted": (
        lambda r: r["choices"][0]["prompt_logprobs"].insert(
            1, r["choices"][0]["prompt_logprobs"].pop()
        ),
        "graded other tokens",
    ),
    "ids of a larger model": (
        graded(lambda e: {**dict(list(e.items())[:-1]), "70": {"logprob": -9}}),
        "token 70, and the student has 70",
    ),
    "names for ids": (graded(lambda e: {f"x{i}": v for i, v in e.items()}), "is not a token id"),
    "fewer": (
        graded(lambda e: dict(list(e.items())[:3])),
        "the server gives 3 log-probs a token where 6 were asked for",
    ),
    "more": (
        graded(lambda e: {**e, **{str(i): {"logprob": -50.0} for i in range(20, 40)}}),
        "and they are not the 6 likeliest",
    ),
}
FINAL = ("ids of a larger model", "fewer", "more")  # no accident: asked for once
CASES = [
    (kind, name, *fault)
    for kind, faults in (("texts", LINE | TEXTS), ("grades", LINE | GRADES))
    for name, fault in faults.items()
]


@pytest.mark.parametrize(
    ("kind", "name", "fault", "says"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES]
)
def test_the_same_weights_or_an_error_and_nothing_lost(kind, name, fault, says, wire, undisturbed):
    _, faults, url = wire
    run = run_on(url, kind)
    passing = [] if name in FINAL else [fault, None, fault]
    faults.queue = list(passing)
    next(run)
    assert faults.met == passing.count(fault)
    before = weights(run)
    faults.always = fault
    with pytest.raises(errors.TeacherError, match=says) as caught:
        next(run)
    assert faults.met > 0
    assert run.done == 1
    assert same(weights(run), before)
    assert "Nothing was trained on it and nothing paid for is lost." in str(caught.value)
    faults.clear()
    run.train()
    assert run.done == 2
    assert same(weights(run), undisturbed[kind])


def test_fewer_choices_than_asked_for(wire, undisturbed):
    """In passing: asked again for all.

    For good: the rest is asked for, so there are always as many as asked for.
    """
    _, faults, url = wire
    run = run_on(url, "texts")
    faults.queue = [lambda r: r["choices"].pop()]
    assert same(weights(run.train()), undisturbed["texts"])
    run = run_on(url, "texts")
    faults.always = lambda r: r.update(choices=r["choices"][:1])
    assert all(len(step.rollout) == 4 and all(step.rollout.texts) for step in run)


def patience(run: opd.Run, seconds: float) -> None:
    """Set the seconds after which a request counts as lost, short only while a fault is met."""
    teacher = run.teacher
    one = teacher.service if isinstance(teacher, TextServer) else teacher.text.service
    one.timeout, one.servers.all[0].client = seconds, None


@pytest.mark.parametrize("kind", METHODS)
def test_a_slow_server(kind, wire, undisturbed):
    _, faults, url = wire
    run = run_on(url, kind, concurrency=1)
    patience(run, 3.0)  # more than a busy machine needs, less than the fault takes
    faults.queue = ["slow"]
    next(run)
    assert faults.met == 1
    before = weights(run)
    faults.always = "slow"
    with pytest.raises(
        errors.TeacherError,
        match=r"no answer within 3 s \(asked 3 times\)\. .* Start the server or wait for it",
    ):
        next(run)
    assert same(weights(run), before)
    faults.clear()
    patience(run, 60)
    assert same(weights(run.train()), undisturbed[kind])


@pytest.mark.parametrize("mode", ["drop", "silent"])
@pytest.mark.parametrize("kind", METHODS)
def test_a_line_that_breaks(kind, mode, wire, undisturbed):
    """The connection is lost between two steps, for good; then it is back."""
    _, _, url = wire
    proxy = Proxy(int(url.split(":")[2].split("/")[0]))
    try:
        run = run_on(f"http://127.0.0.1:{proxy.port}/v1", kind, retries=1)
        next(run)
        before = weights(run)
        proxy.mode = mode
        proxy.hang_up()
        patience(run, 1.0)
        with pytest.raises(
            errors.TeacherError, match="no connection" if mode == "drop" else "no answer within"
        ):
            next(run)
        assert same(weights(run), before)
        proxy.mode = "pass"
        proxy.hang_up()
        patience(run, 60)
        end = weights(run.train())
    finally:
        proxy.close()
    # another address is another server, so its texts have seeds of their own; grades are the same
    # from anywhere
    assert kind == "texts" or same(end, undisturbed[kind])


def test_a_server_that_comes_back_elsewhere_is_not_needed_for_what_was_answered(wire, tmp_path):
    """Half of a step is answered, then the server dies; the next try asks for the other half."""
    server, faults, url = wire
    one = TextServer(url, cache=tmp_path / "c.sqlite", quiet=True, retries=0, concurrency=1)
    faults.queue = [None] * 4
    faults.always = (503, {})
    with pytest.raises(errors.TeacherError, match="answers 503"):
        one.write(TASK.prompts(6), max_new_tokens=3)
    faults.clear()
    assert len(server.requests) == 4
    assert len(one.write(TASK.prompts(6), max_new_tokens=3)) == 6
    assert len(server.requests) == 1 + 6


@pytest.mark.parametrize(
    ("said", "waits"),
    [("3", 3.0), ("0", 0.0), ("900", 120.0), ("soon", 0.01), ("nan", 0.0), ("-5", 0.0)],
)
def test_a_server_may_say_how_long_to_wait(said, waits, wire, monkeypatch):
    _, faults, url = wire
    waited = []
    one = service.Service(url)
    monkeypatch.setattr(
        one, "_stop", type("", (threading.Event,), {"wait": lambda self, s: waited.append(s)})()
    )
    faults.queue = [(429, {"retry-after": said})]
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "temperature": 1.0}
    assert (
        one.post(
            "/chat/completions", body, opd.teachers.Usage(1, 1, 1), lambda reply: reply["model"]
        )
        == "market-teacher"
    )
    assert waited == [pytest.approx(waits)]


def test_waits_grow_and_differ(monkeypatch):
    waits = [[service._pause(i) for i in range(8)] for _ in range(2)]
    assert waits[0] != waits[1]
    for i, wait in enumerate(waits[0]):
        assert 0.75 * min(8, 0.5 * 2**i) <= wait <= min(8, 0.5 * 2**i)


def test_what_cannot_get_better_is_asked_for_once(wire):
    server, faults, url = wire
    for status in (400, 401, 403, 404, 422):
        server.requests.clear()
        faults.clear()
        faults.always = (status, {})
        with pytest.raises(
            errors.TeacherError, match=f"answers {status}: .*made to fail"
        ) as caught:
            service.Service(url).post(
                "/chat/completions", {}, opd.teachers.Usage(1, 1, 1), lambda reply: reply
            )
        assert faults.met == 1
        assert caught.value.status == status
        assert ("OPDLAB_API_KEY" in str(caught.value)) == (status in (401, 403))
