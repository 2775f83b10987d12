"""RunBoard: the curves of a run while it trains, with the alarms of `diagnose.health` where they
went off.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from opdlab.diagnose.health import Alarm, Health, health
from opdlab.errors import OpdlabError
from opdlab.support.expect import shortened
from opdlab.support.progress import in_notebook
from opdlab.viz import markup
from opdlab.viz.channels import Channel
from opdlab.viz.lines import Line, Plot, span, thinned
from opdlab.viz.view import Trait, View

KEYS = {
    "loss": ("loss", "student"),
    "reverse_kl": ("reverse KL, nats", "student"),
    "entropy": ("student entropy, nats", "amount"),
    "length": ("length, tokens", "amount"),
    "reward": ("reward", "teacher"),
    "accuracy": ("accuracy, held out", "teacher"),
    "acceptance": ("overlap: accepted by the teacher", "teacher"),
}
# Curves that are drawn where an alarm was read off them.
METERS = {
    "repetition": ("repeated triples of tokens, share", "amount"),
    "cut": ("cut off at the limit, share", "amount"),
}
# The curve that each signature of `health` is read off.
SEEN_ON = {
    "length run-away": "length",
    "repetition": "repetition",
    "entropy collapse": "entropy",
    "falling overlap": "acceptance",
    "EOS or template mismatch": "acceptance",
    "late over-training": "accuracy",
}
NEAR = 0.04  # of the axis: flags of marks that are nearer to each other overlap
MANY = 24  # steps from which a running mean lies over the pale raw values
OVERLAID = (
    "amount",
    "green",
    "pink",
    "grey",
)  # hues of several runs: blue and orange stay the teacher's and the student's
FLAT = ("reward", "accuracy", "acceptance")  # between 0 and 1, and drawn so


class RunBoard(View):
    """How is the run going, and what goes wrong?

    Curves over steps, alarms marked where they went off.

        board = viz.RunBoard(run)
        board.train()                 # or: for step in board: …

    The picture follows the run while the cell trains. An interrupt leaves it standing and the run
    between two steps, so that another `board.train()` goes on. runs: a run, its `history`, or
    several by name, which are overlaid; finished ones need no training. watch: one of your own
    (`diagnose.health`), of a single run. An alarm of your own stands on the curve of its `metric`,
    or, where the run has no such number, on a curve that counts how often it went off. Raises
    OpdlabError where there is nothing to show.

    `hidden` names the runs that are not drawn.
    """

    name, scripts, styles = "board", ("board.js",), ("lines.css", "board.css")
    hidden = Trait([])

    def __init__(self, runs: Any, title: str = "", watch: Health | None = None) -> None:
        super().__init__()
        self.title, self.runs = (
            title,
            dict(runs) if isinstance(runs, Mapping) else {_named(runs): runs},
        )
        if not self.runs:
            raise OpdlabError(
                "A RunBoard needs a run, and there is none. Give RunBoard(run), a history, or"
                " {'name': run, …}."
            )
        for name, run in self.runs.items():
            if not hasattr(run, "history") and not isinstance(run, pd.DataFrame):
                raise OpdlabError(
                    f"RunBoard got {type(run).__name__} for {name!r}. Give a run, or the data frame"
                    " run.history."
                )
        if watch is not None and (len(self.runs) > 1 or not isinstance(watch, Health)):
            raise OpdlabError(
                f"RunBoard got watch={shortened(watch)} for {len(self.runs)}"
                f" run{'s' * (len(self.runs) > 1)}. Give the watch of one run,"
                " diagnose.health(run), or leave it out: each run gets its own."
            )
        self.watches = {
            name: watch if watch is not None and len(self.runs) == 1 else health(run)
            for name, run in self.runs.items()
        }

    def __iter__(self) -> Iterator[Any]:
        """Train the run, step by step, with the picture following."""
        run, watch = self._only()
        screen = _Screen(self)
        screen.draw()
        try:
            for step in run:
                watch(step)
                screen.draw()
                yield step
        finally:
            screen.draw(last=True)

    def train(self) -> None:
        """Run all remaining steps, with the picture following."""
        for _ in self:
            pass

    @property
    def alarms(self) -> list[tuple[str, Alarm]]:
        """(run, alarm), in the order of their steps."""
        found = [(name, alarm) for name, watch in self.watches.items() for alarm in watch.alarms]
        return sorted(found, key=lambda pair: pair[1].step)

    @property
    def df(self) -> pd.DataFrame:
        """One row a step of every run: its history, with what the watch noted beside it."""
        return pd.concat(
            [self._rows(name).assign(run=name) for name in self.runs], ignore_index=True
        )

    @property
    def plots(self) -> list[Plot]:
        """A plot for every curve that a run has, and one for every further number or name that an
        alarm went off by.
        """
        tables = {name: self._rows(name) for name in self.runs}
        rung = list(dict.fromkeys(self._where(alarm, tables) for _, alarm in self.alarms))
        for key in rung:
            if not _has(tables, key):
                tables = {
                    name: self._with_count(table, name, key) for name, table in tables.items()
                }
        ends = span([np.asarray(t["step"], float) for t in tables.values() if len(t)])
        keys = [
            *(key for key in KEYS if _has(tables, key)),
            *(key for key in rung if key not in KEYS),
        ]
        return [self._plot(key, tables, ends) for key in keys]

    def data(self) -> dict[str, Any]:
        listed = [
            [i, name, alarm.step, alarm.signature, alarm.sentence, alarm.remedy]
            for i, (name, alarm) in enumerate(self.alarms, 1)
        ]
        return {
            "title": self.title,
            "said": self._said(),
            "runs": list(self.runs),
            "hues": self._hues(),
            "plots": [plot.data() for plot in self.plots],
            "alarms": listed,
        }

    def static(self) -> str:
        title = markup.title(self.title)
        keys = "".join(
            f'<span class="opd-lp-key opd-l-{hue}">{markup.safe(name)}</span>'
            for name, hue in self._hues().items()
        )
        alarms = "".join(
            f"<li><b>{i}</b> {markup.safe(self._place(name, alarm))}:"
            f" {markup.safe(alarm.sentence)} "
            f'<span class="opd-soft">{markup.safe(alarm.remedy)}</span></li>'
            for i, (name, alarm) in enumerate(self.alarms, 1)
        )
        return (
            f'{title}<div class="opd-said">{markup.safe(self._said())}'
            f" {keys if len(self.runs) > 1 else ''}</div><div"
            f' class="opd-plots">{"".join(plot.html() for plot in self.plots)}</div>'
            + (f'<ol class="opd-alarms">{alarms}</ol>' if alarms else "")
        )

    def __repr__(self) -> str:
        lines = [f"RunBoard: {self.title + ', ' if self.title else ''}{self._said()}"]
        for plot in self.plots:
            for line in plot.lines:
                if line.kind == "line":
                    bars = markup.sparkline(
                        Channel("", "", line.y - min(0.0, float(np.nanmin(line.y)))), 32
                    )
                    lines.append(
                        f"{bars} {plot.label}{f', {line.name}' if len(self.runs) > 1 else ''}"
                        f" {_course(line)}"
                    )
        return "\n".join(
            [*lines, *(f"! {self._place(name, a)}: {a.sentence}" for name, a in self.alarms)]
        )

    def _only(self) -> tuple[Any, Health]:
        (name, run), *more = self.runs.items()
        if more or isinstance(run, pd.DataFrame):
            what = f"{len(self.runs)} runs" if more else "a history"
            raise OpdlabError(
                f"This board shows {what}, so there is nothing to train. Train with a board of one"
                " run: RunBoard(run)."
            )
        return run, self.watches[name]

    def _rows(self, name: str) -> pd.DataFrame:
        run = self.runs[name]
        table = pd.DataFrame(run if isinstance(run, pd.DataFrame) else run.history)
        if table.empty:
            return pd.DataFrame({"step": []})
        if "step" not in table:
            table = table.assign(step=range(1, len(table) + 1))
        noted = self.watches[name].vitals
        extra = [c for c in noted if c not in table] if len(noted) else []
        return table.merge(noted[["step", *extra]], how="left", on="step") if extra else table

    def _plot(
        self, key: str, tables: Mapping[str, pd.DataFrame], ends: tuple[float, float]
    ) -> Plot:
        label, hue = (KEYS | METERS).get(key, (key.replace("_", " "), "amount"))
        lines = [
            line
            for name, table in tables.items()
            if key in table and name not in self.hidden
            for line in _lines(name, table, key, hue if len(tables) == 1 else self._hues()[name])
        ]
        low, high = span([line.y for line in lines], zero=True)
        told = (
            "; ".join(_course(line) for line in lines if line.kind == "line")
            if len(tables) == 1
            else ""
        )
        marks = [
            (float(a.step), str(i))
            for i, (name, a) in enumerate(self.alarms, 1)
            if self._where(a, tables) == key
        ]
        top = max(high, 1.0) if key in FLAT else high
        return Plot(key, label, lines, told=told, x=ends, y=(low, top), marks=_apart(marks, ends))

    def _where(self, alarm: Alarm, tables: Mapping[str, pd.DataFrame]) -> str:
        """The curve that an alarm stands on: that of the number it was read off, else one of its
        own under its name.
        """
        named = (alarm.metric, SEEN_ON.get(alarm.signature, ""), alarm.signature)
        return next((key for key in named if key and _has(tables, key)), alarm.signature)

    def _with_count(self, table: pd.DataFrame, run: str, signature: str) -> pd.DataFrame:
        """A run's rows with a column of how often an alarm has gone off by then."""
        steps = [
            alarm.step
            for name, alarm in self.alarms
            if name == run and alarm.signature == signature
        ]
        count = [float(sum(at <= step for at in steps)) for step in table["step"]]
        return table.assign(**{signature: count})

    def _hues(self) -> dict[str, str]:
        return {name: OVERLAID[i % len(OVERLAID)] for i, name in enumerate(self.runs)}

    def _place(self, name: str, alarm: Alarm) -> str:
        return f"{f'{name}, ' if len(self.runs) > 1 else ''}step {alarm.step}, {alarm.signature}"

    def _said(self) -> str:
        """Where the runs are and whether all is well."""
        told = []
        for name, run in self.runs.items():
            done, total = len(self._rows(name)), getattr(getattr(run, "settings", None), "steps", 0)
            told.append(f"{name} {done} of {total} steps" if total else f"{name} {done} steps")
        alarms = len(self.alarms)
        return (
            f"{' · '.join(told)} ·"
            f" {f'{alarms} alarm' + 's' * (alarms > 1) if alarms else 'no alarms'}"
        )


class _Screen:
    """The output in which a board is redrawn while its run trains: at most twice a second, and a
    tenth of the time.
    """

    def __init__(self, board: RunBoard) -> None:
        self.board, self.handle, self.due = board, None, 0.0

    def draw(self, last: bool = False) -> None:
        now = time.monotonic()
        if now < self.due and not last:
            return
        self.board.refresh()
        if in_notebook():
            found = (
                self.board._repr_mimebundle_()
                if last
                else {"text/html": self.board.html(script=False), "text/plain": repr(self.board)}
            )
            self._show(*(found if isinstance(found, tuple) else (found, {})))
        self.due = time.monotonic() + max(0.5, 10 * (time.monotonic() - now))

    def _show(self, bundle: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """No script until the run rests, so that nothing flickers and whatever happens leaves a
        whole picture.
        """
        from IPython.display import display

        if self.handle is None:
            self.handle = display(bundle, metadata=metadata, raw=True, display_id=True)
        else:
            self.handle.update(bundle, metadata=metadata, raw=True)


def _has(tables: Mapping[str, pd.DataFrame], key: str) -> bool:
    """Whether a run has numbers under this name."""
    found = [table[key] for table in tables.values() if key in table and key != "step"]
    return any(
        pd.api.types.is_numeric_dtype(column) and bool(column.notna().any()) for column in found
    )


def _apart(
    marks: Sequence[tuple[float, str]], ends: tuple[float, float]
) -> list[tuple[float, str]]:
    """Marks whose numbers do not lie on each other: those that stand too near share the first one's
    flag, "2 3".
    """
    out: list[tuple[float, str]] = []
    flag = 0
    for x, sign in sorted(marks, key=lambda mark: mark[0]):
        if out and x - out[flag][0] <= NEAR * (ends[1] - ends[0]):
            out[flag] = (out[flag][0], f"{out[flag][1]} {sign}")
            if x > out[-1][0]:
                out.append((x, ""))
        else:
            flag = len(out)
            out.append((x, sign))
    return out


def _named(run: Any) -> str:
    return type(run.method).__name__ if hasattr(run, "method") else "run"


def _lines(name: str, table: pd.DataFrame, key: str, hue: str) -> list[Line]:
    """The values, and their running mean where there are many; the few of an evaluation as dots on
    a line.
    """
    there = table[key].notna()
    x, y = np.asarray(table["step"][there], float), np.asarray(table[key][there], float)
    if len(x) < MANY:
        return (
            [
                Line(name, x, y, hue),
                *([Line(name, x, y, hue, "dots")] if 0 < len(x) < len(table) else []),
            ]
            if len(x)
            else []
        )
    mean = pd.Series(y).rolling(max(5, len(y) // 10), center=True, min_periods=1).mean().to_numpy()
    return [Line(name, *thinned(x, y), hue, "faint"), Line(name, *thinned(x, mean), hue)]


def _course(line: Line) -> str:
    return f"{markup.number(line.y[0])} → {markup.number(line.y[-1])}"
