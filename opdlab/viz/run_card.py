"""RunCard: one still picture of a run, for a README, a report or an issue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from opdlab.data.trace import Trace
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.support.expect import shortened
from opdlab.viz import markup
from opdlab.viz.channels import Channel, channels
from opdlab.viz.given import given_traces
from opdlab.viz.glyphs import groups
from opdlab.viz.run_board import RunBoard
from opdlab.viz.view import View

if TYPE_CHECKING:
    from opdlab.training.evaluation import Difference, Evaluation

CURVES = ("loss", "reverse_kl", "entropy", "length")
STRIPS = 3


class RunCard(View):
    """What did this run change?

    Curves, accuracy before and after with its interval, and up to three texts as the teacher sees
    them.

        viz.RunCard(run, before, after, samples=opdlab.score(rollout, student,
        teacher)).to_png("card.png")

    run: a run or its `history`. before, after: `opdlab.evaluate(…)` of the same prompts; without
        them the first and last accuracy
    that the history knows. samples: a scored trace (its first three completions), or traces by
    caption (the first completion of each). note: a line of your own. A still picture without a
    script: `live()` says to use a RunBoard. Raises OpdlabError for a run without steps, and for
    evaluations of different prompts.
    """

    name, scripts, styles = "run-card", (), ("lines.css", "run_card.css")

    def __init__(
        self,
        run: Any,
        before: Evaluation | None = None,
        after: Evaluation | None = None,
        samples: Trace | Mapping[str, Trace] | None = None,
        title: str = "",
        note: str = "",
    ) -> None:
        super().__init__()
        from opdlab.training.evaluation import Evaluation

        for name, result in (("before", before), ("after", after)):
            if result is not None and not isinstance(result, Evaluation):
                raise InvalidValue(
                    f"RunCard got {name}={shortened(result)}. Use what opdlab.evaluate(policy,"
                    " task) returns."
                )
        if (before is None) != (after is None):
            raise OpdlabError(
                "A RunCard compares two evaluations, and got one. Give both before= and after=, or"
                " neither."
            )
        self.board, self.title, self.note = RunBoard(run), title, note
        if self.board.df.empty:
            raise OpdlabError(
                "The run has no steps yet, so there is nothing to show. Train first: run.train()."
            )
        self.before, self.after = before, after
        self.gain: Difference | None = None if before is None or after is None else after - before
        self.strips = _strips(samples)
        self.run = run

    @property
    def df(self) -> pd.DataFrame:
        """The history."""
        return self.board.df

    def html(self, assets: bool = True, script: bool = True) -> str:
        """As of every view, but there is no script to leave out."""
        return super().html(assets, script=False)

    def data(self) -> dict[str, Any]:
        return {}

    def live(self) -> Any:
        raise OpdlabError(
            "A RunCard is a still picture and has no widget. Show the card itself, or a RunBoard"
            " for a live one."
        )

    def static(self) -> str:
        plots = "".join(plot.html() for plot in self.board.plots if plot.key in CURVES)
        note = f'<div class="opd-soft">{markup.safe(self.note)}</div>' if self.note else ""
        return (
            f"{markup.title(self.title or self._name())}"
            f'<div class="opd-card-facts"><span>{markup.safe(self._facts())}</span>{note}</div>'
            f'{self._accuracy()}<div class="opd-card-plots">{plots}</div>{self._texts()}'
            f'<div class="opd-peaks">{markup.safe(self._alarms())}</div>'
        )

    def __repr__(self) -> str:
        lines = [
            f"RunCard: {self.title or self._name()}",
            self._facts(),
            self._gained(),
            self._alarms(),
            *repr(self.board).splitlines()[1:],
        ]
        return "\n".join(line for line in lines if line)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        return {"text/html": self.html(), "text/plain": repr(self)}

    def _name(self) -> str:
        return next(iter(self.board.runs))

    def _facts(self) -> str:
        """How it was trained, as far as the run says."""
        history, s = self.df, getattr(self.run, "settings", None)
        out = [self._name(), f"{len(history)} steps"]
        if s is not None:
            sizes = f"batch {s.batch}" + (f" × {s.n}" if s.n > 1 else "")
            out += [
                sizes,
                f"lr {s.lr:g}",
                f"LoRA {s.lora}" if s.lora else "all weights",
                f"seed {s.seed}",
            ]
        if "tokens" in history:
            out.append(f"{int(history['tokens'].sum()):,} tokens written")
        if "seconds" in history:
            out.append(f"{markup.number(float(history['seconds'].sum()))} s")
        return " · ".join(out)

    def _ends(self) -> tuple[float, float] | None:
        """Accuracy before and after."""
        if self.before is not None and self.after is not None:
            return self.before.accuracy, self.after.accuracy
        known = self.df["accuracy"].dropna().tolist() if "accuracy" in self.df else []
        return (known[0], known[-1]) if len(known) > 1 else None

    def _gained(self) -> str:
        ends = self._ends()
        if ends is None:
            return ""
        said = f"accuracy {ends[0]:.3f} → {ends[1]:.3f}"
        if self.gain is None:
            first, last = (
                int(self.df["step"][i]) for i in self.df["accuracy"].dropna().index[[0, -1]]
            )
            return f"{said} (steps {first} and {last})"
        low, high = (markup.number(x, sign=True) for x in (self.gain.low, self.gain.high))
        return (
            f"{said}, {markup.number(self.gain.mean, sign=True)} [{low}, {high}], 95 % paired over"
            f" {self.gain.prompts} prompts"
        )

    def _accuracy(self) -> str:
        """A scale from 0 to 1: hollow before, filled after, and the interval of the gain as
        whiskers around after.
        """
        ends = self._ends()
        if ends is None:
            return ""
        before, after = ends
        at = lambda value: f"{100 * min(1.0, max(0.0, value)):.2f}%"
        whiskers = ""
        if self.gain is not None:
            low, high = before + self.gain.low, before + self.gain.high
            whiskers = (
                f'<i class="opd-whisker" style="left:{at(low)};right:calc(100% - {at(high)})"></i>'
            )
        low, high = sorted((before, after))
        dots = (
            f'<i class="opd-was" style="left:{at(before)}"></i><i class="opd-is"'
            f' style="left:{at(after)}"></i>'
        )
        way = f'<i class="opd-way" style="left:{at(low)};right:calc(100% - {at(high)})"></i>'
        return (
            f'<div class="opd-card-gain"><b>{markup.safe(self._gained())}</b><div'
            ' class="opd-scale01"><span>0</span><div'
            f' class="opd-line01">{way}{whiskers}{dots}</div><span>1</span></div></div>'
        )

    def _texts(self) -> str:
        if not self.strips:
            return ""
        found = [_channel(trace) for _, trace, _ in self.strips]
        limit = max(c.limit for c in found)
        out = [f'<div class="opd-bar">{markup.legend(found[0], limit)}</div>']
        for (caption, trace, sample), channel in zip(self.strips, found, strict=True):
            prompt = str(trace.meta["prompts"][sample])
            out.append(
                '<div class="opd-card-text"><div class="opd-soft"'
                f' dir="auto">{markup.safe(caption)}{markup.safe(prompt)}</div>'
                '<div class="opd-strip" dir="auto"'
                ' style="white-space:pre-wrap;font-family:monospace">'
                f"{markup.strip(groups(trace.tokens()), channel, limit)}</div></div>"
            )
        return "".join(out)

    def _alarms(self) -> str:
        alarms = [f"{alarm.signature} (step {alarm.step})" for _, alarm in self.board.alarms]
        return f"Alarms: {', '.join(alarms)}" if alarms else "No alarms"


def _strips(samples: Trace | Mapping[str, Trace] | None) -> list[tuple[str, Trace, int]]:
    """(caption, rows of one completion, its number), at most three."""
    if samples is None:
        return []
    if isinstance(samples, Trace):
        held = sorted(set(samples.column("sample").tolist()))[:STRIPS]
        return [("", samples.sample(i), i) for i in held]
    given_traces(samples, "RunCard", "samples={'before': trace, 'after': trace}")
    first = [
        (f"{name}: ", trace, int(trace.column("sample").min()))
        for name, trace in list(samples.items())[:STRIPS]
        if len(trace)
    ]
    return [(name, trace.sample(i), i) for name, trace, i in first]


def _channel(trace: Trace) -> Channel:
    found = channels(trace)
    if not found:
        raise OpdlabError(
            "The samples have no numbers to colour them by. Give a trace made with opdlab.score(…)."
        )
    return found.get("log_ratio") or next(iter(found.values()))
