"""RunCard: one still picture of a run, for a README, a report or an issue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from opdlab.data.trace import Trace
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.support.expect import shortened
from opdlab.support.validation import Text, Unchecked, validate_arguments
from opdlab.viz import markup
from opdlab.viz.channel import Channel
from opdlab.viz.channels import find_channels
from opdlab.viz.given import check_traces
from opdlab.viz.glyphs import group_pieces
from opdlab.viz.made_up import make_trace
from opdlab.viz.run_board import RunBoard, TrainingRun, example_history
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

    from opdlab.training.evaluation import Difference, Evaluation

CURVES = ("loss", "reverse_kl", "entropy", "length")
STRIPS = 3


class RunCard(View):
    """Curves, accuracy before and after with its interval, and up to three texts with their grades.

        viz.RunCard(run, before, after, samples=trace).to_png("card.png")

    A still picture without a script; a RunBoard is the live one.

    Args:
        run: A run or its `history`.
        before: `opdlab.evaluate(…)` before training. Without evaluations the card shows the first
            and last accuracy of the history.
        after: `opdlab.evaluate(…)` of the same prompts after training.
        samples: A scored trace (its first three completions), or traces by caption (the first
            completion of each).
        title: The title above.
        note: A line of your own.

    Attributes:
        board: A RunBoard of the run.
        gain: The paired difference of `after` and `before`; None without evaluations.
        strips: (caption, rows of one completion, its number) of each text shown.

    Raises:
        InvalidValue: `before`, `after` or `samples` is something else.
        OpdlabError: The run has no steps, or the evaluations are of different prompts.
    """

    caption = "What did this run change?"
    takes = "a run or its history"
    name, scripts, styles = "run-card", (), ("lines.css", "run_card.css")

    @validate_arguments
    def __init__(
        self,
        run: Any,
        before: Evaluation | None = None,
        after: Evaluation | None = None,
        samples: Unchecked[Trace | Mapping[str, Trace] | None] = None,
        title: Text = "",
        note: Text = "",
    ) -> None:
        super().__init__()
        _check_evaluation("before", before)
        _check_evaluation("after", after)
        if (before is None) != (after is None):
            raise OpdlabError(
                "A RunCard compares two evaluations, and got one. Give both before= and after=, or"
                " neither."
            )
        if not RunBoard.fits(run):
            raise OpdlabError(
                f"RunCard got a {type(run).__name__} as its run. Give a run, or the data frame"
                " run.history; a trace goes into samples=."
            )
        self.board, self.title, self.note = RunBoard(run), title, note
        if self.board.df.empty:
            raise OpdlabError(
                "The run has no steps yet, so there is nothing to show. Train first: run.train()."
            )
        self.before, self.after = before, after
        self.gain: Difference | None = None if before is None or after is None else after - before
        self.strips = _choose_strips(samples)
        self.run = run

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is a run or a history.

        Args:
            given: Anything.
            sample: Not used: a run has no completion to choose.

        Returns:
            Whether it is a run or a history; it may still have no steps.
        """
        return not isinstance(given, Mapping) and RunBoard.fits(given)

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make the card of a made-up run with one text.

        Args:
            tokens: The bytes of the completion's tokens.
            words: All other texts: title, prompt, names.

        Returns:
            The view.
        """
        samples = {words: make_trace(tokens, prompt=words, finish=words)}
        return cls(example_history(), samples=samples, title=words, note=words)

    @property
    def df(self) -> pd.DataFrame:
        """The history."""
        return self.board.df

    def html(self, assets: bool = True, script: bool = True) -> str:
        """Return the card as an HTML fragment that needs nothing else.

        Args:
            assets: False leaves the styles to the page around it.
            script: Not used: there is no script to leave out.

        Returns:
            The fragment.
        """
        return super().html(assets, script=False)

    def data(self) -> dict[str, Any]:
        """Return nothing: there is no script to draw it.

        Returns:
            An empty dict.
        """
        return {}

    def live(self) -> Any:
        """Refuse to make a widget: a card is a still picture.

        Returns:
            Nothing; the call always raises.

        Raises:
            OpdlabError: Always. The message names the views to use instead.
        """
        raise OpdlabError(
            "A RunCard is a still picture and has no widget. Show the card itself, or a RunBoard"
            " for a live one."
        )

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with the whole card; every foreign string in it is escaped.
        """
        plots = "".join(plot.html() for plot in self.board.plots if plot.key in CURVES)
        note = f'<div class="opd-soft">{markup.escape(self.note)}</div>' if self.note else ""
        return (
            f"{markup.draw_title(self.title or self._name())}"
            '<div class="opd-card-facts">'
            f"<span>{markup.escape(self._list_facts())}</span>{note}</div>"
            f'{self._draw_accuracy()}<div class="opd-card-plots">{plots}</div>{self._draw_texts()}'
            f'<div class="opd-peaks">{markup.escape(self._list_alarms())}</div>'
        )

    def __repr__(self) -> str:
        lines = [
            f"RunCard: {self.title or self._name()}",
            self._list_facts(),
            self._describe_gain(),
            self._list_alarms(),
            *repr(self.board).splitlines()[1:],
        ]
        return "\n".join(line for line in lines if line)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        return {"text/html": self.html(), "text/plain": repr(self)}

    def _name(self) -> str:
        return next(iter(self.board.runs))

    def _list_facts(self) -> str:
        """The settings and sizes of the run, as far as it says."""
        history = self.df
        out = [self._name(), f"{len(history)} steps"]
        if isinstance(self.run, TrainingRun):
            s = self.run.settings
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
            out.append(f"{markup.format_number(float(history['seconds'].sum()))} s")
        return " · ".join(out)

    def _find_ends(self) -> tuple[float, float] | None:
        """Accuracy before and after."""
        if self.before is not None and self.after is not None:
            return self.before.accuracy, self.after.accuracy
        known = self.df["accuracy"].dropna().tolist() if "accuracy" in self.df else []
        return (known[0], known[-1]) if len(known) > 1 else None

    def _describe_gain(self) -> str:
        ends = self._find_ends()
        if ends is None:
            return ""
        said = f"accuracy {ends[0]:.3f} → {ends[1]:.3f}"
        if self.gain is None:
            first, last = (
                int(self.df["step"][i]) for i in self.df["accuracy"].dropna().index[[0, -1]]
            )
            return f"{said} (steps {first} and {last})"
        low, high = (markup.format_number(x, sign=True) for x in (self.gain.low, self.gain.high))
        mean = markup.format_number(self.gain.mean, sign=True)
        counted = f"{self.gain.prompts} prompts, 1 seed"
        return f"{said}, {mean} [{low}, {high}], 95 % paired over {counted}"

    def _draw_accuracy(self) -> str:
        """A scale from 0 to 1: hollow before, filled after, with the interval of the gain."""
        ends = self._find_ends()
        if ends is None:
            return ""
        before, after = ends
        whiskers = ""
        if self.gain is not None:
            ends = before + self.gain.low, before + self.gain.high
            whiskers = f'<i class="opd-whisker" style="{_between(*ends)}"></i>'
        way = f'<i class="opd-way" style="{_between(*sorted((before, after)))}"></i>'
        was = f'<i class="opd-was" style="left:{_place(before)}"></i>'
        now = f'<i class="opd-is" style="left:{_place(after)}"></i>'
        return (
            f'<div class="opd-card-gain"><b>{markup.escape(self._describe_gain())}</b>'
            '<div class="opd-scale01"><span>0</span>'
            f'<div class="opd-line01">{way}{whiskers}{was}{now}</div>'
            "<span>1</span></div></div>"
        )

    def _draw_texts(self) -> str:
        if not self.strips:
            return ""
        found = [_channel(trace) for _, trace, _ in self.strips]
        limit = max(c.limit for c in found)
        out = [f'<div class="opd-bar">{markup.draw_legend(found[0], limit)}</div>']
        for (caption, trace, sample), channel in zip(self.strips, found, strict=True):
            prompt = str(trace.meta["prompts"][sample])
            strip = markup.draw_strip(group_pieces(trace.tokens()), channel, limit)
            out.append(
                '<div class="opd-card-text">'
                f'<div class="opd-soft" dir="auto">{markup.escape(caption + prompt)}</div>'
                '<div class="opd-strip" dir="auto"'
                f' style="white-space:pre-wrap;font-family:monospace">{strip}</div></div>'
            )
        return "".join(out)

    def _list_alarms(self) -> str:
        alarms = [f"{alarm.signature} (step {alarm.step})" for _, alarm in self.board.alarms]
        return f"Alarms: {', '.join(alarms)}" if alarms else "No alarms"


def _check_evaluation(name: str, given: object) -> None:
    """Refuse anything but a result of `opdlab.evaluate`."""
    if given is None:
        return
    from opdlab.training.evaluation import Evaluation

    if not isinstance(given, Evaluation):
        raise InvalidValue(
            f"RunCard got {name}={shortened(given)}. Use what opdlab.evaluate(policy, task)"
            " returns."
        )


def _place(value: float) -> str:
    """Return the place of an accuracy on the scale."""
    return f"{100 * min(1.0, max(0.0, value)):.2f}%"


def _between(low: float, high: float) -> str:
    return f"left:{_place(low)};right:calc(100% - {_place(high)})"


def _choose_strips(samples: Trace | Mapping[str, Trace] | None) -> list[tuple[str, Trace, int]]:
    """(caption, rows of one completion, its number), at most three."""
    if samples is None:
        return []
    if isinstance(samples, Trace):
        held = sorted(set(samples.column("sample").tolist()))[:STRIPS]
        return [("", samples.sample(i), i) for i in held]
    check_traces(samples, "RunCard", "samples={'before': trace, 'after': trace}")
    first = [
        (f"{name}: ", trace, int(trace.column("sample").min()))
        for name, trace in list(samples.items())[:STRIPS]
        if len(trace)
    ]
    return [(name, trace.sample(i), i) for name, trace, i in first]


def _channel(trace: Trace) -> Channel:
    found = find_channels(trace)
    if not found:
        raise OpdlabError(
            "The samples have no numbers to colour them by. Give a trace made with opdlab.score(…)."
        )
    return found.get("log_ratio") or next(iter(found.values()))
