"""Playground: what a loss would do, in worlds small enough to see all of it, and to a token of a
trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from opdlab.audit import audit
from opdlab.data.trace import Trace
from opdlab.errors import InvalidValue, OpdlabError
from opdlab.losses.divergences import Generator
from opdlab.losses.generators import FORMS, PARAMETERS
from opdlab.support.expect import expect
from opdlab.viz import markup, payload, toys
from opdlab.viz.channels import Channel, channels
from opdlab.viz.duel import duel
from opdlab.viz.lines import Line, Plot
from opdlab.viz.toys import Push
from opdlab.viz.view import Trait, View

FIRST = ("forward_kl", "reverse_kl", "generalized_jsd")
HUES = (
    "amount",
    "green",
    "pink",
    "grey",
)  # of the losses shown; blue and orange are the teacher and the student
TALL = 4.0  # the height at which the curves leave the plot
ALONE = 0.1  # a hill with less of the student's mass is left out


class Playground(View):
    """What would this loss do to a token, and to a whole distribution?

    Curves over the log ratio: the push per unit of the student's probability, and on the logit of a
    token that the teacher gives `mass`. A triangle of three outcomes: where a gradient step moves
    each student, with a teacher and a student to drag. One Gaussian under two hills: does it cover
    both? The built-in divergences are computed in the page, so it lives on without Python. losses:
    what is shown, names of generators, `Generator`s, and your own by name or as they are: functions
    of rows, of (student, teacher) log-probs, or methods without a plan; they are audited, and
    checked by finite differences. Own losses are evaluated by Python, so the sliders move them in
    `.live()` only. trace: one scored text, `sample` of it, to see the push of the built-in losses
    on the tokens wanted at a position, at first where the two sides differ most. Raises OpdlabError
    for names that are none, for more than four losses, and what an own loss raises.

    `parameter` is the beta or alpha of those that have one, `clip` the largest push (0: all),
    `temperature` the teacher's, `steps` how many are taken; `teacher` and `student` the
    probabilities of three outcomes.
    """

    name, scripts, styles = (
        "playground",
        ("toys.js", "playground.js"),
        ("lines.css", "playground.css"),
    )
    shown = Trait([])
    parameter = Trait(0.5)
    clip = Trait(0.0)
    temperature = Trait(1.0)
    steps = Trait(200)
    mass = Trait(0.5)
    teacher = Trait([0.6, 0.3, 0.1])
    student = Trait([0.05, 0.15, 0.8])

    def __init__(
        self, losses: Any = None, trace: Trace | None = None, sample: int = 0, title: str = ""
    ) -> None:
        super().__init__()
        if trace is not None:
            expect(trace, Trace, "Playground", "trace")
        self.title, self.own, names = title, dict[str, Any](), list[str]()
        for name, loss in _listed(losses):
            if isinstance(loss, Generator):
                names.append(loss.name)
                self.parameter = float(loss.beta or loss.alpha or self.parameter)
            elif isinstance(loss, str):
                names.append(_known(loss))
            else:
                names.append(_free(toys.of_loss(loss, name).name, names))
                self.own[names[-1]] = loss
        if len(names) > len(HUES):
            raise OpdlabError(
                f"A Playground compares up to {len(HUES)} losses at a time, and got {len(names)}."
                f" Give {len(HUES)} of them."
            )
        self.shown = list(dict.fromkeys(names))
        self.trace = trace.sample(sample) if trace is not None and len(trace) else None
        self.audits = {name: audit(loss) for name, loss in self.own.items()}
        self.checks = {name: toys.finite_difference(loss) for name, loss in self.own.items()}
        if self.trace is not None:
            found = channels(self.trace)
            self.selected = next(iter(found["log_ratio"].peaks()), 0) if "log_ratio" in found else 0

    def push(self, name: str) -> Push:
        """A loss by its name, at the settings of the view."""
        if name in self.own:
            return toys.of_loss(self.own[name], name)
        own = PARAMETERS.get(name)
        generator = Generator(name, **({own.name: self.parameter} if own else {}))
        return toys.of_generator(generator, self.clip)

    @property
    def df(self) -> pd.DataFrame:
        """One row a log ratio: the push of every loss shown."""
        return pd.DataFrame(
            {"log_ratio": toys.X.numpy()}
            | {name: toys.weights(self.push(name)) for name in self.shown}
        )

    @property
    def table(self) -> pd.DataFrame:
        """One row a loss: where the Gaussian ends, its mass left and right, and whether it covers
        both hills.
        """
        rows = []
        for name in self.shown:
            at, width = toys.fit(self.push(name), self.steps, self.temperature)
            left, right = toys.shares(at, width)
            rows.append(
                {
                    "loss": name,
                    "centre": at,
                    "width": width,
                    "left": left,
                    "right": right,
                    "covers": min(left, right) > ALONE,
                }
            )
        return pd.DataFrame(rows)

    def data(self) -> dict[str, Any]:
        text = (
            {}
            if self.trace is None
            else {
                "text": payload.text(self.trace),
                "duel": duel(self.trace),
                "policies": self.trace.policies,
            }
        )
        return {
            "title": self.title,
            "hues": list(HUES),
            "tall": TALL,
            "alone": ALONE,
            "known": [
                [name, PARAMETERS[name].name if name in PARAMETERS else ""] for name in FORMS
            ],
            "own": [self._own(name) for name in self.own],
            "cards": [self._card(name) for name in self.own],
            "settings": self._settings(),
            **text,
        }

    def answer(self, question: Mapping[str, Any]) -> Any:
        """What the page asks when a slider moves: the own losses at other settings."""
        q, p = (
            np.clip(np.asarray(question[name], float), 1e-6, 1) for name in ("teacher", "student")
        )
        at = {
            "mass": float(np.clip(question["mass"], 0.01, 0.99)),
            "temperature": float(np.clip(question["temperature"], 0.1, 10)),
            "steps": int(np.clip(question["steps"], 0, 1000)),
            "teacher": list(q / q.sum()),
            "student": list(p / p.sum()),
        }
        return payload.plain([self._own(name, at) for name in self.own])

    def static(self) -> str:
        title = markup.title(self.title)
        keys = "".join(
            f'<span class="opd-lp-key opd-l-{hue}">{markup.safe(_said(name))}</span>'
            for name, hue in zip(self.shown, HUES, strict=False)
        )
        said = "".join(f"<div>{markup.safe(line)}</div>" for line in self._lines())
        curves = "".join(plot.html() for plot in (self._plot("weights"), self._plot("pulls")))
        return (
            f'{title}<div class="opd-knobs">{keys}</div><div class="opd-curves">{curves}</div><div'
            f' class="opd-peaks">{said}</div>'
        )

    def __repr__(self) -> str:
        rows = [
            "Playground: push by log ratio, from the student's over-confidence to the teacher's"
            " preference"
        ]
        for name in self.shown:
            w = np.clip(toys.weights(self.push(name)), -TALL, TALL)
            rows.append(f"{markup.sparkline(Channel('', '', w - w.min()), 40)} {_said(name)}")
        return "\n".join([*rows, *self._lines()])

    def _lines(self) -> list[str]:
        """What the Gaussian does under each loss, then what is wrong with one's own."""
        fits = [
            f"{_said(r.loss)}: {told(r.left, r.right)} (centre {markup.number(r.centre)}, width"
            f" {markup.number(r.width)})"
            for r in self.table.itertuples()
        ]
        return [*fits, *(f"{name}: {a.verdict}" for name, a in self.audits.items())]

    def _plot(self, what: str) -> Plot:
        values = {
            name: (
                toys.weights(self.push(name))
                if what == "weights"
                else toys.pulls(self.push(name), self.mass)
            )
            for name in self.shown
        }
        tall = TALL if what == "weights" else 0.5
        lines = [
            Line(name, toys.X.numpy(), np.where(np.abs(y) > tall, np.nan, y), hue)
            for (name, y), hue in zip(values.items(), HUES, strict=False)
        ]
        label = "push per unit of probability" if what == "weights" else "push on the logit"
        return Plot(
            what,
            label,
            lines,
            told="by log ratio: student over-confident ↔ teacher prefers",
            x=(-6, 6),
            y=(-tall, tall),
        )

    def _settings(self) -> dict[str, Any]:
        return {
            name: getattr(self, name)
            for name in ("mass", "temperature", "steps", "teacher", "student")
        }

    def _own(self, name: str, at: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """All that the page draws of one own loss."""
        s, push = at or self._settings(), toys.of_loss(self.own[name], name)
        teacher, student = (
            torch.tensor(s[key], dtype=torch.float64) for key in ("teacher", "student")
        )
        return {
            "name": name,
            "weights": toys.weights(push).astype(np.float32),
            "pulls": toys.pulls(push, s["mass"]).astype(np.float32),
            "field": toys.field(push, teacher, s["temperature"]).ravel().astype(np.float32),
            "walk": (
                toys.path(push, student, teacher, s["steps"], s["temperature"])
                .ravel()
                .astype(np.float32)
            ),
            "fit": list(toys.fit(push, s["steps"], s["temperature"])),
        }

    def _card(self, name: str) -> dict[str, Any]:
        found, (gap, top) = self.audits[name], self.checks[name]
        held = gap > 1e-6 * max(top, 1.0)
        check = (
            f"Differs from finite differences by up to {markup.number(gap)}: a part is held back"
            " (detach): it does not descend its value."
            if held
            else "Agrees with finite differences."
        )
        columns = ["divergence", "target", "cosine", "ratio"]
        return {
            "name": name,
            "verdict": found.verdict,
            "flags": [[k.replace("_", " "), v] for k, v in found.flags.items()],
            "check": check,
            "held": held,
            "rows": found.table[columns].head(5).to_numpy().tolist(),
        }


def told(left: float, right: float) -> str:
    """Seeking or covering, in words."""
    if min(left, right) > ALONE:
        return "covers both hills"
    return f"sits on the {'left' if left > right else 'right'} hill"


def _listed(losses: Any) -> list[tuple[str, Any]]:
    if losses is None:
        return [("", name) for name in FIRST]
    if isinstance(losses, Mapping):
        return [(str(name), loss) for name, loss in losses.items()]
    if isinstance(losses, Sequence) and not isinstance(losses, str):
        return [("", loss) for loss in losses]
    return [("", losses), *(("", name) for name in FIRST[:2])]


def _free(name: str, taken: Sequence[str]) -> str:
    """A name that no built-in divergence and no other loss has."""
    name = f"my {name}" if name in FORMS else name
    return next(
        n for i in range(1, len(taken) + 2) if (n := name if i == 1 else f"{name} {i}") not in taken
    )


def _known(name: str) -> str:
    if name not in FORMS:
        raise InvalidValue(
            f"There is no divergence {name!r}. Use {', '.join(FORMS)}, or give your own loss"
            " itself."
        )
    return name


def _said(name: str) -> str:
    return (
        name.replace("_", " ").replace("kl", "KL").replace("jsd", "JSD") if name in FORMS else name
    )
