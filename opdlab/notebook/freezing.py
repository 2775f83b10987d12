"""Running notebooks, and making what they show fit for committing: small, stable, and readable
where no script runs.
"""

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

LIMIT = 1_000_000  # bytes of a committed notebook
CHART = "application/vnd.plotly.v1+json"
_KEPT = ("text/html", "text/plain", "image/png", CHART)
# pixels of a chart's picture: JupyterLab shows it unscaled until the mouse is over it, and would
# cut off a wider one
_WIDTH = 760


def source_hash(notebook: Mapping[str, Any]) -> str:
    """A checksum of the code, which tells whether stored outputs are stale."""
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]


def read_notebook(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a notebook of format 4 as plain data; raises OpdlabError for a file that is none."""
    try:
        book = json.loads(Path(path).read_text(encoding="utf-8"))
        why = _fault(book)
    except (OSError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
    if why:
        raise OpdlabError(
            f"{path} is no notebook that can be read ({why}). Give the path of an .ipynb file,"
            " saved by Jupyter."
        )
    return dict(book)


def _fault(book: Any) -> str:
    """What keeps plain data from being a notebook; "" for a notebook."""
    if not isinstance(book, dict) or not isinstance(book.get("cells"), list):
        return (
            "it has no cells"
            if not (isinstance(book, dict) and "worksheets" in book)
            else "it is of format 3: open and save it in Jupyter"
        )
    for number, cell in enumerate(book["cells"], 1):
        if (
            not isinstance(cell, dict)
            or not isinstance(cell.get("source"), (str, list))
            or "cell_type" not in cell
        ):
            return f"cell {number} has no source or no type"
        if cell["cell_type"] == "code" and not isinstance(cell.get("outputs"), list):
            return f"cell {number} has no list of outputs"
    return ""


def execute(path: str | os.PathLike[str], timeout: int | None = None) -> None:
    """Run a notebook in place, in its own folder. timeout: seconds a cell may take; a GPU run may
    take hours, so none.
    """
    import nbformat
    from nbclient import NotebookClient

    path = Path(path)
    read_notebook(path)
    book = nbformat.read(path, as_version=4)
    NotebookClient(
        book,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    nbformat.write(book, path)


def freeze(path: str | os.PathLike[str]) -> int:
    """Make an executed notebook fit for committing, in place; returns its size in bytes.

    Drops widgets and their state, timings, addresses and stderr, numbers pandas' tables (it names
    them at random), replaces the home and working folders in outputs, adds a picture to charts
    (which GitHub and nbconvert cannot draw), and notes the checksum of the code. Raises OpdlabError
    for what is no notebook, an error output, more than 1 MB, or charts where there is no Chromium.
    """
    path = Path(path)
    book = read_notebook(path)
    book["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "opdlab": {"source": source_hash(book)},
    }
    count = 0
    for cell in book["cells"]:
        cell["metadata"] = {
            k: v for k, v in cell.get("metadata", {}).items() if k in ("tags", "jupyter")
        }
        if cell["cell_type"] == "code":
            count += 1
            cell["execution_count"], cell["outputs"] = (
                count,
                _joined([o for o in map(_frozen, cell["outputs"]) if o]),
            )
            for output in cell["outputs"]:
                if "execution_count" in output:
                    output["execution_count"] = count
    text = _numbered(json.dumps(book, indent=1, ensure_ascii=False) + "\n")
    for folder in (str(path.resolve().parents[1]), str(Path.home())):
        text = text.replace(folder + os.sep, "")
    if len(text.encode()) > LIMIT:
        raise OpdlabError(
            f"{path} would be {len(text.encode()):,} bytes, more than {LIMIT:,}. Show less in it."
        )
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return len(text.encode())


def _frozen(output: dict[str, Any]) -> dict[str, Any] | None:
    if output["output_type"] == "error":
        raise OpdlabError(
            f"The notebook holds an error ({output['ename']}: {output['evalue']}). Run it to the"
            " end first."
        )
    if output["output_type"] == "stream":
        return output if output["name"] == "stdout" else None
    data = {kind: value for kind, value in output["data"].items() if kind in _KEPT}
    html = "".join(data.get("text/html", ""))
    line = "".join(data.get("text/plain", "")) if set(data) == {"text/plain"} else ""
    if re.fullmatch(r"\s*<code>.*?</code> <progress.*", html) or re.fullmatch(
        r".*\d+%\|.*\| \d+/\d+ \[.*\]\s*", line
    ):
        return None  # a finished progress line, ours or tqdm's, says nothing later
    if "text/plain" in data:
        data["text/plain"] = re.sub(
            r" at 0x[0-9a-f]+>", ">", "".join(data["text/plain"])
        ).splitlines(keepends=True)
    if CHART in data and "image/png" not in data:
        data["image/png"] = _picture(data[CHART])
    return {**output, "data": data, "metadata": {}} if data else None


def _joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring printed lines as one output: how a kernel splits them hangs on the clock."""
    out: list[dict[str, Any]] = []
    for output in outputs:
        if out and output["output_type"] == out[-1]["output_type"] == "stream":
            out[-1] = {
                **out[-1],
                "text": "".join([*out[-1]["text"], *output["text"]]).splitlines(keepends=True),
            }
        else:
            out.append(output)
    return out


def _numbered(text: str) -> str:
    """A notebook whose styled tables are called by their order, so that the same results are the
    same file.
    """
    order = {
        name: f"T_{i:05d}"
        for i, name in enumerate(
            dict.fromkeys(re.findall(r'<table id=\\"(T_[0-9a-f]{5})\\"', text))
        )
    }
    return re.sub(
        r"\bT_[0-9a-f]{5}(?![0-9a-zA-Z])", lambda found: order.get(found[0], found[0]), text
    )


def _picture(figure: Mapping[str, Any]) -> str:
    """A plotly chart as a PNG in base64, on white.

    Raises OpdlabError for one that needs WebGL, which many browsers lack.
    """
    from plotly.offline import get_plotlyjs

    from opdlab.viz import camera, embed

    if any(str(trace.get("type", "")).endswith("gl") for trace in figure["data"]):
        raise OpdlabError(
            "A chart needs WebGL, which plotly.express uses from 1000 points on. Give it"
            " render_mode='svg', or fewer points."
        )

    head = f"<style>body{{margin:0;background:Canvas;--opd-chart-text:#555}}figure{{margin:0}}</style><script>{get_plotlyjs()}</script>"
    body = (
        "<figure"
        f' class="opd-chart"><div></div>{embed.script_json(figure, "opd-figure")}</figure>{embed.plain_module("charts.js")}'
    )
    with tempfile.TemporaryDirectory(prefix="opdlab-") as folder:
        picture = camera.shoot(
            embed.document("chart", head, body),
            Path(folder) / "chart.png",
            width=_WIDTH,
            density=1,
            least=1,
        )
        return base64.b64encode(picture.read_bytes()).decode()
