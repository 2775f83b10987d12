"""TokenLens: one completion, coloured token by token, and what student and teacher wanted at each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.trace import Trace
from opdlab.viz import embed, markup
from opdlab.viz.channels import Channel, channels
from opdlab.viz.duel import duel
from opdlab.viz.glyphs import clean, groups, visible

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 64  # characters of the sparkline


class TokenLens:
    """A heat strip of one completion with, under it, the duel of the policies at the token looked at.

    channel: what colours the tokens at first, a key of `channels` (`log_ratio`, `reverse_kl`, `student_entropy`, `loss`, a
    plan column, …). Under a student alone there is no `log_ratio`, and the first that there is takes its place. like: another
    lens whose colour scale this one keeps to, so that the two compare. Raises OpdlabError for a completion that the trace
    does not hold and UnknownColumn for a channel it does not have.
    """

    def __init__(self, trace: Trace, sample: int = 0, channel: str = "log_ratio", title: str = "", like: TokenLens | None = None) -> None:
        self.sample, self.title, self.like = sample, title, like
        self.trace = _rows(trace, sample)
        self.channels = channels(self.trace)
        if channel not in self.channels and channel != "log_ratio":
            raise UnknownColumn(f"The trace has no channel {channel!r}. It has {', '.join(self.channels)}.")
        if not self.channels:
            raise OpdlabError(
                f"The trace has no numbers to draw, only {', '.join(trace.table.column_names)}. Make it with opdlab.score(…)."
            )
        self.channel = channel if channel in self.channels else next(iter(self.channels))

    @property
    def limits(self) -> dict[str, float]:
        """The value that gets full colour, by channel: its own, or that of `like` where that is larger."""
        other = self.like.limits if self.like else {}
        return {key: max(c.limit, other.get(key, 0.0)) for key, c in self.channels.items()}

    @property
    def text(self) -> str:
        """What the strip reads: every token, special ones included."""
        return "".join(group.text for group in groups(self.trace.tokens()))

    def html(self, limits: Mapping[str, float] | None = None, assets: bool = True) -> str:
        """An HTML fragment. It says what matters without scripts, and is interactive with them; `assets=False` leaves style
        and module to the page around it."""
        limits = self.limits | dict(limits or {})
        chosen, tokens = self.channels[self.channel], self.trace.tokens()
        title = f'<div class="opd-title">{markup.safe(self.title)}</div>' if self.title else ""
        static = (
            f'{title}<div class="opd-prompt" style="white-space:pre-wrap" dir="auto">{markup.safe(self._prompt)}</div>'
            f'<div class="opd-bar">{markup.legend(chosen, limits[self.channel])}</div>'
            f'<div class="opd-strip" data-finish="{markup.safe(self._finish)}" dir="auto"'
            f' style="white-space:pre-wrap;font-family:monospace;line-height:1.9">'
            f"{markup.strip(groups(tokens), chosen, limits[self.channel])}</div>"
            f'<div class="opd-peaks">{markup.safe(self._peaks())}</div>'
        )
        data = embed.script_json(self.payload(limits), "opd-data")
        before, after = (embed.style("lens.css"), embed.module("lens.js", "boot.js")) if assets else ("", "")
        return f'<div class="opd-lens" data-lm-suppress-shortcuts="true">{before}<div class="opd-view">{static}</div>{data}</div>{after}'

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that stands alone."""
        from opdlab.viz.page import page

        return page(path, title=self.title or f"Completion {self.sample}", lenses=[("", self)])

    def payload(self, limits: Mapping[str, float]) -> dict[str, Any]:
        """All that the interactive half draws, as plain data."""
        tokens = self.trace.tokens()
        return {
            "title": clean(self.title),
            "prompt": clean(self._prompt),
            "finish": self._finish,
            "channel": self.channel,
            "policies": self.trace.policies,
            "ids": self.trace.column("token_id").tolist(),
            "words": [visible(piece) for piece in tokens],
            "groups": [[g.lead, [list(part) for part in g.parts], g.tokens, int(g.special)] for g in groups(tokens)],
            "channels": [_described(c, limits[key]) for key, c in self.channels.items()],
            "duel": duel(self.trace),
        }

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.html(), "text/plain": str(self)}

    def __repr__(self) -> str:
        chosen = self.channels[self.channel]
        head = f"TokenLens: {self.title or f'completion {self.sample}'}, {len(self.trace)} tokens, {chosen.label}"
        meaning = f" (− {chosen.less}, + {chosen.more})" if chosen.kind != "amount" else ""
        return f"{head}{f' in {chosen.unit}' if chosen.unit else ''}{meaning}\n{_sparkline(chosen)}\n{self._peaks()}"

    @property
    def _prompt(self) -> str:
        return str(self.trace.meta["prompts"][self.sample])

    @property
    def _finish(self) -> str:
        return str(self.trace.meta["finish"][self.sample])

    def _peaks(self) -> str:
        """The tokens of largest size, in words."""
        chosen, tokens = self.channels[self.channel], self.trace.tokens()
        peaks = [f"{visible(tokens[i])} {markup.number(chosen.values[i], chosen.kind != 'amount')} (position {i})" for i in chosen.peaks()]
        return f"Largest {chosen.label}: {', '.join(peaks) or 'none'}"


def _rows(trace: Trace, sample: int) -> Trace:
    texts = trace.meta["texts"]
    if not 0 <= sample < len(texts):
        raise OpdlabError(f"The trace has completions 0 to {len(texts) - 1}, not {sample}. Give sample=0 up to {len(texts) - 1}.")
    rows = trace.sample(sample) if len(trace) else trace
    if not len(rows) and texts[sample]:
        held = ", ".join(map(str, sorted(set(trace.column("sample").tolist()))))
        raise OpdlabError(f"The trace holds no row of completion {sample}, only of {held or 'none'}. Give sample= one of these.")
    return rows


def _described(channel: Channel, limit: float) -> dict[str, Any]:
    keys = ("key", "label", "unit", "kind", "less", "more", "against")
    values = [float(f"{v:.4g}") for v in channel.values]
    return {k: getattr(channel, k) for k in keys} | {"limit": limit, "values": values, "peaks": channel.peaks()}


def _sparkline(channel: Channel) -> str:
    """The size of the channel along the text; where many tokens share a character it shows the largest."""
    size = np.nan_to_num(np.abs(channel.values), nan=0.0, posinf=np.inf)
    bins = np.array_split(size, min(_WIDTH, len(size))) if len(size) else []
    return "".join(_BLOCKS[min(7, int(8 * markup.weight(float(b.max()), channel.limit)))] for b in bins)
