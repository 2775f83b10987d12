"""RunBoard: the curves of a run while it trains, with the alarms of `diagnose.health` on them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from opdlab.errors import OpdlabError
from opdlab.support.expect import shortened
from opdlab.support.validation import Text, Unchecked, validate_arguments
from opdlab.viz import markup, phase_bars
from opdlab.viz.channel import Channel
from opdlab.viz.kept_steps import KeptSteps
from opdlab.viz.lines import Line, Plot, find_range, thin
from opdlab.viz.phase_bars import PhaseBar, bars_of
from opdlab.viz.traits import Trait
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

    from opdlab.diagnose.health import Alarm, Health
    from opdlab.diagnose.profile import Profile

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
NEAR = 0.04  # of the axis: flags of marks that are nearer to each other overlap
MANY = 24  # steps from which a running mean lies over the pale raw values
# Hues of several runs: blue and orange stay the teacher's and the student's.
OVERLAID = ("amount", "green", "pink", "grey")
FLAT = ("reward", "accuracy", "acceptance")  # between 0 and 1, and drawn so


@runtime_checkable
class HasHistory(Protocol):
    """A run, as far as a board reads it."""

    @property
    def history(self) -> pd.DataFrame:
        """One row for each step."""
        ...


@runtime_checkable
class TrainingRun(HasHistory, Protocol):
    """A run that is no mere history: it knows its method and settings."""

    @property
    def method(self) -> Any:
        """The method that the run trains with."""
        ...

    @property
    def settings(self) -> Any:
        """The run's `Settings`."""
        ...


class RunBoard(View):
    """Curves over the steps of a run, with alarms marked where they went off.

        board = viz.RunBoard(run)
        board.train()                 # or: for step in board: …

    The picture follows the run while the cell trains. An interrupt leaves it standing and the run
    between two steps, so that another `board.train()` goes on. An alarm of your own stands on the
    curve of its `metric`, or, where the run has no such number, on a curve that counts how often it
    went off.

    Args:
        runs: A run, its `history`, or several of them by name, which are overlaid. Finished runs
            need no training.
        title: The title above.
        watch: A watch of your own (`diagnose.health`), of a single run.
        traces: Kept rollouts by step, as `{20: step.trace()}` or the paths of their files
            (`opdlab distill` keeps them every `trace_every` steps). A click on a curve opens those
            of the nearest step: by prompt, with rewards, then token by token.
        profile: What `opdlab.profile(run)` found, of a single run: the bars that say where a step's
            time goes then have the limit of the device on them, and the memory.

    Attributes:
        runs: The runs by name.
        watches: The watch of each run, by name.
        hidden: Names of runs that are not drawn.
        step: The step whose rollouts are open; -1 for none.
        kept: The traces by step.

    Raises:
        OpdlabError: There is nothing to show, or the watch or the profile is none of a single run.
    """

    caption = "How is the run going, and what goes wrong?"
    takes = "a run or its history, or several by name"
    name, scripts, styles = "board", ("board.js",), ("lines.css", "board.css")
    hidden = Trait([])
    step = Trait(-1)

    @validate_arguments
    def __init__(
        self,
        runs: Any,
        title: Text = "",
        watch: Health | None = None,
        traces: Unchecked[Mapping[int, Any] | None] = None,
        profile: Unchecked[Profile | None] = None,
    ) -> None:
        from opdlab.diagnose.health import Health, health
        from opdlab.diagnose.profile import Profile

        super().__init__()
        self.title, self.kept = title, KeptSteps.read(traces)
        self.runs: dict[str, Any] = (
            dict(runs) if isinstance(runs, Mapping) else {_name_of_run(runs): runs}
        )
        if not self.runs:
            raise OpdlabError(
                "A RunBoard needs a run, and there is none. Give RunBoard(run), a history, or"
                " {'name': run, …}."
            )
        for name, run in self.runs.items():
            if not _is_run(run):
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
        if profile is not None and (len(self.runs) > 1 or not isinstance(profile, Profile)):
            raise OpdlabError(
                f"RunBoard got profile={shortened(profile)} for {len(self.runs)}"
                f" run{'s' * (len(self.runs) > 1)}. Give the profile of one run,"
                " opdlab.profile(run), or leave it out."
            )
        self.profile = profile
        self.watches = {
            name: watch if watch is not None and len(self.runs) == 1 else health(run)
            for name, run in self.runs.items()
        }

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is a run or a history, or holds some by name.

        Args:
            given: Anything.
            sample: Not used: a run has no completion to choose.

        Returns:
            Whether the view can be made of it.
        """
        if isinstance(given, Mapping):
            return bool(given) and all(_is_run(run) for run in given.values())
        return _is_run(given)

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make a board of two runs whose entropy collapses; it shows no tokens.

        Args:
            tokens: Not used.
            words: The title and the names of the runs.

        Returns:
            The view.
        """
        return cls({words: example_history(), f"{words}, again": example_history()}, title=words)

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
        """The alarms with the name of their run, in the order of their steps."""
        found = [(name, alarm) for name, watch in self.watches.items() for alarm in watch.alarms]
        return sorted(found, key=lambda pair: pair[1].step)

    @property
    def df(self) -> pd.DataFrame:
        """One row for each step of every run: its history, and the numbers of its watch."""
        return pd.concat(
            [self._rows(name).assign(run=name) for name in self.runs], ignore_index=True
        )

    @property
    def plots(self) -> list[Plot]:
        """A plot for each curve that a run has, and for each further number of an alarm."""
        tables = {name: self._rows(name) for name in self.runs}
        rung = list(dict.fromkeys(self._find_curve(alarm, tables) for _, alarm in self.alarms))
        for key in rung:
            if not _has(tables, key):
                tables = {
                    name: self._with_count(table, name, key) for name, table in tables.items()
                }
        ends = find_range([np.asarray(t["step"], float) for t in tables.values() if len(t)])
        keys = [
            *(key for key in KEYS if _has(tables, key)),
            *(key for key in rung if key not in KEYS),
        ]
        return [self._plot(key, tables, ends) for key in keys]

    @property
    def phases(self) -> list[PhaseBar]:
        """Return a bar for each phase of a step; none for several runs, or without seconds."""
        (name, *more) = self.runs
        return [] if more else bars_of(self._rows(name), self.profile)

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/board.js` reads them.
        """
        listed = [
            [i, name, alarm.step, alarm.signature, alarm.sentence, alarm.remedy]
            for i, (name, alarm) in enumerate(self.alarms, 1)
        ]
        return {
            "title": self.title,
            "said": self._summary(),
            "runs": list(self.runs),
            "hues": self._hues(),
            "plots": [plot.data() for plot in self.plots],
            "phases": phase_bars.data_of(self.phases),
            "alarms": listed,
            **self.kept.data(),
        }

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with the plots and the list of alarms; every foreign string in it is escaped.
        """
        keys = "".join(
            f'<span class="opd-lp-key opd-l-{hue}">{markup.escape(name)}</span>'
            for name, hue in self._hues().items()
        )
        said = f"{markup.escape(self._summary())} {keys if len(self.runs) > 1 else ''}"
        plots = "".join(plot.html() for plot in self.plots)
        alarms = "".join(
            f"<li><b>{i}</b> {markup.escape(self._name_alarm(name, alarm))}:"
            f" {markup.escape(alarm.sentence)}"
            f' <span class="opd-soft">{markup.escape(alarm.remedy)}</span></li>'
            for i, (name, alarm) in enumerate(self.alarms, 1)
        )
        listed = f'<ol class="opd-alarms">{alarms}</ol>' if alarms else ""
        return (
            f'{markup.draw_title(self.title)}<div class="opd-said">{said}</div>'
            f'<div class="opd-plots">{plots}</div>{phase_bars.draw(self.phases)}{listed}'
        )

    def __repr__(self) -> str:
        lines = [f"RunBoard: {self.title + ', ' if self.title else ''}{self._summary()}"]
        for plot in self.plots:
            for line in plot.lines:
                if line.kind == "line":
                    height = Channel("", "", line.y - min(0.0, float(np.nanmin(line.y))))
                    name = f", {line.name}" if len(self.runs) > 1 else ""
                    bars = markup.draw_sparkline(height, 32)
                    lines.append(f"{bars} {plot.label}{name} {_describe_course(line)}")
        if self.phases:
            lines.append(phase_bars.describe(self.phases))
        for name, alarm in self.alarms:
            lines.append(f"! {self._name_alarm(name, alarm)}: {alarm.sentence}")
        return "\n".join(lines)

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
        # From zero, except lengths: a text that grows by a tenth is news.
        low, high = find_range([line.y for line in lines], zero=key != "length")
        told = (
            "; ".join(_describe_course(line) for line in lines if line.kind == "line")
            if len(tables) == 1
            else ""
        )
        marks = [
            (float(a.step), str(i))
            for i, (name, a) in enumerate(self.alarms, 1)
            if self._find_curve(a, tables) == key
        ]
        top = max(high, 1.0) if key in FLAT else high
        return Plot(
            key, label, lines, told=told, x=ends, y=(low, top), marks=_keep_apart(marks, ends)
        )

    def _find_curve(self, alarm: Alarm, tables: Mapping[str, pd.DataFrame]) -> str:
        """The curve of the number that an alarm was read off, else one under the alarm's name."""
        named = (alarm.metric, alarm.signature)
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

    def _name_alarm(self, name: str, alarm: Alarm) -> str:
        return f"{f'{name}, ' if len(self.runs) > 1 else ''}step {alarm.step}, {alarm.signature}"

    def _summary(self) -> str:
        """The progress of the runs, and the number of alarms, in words."""
        told = []
        for name, run in self.runs.items():
            done, total = len(self._rows(name)), _planned_steps(run)
            told.append(f"{name} {done} of {total} steps" if total else f"{name} {done} steps")
        count = len(self.alarms)
        alarms = f"{count} alarm{'s' * (count > 1)}" if count else "no alarms"
        return f"{' · '.join(told)} · {alarms}"


class _Screen:
    """The output in which a board is redrawn while its run trains.

    At most twice a second, and for at most a tenth of the time.
    """

    def __init__(self, board: RunBoard) -> None:
        self.board = board
        self.handle: Any = None  # of IPython, once there is an output
        self.due = 0.0

    def draw(self, last: bool = False) -> None:
        from opdlab.support.progress import in_notebook

        now = time.monotonic()
        if now < self.due and not last:
            return
        self.board.refresh()
        if in_notebook():
            # No script until the run rests: nothing flickers, an interrupt leaves a whole picture.
            still = {"text/html": self.board.html(script=False), "text/plain": repr(self.board)}
            found = self.board._repr_mimebundle_() if last else still
            self._show(*(found if isinstance(found, tuple) else (found, {})))
        self.due = time.monotonic() + max(0.5, 10 * (time.monotonic() - now))

    def _show(self, bundle: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """Show a picture, or replace the one that is shown."""
        from IPython import display

        if self.handle is None:
            show: Any = display.display  # IPython has no types
            self.handle = show(bundle, metadata=metadata, raw=True, display_id=True)
        else:
            self.handle.update(bundle, metadata=metadata, raw=True)


def _has(tables: Mapping[str, pd.DataFrame], key: str) -> bool:
    """Tell whether a run has numbers under this name."""
    found = [table[key] for table in tables.values() if key in table and key != "step"]
    return any(
        pd.api.types.is_numeric_dtype(column) and bool(column.notna().any()) for column in found
    )


def _keep_apart(
    marks: Sequence[tuple[float, str]], ends: tuple[float, float]
) -> list[tuple[float, str]]:
    """Marks whose flags do not overlap: those that stand too near share the first one's, "2 3"."""
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


def example_history() -> pd.DataFrame:
    """Return the history of a made-up run of 30 steps, whose entropy collapses.

    Returns:
        One row for each step: `step`, `loss`, `entropy` and `reward`.
    """
    steps = range(1, 31)
    entropy = np.linspace(2, 0, 30)
    return pd.DataFrame({"step": steps, "loss": 1.0, "entropy": entropy, "reward": 0.5})


def _is_run(value: object) -> bool:
    return isinstance(value, (pd.DataFrame, HasHistory))


def _name_of_run(run: Any) -> str:
    return type(run.method).__name__ if isinstance(run, TrainingRun) else "run"


def _planned_steps(run: Any) -> int:
    """The number of steps that a run is to have; 0 for a history, which does not say."""
    return int(run.settings.steps) if isinstance(run, TrainingRun) else 0


def _lines(name: str, table: pd.DataFrame, key: str, hue: str) -> list[Line]:
    """The values, and their running mean where there are many.

    Values that not every step has, as those of an evaluation, are dots on a line.
    """
    there = table[key].notna()
    x, y = np.asarray(table["step"][there], float), np.asarray(table[key][there], float)
    if not len(x):
        return []
    if len(x) < MANY:
        dots = [Line(name, x, y, hue, "dots")] if len(x) < len(table) else []
        return [Line(name, x, y, hue), *dots]
    mean = pd.Series(y).rolling(max(5, len(y) // 10), center=True, min_periods=1).mean().to_numpy()
    return [Line(name, *thin(x, y), hue, "faint"), Line(name, *thin(x, mean), hue)]


def _describe_course(line: Line) -> str:
    return f"{markup.format_number(line.y[0])} → {markup.format_number(line.y[-1])}"
