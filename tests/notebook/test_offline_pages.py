"""Notebooks as HTML files that fetch nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest

import opdlab as opd
from opdlab.notebook import to_html
from opdlab.notebook.exporting import take_formulas

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def write_book(folder, *cells):
    path = folder / "x.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)
    return path


def test_formulas_become_mathml_and_code_keeps_its_dollars():
    drawn: dict[str, str] = {}
    text = take_formulas("Cost $a_1$ and\n\n$$\\sum_t x_t$$\n\n`$HOME` and\n```\n$b$\n```", drawn)
    assert len(drawn) == 2
    first, second = drawn.values()
    assert "<msub><mi>a</mi><mn>1</mn></msub>" in first
    assert 'display="block"' in second
    assert "`$HOME` and\n```\n$b$\n```" in text
    assert text.count("$") == 3


def test_prices_are_no_formulas():
    assert take_formulas("It costs $5 or $6 to run.", {}) == "It costs $5 or $6 to run."


def test_a_formula_that_cannot_be_drawn_is_named():
    with pytest.raises(opd.OpdlabError, match=r"The formula '\\\\left\(' cannot be drawn"):
        take_formulas(r"$\left($", {})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_all_formulas_of_the_series_can_be_drawn(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            drawn: dict[str, str] = {}
            left = take_formulas("".join(cell["source"]), drawn)
            assert "$" not in re.sub(r"```.*?```|`[^`\n]*`", "", left, flags=re.DOTALL)
            # a command that the converter does not know is left as it stands
            assert not re.findall(r"<m\w+>\\[a-zA-Z]+", "".join(drawn.values()))


def test_a_page_fetches_nothing_and_leaves_folded_code_out(tmp_path):
    folded = {"jupyter": {"source_hidden": True}}
    hidden = nbformat.v4.new_code_cell("secret_setup()", metadata=folded)
    code = "```python\nanswer = 1\n```"
    fold = f"<details><summary>Solution</summary>\n\n{code}\n</details>\n\nAfter $x$."
    book = write_book(
        tmp_path, nbformat.v4.new_markdown_cell(fold), hidden, nbformat.v4.new_code_cell("shown()")
    )
    page = to_html(book, tmp_path / "pages" / "x.html").read_text(encoding="utf-8")
    assert "shown" in page
    assert "secret_setup" not in page
    assert "<math" in page
    assert not re.search(r'<(script|link)[^>]+(src|href)="https?:', page)
    details = page[page.index("<details>") : page.index("</details>")]
    assert "answer" in details  # the solution is folded
    assert "After" not in details


def test_what_is_no_notebook_is_refused(tmp_path):
    (tmp_path / "x.ipynb").write_text("{}")
    with pytest.raises(opd.OpdlabError, match="no notebook that can be read"):
        to_html(tmp_path / "x.ipynb", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()
