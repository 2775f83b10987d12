"""Run notebooks, and make their outputs fit for committing: small, stable, without scripts."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opdlab.errors import OpdlabError
from opdlab.notebook import stills
from opdlab.support.files import write_file

LIMIT = 1_000_000  # bytes of a committed notebook
CHART = "application/vnd.plotly.v1+json"
_KEPT_TYPES = ("text/html", "text/plain", "image/png", CHART)

# Grey that is read on white (4.5 to 1) as on the dark pages of Jupyter and GitHub (4.1 to 1).
CHART_TEXT = "#767676"
# A finished progress bar, ours in HTML and tqdm's as text.
_OWN_PROGRESS = re.compile(r"\s*<code>.*?</code> <progress.*")
_TQDM_PROGRESS = re.compile(r".*\d+%\|.*\| \d+/\d+ \[.*\]\s*")

Cell = dict[str, Any]
Output = dict[str, Any]


def hash_source(notebook: Mapping[str, Any]) -> str:
    """Compute a checksum of the code cells, which tells whether stored outputs are stale.

    Args:
        notebook: The notebook as plain data.

    Returns:
        16 hexadecimal digits.
    """
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]


def read_notebook(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a notebook of format 4 as plain data.

    Args:
        path: The path of an .ipynb file.

    Returns:
        The notebook's JSON.

    Raises:
        OpdlabError: The file is not a notebook, or of an older format.
    """
    try:
        book = json.loads(Path(path).read_text(encoding="utf-8"))
        why = _find_fault(book)
    except (OSError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
    if why:
        raise OpdlabError(
            f"{path} is no notebook that can be read ({why}). Give the path of an .ipynb file, "
            "saved by Jupyter."
        )
    return dict(book)


def _find_fault(book: Any) -> str:
    """Say why plain data is not a notebook; "" for a notebook."""
    if isinstance(book, dict) and "worksheets" in book and not isinstance(book.get("cells"), list):
        return "it is of format 3: open and save it in Jupyter"
    if not isinstance(book, dict) or not isinstance(book.get("cells"), list):
        return "it has no cells"
    for number, cell in enumerate(book["cells"], 1):
        is_cell = isinstance(cell, dict) and "cell_type" in cell
        if not is_cell or not isinstance(cell.get("source"), (str, list)):
            return f"cell {number} has no source or no type"
        if cell["cell_type"] == "code" and not isinstance(cell.get("outputs"), list):
            return f"cell {number} has no list of outputs"
    return ""


def execute(path: str | os.PathLike[str], timeout: int | None = None) -> None:
    """Run a notebook in place, in its own folder.

    Args:
        path: An .ipynb file. Its outputs are replaced.
        timeout: Seconds that a cell may take. None for no limit, since a GPU run may take hours.

    Raises:
        OpdlabError: The file is not a notebook.
        nbclient.exceptions.CellExecutionError: A cell raised an error.
    """
    import nbformat
    from nbclient import NotebookClient

    path = Path(path)
    read_notebook(path)
    book = nbformat.read(path, as_version=4)
    client = NotebookClient(
        book,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    nbformat.write(book, path)


def freeze(path: str | os.PathLike[str]) -> int:
    """Make an executed notebook fit for committing, in place.

    It drops widgets and their state, timings, addresses and stderr, numbers the tables of pandas
    (which names them at random), replaces the home and working folders in outputs, adds a picture
    to charts (which GitHub and nbconvert cannot draw) and to views (whose scripts do not run in a
    notebook that is not trusted), and stores the checksum of the code.

    Args:
        path: An .ipynb file that has run to its end.

    Returns:
        The size of the file, in bytes.

    Raises:
        OpdlabError: The file is not a notebook, holds an error, is larger than 1 MB, or has
            pictures that cannot be drawn here, for which Chromium and Pillow are needed.
    """
    path = Path(path)
    book = read_notebook(path)
    book["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "opdlab": {"source": hash_source(book)},
    }
    count = 0
    for cell in book["cells"]:
        kept = {k: v for k, v in cell.get("metadata", {}).items() if k in ("tags", "jupyter")}
        cell["metadata"] = kept
        if cell["cell_type"] == "code":
            count += 1
            _freeze_outputs(cell, count)
    text = _number_tables(json.dumps(book, indent=1, ensure_ascii=False) + "\n")
    for folder in (str(path.resolve().parents[1]), str(Path.home())):
        text = text.replace(folder + os.sep, "")
    size = len(text.encode())
    if size > LIMIT:
        raise OpdlabError(f"{path} would be {size:,} bytes, more than {LIMIT:,}. Show less in it.")
    write_file(path, text.encode())
    return size


def _freeze_outputs(cell: Cell, count: int) -> None:
    """Freeze the outputs of a code cell, which becomes the one of number `count`."""
    cell["execution_count"] = count
    frozen = [_freeze_output(output) for output in cell["outputs"]]
    cell["outputs"] = _join_printed([output for output in frozen if output])
    for output in cell["outputs"]:
        if "execution_count" in output:
            output["execution_count"] = count


def _freeze_output(output: Output) -> Output | None:
    """The stable part of an output; None where nothing of it is worth keeping."""
    if output["output_type"] == "error":
        raise OpdlabError(
            f"The notebook holds an error ({output['ename']}: {output['evalue']}). Run it to the "
            "end first."
        )
    if output["output_type"] == "stream":
        return output if output["name"] == "stdout" else None
    data = {kind: value for kind, value in output["data"].items() if kind in _KEPT_TYPES}
    if _is_progress(data):
        return None
    if "text/plain" in data:
        text = re.sub(r" at 0x[0-9a-f]+>", ">", "".join(data["text/plain"]))
        data["text/plain"] = text.splitlines(keepends=True)
    if "text/html" in data and "text/plain" in data:
        html, words = ("".join(data[kind]) for kind in ("text/html", "text/plain"))
        data["text/html"] = stills.add_still(html, words).splitlines(keepends=True)
    if CHART in data and "image/png" not in data:
        data["image/png"] = _draw_chart(data[CHART])
    return {**output, "data": data, "metadata": {}} if data else None


def _is_progress(data: Mapping[str, Any]) -> bool:
    """Tell whether an output is a finished progress bar, which says nothing to a later reader."""
    if _OWN_PROGRESS.fullmatch("".join(data.get("text/html", ""))):
        return True
    text = "".join(data.get("text/plain", "")) if set(data) == {"text/plain"} else ""
    return bool(_TQDM_PROGRESS.fullmatch(text))


def _join_printed(outputs: list[Output]) -> list[Output]:
    """Join neighbouring printed lines: how a kernel splits them depends on its timing."""
    joined: list[Output] = []
    for output in outputs:
        if joined and output["output_type"] == joined[-1]["output_type"] == "stream":
            text = "".join([*joined[-1]["text"], *output["text"]])
            joined[-1] = {**joined[-1], "text": text.splitlines(keepends=True)}
        else:
            joined.append(output)
    return joined


def _number_tables(text: str) -> str:
    """Name styled tables by their order, so that the same results give the same file."""
    names = dict.fromkeys(re.findall(r'<table id=\\"(T_[0-9a-f]{5})\\"', text))
    order = {name: f"T_{i:05d}" for i, name in enumerate(names)}

    def rename(found: re.Match[str]) -> str:
        return order.get(found[0], found[0])

    return re.sub(r"\bT_[0-9a-f]{5}(?![0-9a-zA-Z])", rename, text)


def _draw_chart(figure: Mapping[str, Any]) -> str:
    """Draw a Plotly chart on nothing, as a PNG in base64 that fits light and dark pages.

    Raises:
        OpdlabError: The chart needs WebGL, which many browsers lack.
    """
    from plotly.offline import get_plotlyjs

    from opdlab.viz import camera, embed

    if any(str(trace.get("type", "")).endswith("gl") for trace in figure["data"]):
        raise OpdlabError(
            "A chart needs WebGL, which plotly.express uses from 1000 points on. Give it "
            "render_mode='svg', or fewer points."
        )
    style = f"body{{margin:0;--opd-chart-text:{CHART_TEXT}}}figure{{margin:0}}"
    head = f"<style>{style}</style><script>{get_plotlyjs()}</script>"
    data = embed.script_json(figure, "opd-figure")
    chart = f'<figure class="opd-chart"><div></div>{data}</figure>'
    document = embed.document("chart", head, chart + embed.plain_module("charts.js"))
    with tempfile.TemporaryDirectory(prefix="opdlab-") as folder:
        target = Path(folder) / "chart.png"
        picture = camera.shoot(document, target, width=stills.WIDTH, density=1, least=1, clear=True)
        return base64.b64encode(picture.read_bytes()).decode()
