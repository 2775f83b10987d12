"""Playground: the effect of a loss in worlds small enough to see all of it, and on a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError
from opdlab.support.expect import expect
from opdlab.support.validation import Text, Unchecked, Whole, validate_arguments
from opdlab.viz import markup, payload
from opdlab.viz.channel import Channel
from opdlab.viz.channels import find_channels
from opdlab.viz.duel import find_duel
from opdlab.viz.lines import Line, Plot
from opdlab.viz.made_up import make_trace
from opdlab.viz.traits import Trait
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

    from opdlab.viz.playground_losses import Setting
    from opdlab.viz.toys import Push

# Of the losses shown; blue and orange are the teacher and the student.
HUES = ("amount", "green", "pink", "grey")
TALL = 4.0  # the height at which the curves leave the plot
ALONE = 0.1  # a hill with less of the student's mass is left out


class Playground(View):
    """The push of a loss on a token, and the way of whole distributions under it.

    Curves over the log ratio show the push per unit of the student's probability, and on the logit
    of a token that the teacher gives `mass`. A triangle of three outcomes shows where a gradient
    step moves each student, with a teacher and a student to drag. A Gaussian under two hills shows
    whether the loss covers both. The built-in divergences are computed in the page, so it lives on
    without Python; own losses are evaluated by Python, so the sliders move them in `.live()` only.

    Args:
        losses: The losses shown: names of generators, `Generator`s, and your own by name or as they
            are: functions of rows, of (student, teacher) log-probs, or methods without a plan. Own
            losses are audited, and checked by finite differences.
        trace: A scored text, to see the push of the built-in losses on the tokens wanted at a
            position.
        sample: The completion of the trace.
        title: The title above.

    Attributes:
        shown: Names of the losses shown.
        parameter: The beta or alpha of divergences that have one.
        clip: The largest push; 0 for any.
        temperature: The teacher's temperature.
        steps: Gradient steps taken.
        mass: The teacher's probability of the token that is pushed.
        teacher: The teacher's probabilities of three outcomes.
        student: The student's probabilities of three outcomes.
        selected: The position looked at; at first the one where the two sides differ most.

    Raises:
        InvalidValue: There is no divergence of a name.
        OpdlabError: There are more than four losses. An own loss may raise its own errors.
    """

    caption = "What would this loss do to a token, and to a whole distribution?"
    takes = "losses, and a trace if you like"
    name = "playground"
    scripts = ("playground.js",)
    styles = ("lines.css", "playground.css")
    shown = Trait([])
    parameter = Trait(0.5)
    clip = Trait(0.0)
    temperature = Trait(1.0)
    steps = Trait(200)
    mass = Trait(0.5)
    teacher = Trait([0.6, 0.3, 0.1])
    student = Trait([0.05, 0.15, 0.8])

    @validate_arguments
    def __init__(
        self,
        losses: Any = None,
        trace: Unchecked[Trace | None] = None,
        sample: Whole = 0,
        title: Text = "",
    ) -> None:
        from opdlab.viz.playground_losses import PlaygroundLosses

        super().__init__()
        if trace is not None:
            expect(trace, Trace, "Playground", "trace")
        self.title = title
        self.losses = PlaygroundLosses(losses)
        if len(self.losses.names) > len(HUES):
            raise OpdlabError(
                f"A Playground compares up to {len(HUES)} losses at a time, and got"
                f" {len(self.losses.names)}. Give {len(HUES)} of them."
            )
        self.shown = list(dict.fromkeys(self.losses.names))
        self.own, self.audits = self.losses.own, self.losses.audits
        if self.losses.parameter is not None:
            self.parameter = self.losses.parameter
        self.trace = trace.sample(sample) if trace is not None and len(trace) else None
        if self.trace is not None:
            found = find_channels(self.trace)
            self.selected = next(iter(found["log_ratio"].peaks()), 0) if "log_ratio" in found else 0

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is a function, a name of a loss, or a list or dict of such.

        Args:
            given: Anything.
            sample: Not used: the losses decide.

        Returns:
            Whether it could be a loss or several; names and functions are looked at when it is
            made.
        """
        return callable(given) or (isinstance(given, (str, list, tuple, Mapping)) and bool(given))

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make a playground of three divergences with a text.

        Args:
            tokens: The bytes of the text's tokens.
            words: All other texts: title, prompt.

        Returns:
            The view.
        """
        trace = make_trace(tokens, prompt=words, finish=words)
        return cls(["forward_kl", "reverse_kl", "jensen_shannon"], trace=trace, title=words)

    def push(self, name: str) -> Push:
        """Return a loss by its name, at the settings of the view.

        Args:
            name: The name of an own loss of the view, or of a divergence.

        Returns:
            The loss as the small worlds take it.
        """
        return self.losses.push(name, self.parameter, self.clip)

    @property
    def df(self) -> pd.DataFrame:
        """One row for each log ratio: the push of every loss shown."""
        columns = {}
        for name in self.shown:
            columns["log_ratio"], columns[name], _ = self._curves(name)
        return pd.DataFrame(columns)

    @property
    def table(self) -> pd.DataFrame:
        """One row for each loss: where the Gaussian ends, its mass, and whether it covers both."""
        rows = [
            {"loss": name, **self.losses.fit(self.push(name), self.steps, self.temperature)}
            for name in self.shown
        ]
        return pd.DataFrame(rows)

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/playground.js` reads them.
        """
        drawn: dict[str, Any] = {
            "title": self.title,
            "hues": list(HUES),
            "tall": TALL,
            "alone": ALONE,
            "known": [[name, self.losses.parameters.get(name, "")] for name in self.losses.known],
            "own": self._describe_losses(self._setting()),
            "cards": [self.losses.describe_audit(name) for name in self.own],
            "settings": vars(self._setting()),
        }
        if self.trace is not None:
            drawn["text"] = payload.describe_text(self.trace)
            drawn["duel"] = find_duel(self.trace)
            drawn["policies"] = self.trace.policies
        return drawn

    def answer(self, question: Mapping[str, Any]) -> Any:
        """Return the losses that Python computes at other settings, as the page asks for a slider.

        Args:
            question: The fields of `Setting`, as the sliders have them; values out of range are
                clipped, and probabilities normalised.

        Returns:
            A list with the fields of `OwnLoss` in `static/types.js` for each loss, as plain data.
        """
        from opdlab.viz.playground_losses import Setting

        teacher, student = (
            np.clip(np.asarray(question[name], float), 1e-6, 1) for name in ("teacher", "student")
        )
        at = Setting(
            mass=float(np.clip(question["mass"], 0.01, 0.99)),
            temperature=float(np.clip(question["temperature"], 0.1, 10)),
            steps=int(np.clip(question["steps"], 0, 1000)),
            teacher=list(teacher / teacher.sum()),
            student=list(student / student.sum()),
        )
        return payload.to_plain_data(self._describe_losses(at))

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with the curves and the losses in words; every foreign string in it is escaped.
        """
        keys = "".join(
            f'<span class="opd-lp-key opd-l-{hue}">{markup.escape(self.losses.label(name))}</span>'
            for name, hue in zip(self.shown, HUES, strict=False)
        )
        said = "".join(f"<div>{markup.escape(line)}</div>" for line in self._lines())
        curves = "".join(plot.html() for plot in self._plots())
        return (
            f'{markup.draw_title(self.title)}<div class="opd-knobs">{keys}</div>'
            f'<div class="opd-curves">{curves}</div><div class="opd-peaks">{said}</div>'
        )

    def __repr__(self) -> str:
        rows = [
            "Playground: push by log ratio, from the student's over-confidence to the teacher's"
            " preference"
        ]
        for name in self.shown:
            push = np.clip(self._curves(name)[1], -TALL, TALL)
            bars = markup.draw_sparkline(Channel("", "", push - push.min()), 40)
            rows.append(f"{bars} {self.losses.label(name)}")
        return "\n".join([*rows, *self._lines()])

    def _lines(self) -> list[str]:
        """The end of the Gaussian under each loss, then the verdicts on own losses."""
        fits = [
            f"{self.losses.label(row.loss)}: {hills_in_words(row.left, row.right)}"
            f" (centre {markup.format_number(row.centre)}, width {markup.format_number(row.width)})"
            for row in self.table.itertuples()
        ]
        return [*fits, *(f"{name}: {found.verdict}" for name, found in self.audits.items())]

    def _curves(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.losses.curves(self.push(name), self.mass)

    def _plots(self) -> list[Plot]:
        """The two plots over the log ratio: push per unit of probability, and on the logit."""
        curves = {name: self._curves(name) for name in self.shown}
        weights = {name: (x, push) for name, (x, push, _) in curves.items()}
        pulls = {name: (x, pull) for name, (x, _, pull) in curves.items()}
        return [
            _plot("weights", "push per unit of probability", weights, TALL),
            _plot("pulls", "push on the logit", pulls, 0.5),
        ]

    def _describe_losses(self, at: Setting) -> list[dict[str, Any]]:
        """The losses that the page cannot compute itself, at these settings."""
        return [
            self.losses.describe_loss(name, at, self.parameter, self.clip)
            for name in self.losses.by_python
        ]

    def _setting(self) -> Setting:
        from opdlab.viz.playground_losses import Setting

        return Setting(self.mass, self.temperature, self.steps, self.teacher, self.student)


def hills_in_words(left: float, right: float) -> str:
    """Return whether the student's mass left and right of the valley seeks or covers, in words.

    Args:
        left: The student's mass left of the valley, from 0 to 1.
        right: The student's mass right of it.

    Returns:
        "covers both hills" where both hold more than 0.1, else the hill that the student sits on.
    """
    if min(left, right) > ALONE:
        return "covers both hills"
    return f"sits on the {'left' if left > right else 'right'} hill"


def _plot(
    key: str, label: str, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], tall: float
) -> Plot:
    """Curves over the log ratio, cut where they leave the plot."""
    lines = [
        Line(name, x, np.where(np.abs(y) > tall, np.nan, y), hue)
        for (name, (x, y)), hue in zip(curves.items(), HUES, strict=False)
    ]
    told = "by log ratio: student over-confident ↔ teacher prefers"
    return Plot(key, label, lines, told=told, x=(-6, 6), y=(-tall, tall))
