"""Compare: one text as several losses, teachers, checkpoints or runs see it, on one scale, and
where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.viz import markup, payload
from opdlab.viz.channels import Channel, channels, described
from opdlab.viz.given import given_traces
from opdlab.viz.glyphs import groups, visible
from opdlab.viz.token_lens import TokenLens, rows_of
from opdlab.viz.view import Trait, View

MOST = 8  # strips that a reader can hold beside each other
CHANGED = 8  # tokens of the list
ROOM = 60_000  # deflated bytes of channels in pages of long texts


class Compare(View):
    """What do several losses, teachers, checkpoints or runs make of the same tokens?

    A strip each on one scale, and a difference.

    traces: traces or TokenLenses by name, or a list of TokenLenses, named by their titles. channel:
        a key that all of them have.
    Raises OpdlabError for fewer than two, or where tokens differ, and UnknownColumn for a channel
    that one lacks.

    Traits: `channel`, and `pair` [minuend, subtrahend] by place: at first the second minus the
        first. `correlation` is
    Spearman's, of the sizes of the channel's values: whether two put their weight on the same
    tokens. `changed` lists the tokens on which the pair differs most.
    """

    name, scripts, styles = "compare", ("compare.js",), ("compare.css",)
    channel = Trait("log_ratio")
    pair = Trait([1, 0])

    def __init__(
        self,
        traces: Mapping[str, Trace | TokenLens] | Sequence[TokenLens],
        sample: int = 0,
        channel: str = "log_ratio",
        title: str = "",
    ) -> None:
        super().__init__()
        self.sample, self.title, self.traces = sample, title, _named(traces, sample)
        _check_same(self.traces)
        if channel not in self.channels and channel != "log_ratio":
            raise UnknownColumn(
                f"Not all of the traces have {channel!r}. They share"
                f" {', '.join(self.channels) or 'no channel'}."
            )
        if not self.channels:
            raise OpdlabError(
                "The traces share no numbers to compare. Score the same rollout for each:"
                " opdlab.score(rollout, …)."
            )
        self.channel = channel if channel in self.channels else next(iter(self.channels))
        self.selected = int(self.changed.index[0]) if len(self.changed) else 0

    @cached_property
    def channels(self) -> dict[str, list[Channel]]:
        """The channels that all traces have, by key, one of each trace; kinds left out."""
        found = [channels(trace) for trace in self.traces.values()]
        keys = [
            k
            for k in found[0]
            if all(k in other for other in found) and found[0][k].kind != "category"
        ]
        return {k: [other[k] for other in found] for k in keys}

    @property
    def names(self) -> list[str]:
        return list(self.traces)

    @property
    def limit(self) -> float:
        """The value of the chosen channel that gets full colour, in all strips."""
        return max(c.limit for c in self.channels[self.channel])

    @property
    def df(self) -> pd.DataFrame:
        """One row a token: `token`, the channel under each name, and `difference` of the pair."""
        first, chosen = next(iter(self.traces.values())), self.channels[self.channel]
        values = dict(zip(self.names, (c.values for c in chosen), strict=True))
        minuend, subtrahend = (chosen[i].values for i in self.pair)
        with np.errstate(invalid="ignore"):
            return pd.DataFrame(
                {
                    "token": [visible(p) for p in first.tokens()],
                    **values,
                    "difference": minuend - subtrahend,
                }
            )

    @property
    def correlation(self) -> pd.DataFrame:
        """Spearman's rank correlation of sizes, name by name; NaN where one does not vary."""
        return pd.DataFrame(_spearman(self.channels[self.channel]), self.names, self.names)

    @property
    def changed(self) -> pd.DataFrame:
        """The rows of `df` with the largest differences, largest first; those of less than a
        hundredth of it are left out.
        """
        size = self.df["difference"].abs()
        return self.df.loc[size[(size > 0) & (size >= size.max() / 100)].nlargest(CHANGED).index]

    def static(self) -> str:
        chosen, tokens = (
            self.channels[self.channel],
            groups(next(iter(self.traces.values())).tokens()),
        )
        look = "white-space:pre-wrap;font-family:monospace;line-height:1.9"
        strips = [
            f'<div class="opd-versus"><b>{markup.safe(name)}</b></div><div class="opd-strip"'
            f' style="{look}" dir="auto">{markup.strip(tokens, channel, self.limit)}</div>'
            for name, channel in zip(self.names, chosen, strict=True)
        ]
        title = markup.title(self.title)
        return (
            f"{title}<div"
            f' class="opd-bar">{markup.legend(chosen[0], self.limit)}</div>{"".join(strips)}<div'
            f' class="opd-peaks">{markup.safe(self._summary())}</div>'
        )

    def data(self) -> dict[str, Any]:
        text = payload.text(next(iter(self.traces.values())))
        return {
            "title": self.title,
            "text": text,
            "names": self.names,
            "prompt": text["texts"][0]["prompt"] if text["texts"] else "",
            "channels": self._carried(),
        }

    def __repr__(self) -> str:
        chosen, width = self.channels[self.channel], max(map(len, self.names))
        lines = [
            f"{name:{width}}  {markup.sparkline(replace(c, fixed=self.limit))}"
            for name, c in zip(self.names, chosen, strict=True)
        ]
        head = (
            f"Compare: {self.title or f'completion {self.sample}'},"
            f" {chosen[0].label}{f' in {chosen[0].unit}' if chosen[0].unit else ''}"
        )
        return "\n".join([head, *lines, self._summary()])

    def _carried(self) -> list[dict[str, Any]]:
        """The channels with the values of all traces; of long texts those that there is room for."""
        out, spent = [], 0
        for key, some in self.channels.items():
            limit = max(c.limit for c in some)
            told = [described(c, limit) for c in some]
            cost = (
                sum(payload.cost(t["values"]) for t in told)
                if len(some[0].values) > payload.LONG
                else 0
            )
            if key == self.channel or spent + cost <= ROOM:
                spent += cost
                out.append(
                    {
                        **told[0],
                        "values": [t["values"] for t in told],
                        "peaks": [t["peaks"] for t in told],
                        "rho": np.round(_spearman(some), 3),
                    }
                )
        return out

    def _summary(self) -> str:
        a, b = (self.names[i] for i in self.pair)
        rho, chosen = self.correlation.loc[a, b], self.channels[self.channel][0]
        words = [
            f"{row.token} {markup.number(row.difference, True)} (position {i})"
            for i, row in self.changed.head(5).iterrows()
        ]
        return (
            f"{a} minus {b}, {chosen.label}: rank correlation {markup.number(rho)}; changed most:"
            f" {', '.join(words) or 'none'}"
        )


def _named(
    traces: Mapping[str, Trace | TokenLens] | Sequence[TokenLens], sample: int
) -> dict[str, Trace]:
    if (
        isinstance(traces, (str, Trace))
        or not isinstance(traces, Sequence)
        or not all(isinstance(one, TokenLens) for one in traces)
    ):
        given_traces(traces, "Compare", "{'old': a, 'new': b}", kinds=(Trace, TokenLens))
    if isinstance(traces, Mapping):
        out = {
            str(name): some.trace if isinstance(some, TokenLens) else rows_of(some, sample)
            for name, some in traces.items()
        }
    else:
        titles = [lens.title or chr(65 + i) for i, lens in enumerate(traces)]
        out = {
            t if titles.count(t) == 1 else f"{t} {i + 1}": lens.trace
            for i, (t, lens) in enumerate(zip(titles, traces, strict=True))
        }
    if not 2 <= len(out) <= MOST:
        raise OpdlabError(
            f"Compare got {len(out)} traces; it shows two to {MOST}. Give them by name:"
            " Compare({'old': a, 'new': b})."
        )
    return out


def _check_same(traces: Mapping[str, Trace]) -> None:
    """Raises OpdlabError where two traces are not of the same tokens, with the first place where
    they part.
    """
    (first, base), *others = traces.items()
    wanted = base.tokens()
    for name, trace in others:
        tokens = trace.tokens()
        if tokens == wanted:
            continue
        at = next(
            (i for i, (x, y) in enumerate(zip(wanted, tokens, strict=False)) if x != y),
            min(len(wanted), len(tokens)),
        )
        seen = [visible(some[at]) if at < len(some) else "the end" for some in (wanted, tokens)]
        raise OpdlabError(
            f"{first!r} and {name!r} are not of the same text: they part at position {at}"
            f" ({seen[0]} and {seen[1]}). Score one rollout under each: opdlab.score(rollout, …),"
            " or compare TokenLenses side by side with viz.page."
        )


def _spearman(some: Sequence[Channel]) -> np.ndarray:
    """`[k, k]` rank correlations of sizes."""
    return (
        pd.DataFrame({i: np.abs(c.values) for i, c in enumerate(some)})
        .corr(method="spearman")
        .to_numpy(float)
    )
