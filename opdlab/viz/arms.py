"""Arms: the accuracies of controlled runs with their intervals, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError
from opdlab.support.expect import expect
from opdlab.support.validation import Text, Unchecked, validate_arguments
from opdlab.viz import markup
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

    from opdlab.evidence.controls import Controls

TEACHER, START = "teacher", "start"
SIDES = {  # of an arm: its colour, a sign, and what it means
    "teacher": ("●", "with the teacher"),
    "student": ("◆", "without a teacher"),
    "amount": ("■", "with part of the teacher, or another rate"),
}
TICKS = (0.0, 0.5, 1.0)


class Arms(View):
    """Accuracy after training by arm: a mark for each seed, and the mean with its interval.

        viz.Arms(opd.controls(student, teacher, task))

    A still picture without a script. The dashed line is the student before training.

    Args:
        controls: The result of `opdlab.controls`.
        title: The title above.
        share: Whether the line above the arms says how much of the gain is due to the teacher.
            False suits controls that compare other things, such as placebos.

    Attributes:
        controls: The result.
        title: The title above.
        says_share: Whether the share is said.

    Raises:
        OpdlabError: It is something else.
    """

    caption = "How much of the gain is due to the teacher?"
    takes = "the result of opdlab.controls"
    name, scripts, styles = "arms", (), ("run_card.css", "arms.css")

    @validate_arguments
    def __init__(self, controls: Unchecked[Controls], title: Text = "", share: bool = True) -> None:
        super().__init__()
        from opdlab.evidence.controls import Controls

        expect(controls, Controls, type(self).__name__, "controls")
        self.controls, self.title, self.says_share = controls, title, share

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is the result of controls.

        Args:
            given: Anything.
            sample: Not used: there is no completion to choose.

        Returns:
            Whether it is.
        """
        if given is None or isinstance(given, (Trace, pd.DataFrame)):
            return False  # without importing what computes
        from opdlab.evidence.controls import Controls

        return isinstance(given, Controls)

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make the picture of three made-up arms.

        Args:
            tokens: Not used: no text is shown.
            words: All texts: title, labels, names.

        Returns:
            The view.
        """
        from opdlab.evidence.controls import Controls

        def arm(right: int, *, is_free: bool) -> dict[str, Any]:
            scores = [[float(p < right + seed) for p in range(20)] for seed in range(2)]
            nothing = [[None] * 20] * 2
            return {
                "label": words,
                "is_teacher_free": is_free,
                "seeds": [0, 1],
                "greedy": scores,
                "sampled": nothing,
                "tokens": [100, 100],
                "seconds": [1, 1],
            }

        stored = {
            "facts": {"task": words, "method": words},
            "before": [float(p < 6) for p in range(20)],
            "before_sampled": [None] * 20,
            "left_out": {words: words},
            "arms": {
                TEACHER: arm(18, is_free=False),
                "no_teacher": arm(4, is_free=True),
                "sign": arm(11, is_free=False),
            },
        }
        return cls(Controls.from_json(stored), title=words)

    @property
    def df(self) -> pd.DataFrame:
        """The table of the controls: one row for each arm, the best first."""
        return self.controls.table

    def html(self, assets: bool = True, script: bool = True) -> str:
        """Return the picture as an HTML fragment that needs nothing else.

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
        """Refuse to make a widget: this is a still picture.

        Returns:
            Nothing; the call always raises.

        Raises:
            OpdlabError: Always.
        """
        raise OpdlabError("Arms is a still picture and has no widget. Show the view itself.")

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with the whole picture; every foreign string in it is escaped.
        """
        rows = "".join(self._draw_row(row) for row in self.df.to_dict("records"))
        drawn = {self._side(name) for name in self.controls.arms}
        keys = "".join(
            f'<span class="opd-item opd-arm-{side}"><i>{sign}</i>{told}</span>'
            for side, (sign, told) in SIDES.items()
            if side in drawn
        )
        headline = markup.escape(self._headline())
        left_out = self._list_left_out()
        return (
            f"{markup.draw_title(self.title)}"
            + f'<div class="opd-card-gain"><b>{headline}</b></div>' * self.says_share
            + f'<div class="opd-bar"><span>{markup.escape(self._list_facts())}</span>'
            f'<span class="opd-legend opd-key">{keys}</span></div>'
            f'<div class="opd-arms" role="table" aria-label="Accuracy by arm">{rows}'
            f"{_draw_ticks()}</div>"
            f'<div class="opd-soft opd-arms-foot">{markup.escape(self._list_counts())}</div>'
            + (
                f'<div class="opd-soft opd-arms-foot">{markup.escape(left_out)}</div>'
                * bool(left_out)
            )
        )

    def __repr__(self) -> str:
        lines = [f"Arms: {self.title or self._list_facts()}"]
        if self.says_share:
            lines.append(self._headline())
        for row in self.df.to_dict("records"):
            bar = markup.draw_bar(row["accuracy"])
            lines.append(f"{bar} {row['accuracy']:.3f} {self._say_gain(row):<27} {row['what']}")
        lines += [self._list_counts(), self._list_left_out()]
        return "\n".join(line for line in lines if line)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        return {"text/html": self.html(), "text/plain": repr(self)}

    def _headline(self) -> str:
        return repr(self.controls).splitlines()[0]

    def _list_facts(self) -> str:
        facts = self.controls.facts
        settings = facts.get("settings") or {}
        said = [str(facts.get("method", "")), str(facts.get("task", ""))]
        said += [f"{name} {value:g}" for name, value in settings.items()]
        return " · ".join(one for one in said if one)

    def _list_counts(self) -> str:
        prompts = self.controls.prompts
        is_greedy = self.controls.by == "greedy"
        how = "Greedy accuracy" if is_greedy else "Accuracy of samples"
        return (
            f"{how} after training, from 0 to 1. Hollow: one per seed; filled: their mean."
            " Bars: 95 % intervals of the gain over the start, over"
            f" {prompts} prompt{'s' * (prompts != 1)} and {self._say_seeds()}. Dashed: the start."
        )

    def _say_seeds(self) -> str:
        """The number of seeds of an arm; from the least to the most where arms differ."""
        counts = [len(arm.seeds) for arm in self.controls.arms.values()]
        least, most = min(counts), max(counts)
        if least != most:
            return f"{least} to {most} seeds"
        return f"{most} seed{'s' * (most != 1)}"

    def _list_left_out(self) -> str:
        return " ".join(f"Left out: {n}, since {why}." for n, why in self.controls.left_out.items())

    def _say_gain(self, row: dict[str, Any]) -> str:
        if row["arm"] == START:
            return ""
        gain, low, high = (
            f"{row[name]:+.3f}".replace("-", "−") for name in ("gain", "low", "high")
        )
        return f"{gain} [{low}, {high}]"

    def _draw_row(self, row: dict[str, Any]) -> str:
        """One arm: its words, the scale, the numbers."""
        start = float(self.controls.start.mean())
        line = f'<i class="opd-arm-start" style="left:{_place(start)}"></i>'
        side = self._side(str(row["arm"]))
        if row["arm"] != START:
            low, high = start + row["low"], start + row["high"]
            line += f'<i class="opd-arm-whisker" style="{_between(low, high)}"></i>'
            scores = self.controls.scores(str(row["arm"])).mean(1)
            line += "".join(
                f'<i class="opd-arm-seed" style="left:{_place(float(one))}"></i>' for one in scores
            )
        sign = SIDES[side][0] if row["arm"] != START else ""
        line += f'<i class="opd-arm-mean" style="left:{_place(row["accuracy"])}">{sign}</i>'
        return (
            f'<div class="opd-arm opd-arm-{side}" role="row">'
            f'<span role="cell">{markup.escape(str(row["what"]))}</span>'
            f'<span class="opd-line01" role="presentation">{line}</span>'
            f'<span class="opd-value" role="cell">{row["accuracy"]:.3f}'
            f" <small>{markup.escape(self._say_gain(row))}</small></span></div>"
        )

    def _side(self, name: str) -> str:
        if name in (TEACHER, START):
            return "teacher"
        return "student" if self.controls.arms[name].is_teacher_free else "amount"


def _draw_ticks() -> str:
    """A last row with the numbers of the scale."""
    ticks = "".join(
        f'<i class="opd-arms-tick" style="left:{_place(one)}">{one:g}</i>' for one in TICKS
    )
    return (
        '<div class="opd-arm opd-arms-ticks" aria-hidden="true"><span></span>'
        f'<span class="opd-arms-scale">{ticks}</span><span></span></div>'
    )


def _place(value: float) -> str:
    return f"{100 * min(1.0, max(0.0, value)):.2f}%"


def _between(low: float, high: float) -> str:
    return f"left:{_place(low)};right:calc(100% - {_place(high)})"
