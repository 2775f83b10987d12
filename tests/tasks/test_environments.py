"""Plain functions as tools: what they are told, what they answer, and how they fail."""

from __future__ import annotations

import sys
import time

import pytest

from opdlab import Prompt
from opdlab.errors import InvalidValue
from opdlab.tasks import Tools, from_records

CHAT = Prompt(messages=({"role": "user", "content": "figs?"},))


def price(item: str, count: int = 1) -> int:
    """Look up what some goods cost.

    Args:
        item: The name of the goods.
        count: How many.
    """
    return {"figs": 38}[item] * count


def say(text: str) -> str:
    """Say a text again.

    Args:
        text: The text.
    """
    return text


def fail(how: str) -> None:
    """Fail in some way.

    Args:
        how: The way.
    """
    if how == "exit":
        sys.exit(3)
    if how == "slow":
        time.sleep(30)
    if how == "surrogate":
        raise ValueError("\ud800")
    raise ZeroDivisionError("by zero")


def answer(tools: Tools, *calls: tuple[str, dict]) -> list[str]:
    """The contents of the reply to some calls."""
    message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": name, "arguments": given}} for name, given in calls],
    }
    reply = tools.reply(CHAT, (message,), 0)
    assert all(one["role"] == "tool" for one in reply)
    return [one["content"] for one in reply]


def test_schemas_come_from_type_hints_and_docstrings():
    tools = Tools(price, say)
    first = tools.tools[0]["function"]
    assert first["name"] == "price"
    assert first["description"] == "Look up what some goods cost."
    assert first["parameters"]["required"] == ["item"]
    assert first["parameters"]["properties"]["count"]["type"] == "integer"


def test_calls_are_answered_in_order_texts_as_they_are_and_the_rest_as_json():
    tools = Tools(price, say)
    assert answer(tools, ("price", {"item": "figs", "count": 2}), ("say", {"text": "é"})) == [
        "76",
        "é",
    ]
    assert answer(Tools(dict_of), ("dict_of", {"key": "a"})) == ['{"a": [1, null]}']


def report(kind: str) -> dict:
    """Report something.

    Args:
        kind: Of what kind.
    """
    return {"café ☕": {"nan": [float("nan")], "inf": float("inf"), "plain": "日本"}[kind]}


def test_json_is_that_of_chat_templates_and_numbers_that_it_lacks_are_errors():
    from transformers.utils.chat_template_utils import _compile_jinja_template

    plain = _compile_jinja_template("{{ value | tojson }}").render(value=report("plain"))
    assert answer(Tools(report), ("report", {"kind": "plain"})) == [plain]
    assert "☕" in plain
    for kind in ("nan", "inf"):
        (said,) = answer(Tools(report), ("report", {"kind": kind}))
        assert (
            said == "Error: ValueError: the result holds NaN or Infinity, which JSON does not have"
        )


def dict_of(key: str) -> dict:
    """Make a dict.

    Args:
        key: Its key.
    """
    return {key: [1, None]}


def test_a_turn_without_calls_ends_the_conversation():
    assert Tools(price).reply(CHAT, ({"role": "assistant", "content": "38"},), 0) == []


def test_every_failure_becomes_a_message():
    tools = Tools(price, fail, seconds=0.2)
    contents = answer(
        tools,
        ("price", {"item": "hats"}),
        ("price", {"goods": "figs"}),
        ("cost", {"item": "figs"}),
        ("fail", {"how": "exit"}),
        ("fail", {"how": "divide"}),
        ("fail", {"how": "surrogate"}),
    )
    assert contents[0] == "Error: KeyError: 'hats'"
    assert contents[1] == "Error: missing a required argument: 'item'"
    assert contents[2] == "Error: there is no tool cost. There is price, fail."
    assert contents[3] == "Error: SystemExit: 3"
    assert contents[4] == "Error: ZeroDivisionError: by zero"
    assert contents[5] == "Error: ValueError: ?"
    broken = {"role": "assistant", "content": "<tool_call>", "error": "it is not valid JSON"}
    assert tools.reply(CHAT, (broken,), 0)[0]["content"] == "Error: it is not valid JSON"


def test_a_slow_call_is_not_waited_for():
    began = time.monotonic()
    assert answer(Tools(fail, seconds=0.2), ("fail", {"how": "slow"})) == [
        "Error: fail took longer than 0.2 seconds"
    ]
    assert time.monotonic() - began < 15


def test_functions_that_cannot_be_described_are_refused_in_words():
    def bare(item):
        return item

    def untold(item: str) -> str:
        """Say it."""
        return item

    for function in (bare, untold):
        with pytest.raises(InvalidValue, match=f"cannot describe {function.__name__} to a model"):
            Tools(function)
    with pytest.raises(InvalidValue, match="Use functions with type hints"):
        Tools("price")
    with pytest.raises(InvalidValue, match="each with a name of its own"):
        Tools(price, price)
    with pytest.raises(InvalidValue, match="seconds=0"):
        Tools(price, seconds=0)


def test_a_task_shows_its_tools_in_every_prompt():
    records = [{"messages": [{"role": "user", "content": f"figs {i}?"}]} for i in range(8)]
    task = from_records(records, environment=Tools(price), verify=lambda prompt, text: 1.0)
    for prompts in (task.prompts(3), task.prompts(1, split="test"), task.training_batch(4, 0, 0)):
        assert all(prompt.tools == Tools(price).tools for prompt in prompts)
    with pytest.raises(InvalidValue, match="environment is 'price'"):
        from_records(records, environment="price")
