"""The formats that docs/data.md lists are the formats that are read."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from opdlab.tasks.records import ANSWERED, ASKED, read_prompts

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^\| (.+?) \| `(\{.+\})` \|$", PAGE, re.MULTILINE)


def test_the_table_has_examples_of_every_column():
    assert len(EXAMPLES) == 9
    for column in (*ASKED, "completion"):
        assert any(f'"{column}":' in example for _, example in EXAMPLES), column


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_an_example_is_read_as_the_page_says(name, example):
    (prompt,) = read_prompts([ast.literal_eval(example)])
    asked = prompt.text if prompt.messages is None else prompt.messages[-1]["content"]
    assert (asked, prompt.answer) == ("Hi", "4"), name


def test_the_page_names_the_columns_in_their_order():
    assert f"the first of {', '.join(f'`{name}`' for name in ASKED)} that is there" in PAGE
    assert all(f"`{name}`" in PAGE for name in ANSWERED)
