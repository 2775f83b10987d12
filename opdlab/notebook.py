"""What the notebooks share: the one-line set-up, and freezing of executed notebooks for committing.

A profile (`OPDLAB_PROFILE=ci|cpu|gpu`) sets models and sizes; the cells stay the same. Nothing here is needed to use opdlab.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opdlab.errors import OpdlabError
from opdlab.rows import Rows

PROFILES = ("ci", "cpu", "gpu")
LIMIT = 1_000_000  # bytes of a committed notebook
_KEPT = ("text/html", "text/plain", "image/png", "application/vnd.plotly.v1+json")


@dataclass(frozen=True)
class Context:
    """What `setup` found: the profile, the device, and whether there is a GPU to use."""

    profile: str
    device: str

    @property
    def gpu(self) -> bool:
        return self.device.startswith("cuda")

    def pick(self, **sizes: Any) -> Any:
        """The value for this profile: `ctx.pick(ci=8, cpu=64, gpu=512)`; a profile left out takes the one before it."""
        known = [p for p in PROFILES[: PROFILES.index(self.profile) + 1] if p in sizes]
        if not known:
            raise OpdlabError(f"pick has no size for profile {self.profile!r}. Name at least ci=….")
        return sizes[known[-1]]


def setup(minutes: Mapping[str, float] | None = None) -> Context:
    """Print versions, device, profile and the time to expect; quieten progress bars of loading. Returns the `Context`."""
    import transformers

    import opdlab

    profile = os.environ.get("OPDLAB_PROFILE", "gpu" if torch.cuda.is_available() else "cpu")
    if profile not in PROFILES:
        raise OpdlabError(f"OPDLAB_PROFILE is {profile!r}. Use ci, cpu or gpu.")
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*IProgress not found.*")
    device = "cuda" if profile == "gpu" and torch.cuda.is_available() else "cpu"
    expect = f" · about {minutes[profile]:g} min" if minutes and profile in minutes else ""
    versions = f"opdlab {opdlab.__version__} · torch {torch.__version__.split('+')[0]} · transformers {transformers.__version__}"
    print(f"{versions} · Python {platform.python_version()}\nprofile {profile} · {device}{expect}")
    return Context(profile, device)


def source_hash(notebook: Mapping[str, Any]) -> str:
    """A checksum of the cells' sources, which tells whether stored outputs are stale."""
    sources = [[cell["cell_type"], "".join(cell["source"])] for cell in notebook["cells"]]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]


def freeze(path: str | os.PathLike[str]) -> int:
    """Make an executed notebook fit for committing, in place; returns its size in bytes.

    Drops widgets and their state, timings and stderr, replaces the home and working folders in outputs, and notes the
    checksum of the sources. Raises OpdlabError for an error output, an unexecuted cell, or more than 1 MB.
    """
    path = Path(path)
    book = json.loads(path.read_text(encoding="utf-8"))
    book["metadata"] = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                        "language_info": {"name": "python"}, "opdlab": {"source": source_hash(book)}}  # fmt: skip
    count = 0
    for cell in book["cells"]:
        cell["metadata"] = {k: v for k, v in cell["metadata"].items() if k in ("tags", "jupyter")}
        if cell["cell_type"] == "code":
            count += 1
            cell["execution_count"], cell["outputs"] = count, [o for o in map(_frozen, cell["outputs"]) if o]
            for output in cell["outputs"]:
                if "execution_count" in output:
                    output["execution_count"] = count
    text = json.dumps(book, indent=1, ensure_ascii=False) + "\n"
    for folder in (str(path.resolve().parents[1]), str(Path.home())):
        text = text.replace(folder + os.sep, "")
    if len(text.encode()) > LIMIT:
        raise OpdlabError(f"{path} would be {len(text.encode()):,} bytes, more than {LIMIT:,}. Show less in it.")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return len(text.encode())


def _frozen(output: dict[str, Any]) -> dict[str, Any] | None:
    if output["output_type"] == "error":
        raise OpdlabError(f"The notebook holds an error ({output['ename']}: {output['evalue']}). Run it to the end first.")
    if output["output_type"] == "stream":
        return output if output["name"] == "stdout" else None
    data = {kind: value for kind, value in output["data"].items() if kind in _KEPT}
    html = "".join(data.get("text/html", ""))
    if re.fullmatch(r"\s*<code>.*?</code> <progress.*", html):  # a finished progress line says nothing later
        return None
    return {**output, "data": data, "metadata": {}} if data else None


def execute(path: str | os.PathLike[str], timeout: int = 600) -> None:
    """Run a notebook in place, in its own folder."""
    import nbformat
    from nbclient import NotebookClient

    path = Path(path)
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    nbformat.write(book, path)


def check_loss(fn: Callable[[Rows], Tensor], target: str = "reverse_kl") -> bool:
    """Check a reader's loss against a divergence of opdlab; says what is wrong, and whether it is another one instead."""
    from opdlab.methods.opd import DIVERGENCES

    rows = _example_rows()
    want = DIVERGENCES[target](rows.student, rows.teacher)
    try:
        got = fn(rows)
    except NotImplementedError:
        print(f"… not written yet: return the {target} of every row, shape [{len(rows)}].")
        return False
    if not isinstance(got, Tensor) or got.shape != want.shape:
        shape = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
        print(f"✗ one number a token is wanted, shape {list(want.shape)}; you returned {shape}. Sum over the vocabulary, dim=-1.")
        return False
    if torch.allclose(got, want, atol=1e-4):
        print(f"✓ that is the {target}.")
        return True
    other = [name for name, f in DIVERGENCES.items() if torch.allclose(got, f(rows.student, rows.teacher), atol=1e-4)]
    hint = f"that is the {other[0]}" if other else "the sign is wrong" if torch.allclose(-got, want, atol=1e-4) else "the values differ"
    print(f"✗ {hint}: first row {got[0].item():.4f}, wanted {want[0].item():.4f}.")
    return False


def _example_rows() -> Rows:
    made = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 7, generator=made).log_softmax(-1) for _ in range(2))
    return Rows({"student": student.requires_grad_(), "teacher": teacher}, torch.zeros(5, dtype=torch.long))
