"""docs/errors.md lists wrong uses with what opdlab says to them; the calls themselves write it.

`OPDLAB_WRITE=1 python -m pytest tests/test_docs_errors.py` writes the page anew.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import test_wrong_uses as wrong
from test_wrong_uses import World

import opdlab as opd
from opdlab.errors import OpdlabError

PAGE = Path(__file__).parent.parent / "docs" / "errors.md"
HEAD = (
    "# What opdlab says to wrong uses\n\n"
    "What cannot be right is refused before anything is computed, with the value and a way out."
    " All errors are subclasses of\n`opdlab.OpdlabError`; those about values are a `ValueError`"
    " too. This page is made by `tests/test_docs_errors.py`, which makes\nevery call in it. `w`"
    " stands for the shipped models and their task, and `w.distill(…)` for `opdlab.distill(student,"
    " teacher, task,\nsteps=2, batch=2, …)`.\n"
)
Case = tuple[str, Callable[[World], Any]]


def by_keywords(name: str, cases: list[Any], call: Callable[[World, dict], Any]) -> Iterator[Case]:
    for given, _ in cases:
        words = ", ".join(f"{key}={describe(value)}" for key, value in given.items())
        yield f"{name}({words})", lambda w, given=given: call(w, given)


def by_source(cases: list[Any]) -> Iterator[Case]:
    """Cases whose call is a lambda; the use is the lambda's own code."""
    for call, _ in cases:
        takes_world = call.__code__.co_argcount > 0
        yield source_of(call), call if takes_world else lambda w, call=call: call()


def describe(value: object) -> str:
    """An argument as code; objects made for a test are shown by what they are."""
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return re.sub(r"<(?:function|module|class|bound method) '?([\w.<>]+)'?[^>]*>+", r"\1", text)


def source_of(call: Callable[..., Any]) -> str:
    """The body of a lambda, found by the place of its code in the file."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(call)))
    found = [
        node.body
        for node in ast.walk(tree)
        if isinstance(node, ast.Lambda) and lies_in(call.__code__, node)
    ]
    innermost = min(found, key=lambda body: len(ast.unparse(body)))
    return ast.unparse(innermost)


def lies_in(code: CodeType, node: ast.Lambda) -> bool:
    places = [place for place in code.co_positions() if None not in place and place[3] > place[2]]
    body = node.body
    return any(
        (line, end, column, last)
        == (body.lineno, body.end_lineno, body.col_offset, body.end_col_offset)
        for line, end, column, last in places
    )


def sections() -> dict[str, list[Case]]:
    """All wrong uses of the tests, as (the use, the call)."""

    def distill(w: World, given: dict[str, Any]) -> Any:
        return w.distill(**given)

    def sample(w: World, given: dict[str, Any]) -> Any:
        options = {"max_new_tokens": 2} | given
        return w.student.sample(w.task.prompts(2), **options)

    def of_method(w: World, method: Any) -> Any:
        return w.distill(method=method)

    methods = [
        (f"w.distill(method={describe(method)})", lambda w, method=method: of_method(w, method))
        for method, _ in wrong.METHODS
        if "object at 0x" not in repr(method) and "<lambda>" not in repr(method)
    ]
    needs = [
        (
            f"opdlab.method(needs=({name!r},))(loss)",
            lambda _, name=name: opd.method(needs=(name,))(wrong.of_rows),
        )
        for name, _ in wrong.NEEDS
    ]
    return {
        "Settings": [
            *by_keywords("w.distill", wrong.SETTINGS, distill),
            *by_keywords("w.distill", wrong.WITHOUT_EFFECT, distill),
        ],
        "Objects in the wrong place": [*by_source(wrong.PLACES)],
        "Methods": methods,
        "Names in `needs`": needs,
        "Fields of methods and losses": [*by_source(wrong.FIELDS)],
        "Sampling": [
            *by_keywords("student.sample", wrong.SAMPLING, sample),
            *by_source(wrong.PROMPTS),
        ],
        "Diagnoses": [*by_source(wrong.DIAGNOSES)],
        "Views": [*by_source(wrong.VIEWS)],
    }


def draw(world: World) -> str:
    """Make every call and write what is said."""
    parts = [HEAD]
    for title, cases in sections().items():
        rows = []
        for use, call in cases:
            with pytest.raises(OpdlabError) as caught:
                call(world)
            rows.append(f"| {cell(use)} | {type(caught.value).__name__} | {cell(caught.value)} |")
        head = "| use | error | what it says |\n| --- | --- | --- |\n"
        parts.append(f"## {title}\n\n{head}" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def cell(text: object) -> str:
    """A text as code in a table of Markdown, without what differs from machine to machine."""
    line = re.sub(r" at 0x[0-9a-f]+", "", str(text)).replace("|", "\\|")
    line = re.sub(r"\.\.\.x[0-9a-f]{6,}>", "...>", line)  # the end of a shortened address
    line = re.sub(r"\b(Policy|Task)\([^()]*?\.\.\.[^)]*\)", r"\1(…)", line)
    return f"`{line}`" if "`" not in line else f"`` {line} ``"


def test_the_page_says_what_opdlab_says():
    world = World(*opd.load("market"))
    said = draw(world)
    if os.environ.get("OPDLAB_WRITE"):
        PAGE.write_text(said, encoding="utf-8")
    assert said.count("\n| ") - 2 * said.count("## ") >= 240
    assert str(Path(__file__).parents[1]) not in said
    assert PAGE.read_text(encoding="utf-8") == said, "write it anew: OPDLAB_WRITE=1"
