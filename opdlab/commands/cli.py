"""The command line:

`opdlab demo`, `opdlab doctor`, `opdlab show`, `opdlab gallery`, `opdlab lab`, `opdlab freeze`.
"""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import tyro

from opdlab.errors import OpdlabError

app = tyro.extras.SubcommandApp()


def _quiet() -> None:
    """No bars for loading weights; opdlab's own stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@app.command
def demo(
    profile: str = "market",
    student: str | None = None,
    teacher: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    out: Path = Path("runs/demo"),
    method: str | None = None,
    teacher_url: str | None = None,
    teacher_model: str | None = None,
) -> None:
    """Distil a student and show what changed: a table here, a page to open.

    Args:
        profile: market (shipped models, CPU), small (SmolLM2-135M, CPU) or gpu (any Hub pair,
            bf16).
        student: a shipped model's name, a Hub name or a folder, as the profile has it.
        teacher: likewise.
        steps: updates; the profile's own number by default.
        seed: of prompts, samples and the adapter.
        out: folder for the page and the traces.
        method: a name of opdlab.methods, as opd, opd-plus, topd, omniopd, grpo; opd by default,
            omniopd with a server.
        teacher_url: an OpenAI-compatible server that teaches, as http://127.0.0.1:8000/v1; its key
            is read from OPDLAB_API_KEY.
        teacher_model: the model's name there; by default what the server says it is.
    """
    from opdlab.commands import demo as job

    _quiet()
    print(
        job.demo(
            profile,
            student,
            teacher,
            steps,
            seed,
            out,
            method=method,
            teacher_url=teacher_url,
            teacher_model=teacher_model,
        )
    )


@app.command
def show(
    trace: Annotated[Path, tyro.conf.Positional],
    sample: int = 0,
    out: Path | None = None,
    open: bool = True,
) -> None:
    """Draw a saved trace as a page, with every view that it has something for, and open it.

    Args:
        trace: a Parquet file written by `trace.save`.
        sample: which completion the close views show.
        out: where the page goes; beside the trace by default.
        open: whether to open it in a browser.
    """
    from opdlab import viz
    from opdlab.data.trace import Trace
    from opdlab.viz.overview import overview

    path = viz.page(
        out or trace.with_suffix(".html"),
        title=trace.name,
        lenses=overview(Trace.load(trace), sample),
    )
    print(f"page: {path}")
    if open:
        webbrowser.open(Path(path).resolve().as_uri())


@app.command
def gallery(
    world: Annotated[str, tyro.conf.Positional] = "market",
    out: Path = Path("runs/gallery"),
    pictures: bool = False,
) -> None:
    """Write a page with every view, on models that run here: a minute on the market, some on
    SmolLM2.

    Args:
        world: market (shipped models) or small (SmolLM2-135M).
        out: folder for the page.
        pictures: draw each view as a PNG as well, light and dark, 480 and 1200 pixels wide.
    """
    from opdlab.commands.gallery import gallery as draw

    _quiet()
    print(f"page: {draw(out, world, pictures)}")


@app.command
def doctor(
    student: Annotated[str, tyro.conf.Positional],
    teacher: Annotated[str, tyro.conf.Positional],
    task: str | None = None,
    prompts: int = 32,
    k: int = 8,
    seed: int = 0,
) -> None:
    """Before any training: can on-policy distillation work between these two, and if not, why not?

    Exit code 1 if it cannot.

    Args:
        student: student, novice, teacher or scribe (shipped), small (SmolLM2), a folder or a Hub
            name.
        teacher: likewise; "small small" is SmolLM2 with itself, told a rule.
        task: market, market-secret, rule, gym:NAME or a JSONL file; by default the shipped models'
            own, else plain questions.
        prompts: how many held-out prompts to ask.
        k: the student's samples of each, for pass@k.
        seed: of prompts and samples.
    """
    from rich.console import Console

    from opdlab import diagnose
    from opdlab.diagnose import named, report

    _quiet()
    console = Console()
    with console.status("loading …") as status:
        first, second, world = named.pair(student, teacher, task)
        status.update("the student writes, the teacher grades …")
        found = diagnose.doctor(first, second, world, prompts=prompts, k=k, seed=seed)
    console.print(report.report(found))
    if found.verdict == "stop":
        sys.exit(1)


@app.command
def lab(port: int = 8888) -> None:
    """Open JupyterLab at the index of the notebooks, or in this folder where they are not.

    Args:
        port: where to serve it, on this machine only; the next free one if it is taken.
    """
    from jupyterlab.labapp import LabApp

    series = Path(__file__).parents[2] / "notebooks"
    options = (
        [f"--ServerApp.root_dir={series}", "--LabApp.default_url=/lab/tree/README.md"]
        if series.exists()
        else []
    )
    settings = (
        Path(__file__).parents[1] / "notebook" / "lab"
    )  # Markdown opens rendered; no question about news
    options += (
        ["--allow-root"] if os.name == "posix" and os.geteuid() == 0 else []
    )  # as on rented machines: the token still guards
    LabApp.launch_instance(
        [*options, f"--LabApp.app_settings_dir={settings}", f"--port={port}", "--ip=127.0.0.1"]
    )


@app.command
def freeze(
    notebooks: Annotated[tuple[Path, ...], tyro.conf.Positional], execute: bool = False
) -> None:
    """Make executed notebooks small and stable for committing: no widgets, no timings, no folders
    of this machine.

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
    try:
        app.cli(
            prog="opdlab",
            description="On-policy distillation of language models, one token at a time.",
        )
    except (OpdlabError, OSError) as error:  # a file that is not there is the user's to mend, too
        sys.exit(f"opdlab: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("opdlab: stopped")


if __name__ == "__main__":
    main()
