"""The command line: `opdlab demo`, `opdlab show`, `opdlab lab`, `opdlab freeze`."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import tyro

from opdlab.errors import OpdlabError

app = tyro.extras.SubcommandApp()


@app.command
def demo(profile: str = "market", student: str | None = None, teacher: str | None = None, steps: int | None = None, seed: int = 0,
         out: Path = Path("runs/demo")) -> None:  # fmt: skip
    """Distil a student and show what changed: a table here, a page to open.

    Args:
        profile: market (shipped models, CPU), small (SmolLM2-135M, CPU) or gpu (any Hub pair, bf16).
        student: a shipped model's name, a Hub name or a folder, as the profile has it.
        teacher: likewise.
        steps: updates; the profile's own number by default.
        seed: of prompts, samples and the adapter.
        out: folder for the page and the traces.
    """
    from opdlab import demo as job

    print(job.demo(profile, student, teacher, steps, seed, out))


@app.command
def show(trace: Annotated[Path, tyro.conf.Positional], sample: int = 0, out: Path | None = None, open: bool = True) -> None:
    """Draw a completion of a saved trace as a page and open it.

    Args:
        trace: a Parquet file written by `trace.save`.
        sample: which completion.
        out: where the page goes; beside the trace by default.
        open: whether to open it in a browser.
    """
    from opdlab import viz
    from opdlab.trace import Trace

    path = viz.TokenLens(Trace.load(trace), sample).to_html(out or trace.with_suffix(".html"))
    print(f"page: {path}")
    if open:
        webbrowser.open(Path(path).resolve().as_uri())


@app.command
def lab(port: int = 8888) -> None:
    """Open JupyterLab on the notebook series.

    Args:
        port: where to serve it, on this machine only.
    """
    from jupyterlab.labapp import LabApp

    root = Path(__file__).parents[1] / "notebooks"
    LabApp.launch_instance([f"--ServerApp.root_dir={root if root.exists() else Path.cwd()}", f"--port={port}", "--ip=127.0.0.1"])


@app.command
def freeze(notebooks: Annotated[tuple[Path, ...], tyro.conf.Positional], execute: bool = False) -> None:
    """Make executed notebooks small and stable for committing: no widgets, no timings, no folders of this machine.

    Args:
        notebooks: the files, changed in place.
        execute: run them first.
    """
    from opdlab import notebook

    for path in notebooks:
        if execute:
            notebook.execute(path)
        print(f"{path}: {notebook.freeze(path):,} bytes")


def main() -> None:
    """Entry point: what the user can mend is one line on stderr and exit code 1, not a traceback."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading weights; opdlab's own stay
    try:
        app.cli(prog="opdlab", description="On-policy distillation of language models, one token at a time.")
    except OpdlabError as error:
        sys.exit(f"opdlab: {error}")
    except KeyboardInterrupt:
        sys.exit("opdlab: stopped")


if __name__ == "__main__":
    main()
