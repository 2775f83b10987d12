"""TokenLens: one completion, coloured token by token, with the top candidates at each token."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.support.expect import expect
from opdlab.support.validation import Text, Texts, Unchecked, Whole, validate_arguments
from opdlab.viz import markup, payload
from opdlab.viz.channels import describe_fitting, find_channels
from opdlab.viz.duel import find_duel
from opdlab.viz.given import select_completion
from opdlab.viz.glyphs import group_pieces, show_piece
from opdlab.viz.made_up import make_trace
from opdlab.viz.segments import find_segments
from opdlab.viz.traits import Trait
from opdlab.viz.turns import learned_rows
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

TRACKS = 4  # that fit under a line


class TokenLens(View):
    """A heat strip of one completion; under it, the top candidates of the policies at one token.

    Texts of more than 400 tokens have a map, with bands for thought and answer: by `<think>` and
    `</think>` in the text, or by a column `segment` of names. Of a text of more than 2,500 tokens
    the page carries as many channels as 120 kB for 10,000 tokens hold: the one asked for and the
    tracks, then the first of `find_channels`; the page says which are left out.

    Args:
        trace: The trace.
        sample: The completion.
        channel: The channel that colours the tokens at first: `log_ratio`, `reverse_kl`,
            `student_entropy`, `loss`, a plan column, a column of names such as `type`, … Under a
            student alone there is no `log_ratio`, and the first channel takes its place.
        title: The title above.
        like: Another lens whose colour scale this one keeps to, so that the two compare.
        tracks: Up to four further channels, drawn as thin bars under each line.

    Attributes:
        channel: The key of the channel that colours.
        tracks: The keys of the further channels.
        selected: The position looked at; at first the channel's largest.
        pins: Up to three positions that stay in view side by side.
        trace: The rows of the completion.
        channels: All channels of the completion, by key.

    Raises:
        OpdlabError: The trace has no such completion or no numbers, or there are too many tracks.
        UnknownColumn: The trace has no such channel.
    """

    caption = "What does each token cost, and what did student and teacher want there?"
    name = "lens"
    scripts = ("lens.js",)
    channel = Trait("log_ratio")
    tracks = Trait([])
    pins = Trait([])

    @validate_arguments
    def __init__(
        self,
        trace: Unchecked[Trace],
        sample: Whole = 0,
        channel: Text = "log_ratio",
        title: Text = "",
        like: TokenLens | None = None,
        tracks: Texts = (),
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        self.sample, self.title = sample, title
        self._least = like.limits if like else {}
        self.trace = select_completion(trace, sample)
        self.channels = find_channels(self.trace)
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

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is a trace.

        Args:
            given: Anything.
            sample: Not used: every trace has a lens.

        Returns:
            Whether it is a `Trace`.
        """
        return isinstance(given, Trace)

    @classmethod
    def of_trace(cls, trace: Trace, sample: int = 0) -> Self:
        """Make the lens of a completion.

        Args:
            trace: A trace that the view fits.
            sample: The completion.

        Returns:
            The view.
        """
        return cls(trace, sample)

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make the lens of a completion whose tokens all have the type `words`.

        Args:
            tokens: The bytes of the completion's tokens.
            words: All other texts: title, prompt, names.

        Returns:
            The view.
        """
        trace = make_trace(tokens, prompt=words, finish=words)
        typed = trace.with_columns(type=[words] * len(tokens))
        return cls(typed, channel="type", title=words, tracks=["jsd"])

    @property
    def limits(self) -> dict[str, float]:
        """The value that gets full colour, by channel: its own, or that of `like` if larger."""
        return {key: max(c.limit, self._least.get(key, 0.0)) for key, c in self.channels.items()}

    def with_limits(self, limits: Mapping[str, float]) -> TokenLens:
        """Return the lens with full colour at these values, or at its own where they are larger.

        Args:
            limits: The values by channel; channels without one keep their own.

        Returns:
            A copy without a widget and without watchers.
        """
        other = copy.copy(self)
        other._least = dict(limits)
        other._traits = dict(self._traits)
        other._watchers = []
        other._widget = None
        return other

    @property
    def df(self) -> pd.DataFrame:
        """The trace's rows of this completion, by position, with each token as it is listed."""
        return self.trace.to_pandas().assign(
            token=[show_piece(piece) for piece in self.trace.tokens()]
        )

    @property
    def text(self) -> str:
        """The text of the strip: every token, special ones included."""
        return "".join(group.text for group in group_pieces(self.trace.tokens()))

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with the coloured strip and its peaks; every foreign string in it is escaped.
        """
        chosen, limit = self.channels[self.channel], self.limits[self.channel]
        tokens, own = group_pieces(self.trace.tokens()), learned_rows(self.trace)
        return (
            f"{markup.draw_title(self.title)}{markup.draw_prompt(self._prompt)}"
            f'<div class="opd-bar">{markup.draw_legend(chosen, limit)}</div>'
            f"{markup.draw_strip_box(tokens, chosen, limit, self._finish, own)}"
            f"{markup.draw_words(self._peaks())}"
        )

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/lens.js` reads them.
        """
        fixed = {"text": payload.describe_text(self.trace), "duel": find_duel(self.trace)}
        spent = len(payload.pack(fixed)) if len(self.trace) > payload.LONG else 0
        carried = describe_fitting(
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
            "segments": find_segments(self.trace),
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
        unit = f" in {chosen.unit}" if chosen.unit else ""
        return f"{head}{unit}{meaning}\n{markup.draw_sparkline(chosen)}\n{self._peaks()}"

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
            return f"{markup.count_names(chosen)} of {len(tokens)} tokens"
        peaks = []
        for i in chosen.peaks():
            value = markup.format_value(chosen.values[i], chosen)
            peaks.append(f"{show_piece(tokens[i])} {value} (position {i})")
        return f"Largest {chosen.label}: {', '.join(peaks) or 'none'}"
