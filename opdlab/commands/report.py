"""Report what a run changed, from the files in its folder: a page, JSON, and a table.

No model is loaded, so an unfinished run, or one from another machine, is reported as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from opdlab import viz
from opdlab.commands.run_files import Measured, RunFiles
from opdlab.data.labels import load_labelled
from opdlab.data.trace import Trace
from opdlab.diagnose.health import health
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.evidence.controls import Controls
from opdlab.support.version import VERSION
from opdlab.training import checkpoint
from opdlab.training.evaluation import Evaluation
from opdlab.viz import View, embed

ROLES = ("before", "after", "teacher")


@dataclass(frozen=True, eq=False)
class Found:
    """Hold the content of a run's folder.

    Attributes:
        files: The places of its files.
        saved: `run.json` of the last checkpoint.
        history: One row for each step until then.
        measured: Evaluations, alarms and costs.
        config: The text of the config, or "".
        controls: The controls in the folder `controls`, or None.
    """

    files: RunFiles
    saved: dict[str, Any]
    history: pd.DataFrame
    measured: Measured
    config: str
    controls: Controls | None = None

    @property
    def done(self) -> int:
        """Number of steps done."""
        return int(self.saved["step"])

    @property
    def steps(self) -> int:
        """Number of steps in all."""
        return int(self.saved["settings"]["steps"])


def find_run(folder: Path) -> Found:
    """Read the folder of a run.

    Args:
        folder: The folder, as it was given as `[run] folder`, `--out` or `distill(save=…)`.

    Returns:
        Its content.

    Raises:
        OpdlabError: It holds no checkpoint.
        DamagedFile: The checkpoint is not what was written.
    """
    files = RunFiles(folder)
    if files.checkpoint() is None:
        reason = "no step is saved yet" if files.config.exists() else "it is no run's folder"
        raise OpdlabError(
            f"{folder} cannot be reported: {reason}. Give the folder of a run that has saved a"
            " checkpoint."
        )
    there = checkpoint.find_checkpoint(folder)
    config = files.config.read_text(encoding="utf-8") if files.config.exists() else ""
    history = pd.DataFrame(checkpoint.read_json(there / "history.json"))
    saved = checkpoint.read_json(there / "run.json")
    controls = read_controls(files.controls) if files.controls.exists() else None
    return Found(files, saved, history, files.read_measured(), config, controls)


def read_controls(file: Path) -> Controls:
    """Read what `opdlab.controls` kept.

    Args:
        file: Its `controls.json`.

    Returns:
        The controls.

    Raises:
        OpdlabError: The file holds something else.
    """
    try:
        return Controls.from_json(json.loads(file.read_bytes()))
    except (ValueError, InvalidValue) as error:
        raise OpdlabError(
            f"{file} is no result of opdlab.controls ({error}). Remove it, or run the controls"
            " again."
        ) from None


def write_report(folder: Path) -> dict[str, Any]:
    """Write `report.html` and `report.json` into a run's folder.

    Args:
        folder: The folder.

    Returns:
        The content of `report.json`.

    Raises:
        OpdlabError: It holds no checkpoint.
    """
    found = find_run(folder)
    data = summarise(found)
    embed.write(
        found.files.report_data,
        json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    )
    _write_page(found, data)
    return data


def summarise(found: Found) -> dict[str, Any]:
    """Put what a run changed into plain data.

    Args:
        found: The content of its folder.

    Returns:
        JSON data: numbers that are not known are None.
    """
    files, saved = found.files, found.saved
    evaluations = found.measured.evaluations
    before, after = evaluations.get("before"), evaluations.get("after")
    gain = None
    if before is not None and after is not None:
        paired = after - before
        gain = {"mean": paired.mean, "low": paired.low, "high": paired.high, "clear": paired.clear}
    last = {} if found.history.empty else found.history.iloc[-1].to_dict()
    data = {
        "opdlab": VERSION,
        "folder": str(files.folder),
        "is_finished": found.done >= found.steps,
        "done": found.done,
        "steps": found.steps,
        "student": saved["student"],
        "task": saved["task"],
        "method": saved["method"]["name"],
        "settings": saved["settings"],
        "accuracy": {role: _numbers(evaluations.get(role)) for role in ROLES},
        "gain": gain,
        "last_step": last,
        "alarms": [
            {
                "step": one.step,
                "signature": one.signature,
                "sentence": one.sentence,
                "remedy": one.remedy,
            }
            for one in _alarms(found)
        ],
        "cost": _cost(found),
        "controls": None if found.controls is None else repr(found.controls).splitlines()[0],
        "files": _list_files(files),
        "load": loading_code(found),
    }
    plain: dict[str, Any] = _plain(data)
    return plain


def _numbers(evaluation: Evaluation | None) -> dict[str, float] | None:
    return None if evaluation is None else evaluation.table()


def _plain(value: Any) -> Any:
    """The same as JSON holds it; NaN and infinity become None."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, (np.floating, np.integer, np.bool_)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _alarms(found: Found) -> Sequence[Any]:
    return found.measured.alarms or health(found.history).alarms


def _cost(found: Found) -> dict[str, float]:
    history = found.history
    sums = {
        "training_s": "seconds",
        "sampling_s": "generate_s",
        "grading_s": "grade_s",
        "learning_s": "learn_s",
        "tokens": "tokens",
    }
    cost = {name: float(history[key].sum()) for name, key in sums.items() if key in history}
    return {**cost, **found.measured.costs}


def _list_files(files: RunFiles) -> dict[str, str]:
    last = files.checkpoint()
    places = {
        "config": files.config,
        "report": files.report,
        "board": files.board,
        "adapter": trained_place(files),
        "checkpoint": last,
    }
    listed = {name: str(path) for name, path in places.items() if path is not None}
    return {**listed, "traces": str(files.folder / "traces")} if files.traces() else listed


def trained_place(files: RunFiles) -> Path | None:
    """Find what was trained: the adapter, or the last checkpoint, which PEFT loads as well.

    Args:
        files: The places of the run's files.

    Returns:
        A folder; None before the first checkpoint.
    """
    return files.adapter if files.adapter.is_dir() else files.checkpoint()


def loading_code(found: Found) -> str:
    """Write the code that loads what was trained, without opdlab and with it.

    Args:
        found: The content of the run's folder.

    Returns:
        Python code.
    """
    place = str(trained_place(found.files))
    tokenizer = found.saved["student"] or place
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if found.saved["settings"]["lora"] is None:
        lines += [f"model = AutoModelForCausalLM.from_pretrained({place!r})"]
        tokenizer = place
    else:
        lines[0:0] = ["from peft import AutoPeftModelForCausalLM"]
        lines[1] = "from transformers import AutoTokenizer"
        lines += [f"model = AutoPeftModelForCausalLM.from_pretrained({place!r})"]
    lines += [
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})",
        "",
        "# or, to look at it or to train it on:",
        "import opdlab as opd",
        f"policy = opd.Policy.load({place!r})",
    ]
    return "\n".join(lines)


def summary_rows(data: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Make the rows of the summary.

    Args:
        data: The content of `report.json`.

    Returns:
        A label and its values before, after and of the teacher.
    """
    found = data["accuracy"]
    rows = []
    labels = {"accuracy": "accuracy, greedy", "length": "length, tokens", "cut": "cut off, share"}
    others = [key for role in ROLES for key in found[role] or () if "@" in key]
    for key in dict.fromkeys([*labels, *others]):
        cells = [_cell(found[role], key) for role in ROLES]
        if any(cells):
            rows.append((labels.get(key, key), *cells))
    if data["gain"]:
        gain = data["gain"]
        shown = f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
        rows.append(("gain, 95 % interval, paired, 1 seed", "", shown, ""))
    return [(label, one, two, three) for label, one, two, three in rows]


def _cell(numbers: dict[str, float] | None, key: str) -> str:
    if numbers is None or numbers.get(key) is None:
        return ""
    if key != "accuracy":
        return f"{numbers[key]:.3g}"
    return f"{numbers[key]:.3f} [{numbers['low']:.3f}, {numbers['high']:.3f}]"


def print_report(console: Console, data: dict[str, Any]) -> None:
    """Print the summary, the alarms and the places of the files.

    Args:
        console: The console to print to.
        data: The content of `report.json`.
    """
    rows = summary_rows(data)
    if rows:
        table = Table("", title=f"{data['task']}: {data['method']}, {_progress(data)}")
        for column in ROLES:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for alarm in data["alarms"]:
        console.print(
            f"! step {alarm['step']}, {alarm['signature']}: {alarm['sentence']}", markup=False
        )
    console.print(_say_cost(data["cost"]), markup=False, highlight=False)
    for name in ("adapter", "report"):
        if name in data["files"]:
            console.print(
                f"{name}: {data['files'][name]}", markup=False, soft_wrap=True, highlight=False
            )


def _progress(data: dict[str, Any]) -> str:
    if data["is_finished"]:
        return f"{data['done']} steps"
    return f"step {data['done']} of {data['steps']} (not finished)"


def _say_cost(cost: dict[str, float]) -> str:
    parts = [f"cost: {cost.get('training_s', 0):.0f} s of training"]
    phases = {"sampling_s": "sampling", "grading_s": "grading", "learning_s": "learning"}
    if spent := [f"{cost[key]:.0f} s {word}" for key, word in phases.items() if key in cost]:
        parts.append(f"of which {', '.join(spent)}")
    if "tokens" in cost:
        parts.append(f"{cost['tokens']:,.0f} tokens written")
    if "evaluating_s" in cost:
        parts.append(f"{cost['evaluating_s']:.0f} s of evaluation")
    if "peak_memory_gib" in cost:
        parts.append(f"peak memory {cost['peak_memory_gib']:.1f} GiB")
    if "peak_gpu_memory_gib" in cost:
        parts.append(f"{cost['peak_gpu_memory_gib']:.1f} GiB on the GPU")
    return ", ".join(parts)


def _write_page(found: Found, data: dict[str, Any]) -> None:
    watch = health(found.history)
    watch.alarms = list(_alarms(found))
    name = str(data["method"])
    board: View = viz.RunBoard({name: found.history}, watch=watch, traces=found.files.traces())
    texts = [("How to load what was trained", data["load"])]
    if found.config:
        texts.append(("The config", found.config))
    note = (
        f"{name} on {data['task']}, {_progress(data)}.\n\n{_say_cost(data['cost'])}.\n\n"
        f"{watch.sentence}"
    )
    viz.page(
        found.files.report,
        title=f"{found.files.folder.name}: what the run changed",
        summary=summary_rows(data),
        lenses=[("The run", board), *_controls(found), *_strips(found)],
        note=note,
        texts=texts,
    )


def _controls(found: Found) -> list[tuple[str, View]]:
    """The card of the controls, if there are any."""
    if found.controls is None:
        return []
    return [("How much of the gain is due to the teacher?", viz.Arms(found.controls))]


def _strips(found: Found) -> list[tuple[str, View]]:
    """The text that the teacher disagreed with most, before and after training, with its labels."""
    traces = found.files.traces()
    if not traces:
        return []
    first, last = min(traces), max(traces)
    before = load_labelled(traces[first])
    sample = _most_disputed(before)
    views: list[tuple[str, View]] = [
        (f"After step {first}: a text that the student wrote", viz.TokenLens(before, sample))
        if first
        else ("Before: a text that the student wrote", viz.TokenLens(before, sample))
    ]
    if found.files.before_again.exists():
        again = load_labelled(found.files.before_again)
        views.append(("After: the same text, graded again", viz.TokenLens(again, sample)))
    if last != first:
        now = load_labelled(traces[last])
        caption = f"After step {last}: what the student writes now for the same prompt"
        views.append((caption, viz.TokenLens(now, sample)))
    return views


def _most_disputed(trace: Trace) -> int:
    names = trace.table.column_names
    columns = [name for name in names if name.endswith("reverse_kl")] or ["student_entropy"]
    return int(trace.to_pandas().groupby("sample")[columns[0]].max().idxmax())
