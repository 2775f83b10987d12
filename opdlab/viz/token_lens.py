"""TokenLens: one completion, coloured token by token, and what student and teacher wanted at each."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.support.expect import expect
from opdlab.viz import markup, payload
from opdlab.viz.channels import channels, fitting
from opdlab.viz.duel import duel
from opdlab.viz.glyphs import groups, visible
from opdlab.viz.segments import segments
from opdlab.viz.view import Trait, View

TRACKS = 4  # that fit under a line


class TokenLens(View):
    """A heat strip of one completion with, under it, the duel of the policies at the token looked
    at.

    channel: what colours the tokens at first, a key of `channels` (`log_ratio`, `reverse_kl`,
        `student_entropy`, `loss`, a
    plan column, a column of names such as `type`, …). Under a student alone there is no
    `log_ratio`, and the first that there is takes its place. tracks: up to four further channels,
    as thin bars under each line. like: another lens whose colour scale this one keeps to, so that
    the two compare. Raises OpdlabError for a completion that the trace does not hold and
    UnknownColumn for a channel it does not have.

    Texts of more than 400 tokens have a map, with bands of their segments: think and answer by
    `<think>` and `</think>` in the text, or a column `segment` of names. `selected` is the position
    looked at, at first the channel's largest; `channel` the key of what colours; `pins` up to three
    positions that stay in view side by side. Of a text of more than 2,500 tokens the page carries
    as many channels as 120 kB for 10,000 tokens hold: the one asked for and the tracks, then those
    that `channels` lists first; the page says what is left out.
    """

    name, scripts = "lens", ("tracks.js", "minimap.js", "tools.js", "lens.js")
    channel = Trait("log_ratio")
    tracks = Trait([])
    pins = Trait([])

    def __init__(
        self,
        trace: Trace,
        sample: int = 0,
        channel: str = "log_ratio",
        title: str = "",
        like: TokenLens | None = None,
        tracks: Sequence[str] = (),
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        self.sample, self.title, self._least = sample, title, like.limits if like else {}
        self.trace = rows_of(trace, sample)
        self.channels = channels(self.trace)
        for key in (*([] if channel == "log_ratio" else [channel]), *tracks):
            if key not in self.channels:
                raise UnknownColumn(
                    f"The trace has no channel {key!r}. It has {', '.join(self.channels)}."
                )
        if not self.channels:
            raise OpdlabError(
                f"The trace has no numbers to draw, only {', '.join(trace.table.column_names)}."
                " Make it with opdlab.score(…)."
            )
        if len(tracks) > TRACKS:
            raise OpdlabError(
                f"There is room for {TRACKS} tracks under a line, not {len(tracks)}. Leave some"
                " out."
            )
        self.channel = channel if channel in self.channels else next(iter(self.channels))
        self.tracks = list(tracks)
        self.selected = next(iter(self.channels[self.channel].peaks()), 0)

    @property
    def limits(self) -> dict[str, float]:
        """The value that gets full colour, by channel: its own, or that of `like` where that is
        larger.
        """
        return {key: max(c.limit, self._least.get(key, 0.0)) for key, c in self.channels.items()}

    def scaled(self, limits: Mapping[str, float]) -> TokenLens:
        """The same lens with full colour at these values, or at its own where they are larger."""
        other = copy.copy(self)
        other._least, other._traits, other._watchers, other._widget = (
            dict(limits),
            dict(self._traits),
            [],
            None,
        )
        return other

    @property
    def df(self) -> pd.DataFrame:
        """The trace's rows of this completion, by position, with each token as it is listed."""
        return self.trace.to_pandas().assign(
            token=[visible(piece) for piece in self.trace.tokens()]
        )

    @property
    def text(self) -> str:
        """What the strip reads: every token, special ones included."""
        return "".join(group.text for group in groups(self.trace.tokens()))

    def static(self) -> str:
        chosen, limit, tokens = (
            self.channels[self.channel],
            self.limits[self.channel],
            self.trace.tokens(),
        )
        title = markup.title(self.title)
        return (
            f'{title}<div class="opd-prompt" style="white-space:pre-wrap"'
            f' dir="auto">{markup.safe(self._prompt)}</div><div'
            f' class="opd-bar">{markup.legend(chosen, limit)}</div><div class="opd-strip"'
            f' data-finish="{markup.safe(self._finish)}" dir="auto"'
            f' style="white-space:pre-wrap;font-family:monospace;line-height:1.9">{markup.strip(groups(tokens), chosen, limit)}</div><div'
            f' class="opd-peaks">{markup.safe(self._peaks())}</div>'
        )

    def data(self) -> dict[str, Any]:
        fixed = {"text": payload.text(self.trace), "duel": duel(self.trace)}
        spent = len(payload.pack(fixed)) if len(self.trace) > payload.LONG else 0
        carried = fitting(
            self.channels, self.limits, keep=(self.channel, *self.tracks), spent=spent
        )
        have = {c["key"] for c in carried}
        return {
            "title": self.title,
            "prompt": self._prompt,
            "finish": self._finish,
            "policies": self.trace.policies,
            **fixed,
            "channels": carried,
            "left": [c.label for key, c in self.channels.items() if key not in have],
            "segments": segments(self.trace),
        }

    def __repr__(self) -> str:
        chosen = self.channels[self.channel]
        head = (
            f"TokenLens: {self.title or f'completion {self.sample}'}, {len(self.trace)} tokens,"
            f" {chosen.label}"
        )
        meaning = (
            f" (− {chosen.less}, + {chosen.more})" if chosen.kind in ("ratio", "signed") else ""
        )
        return f"{head}{f' in {chosen.unit}' if chosen.unit else ''}{meaning}\n{markup.sparkline(chosen)}\n{self._peaks()}"

    @property
    def _prompt(self) -> str:
        return str(self.trace.meta["prompts"][self.sample])

    @property
    def _finish(self) -> str:
        return str(self.trace.meta["finish"][self.sample])

    def _peaks(self) -> str:
        """The tokens of largest size, in words; of kinds, how common each is."""
        chosen, tokens = self.channels[self.channel], self.trace.tokens()
        if chosen.kind == "category":
            parts = [
                f"{i + 1} {name} {100 * (chosen.values == i).mean():.0f} %"
                for i, name in enumerate(chosen.names)
            ]
            return f"{chosen.label}: {', '.join(parts)} of {len(tokens)} tokens"
        peaks = [
            f"{visible(tokens[i])} {markup.said(chosen.values[i], chosen)} (position {i})"
            for i in chosen.peaks()
        ]
        return f"Largest {chosen.label}: {', '.join(peaks) or 'none'}"


def rows_of(trace: Trace, sample: int) -> Trace:
    """The rows of one completion; raises OpdlabError for one that is not there."""
    texts = trace.meta["texts"]
    if not 0 <= sample < len(texts):
        raise OpdlabError(
            f"The trace has completions 0 to {len(texts) - 1}, not {sample}. Give sample=0 up to"
            f" {len(texts) - 1}."
        )
    rows = trace.sample(sample) if len(trace) else trace
    if not len(rows) and texts[sample]:
        held = ", ".join(map(str, sorted(set(trace.column("sample").tolist()))))
        raise OpdlabError(
            f"The trace holds no row of completion {sample}, only of {held or 'none'}. Give sample="
            " one of these."
        )
    return rows
