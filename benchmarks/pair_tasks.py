"""The two tasks of the real pair: a form that only the teacher is told, and a skill.

Both are lists of records with a verifier, so that `opdlab distill` reads them as a JSONL file.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opdlab.data.prompt import Prompt
from opdlab.tasks import Task, from_records

SYSTEM = "You are a helpful assistant."
HELD_OUT = 64

Record = dict[str, Any]


@dataclass(frozen=True)
class RecordTask:
    """A task as records.

    Attributes:
        name: Its name.
        records: Makes its records.
        verify: Scores a text, 0 or 1.
        max_new_tokens: Length limit of an answer.
        has_hint: Whether the teacher is told each record's hint.
    """

    name: str
    records: Callable[[], list[Record]]
    verify: Callable[[Prompt, str], float]
    max_new_tokens: int
    has_hint: bool

    def task(self) -> Task:
        return from_records(
            self.records(),
            name=self.name,
            test=HELD_OUT,
            verify=self.verify,
            max_new_tokens=self.max_new_tokens,
        )


def ask(question: str) -> list[dict[str, str]]:
    """A short system message, since that of Qwen's template is longer than the questions."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


# The form: a product, in JSON. Only the teacher is told that JSON is wanted.

RULE = (
    "Reply with one JSON object with the keys product (a number) and even (true or false), and"
    " nothing else"
)
_FENCE = re.compile(r"```(?:json)?\s*\n?(.*?)\n?```", re.DOTALL)


def form_records() -> list[Record]:
    """All products of a number from 11 to 99 and one from 2 to 9."""
    return [
        {"messages": ask(f"What is {a} * {b}?"), "answer": str(a * b), "hint": RULE}
        for a in range(11, 100)
        for b in range(2, 10)
    ]


def follows_form(prompt: Prompt, text: str) -> float:
    """1.0 for a JSON object with the two keys and values of their types; the numbers may be wrong.

    A code fence around it is taken off.
    """
    stripped = text.strip()
    fenced = _FENCE.fullmatch(stripped)
    try:
        value = json.loads(fenced[1] if fenced else stripped)
    except ValueError:
        return 0.0
    return float(
        isinstance(value, dict)
        and set(value) == {"product", "even"}
        and isinstance(value["even"], bool)
        and isinstance(value["product"], int | float)
        and not isinstance(value["product"], bool)
    )


# The skill: which exception a few lines of Python raise. Both models get the same question.

PROGRAMS = (
    ("{x} = [{a}, {b}, {c}]\n{x}[{b}]", "IndexError"),
    ('"{w}"[{a}]', "IndexError"),
    ('{x} = {{"{w}": {a}}}\n{x}["{v}"]', "KeyError"),
    ("{{{a}: {b}}}.pop({c})", "KeyError"),
    ('"{w}" + {a}', "TypeError"),
    ("len({a})", "TypeError"),
    ("{x} = ({a}, {b})\n{x}[0] = {c}", "TypeError"),
    ("{a} / 0", "ZeroDivisionError"),
    ("{x} = {b} - {b}\n{a} % {x}", "ZeroDivisionError"),
    ('int("{w}")', "ValueError"),
    ('float("{w}")', "ValueError"),
    ("[{a}, {b}].index({c})", "ValueError"),
    ("{x} = {a}\n{x}.append({b})", "AttributeError"),
    ('"{w}".push("{v}")', "AttributeError"),
    ("print({w})", "NameError"),
    ("{x} = {w} + 1", "NameError"),
)
EXCEPTIONS = tuple(dict.fromkeys(exception for _, exception in PROGRAMS))
WORDS = (
    "apple banana cherry orange window garden planet silver yellow purple dragon rocket bridge"
    " castle forest hunter island jacket kettle ladder market nature office pencil rabbit school"
    " ticket valley winter zebra candle dinner engine finger guitar hammer insect jungle kitten"
    " lemon mirror needle onion pepper queen river summer tunnel violin whale"
).split()


def exception_records(count: int = 480) -> list[Record]:
    """Programs that raise an exception each; the same ones at every call."""
    rng = random.Random(0)
    records: dict[str, Record] = {}
    while len(records) < count:
        program, exception = PROGRAMS[len(records) % len(PROGRAMS)]
        a, b, c = rng.sample(range(10, 50), 3)
        w, v = rng.sample(WORDS, 2)
        code = program.format(a=a, b=b, c=c, w=w, v=v, x=rng.choice("dkmnpqst"))
        question = (
            f"Which exception does this Python code raise?\n\n{code}\n\n"
            "Answer with the name of the exception only."
        )
        records.setdefault(code, {"messages": ask(question), "answer": exception, "id": code})
    return list(records.values())


def names_exception(prompt: Prompt, text: str) -> float:
    """1.0 for the exception's name; quotes, backticks and a period around it are taken off."""
    return float(text.strip().strip("`'\".") == prompt.answer)


TASKS = {
    "form": RecordTask("form", form_records, follows_form, 24, has_hint=True),
    "skill": RecordTask("skill", exception_records, names_exception, 8, has_hint=False),
}
