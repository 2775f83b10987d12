"""Compare: one text under several losses, teachers, checkpoints or runs, and their difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.support.validation import Text, Unchecked, Whole, validate_arguments
from opdlab.viz import markup, payload
from opdlab.viz.channel import Channel, describe_channel
from opdlab.viz.channels import find_channels, find_labelled_kinds
from opdlab.viz.given import check_traces, select_completion
from opdlab.viz.glyphs import group_pieces, show_piece
from opdlab.viz.made_up import make_trace
from opdlab.viz.token_lens import TokenLens
from opdlab.viz.traits import Trait
from opdlab.viz.turns import learned_rows
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

MOST = 8  # strips that a reader can hold beside each other
CHANGED = 8  # tokens of the list
ROOM = 60_000  # deflated bytes of channels in pages of long texts


class Compare(View):
    """One text under several losses, teachers or checkpoints: a strip each on one scale.

    Below the strips lie the difference of two of them and the numbers of all at one token, with
    the kinds (a method's routes, types) that each trace gives it.

    Args:
        traces: Traces or TokenLenses by name, or a list of TokenLenses, named by their titles.
        sample: The completion.
        channel: The channel that colours at first, a key that all traces have.
        title: The title above.

    Attributes:
        channel: The key of the channel that colours.
        pair: [minuend, subtrahend] by place; at first the second minus the first.
        traces: The rows of the completion in each trace, by name.
        selected: The position looked at; at first the one where the pair differs most.

    Raises:
        OpdlabError: There are fewer than two traces, or their tokens differ.
        UnknownColumn: A trace lacks the channel.
    """

    caption = "On which tokens do several losses, teachers or checkpoints differ?"
    takes = "several traces of one rollout, by name"
    name, scripts, styles = "compare", ("compare.js",), ("compare.css",)
    channel = Trait("log_ratio")
    pair = Trait([1, 0])

    @validate_arguments
    def __init__(
        self,
        traces: Unchecked[Mapping[str, Trace | TokenLens] | Sequence[TokenLens]],
        sample: Whole = 0,
        channel: Text = "log_ratio",
        title: Text = "",
    ) -> None:
        super().__init__()
        self.sample, self.title, self.traces = sample, title, _name_traces(traces, sample)
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

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` holds two or more traces by name.

        Args:
            given: Anything.
            sample: Not used: the number of traces decides.

        Returns:
            Whether it is a mapping of two to eight traces or TokenLenses.
        """
        return (
            isinstance(given, Mapping)
            and 2 <= len(given) <= MOST
            and all(isinstance(trace, (Trace, TokenLens)) for trace in given.values())
        )

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make a comparison of two gradings of the same tokens.

        Args:
            tokens: The bytes of the tokens, the same in both traces.
            words: All other texts: title, prompt, names.

        Returns:
            The view.
        """
        first, second = (
            make_trace(tokens, prompt=words, finish=words, seed=seed) for seed in (0, 1)
        )
        return cls({words: first, f"{words}, later": second}, title=words)

    @cached_property
    def channels(self) -> dict[str, list[Channel]]:
        """The channels of numbers that all traces have, by key, one of each trace."""
        return {key: found for key, found in self._shared.items() if found[0].kind != "category"}

    @cached_property
    def kinds(self) -> dict[str, list[Channel]]:
        """The categories that all traces have with the same names, by key, one of each trace."""
        return {
            key: found
            for key, found in self._shared.items()
            if found[0].kind == "category" and len({channel.names for channel in found}) == 1
        }

    @cached_property
    def _shared(self) -> dict[str, list[Channel]]:
        found = [find_channels(trace) for trace in self.traces.values()]
        keys = [key for key in found[0] if all(key in other for other in found)]
        return {key: [other[key] for other in found] for key in keys}

    @property
    def names(self) -> list[str]:
        """The names of the traces, in order."""
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
                    "token": [show_piece(p) for p in first.tokens()],
                    **values,
                    "difference": minuend - subtrahend,
                }
            )

    @property
    def correlation(self) -> pd.DataFrame:
        """Spearman's rank correlation of sizes, name by name; NaN where one does not vary."""
        return pd.DataFrame(_correlate(self.channels[self.channel]), self.names, self.names)

    @property
    def changed(self) -> pd.DataFrame:
        """The rows of `df` with the largest differences, largest first.

        Those of less than a hundredth of the largest are left out.
        """
        size = self.df["difference"].abs()
        return self.df.loc[size[(size > 0) & (size >= size.max() / 100)].nlargest(CHANGED).index]

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with a strip for each trace; every foreign string in it is escaped.
        """
        chosen = self.channels[self.channel]
        trace = next(iter(self.traces.values()))
        tokens, own = group_pieces(trace.tokens()), learned_rows(trace)
        strips = [
            f'<div class="opd-versus"><b>{markup.escape(name)}</b></div>'
            f"{markup.draw_strip_box(tokens, channel, self.limit, learned=own)}"
            for name, channel in zip(self.names, chosen, strict=True)
        ]
        lines = (self._summary(), *self._kinds_in_words())
        said = "".join(markup.draw_words(line) for line in lines)
        return (
            f"{markup.draw_title(self.title)}"
            f'<div class="opd-bar">{markup.draw_legend(chosen[0], self.limit)}</div>'
            f"{''.join(strips)}{said}"
        )

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/compare.js` reads them.
        """
        text = payload.describe_text(next(iter(self.traces.values())))
        kinds = [
            describe_channel(found[0], found[0].limit)
            | {"values": [describe_channel(c, c.limit)["values"] for c in found]}
            for found in self.kinds.values()
        ]
        return {
            "title": self.title,
            "text": text,
            "names": self.names,
            "prompt": text["texts"][0]["prompt"] if text["texts"] else "",
            "channels": self._describe_channels(),
            "kinds": kinds,
        }

    def __repr__(self) -> str:
        chosen, width = self.channels[self.channel], max(map(len, self.names))
        lines = [
            f"{name:{width}}  {markup.draw_sparkline(replace(c, fixed=self.limit))}"
            for name, c in zip(self.names, chosen, strict=True)
        ]
        unit = f" in {chosen[0].unit}" if chosen[0].unit else ""
        title = self.title or f"completion {self.sample}"
        head = f"Compare: {title}, {chosen[0].label}{unit}"
        return "\n".join([head, *lines, self._summary(), *self._kinds_in_words()])

    def _describe_channels(self) -> list[dict[str, Any]]:
        """The channels with the values of all traces; of long texts only some, to save room."""
        out, spent = [], 0
        for key, found in self.channels.items():
            limit = max(channel.limit for channel in found)
            described = [describe_channel(channel, limit) for channel in found]
            values = [one["values"] for one in described]
            is_long = len(found[0].values) > payload.LONG
            cost = sum(map(payload.measure_cost, values)) if is_long else 0
            if key == self.channel or spent + cost <= ROOM:
                spent += cost
                peaks = [one["peaks"] for one in described]
                rho = np.round(_correlate(found), 3)
                out.append({**described[0], "values": values, "peaks": peaks, "rho": rho})
        return out

    def _summary(self) -> str:
        a, b = (self.names[i] for i in self.pair)
        rho, chosen = self.correlation.loc[a, b], self.channels[self.channel][0]
        words = [
            f"{row.token} {markup.format_number(row.difference, True)} (position {i})"
            for i, row in self.changed.head(5).iterrows()
        ]
        return (
            f"{a} minus {b}, {chosen.label}: rank correlation {markup.format_number(rho)};"
            f" changed most: {', '.join(words) or 'none'}"
        )

    def _kinds_in_words(self) -> list[str]:
        """The shares of each kind in each trace, of kinds that a method names."""
        out = []
        for key in find_labelled_kinds(next(iter(self.traces.values()))):
            for name, channel in zip(self.names, self.kinds.get(key, []), strict=False):
                out.append(f"{name}, {markup.count_names(channel)}")
        return out


def _name_traces(
    traces: Mapping[str, Trace | TokenLens] | Sequence[TokenLens], sample: int
) -> dict[str, Trace]:
    if (
        isinstance(traces, (str, Trace))
        or not isinstance(traces, Sequence)
        or not all(isinstance(one, TokenLens) for one in traces)
    ):
        check_traces(traces, "Compare", "{'old': a, 'new': b}", kinds=(Trace, TokenLens))
    if isinstance(traces, Mapping):
        out = {str(name): _one_completion(some, sample) for name, some in traces.items()}
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


def _one_completion(given: Trace | TokenLens, sample: int) -> Trace:
    return given.trace if isinstance(given, TokenLens) else select_completion(given, sample)


def _check_same(traces: Mapping[str, Trace]) -> None:
    """Raise OpdlabError where two traces are not of the same tokens; it says where they part."""
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
        seen = [show_piece(some[at]) if at < len(some) else "the end" for some in (wanted, tokens)]
        raise OpdlabError(
            f"{first!r} and {name!r} are not of the same text: they part at position {at}"
            f" ({seen[0]} and {seen[1]}). Score one rollout under each: opdlab.score(rollout, …),"
            " or compare TokenLenses side by side with viz.page."
        )


def _correlate(some: Sequence[Channel]) -> np.ndarray:
    """`[k, k]` rank correlations of sizes."""
    sizes = pd.DataFrame({i: np.abs(channel.values) for i, channel in enumerate(some)})
    return np.asarray(sizes.corr(method="spearman"), float)
