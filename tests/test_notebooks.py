"""The committed notebooks: what a machine can check of them without running them."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import nbformat
import pytest

from opdlab import notebook
from opdlab.notebook import checking
from opdlab.notebook.freezing import CHART

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SOLUTION = re.compile(r"<summary>Solution</summary>\s*```python\n(.*?)```\s*</details>", re.DOTALL)
# before a solution that is folded away
FOLDED = "import math\n\nimport numpy as np\nimport torch\n\nimport opdlab as opd\n\n"


def read(path):
    book = nbformat.read(path, as_version=4)
    text = {
        kind: [c.source for c in book.cells if c.cell_type == kind] for kind in ("markdown", "code")
    }
    return book, text


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_frozen_and_fresh(path):
    text = path.read_text(encoding="utf-8")
    book = json.loads(text)
    nbformat.validate(book)
    assert len(text.encode()) <= notebook.LIMIT
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    assert set(book["metadata"]) == {"kernelspec", "language_info", "opdlab"}  # no state of widgets
    assert book["metadata"]["opdlab"]["source"] == notebook.hash_source(book), (
        "stale outputs: run make notebooks"
    )
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert "application/vnd.jupyter.widget-view+json" not in text
    assert not re.search(r"/(?:home|root|work|Users|tmp)/", text)  # no folder of a machine


def test_charts_have_pictures(path):
    data = [
        o.get("data", {}) for c in read(path)[0].cells if c.cell_type == "code" for o in c.outputs
    ]
    assert all("image/png" in each for each in data if CHART in each)


def test_follows_the_skeleton(path):
    book, text = read(path)
    assert re.match(rf"# {path.stem[:2]} · ", book.cells[0].source), "a title with the number"
    assert "By the end" in book.cells[0].source
    assert text["code"][0].count("opd.notebook.setup(") == 1
    assert any("assert " in source for source in text["code"])
    assert sum("interact(" in source for source in text["code"]) == 0  # stalls executors
    headings = [
        line for source in text["markdown"] for line in source.splitlines() if line.startswith("#")
    ]
    assert len(headings) == len(set(headings))


def test_links_lead_somewhere(path):
    for source in read(path)[1]["markdown"]:
        for link in re.findall(r"\]\(([^)#\s]+)\)", source):
            assert link.startswith("https://") or (FOLDER / link).exists(), link


def test_exercises_are_all_there_in_order_with_stubs(path):
    written = [
        re.findall(r'exercise\("([^"]+)"\)\ndef \w+\(.*\):\n    raise NotImplementedError', s)
        for s in read(path)[1]["code"]
    ]
    used = [key for keys in written for key in keys]
    number = path.stem[:2]
    assert used == list(
        checking.list_exercises(number) if number in checking.list_notebooks() else []
    )
    assert sum(s.count("notebook.exercise(") for s in read(path)[1]["code"]) == len(used)
    assert len(used) >= 2


def test_folded_solutions_are_right(path, tmp_path):
    text = read(path)[1]
    folded = [code for source in text["markdown"] for code in SOLUTION.findall(source)]
    named = [
        found
        for source in text["code"]
        for found in re.findall(r'exercise\("([^"]+)"\)\ndef (\w+)\(', source)
    ]
    assert len(folded) == len(named)
    for code, (key, name) in zip(folded, named, strict=True):
        file = tmp_path / f"{key}.py"
        file.write_text(FOLDED + code, encoding="utf-8")
        assert checking.find_exercise(key).judge(runpy.run_path(str(file))[name]) is None, key


def test_index_lists_all():
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \d\d \| \[\w+\]\((\w+\.ipynb)\) \|", index, re.MULTILINE) == [
        path.name for path in NOTEBOOKS
    ]
