"""Run opdlab from a terminal: `opdlab demo`, `doctor`, `conform`, `show`, `trace`, `gallery`, ….

Each command imports what it needs when it runs, so `opdlab --help` is quick and `opdlab show` works
without the libraries that models need.
"""

from __future__ import annotations

import os
import sys
import time
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from opdlab.commands.flags import Flags, WorkFlags
from opdlab.errors import OpdlabError

app = tyro.extras.SubcommandApp()


def _hide_loading_bars() -> None:
    """Hide the progress bars of transformers; opdlab's own stay."""
    from transformers.utils import logging

    disable: Callable[[], None] = logging.disable_progress_bar
    disable()


Config = Annotated[Path | None, tyro.conf.Positional]
RunFlags = Annotated[Flags, tyro.conf.OmitArgPrefixes]
NO_FLAGS = Flags()


@app.command
def distill(
    config: Config = None,
    flags: RunFlags = NO_FLAGS,
    fresh: bool = False,
    accept_changes: bool = False,
    json: bool = False,
) -> None:
    """Train a student as a config file or flags say, and report what changed.

    A run that its folder holds already is taken up where it was. Ctrl-C leaves a run that can be
    taken up.

    Args:
        config: A TOML file; flags go over it.
        flags: What the run is made of.
        fresh: Begin a new run, in the next folder that is free.
        accept_changes: Go on with a run although its parts or settings are others now.
        json: Print the report as JSON, alone on stdout.
    """
    from opdlab.commands.distill import distill as run_distill
    from opdlab.commands.flags import read_given
    from opdlab.commands.output import Output

    _hide_loading_bars()
    with Output(json).printing() as output:
        run_distill(read_given(config, flags), output, fresh=fresh, accept_changes=accept_changes)


Who = Annotated[tuple[str, ...], tyro.conf.arg(metavar="{student,distilled,teacher}")]


@app.command
def evaluate(
    config: Config = None,
    flags: RunFlags = NO_FLAGS,
    who: Who = (),
    n: int = 200,
    k: int = 0,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Evaluate student, distilled student and teacher on held-out prompts, with intervals.

    Args:
        config: A TOML file; flags go over it.
        flags: What the run is made of. The distilled student is the last checkpoint in its folder.
        who: The models to evaluate; all that there are by default.
        n: Number of prompts.
        k: Samples for each prompt, beside the greedy answer.
        seed: Seed of prompts and samples.
        json: Print the numbers as JSON, alone on stdout.
    """
    from opdlab.commands import ask
    from opdlab.commands.flags import read_given
    from opdlab.commands.output import Output

    _hide_loading_bars()
    with Output(json).printing() as output:
        ask.evaluate(read_given(config, flags), output, who, n, k, seed)


@app.command
def sample(
    config: Config = None,
    flags: RunFlags = NO_FLAGS,
    who: Who = (),
    prompt: tuple[str, ...] = (),
    prompts: int = 4,
    n: int = 1,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Let a model write: the distilled student, or the student if none was trained yet.

    Args:
        config: A TOML file; flags go over it.
        flags: What the run is made of. The distilled student is the last checkpoint in its folder.
        who: The models that write.
        prompt: Questions of your own, in place of held-out prompts of the task.
        prompts: Number of held-out prompts.
        n: Texts for each prompt.
        max_new_tokens: Length limit; the task's, or 256 for questions of your own.
        temperature: 0 takes the likeliest token each time.
        top_p: Keep the fewest likeliest tokens that together have this probability.
        seed: Seed of prompts and texts.
        json: Print the texts as JSON, alone on stdout.
    """
    from opdlab.commands import ask
    from opdlab.commands.flags import read_given
    from opdlab.commands.output import Output

    _hide_loading_bars()
    with Output(json).printing() as output:
        ask.sample(
            read_given(config, flags),
            output,
            who,
            prompt,
            prompts,
            n,
            {
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "seed": seed,
            },
        )


@app.command
def score(
    config: Config = None,
    flags: RunFlags = NO_FLAGS,
    who: Who = (),
    texts: str = "student",
    prompts: int = 8,
    trace: Path = Path("trace.parquet"),
    k: int = 8,
    seed: int = 0,
    page: bool = False,
    json: bool = False,
) -> None:
    """Make a trace: held-out prompts, answered, and graded token by token by student and teacher.

    Args:
        config: A TOML file; flags go over it.
        flags: What the run is made of. The distilled student is the last checkpoint in its folder.
        who: The policy whose tokens are graded: student or distilled.
        texts: The texts that are graded: student (it writes them) or answer (the data set's own).
        prompts: Number of held-out prompts.
        trace: The Parquet file to write.
        k: Top tokens that are kept of each policy.
        seed: Seed of prompts and texts.
        page: Draw a page of the trace as well.
        json: Print a summary as JSON, alone on stdout.
    """
    from opdlab.commands import ask
    from opdlab.commands.flags import read_given
    from opdlab.commands.output import Output

    _hide_loading_bars()
    with Output(json).printing() as output:
        ask.score(read_given(config, flags), output, who, texts, prompts, trace, k, seed, page)


@app.command
def report(folder: Annotated[Path, tyro.conf.Positional], json: bool = False) -> None:
    """Write the report of a run, finished or not, from the files in its folder.

    Args:
        folder: The run's folder.
        json: Print the report as JSON, alone on stdout.
    """
    from opdlab.commands import report as reports
    from opdlab.commands.output import Output

    with Output(json).printing() as output:
        output.result = reports.write_report(folder)
        reports.print_report(output.console, output.result)


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
        student: The name of a shipped model, a Hub name or a folder, as the profile has it.
        teacher: Likewise.
        steps: Number of updates; the profile's own number by default.
        seed: Seed of prompts, samples and the adapter.
        out: Folder for the page and the traces.
        method: A method by name, such as opd, opd-plus, topd, omniopd or grpo; opd by default,
            omniopd with a server.
        teacher_url: An OpenAI-compatible server that teaches, such as http://127.0.0.1:8000/v1.
            Its key is read from OPDLAB_API_KEY.
        teacher_model: The model's name on that server; by default the server's own.
    """
    # Said before the libraries are loaded, which takes some seconds.
    print("opdlab demo: starting …", flush=True)
    from opdlab.commands.demo import demo as run_demo

    _hide_loading_bars()
    print(
        run_demo(
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
    """Draw a saved trace as a page with every view that fits it, and open the page.

    Labels in the file beside it are drawn, too.

    Args:
        trace: A Parquet file written by `trace.save`.
        sample: The completion that the close views show.
        out: The page to write; beside the trace by default.
        open: Whether to open the page in a browser.
    """
    from opdlab import viz
    from opdlab.data.labels import load_labelled
    from opdlab.viz.overview import overview

    path = viz.page(
        out or trace.with_suffix(".html"),
        title=trace.name,
        lenses=overview(load_labelled(trace), sample),
    )
    print(f"page: {path}")
    if open:
        webbrowser.open(Path(path).resolve().as_uri())


@app.command
def trace(
    file: Annotated[Path, tyro.conf.Positional],
    question: Annotated[
        Literal["describe", "worst", "where", "compare"], tyro.conf.Positional
    ] = "describe",
    about: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    by: str = "",
    n: int = 10,
    context: int = 8,
    json: bool = False,
) -> None:
    """Ask a saved trace: its worst tokens, the tokens where something holds, or another trace.

    Args:
        file: A Parquet file written by `trace.save`.
        question: describe (what it holds), worst (the tokens of largest size), where (those for
            which conditions hold), or compare (with another trace).
        about: The conditions of where, such as "reverse_kl > 1", or the other file of compare.
        by: The channel of worst and compare; the first by default. describe lists them.
        n: The largest number of tokens that are listed.
        context: Tokens of text before and after each.
        json: Print the answer as JSON, alone on stdout; docs/trace.md describes its fields.
    """
    from opdlab.commands.output import Output
    from opdlab.commands.trace import ask_trace

    with Output(json).printing() as output:
        ask_trace(file, question, about, output, by=by, n=n, context=context)


@app.command
def gallery(
    world: Annotated[str, tyro.conf.Positional] = "market",
    out: Path = Path("runs/gallery"),
    pictures: bool = False,
) -> None:
    """Write a page with every view: one minute on the shipped models, several on SmolLM2.

    Args:
        world: market (shipped models) or small (SmolLM2-135M).
        out: Folder for the page.
        pictures: Whether to draw each view as a PNG as well, light and dark, 480 and 1200 pixels
            wide.
    """
    from opdlab.commands.gallery import gallery as draw_gallery

    _hide_loading_bars()
    print(f"page: {draw_gallery(out, world, pictures)}")


PlannedWork = Annotated[WorkFlags, tyro.conf.OmitArgPrefixes]
NO_WORK = WorkFlags()


@app.command
def doctor(
    student: Annotated[str, tyro.conf.Positional],
    teacher: Annotated[str | None, tyro.conf.Positional] = None,
    task: str | None = None,
    prompts: int = 32,
    k: int = 8,
    seed: int = 0,
    budget: float = 90.0,
    plan: bool = False,
    gpus: int = 1,
    device: str = "h100",
    work: PlannedWork = NO_WORK,
) -> None:
    """Say before any training whether distillation can work between two models, and why not.

    The exit code is 1 if it cannot work. Progress goes to stderr; Ctrl-C ends it early, with what
    was found so far.

    Args:
        student: A shipped model (student, novice, teacher, scribe), small (SmolLM2), a folder or a
            Hub name. Or, alone, the config file of a run, as for `opdlab distill`.
        teacher: Likewise. "small small" is SmolLM2 that learns from itself, given a rule.
        task: market, market-secret, market-tools, rule, gym:NAME or a JSONL file. By default the
            shipped models' own task, and plain questions for other models. A config has its own.
        prompts: Number of held-out prompts to ask at most.
        k: Samples of the student per prompt at most, for pass@k.
        seed: Seed of prompts and samples.
        budget: Seconds to keep to once the models are loaded; it asks as much as fits.
        plan: Load no weights, and say what a step takes on several devices: memory, traffic, time.
        gpus: Devices of the plan.
        device: The devices of the plan: h200, h100, a100, l40s or 4090.
        work: The step of the plan.
    """
    if plan:
        from opdlab.commands.plan import print_plan

        print_plan(student, teacher, gpus, device, work)
        return
    if (gpus, device, work) != (1, "h100", NO_WORK):
        raise OpdlabError("doctor got options of a plan without --plan. Add it, or leave them out.")
    from opdlab import diagnose
    from opdlab.commands.doctor import load_named_pair, load_planned_pair
    from opdlab.support.consoles import make_console

    _hide_loading_bars()
    progress = make_console(stderr=True)
    began = time.monotonic()
    named = student if teacher is None else f"{student} and {teacher}"
    progress.print(f"opdlab doctor: loading {named} …", markup=False)
    with progress.status("loading …"):  # it moves in a terminal, and is not drawn elsewhere
        if teacher is None:
            first, second, world, settings = load_planned_pair(student, task)
        else:
            first, second, world, settings = load_named_pair(student, teacher, task)
    progress.print(
        f"loaded in {time.monotonic() - began:.0f} s; looking at the pair, {budget:.0f} s at most"
    )
    found = diagnose.doctor(
        first, second, world, prompts=prompts, k=k, seed=seed, budget=budget, **settings
    )
    make_console().print(found)
    if found.verdict == "stop":
        sys.exit(1)


Pairs = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")]


@app.command
def conform(
    target: Annotated[str, tyro.conf.Positional],
    kind: str | None = None,
    trains: str | None = None,
    reduction: str | None = None,
    keyword: Pairs = (),
    option: Pairs = (),
    spec: str | None = None,
    out: Path | None = None,
    seed: int = 0,
    seconds: float = 300.0,
    json: bool = False,
) -> None:
    """Certify a loss: which gradient it trains, and what it does with masks, counts and extremes.

    The exit code is 1 if it does not conform. FILE.py is run as code, so name only files that you
    trust.

    Args:
        target: FILE.py:FUNCTION; or zoo (known mistakes), trl or liger (the installed losses).
        kind: What the function takes: logits (the default), log_probs, sampled, top_k, hidden or
            sequences.
        trains: The divergence that it claims, such as reverse_kl.
        reduction: none, sum, token, sequence or text_sum.
        keyword: The function's own name of a quantity, as count=num_items_in_batch. Quantities are
            tokens, count, temperature, sampler and the divergence's parameter.
        option: A further keyword with a number or a text, as k=3.
        spec: Name of an opdlab.conformance.Spec in the same file, in place of the flags above.
        out: Folder for conformance.json, junit.xml and badge.svg.
        seed: Seed of the toy models.
        seconds: The longest time for each loss.
        json: Print the report as JSON, alone on stdout.
    """
    from opdlab.commands import conform as commands
    from opdlab.commands.flags import read_number, read_pairs
    from opdlab.commands.output import Output

    given = {
        "kind": kind,
        "trains": trains,
        "reduction": reduction,
        "keywords": read_pairs(keyword, "--keyword"),
        "options": {
            name: read_number(value) for name, value in read_pairs(option, "--option").items()
        },
    }
    fields = {name: value for name, value in given.items() if value}
    with Output(json).printing() as output:
        passes = commands.run(target, output, fields, spec, out, seed, seconds)
    if not passes:
        sys.exit(1)


@app.command
def lab(port: int = 8888) -> None:
    """Open JupyterLab on the notebooks, or in this folder if the notebooks are not installed.

    The notebooks of the series are marked as trusted, so that their pictures respond.

    Args:
        port: The port to serve it at, on this machine only; the next free one if it is taken.
    """
    from jupyterlab.labapp import LabApp

    from opdlab.notebook import trust

    package = Path(__file__).parents[1]
    series = package.parent / "notebooks"
    options = ["--ip=127.0.0.1", f"--port={port}"]
    # These settings open Markdown files rendered, and ask no questions about news.
    options.append(f"--LabApp.app_settings_dir={package / 'notebook' / 'lab'}")
    if series.exists():
        trust(sorted(series.glob("[0-9][0-9]_*.ipynb")))
        options += [f"--ServerApp.root_dir={series}", "--LabApp.default_url=/lab/tree/README.md"]
    if os.name == "posix" and os.geteuid() == 0:
        options.append("--allow-root")  # rented machines know only root; the token still guards
    LabApp.launch_instance(options)


@app.command
def freeze(
    notebooks: Annotated[tuple[Path, ...], tyro.conf.Positional], execute: bool = False
) -> None:
    """Make executed notebooks small and stable for committing.

    Takes out widgets, times and folders of this machine.

    Args:
        notebooks: The files, changed in place.
        execute: Whether to run them first.
    """
    from opdlab import notebook

    for path in notebooks:
        if execute:
            notebook.execute(path)
        print(f"{path}: {notebook.freeze(path):,} bytes")


@app.command
def html(
    notebooks: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path = Path("pages")
) -> None:
    """Write notebooks as HTML files that fetch nothing, formulas included.

    Args:
        notebooks: The files, with their outputs. Folded code is left out.
        out: The folder to write them to.
    """
    from opdlab import notebook

    for path in notebooks:
        print(notebook.to_html(path, out / f"{path.stem}.html"))


def main() -> None:
    """Run the command line; what the user can mend is one line on stderr, with exit code 1."""
    try:
        app.cli(
            prog="opdlab",
            description="On-policy distillation of language models, one token at a time.",
        )
    except (OpdlabError, OSError) as error:  # a missing file is the user's to mend, too
        sys.exit(f"opdlab: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("opdlab: stopped")


if __name__ == "__main__":
    main()
