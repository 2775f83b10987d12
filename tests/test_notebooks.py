"""The committed notebooks: everything that can be checked without running them."""

from __future__ import annotations

import ast
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

WIDGET = "application/vnd.jupyter.widget-view+json"
FOLDER_OF_A_MACHINE = re.compile(r"/(?:home|root|work|Users|tmp)/")
TASK = re.compile(r"^\| .+ \| (\d+) \| ([●○]{3}) \|$", re.MULTILINE)
TOTAL = re.compile(
    r"\*\*What you will do\*\*"
    r"(?: \((\d+) minutes(?: with the exercises|, and a project of (\d+))\))?"
)
POINTS = re.compile(r"^\| .+ \| (\d+) \|$", re.MULTILINE)
WITH_PROJECT = ("01", "13", "24", "32", "41", "50")
LINK = re.compile(r"\]\(([^)#\s]+)\)")
STUB = re.compile(r'exercise\("([^"]+)"\)\ndef (\w+)\(.*\):\n    raise NotImplementedError')
SOLUTION = re.compile(r"<summary>Solution</summary>\s*```python\n(.*?)```\s*</details>", re.DOTALL)
INDEX_ROW = re.compile(r"^\| \d\d \| \[\w+\]\((\w+\.ipynb)\) \|", re.MULTILINE)

MINUTES = re.compile(
    r"^\| \d\d \| \[(\w+)\]\(.+ \| (\d+)(, and a project)?(?: of (\d+))? \|[^|]+\|$",
    re.MULTILINE,
)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def book(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture
def code(book):
    return [cell.source for cell in book.cells if cell.cell_type == "code"]


@pytest.fixture
def text(book):
    return [cell.source for cell in book.cells if cell.cell_type == "markdown"]


def test_frozen_and_fresh(path):
    raw = path.read_text(encoding="utf-8")
    book = json.loads(raw)
    nbformat.validate(book)
    assert len(raw.encode()) <= notebook.LIMIT
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    assert set(book["metadata"]) == {"kernelspec", "language_info", "opdlab"}  # no widget state
    assert book["metadata"]["opdlab"]["source"] == notebook.hash_source(book), (
        "stale outputs: run make notebooks"
    )
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert WIDGET not in raw
    assert not FOLDER_OF_A_MACHINE.search(raw)


def test_charts_have_pictures(book):
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    charts = [output.data for output in outputs if CHART in output.get("data", {})]
    assert all("image/png" in data for data in charts)


def test_follows_the_skeleton(path, book, code, text):
    title = book.cells[0].source
    assert re.match(rf"# {path.stem[:2]} · ", title), "a title with the number"
    assert "By the end" in title
    assert code[0].count("opd.notebook.setup(") == 1
    assert any("assert " in source for source in code)
    assert not any("interact(" in source for source in code)  # it stalls executors
    lines = [line for source in text for line in source.splitlines()]
    headings = [line for line in lines if line.startswith("#")]
    assert len(headings) == len(set(headings))


def test_the_result_stands_before_the_code(book):
    """`tests/browser/measure_pages.py` measures the pages themselves."""
    kinds = [cell.cell_type for cell in book.cells]
    assert kinds[:3] == ["markdown", "code", "markdown"]
    assert "## The result first" in book.cells[2].source
    setup = book.cells[1]
    assert "opd.notebook.setup(" in setup.source
    assert setup.metadata.jupyter.source_hidden  # the imports are folded
    first = next(i for i, cell in enumerate(book.cells) if TOTAL.search(cell.source))
    shown = [cell for cell in book.cells[3:first] if cell.cell_type == "code"]
    assert any(output.get("data") for cell in shown for output in cell.outputs)


def test_says_what_there_is_to_do_with_minutes_and_difficulty(text):
    (plan,) = [source for source in text if TOTAL.search(source)]
    tasks = TASK.findall(plan)
    assert len(tasks) >= 5
    minutes = sum(int(number) for number, _ in tasks)
    said = TOTAL.search(plan)
    assert said[1] is None or int(said[1]) + int(said[2] or 0) == minutes
    assert "●○○" in [difficulty for _, difficulty in tasks]  # an easy beginning
    assert "glossary.md" in plan


def test_asks_for_a_prediction_before_a_result(text):
    assert any("**Predict first" in source for source in text)


def test_projects_have_a_rubric(path, text):
    projects = [source for source in text if "## Project · " in source]
    assert len(projects) == (path.stem[:2] in WITH_PROJECT)
    for project in projects:
        rubric = project[project.index("## Project · ") :].partition("\n## What this shows")[0]
        assert sum(int(points) for points in POINTS.findall(rubric)) == 10


def test_links_lead_somewhere(text):
    for source in text:
        for link in LINK.findall(source):
            assert link.startswith("https://") or (FOLDER / link).exists(), link


def test_exercises_are_all_there_in_order_with_stubs(path, code):
    number = path.stem[:2]
    known = checking.list_exercises(number) if number in checking.list_notebooks() else {}
    stubs = STUB.findall("\n".join(code))
    assert [key for key, _ in stubs] == list(known)
    assert sum(source.count("notebook.exercise(") for source in code) == len(stubs)
    assert len(stubs) >= 2


def test_folded_solutions_are_right(code, text, tmp_path):
    solutions = SOLUTION.findall("\n".join(text))
    stubs = STUB.findall("\n".join(code))
    assert len(solutions) == len(stubs)
    imports = _list_imports(code)
    for solution, (key, name) in zip(solutions, stubs, strict=True):
        file = tmp_path / f"{key}.py"
        # Only the notebook's own imports: a reader pastes the solution there.
        file.write_text(imports + solution, encoding="utf-8")
        function = runpy.run_path(str(file))[name]
        assert checking.find_exercise(key).judge(function) is None, key


def _list_imports(code):
    statements = [statement for source in code for statement in ast.parse(source).body]
    imports = [one for one in statements if isinstance(one, ast.Import | ast.ImportFrom)]
    return "".join(f"{ast.unparse(one)}\n" for one in imports)


def test_the_index_says_the_minutes_of_the_notebook(path, text):
    """Those of a project stand apart, in the notebook as in the index."""
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    found = {name: said for name, *said in MINUTES.findall(index)}
    minutes, project, of_project = found[path.stem]
    (plan,) = [source for source in text if TOTAL.search(source)]
    tasks = [line for line in plan.splitlines() if TASK.match(line)]
    lessons = [line for line in tasks if not line.startswith("| Project")]
    assert int(minutes) == sum(int(TASK.match(line)[1]) for line in lessons)
    assert bool(project) == (len(lessons) < len(tasks))
    assert not of_project or TOTAL.search(plan)[2] == of_project


def test_the_index_lists_all():
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    listed = INDEX_ROW.findall(index)
    assert sorted(listed) == [path.name for path in NOTEBOOKS]
    # In the order of reading: the introduction, what goes deeper, and cases by number.
    first = ["00", "01", "10", "20", "11", "12", "21", "13"]
    numbers = [name[:2] for name in listed]
    assert numbers == first + sorted(set(numbers) - set(first))
