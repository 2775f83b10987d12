"""Parts of a user's own that fail or return something else are refused, or told as an error."""

from __future__ import annotations

from dataclasses import replace

import pytest

import opdlab as opd
from opdlab.data.conversation import Turn
from opdlab.errors import BadVerifier, InvalidValue, OpdlabError
from opdlab.tasks import Environment, Tools
from opdlab.tasks.environments import run_call
from opdlab.tasks.market import model


def price(item: str) -> str:
    """Look up a price.

    Args:
        item: The goods.
    """
    return "38"


@pytest.fixture(scope="module")
def market():
    return opd.load("market", tools=True)


def write(market, environment) -> opd.Rollout:
    student, _, task = market
    return student.sample(task.prompts(1), max_new_tokens=90, seed=0, environment=environment)


def fail(_: object) -> None:
    raise ZeroDivisionError


def test_a_parser_that_fails_makes_a_call_that_cannot_be_read(market):
    messages = write(market, Tools(price, parse=fail)).texts[0].messages
    assert messages[1]["content"] == "Error: the turn cannot be parsed: ZeroDivisionError"


@pytest.mark.parametrize("wrong", [None, "a text", Turn("a", ({"name": "price"},))])
def test_a_parser_that_returns_something_else_is_refused(market, wrong):
    with pytest.raises(InvalidValue, match=r"Return an opdlab\.data.conversation.Turn"):
        write(market, Tools(price, parse=lambda text: wrong))


def test_what_is_no_parser_and_what_must_be_awaited_are_refused():
    async def later(item: str) -> str:
        """Look up a price.

        Args:
            item: The goods.
        """
        return item

    with pytest.raises(InvalidValue, match="parse='x'"):
        Tools(price, parse="x")
    with pytest.raises(InvalidValue, match="coroutine later"):
        Tools(later)


def test_an_environment_cannot_change_what_was_written(market):
    class Vandal(Environment):
        max_turns = 2

        def reply(self, prompt, messages, seed):
            for message in messages:
                message["content"] = "changed"
            return [{"role": "user", "content": "Sure?"}] if len(messages) == 1 else []

    student = market[0]
    rollout = write(market, Vandal())
    first = rollout.ids[0][rollout.learn[0] & (rollout.turn[0] == 0)]
    written = student.tokenizer.decode(first, skip_special_tokens=True)
    messages = rollout.texts[0].messages
    assert "changed" not in [message["content"] for message in messages]
    assert str(messages[0]["content"]).strip() in written or messages[0].get("tool_calls")


def test_an_environment_that_forgets_to_return_is_told_so(market):
    class Forgets(Environment):
        def reply(self, prompt, messages, seed):
            return None

    with pytest.raises(OpdlabError, match=r"replied None on prompt .*\[\] ends the conversation"):
        write(market, Forgets())


@pytest.mark.parametrize("given", [[{"role": "judge", "content": "no"}], [3], "no", 3])
def test_a_reply_that_is_none_names_environment_and_prompt(market, given):
    class Mutters(Environment):
        def reply(self, prompt, messages, seed):
            return given

    with pytest.raises(
        OpdlabError, match=r"environment Mutters replied on prompt .* after turn 0 with something"
    ):
        write(market, Mutters())


def test_an_error_without_words_is_told_by_its_name():
    class Wordless(Exception):
        def __str__(self):
            raise RuntimeError

    def tool():
        raise Wordless

    assert run_call(tool, {}, 5) == "Error: Wordless"


def test_a_feedback_that_fails_names_the_prompt():
    task = replace(opd.tasks.market(), feedback=lambda prompt, text: 1 / 0)
    method = opd.SDPO(solution_form="hint {}", feedback_form="hint {}")
    run = opd.distill(
        model("student"), None, task, method=method, n=2, steps=1, batch=4, quiet=True
    )
    with pytest.raises(BadVerifier, match=r"feedback failed on prompt .*ZeroDivisionError"):
        run.train()


@pytest.mark.parametrize("route", [fail, lambda: "a", {"a": 1e308, "b": 1e308}])
def test_a_route_that_fails_is_refused(route):
    def train():
        many = opd.teachers.MultiTeacher(
            {"a": model("teacher"), "b": model("teacher")}, route=route
        )
        pair = (model("student"), many, opd.tasks.market())
        opd.distill(*pair, steps=1, batch=2, quiet=True).train()

    with pytest.raises(InvalidValue, match="route"):
        train()
