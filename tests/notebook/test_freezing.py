"""Running notebooks and freezing their outputs."""

from __future__ import annotations

import base64
import io
import re
import shutil

import nbformat
import pytest

import opdlab as opd
from opdlab import notebook
from opdlab.notebook.freezing import CHART, CHART_TEXT

BLUE = (0x00, 0x72, 0xB2)


def write_notebook(folder, *sources):
    """Write a notebook with these code cells, in a folder of its own."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    path = folder / "nb" / "x.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(book, path)
    return path


def read_cells(path):
    return nbformat.read(path, as_version=4).cells


def set_outputs(path, *outputs):
    book = nbformat.read(path, as_version=4)
    book.cells[0].outputs = list(outputs)
    nbformat.write(book, path)


def test_freeze_keeps_results_and_drops_what_changes_by_itself(tmp_path):
    path = write_notebook(
        tmp_path,
        "import os, sys\nprint('kept')\nprint('gone', file=sys.stderr)",
        "print(os.getcwd())",
        "1 + 1",
    )
    notebook.execute(path)
    size = notebook.freeze(path)
    book = nbformat.read(path, as_version=4)
    assert [output["text"] for output in book.cells[0].outputs] == ["kept\n"]
    assert str(tmp_path) not in path.read_text()
    assert book.cells[2].outputs[0]["data"]["text/plain"] == "2"
    assert notebook.freeze(path) == size  # freezing twice changes nothing


def test_the_checksum_depends_on_code_only(tmp_path):
    path = write_notebook(tmp_path, "1", "2")
    notebook.freeze(path)
    book = nbformat.read(path, as_version=4)
    assert book.metadata["opdlab"]["source"] == notebook.hash_source(book)
    book.cells.insert(0, nbformat.v4.new_markdown_cell("# New words"))
    assert book.metadata["opdlab"]["source"] == notebook.hash_source(book)
    book.cells[2].source = "3"
    assert book.metadata["opdlab"]["source"] != notebook.hash_source(book)


def test_the_same_results_are_the_same_file(tmp_path):
    styled = "table = lambda n: pd.DataFrame({'T_abcde': [n]}).style.highlight_max()"
    sources = (
        f"import pandas as pd\n{styled}\ntable(1)",
        "table(2)",
        "object()",
        "import sys, time\nprint('a')\nsys.stdout.flush()\ntime.sleep(0.5)\nprint('b')",
    )
    texts = []
    for name in "ab":
        path = write_notebook(tmp_path / name, *sources)
        notebook.execute(path)
        notebook.freeze(path)
        # nbformat names the cells at random.
        texts.append(re.sub(r'"id": "\w+"', "", path.read_text()))
    assert texts[0] == texts[1]
    cells = read_cells(path)
    first, second = (cell.outputs[0]["data"]["text/html"] for cell in cells[:2])
    assert '<table id="T_00000">' in first
    assert "#T_00000_row0_col0" in first
    assert '<table id="T_00001">' in second
    assert "T_abcde" in second  # the name of a column, which stays
    assert cells[2].outputs[0]["data"]["text/plain"] == "<object>"
    assert [output["text"] for output in cells[3].outputs] == ["a\nb\n"]


def test_freeze_drops_progress_bars_of_tqdm(tmp_path):
    source = (
        "from tqdm.notebook import tqdm\n"
        "for x in tqdm(range(3), desc='Loading'):\n    pass\n"
        "print('kept')"
    )
    path = write_notebook(tmp_path, source)
    notebook.execute(path)
    outputs = read_cells(path)[0].outputs
    assert any("Loading" in o.get("data", {}).get("text/plain", "") for o in outputs)
    notebook.freeze(path)
    assert [output.get("text") for output in read_cells(path)[0].outputs] == ["kept\n"]


def test_freeze_refuses_errors_and_large_outputs(tmp_path):
    path = write_notebook(tmp_path, "print('x' * 1_100_000)")
    notebook.execute(path)
    with pytest.raises(opd.OpdlabError, match="more than 1,000,000"):
        notebook.freeze(path)
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])
    set_outputs(path, error)
    with pytest.raises(opd.OpdlabError, match=r"holds an error \(ValueError: no\)"):
        notebook.freeze(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{}", "it has no cells"),
        ("[1]", "it has no cells"),
        ('{"cells": 3}', "it has no cells"),
        ("print(1)", "Expecting value"),
        ("", "Expecting"),
        (b"\xff\xfe", "utf-8"),
        ("[" * 100_000, "recursion"),
        ('{"worksheets": []}', "format 3: open and save it"),
        ('{"cells": [1]}', "cell 1 has no source"),
        ('{"cells": [{"cell_type": "code", "source": "1"}]}', "cell 1 has no list of outputs"),
    ],
)
def test_a_file_that_is_no_notebook_is_refused_and_left_alone(text, why, tmp_path):
    path = tmp_path / "odd.ipynb"
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(raw)
    refused = rf"odd\.ipynb is no notebook that can be read \(.*{why}.*Give the path of an \.ipynb"
    for function in (notebook.freeze, notebook.execute):
        with pytest.raises(opd.OpdlabError, match=refused):
            function(path)
    assert path.read_bytes() == raw


def test_a_missing_notebook_is_refused(tmp_path):
    with pytest.raises(opd.OpdlabError, match="No such file"):
        notebook.freeze(tmp_path / "missing.ipynb")


@pytest.mark.parametrize(("paper", "least"), [("#ffffff", 4.5), ("#111111", 4.0)])
def test_the_text_of_charts_is_read_on_white_and_on_dark_pages(paper, least):
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dim, bright = sorted([luminance(paper), luminance(CHART_TEXT)])
    assert (bright + 0.05) / (dim + 0.05) >= least


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_freeze_adds_a_picture_to_charts(tmp_path):
    from PIL import Image

    figure = {
        "data": [{"type": "bar", "x": [1], "y": [1], "marker": {"color": "#0072B2"}}],
        "layout": {"height": 200, "margin": {"l": 40, "r": 0, "t": 0, "b": 20}},
    }
    figure["layout"]["paper_bgcolor"] = "rgba(0,0,0,0)"  # as in opdlab's template
    shown = f"display({{{CHART!r}: {figure!r}}}, raw=True)"
    path = write_notebook(tmp_path, f"from IPython.display import display\n{shown}")
    notebook.execute(path)
    size = notebook.freeze(path)
    data = read_cells(path)[0].outputs[0]["data"]
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGBA")
    assert picture.size == (760, 200)
    assert picture.getpixel((2, 2))[3] == 0  # the page's own paper, light or dark
    picture = picture.convert("RGB")
    colours = picture.getcolors(1 << 20)
    assert sum(count for count, colour in colours if colour == BLUE) > 0.5 * 760 * 200
    assert dict(data[CHART]) == figure
    assert notebook.freeze(path) == size


def test_freeze_refuses_charts_that_need_webgl(tmp_path):
    figure = {"data": [{"type": "scattergl", "x": [1], "y": [1]}], "layout": {}}
    path = write_notebook(tmp_path, "1")
    set_outputs(path, nbformat.v4.new_output("display_data", {CHART: figure}))
    with pytest.raises(opd.OpdlabError, match=r"needs WebGL.*Give it render_mode='svg'"):
        notebook.freeze(path)
