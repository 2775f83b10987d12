"""Timeline: when rollouts leave the teacher's road.

Cumulative log ratio and cumulative KL along the tokens, one line for each rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.support.expect import expect
from opdlab.support.validation import (
    Finite,
    Numbers,
    NumbersByRow,
    Text,
    Unchecked,
    WholeNumbers,
    validate_arguments,
)
from opdlab.viz import markup, payload
from opdlab.viz.channel import describe_channel
from opdlab.viz.channels import find_channels, find_kinds, find_labelled_kinds, find_rivals
from opdlab.viz.glyphs import show_piece
from opdlab.viz.lines import HUES, Line, Plot, find_range, thin
from opdlab.viz.made_up import make_trace
from opdlab.viz.traits import Trait
from opdlab.viz.turns import describe_turns, find_turns, sum_by_turn
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

MOST = 16  # rollouts that one picture holds
TOGETHER = 6  # rollouts whose lines can be told apart in one plot; more get a plot each


class Timeline(View):
    """Sums along the tokens of rollouts, and the first token beyond a threshold: the fork.

    The upper plot sums log T(y) − log S(y): at −3 the path so far is e³ = 20 times less likely
    under the teacher than under the student. There the rollout forks, if `threshold` is 3. The
    lower plot sums the KL of the student to the teacher. More than six rollouts get an upper plot
    each, all on one scale. At the token that is looked at, the page names its kinds: a method's
    routes, types.

    Args:
        trace: The trace.
        samples: The completions; by default those of the first one's prompt, 16 at most.
        rewards: A reward for each completion, as a list or a dict; by default the trace's column
            `reward`, if it has one.
        threshold: The nats below zero at which a rollout forks.
        against: The policy compared with; by default the first rival.
        title: The title above.

    Attributes:
        threshold: The nats below zero at which a rollout forks; the page can move it.
        samples: The completions shown.
        trace: Their rows.
        against: The policy compared with.
        rewards: The rewards by completion; empty where there are none.
        selected: The row of `trace` that is looked at; at first the first fork.

    Raises:
        OpdlabError: The trace has the student alone, or not these completions.
        UnknownColumn: There is no such policy.
    """

    caption = "Where does a rollout leave the teacher's road?"
    name, scripts, styles = "timeline", ("timeline.js",), ("lines.css", "timeline.css")
    threshold = Trait(3.0)

    @validate_arguments
    def __init__(
        self,
        trace: Unchecked[Trace],
        samples: WholeNumbers | None = None,
        rewards: Numbers | NumbersByRow | None = None,
        threshold: Finite = 3.0,
        against: Text = "",
        title: Text = "",
    ) -> None:
        super().__init__(threshold=float(threshold))
        expect(trace, Trace, type(self).__name__, "trace")
        self.samples, self.title = _choose_samples(trace, samples), title
        self.trace = Trace(
            trace.table.filter(pc.is_in(trace.table["sample"], pa.array(self.samples))), trace.meta
        )
        rivals = find_rivals(trace)
        if not rivals:
            raise OpdlabError(
                "The trace has the student alone, so nothing to depart from. Score it under a"
                " teacher too: opdlab.score(…)."
            )
        if against and against not in rivals:
            raise UnknownColumn(
                f"There is no policy {against!r} to compare with, only {', '.join(rivals)}. Name"
                " one of these."
            )
        self.against = against or rivals[0]
        self._prefix = "" if self.against == rivals[0] else f"{against}_"
        self.rewards = find_rewards(trace, rewards, self.samples)
        fork = self.forks["row"].dropna()
        self.selected = int(fork.iloc[0]) if len(fork) else 0

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is a trace with tokens, of a student and another policy.

        Args:
            given: Anything.
            sample: Not used: the trace as a whole decides.

        Returns:
            Whether the trace has what the view needs.
        """
        return isinstance(given, Trace) and bool(find_rivals(given)) and len(given) > 0

    @classmethod
    def of_trace(cls, trace: Trace, sample: int = 0) -> Self:
        """Make the timeline of one completion.

        Args:
            trace: A trace that the view fits.
            sample: The completion.

        Returns:
            The view.
        """
        return cls(trace, samples=[sample])

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make the timeline of one completion whose tokens all have the type `words`.

        Args:
            tokens: The bytes of the completion's tokens.
            words: All other texts: title, prompt, names.

        Returns:
            The view.
        """
        trace = make_trace(tokens, prompt=words, finish=words)
        return cls(trace.with_columns(type=[words] * len(tokens)), rewards=[1], title=words)

    @cached_property
    def _channels(self) -> Mapping[str, Any]:
        return find_channels(self.trace)

    @cached_property
    def _paths(self) -> dict[str, np.ndarray]:
        """`log_ratio`, `kl` where it is known, and their sums along each rollout, `[rows]` each.

        The sums are in the precision of the page.
        """
        ratio = self._channels[f"{self._prefix}log_ratio"].values
        divergence = self._channels.get(f"{self._prefix}reverse_kl")
        kl = np.full(len(ratio), np.nan) if divergence is None else divergence.values
        paths = {"log_ratio": ratio}
        if not np.isnan(kl).all():
            paths["kl"] = kl
        paths["cumulative_log_ratio"] = self._sum_along(ratio)
        paths["cumulative_kl"] = self._sum_along(kl)
        return paths

    def _sum_along(self, values: np.ndarray) -> np.ndarray:
        """The sum of the values of a rollout up to each token; NaN adds nothing."""
        finite = np.nan_to_num(values, nan=0.0, posinf=1e4, neginf=-1e4)
        sums = [
            np.cumsum(finite[first : first + size])
            for _, first, size in payload.find_spans(self.trace)
        ]
        return np.concatenate([*sums, np.zeros(0)]).clip(-6e4, 6e4).astype(np.float16)

    @property
    def df(self) -> pd.DataFrame:
        """One row per token of the rollouts.

        Columns: `sample`, `position`, `token`, `log_ratio`, `kl`, the two sums up to the token, and
        the name of each kind (a method's routes, types).
        """
        table: dict[str, Any] = {
            "sample": self.trace.column("sample"),
            "position": self.trace.column("position"),
            "token": [show_piece(piece) for piece in self.trace.tokens()],
        }
        table |= {key: values.astype(float) for key, values in self._paths.items()}
        for key, channel in find_kinds(self.trace).items():
            table.setdefault(key, [markup.format_value(value, channel) for value in channel.values])
        return pd.DataFrame(table)

    @property
    def forks(self) -> pd.DataFrame:
        """One row for each rollout.

        `fork` is the first position beyond the threshold (NaN for none), with its `token` and its
        `row` of `df`.
        """
        rows, ids = [], self.trace.column("token_id")
        for sample, first, size in payload.find_spans(self.trace):
            path = self._paths["cumulative_log_ratio"][first : first + size].astype(float)
            beyond = np.flatnonzero(path <= -self.threshold)
            at = int(beyond[0]) if len(beyond) else None
            token = "" if at is None else show_piece(self.trace.piece(int(ids[first + at])))
            rows.append(
                {
                    "sample": sample,
                    "fork": at,
                    "token": token,
                    "row": None if at is None else first + at,
                    "tokens": size,
                    "log_ratio": path[-1],
                    "reward": self.rewards.get(sample, np.nan),
                }
            )
        table = pd.DataFrame(
            rows, columns=["sample", "fork", "token", "row", "tokens", "log_ratio", "reward"]
        )
        return table.astype({"fork": float, "row": float}).set_index("sample")

    @property
    def turns(self) -> pd.DataFrame:
        """One row per turn: `sample`, `turn` (from 0), `tokens`, and the sums in nats over it.

        `log_ratio` and `kl` count the student's own tokens alone, so do the sums along a rollout.
        """
        keys = {"log_ratio": "log_ratio", "kl": "reverse_kl"}
        found = {
            name: self._channels[f"{self._prefix}{key}"].values
            for name, key in keys.items()
            if f"{self._prefix}{key}" in self._channels
        }
        return sum_by_turn(self.trace, found)

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with the plots and the forks in words; every foreign string in it is escaped.
        """
        own, shared = ("".join(plot.html() for plot in plots) for plots in self._plots())
        if own:
            label, told = self._names["cumulative_log_ratio"]
            own = (
                f'<div class="opd-timeline-head"><b>{label}</b>'
                f' <span class="opd-soft">{markup.escape(told)}</span></div>'
                f'<div class="opd-timeline-own">{own}</div>'
            )
        said = "".join(markup.draw_words(line) for line in self._lines())
        return f'{markup.draw_title(self.title)}<div class="opd-timeline">{own}{shared}</div>{said}'

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/timeline.js` reads them.
        """
        paths = {
            key: values if key.startswith("cumulative") else payload.compact(values)
            for key, values in self._paths.items()
        }
        own, shared = self._plots()
        known = [self.rewards.get(sample, np.nan) for sample in self.samples]
        return {
            "title": self.title,
            "against": self.against,
            "text": payload.describe_text(self.trace),
            "paths": paths,
            "limit": self._channels[f"{self._prefix}log_ratio"].limit,
            "looks": [self._choose_look(sample) for sample in self.samples],
            "own": [plot.data() for plot in own],
            "plots": [plot.data() for plot in shared],
            "head": self._names["cumulative_log_ratio"],
            "rewards": known if self.rewards else None,
            "kinds": [describe_channel(c, c.limit) for c in find_kinds(self.trace).values()],
            "turns": self._describe_turns(),
        }

    def _describe_turns(self) -> list[dict[str, float]]:
        """The student's turns with their rows and sums; empty where all rollouts have one."""
        table = self.turns
        if not len(table) or not table["turn"].max():
            return []
        samples = self.trace.column("sample")
        rows = {
            (int(samples[first]), turn): (first, size)
            for first, size, turn, is_own in find_turns(self.trace)
            if is_own
        }
        out = []
        for one in table.to_dict("records"):
            first, size = rows[int(one["sample"]), int(one["turn"])]
            sums = {name: float(one[name]) for name in ("log_ratio", "kl") if name in one}
            turn = {"turn": int(one["turn"]), "tokens": int(one["tokens"])}
            out.append({"first": first, "size": size, **turn, **sums})
        return out

    def __repr__(self) -> str:
        lost, lines = -self._paths["cumulative_log_ratio"].astype(float).clip(max=0), []
        most = max(float(lost.max(initial=0.0)), 0.1)
        for sample, first, size in payload.find_spans(self.trace):
            parts = np.array_split(lost[first : first + size], min(48, size))
            bars = "".join(markup.draw_bar(float(part.max()) / most) for part in parts)
            lines.append(f"{bars}  rollout {sample}")
        title = self.title or f"{len(self.samples)} rollouts"
        head = f"Timeline: {title}, nats lost against {self.against} so far"
        return "\n".join([head, *lines, *self._lines()])

    def _choose_look(self, sample: int) -> str:
        """The look of a rollout's line.

        Rewards at or above the middle are violet and whole, those below grey and dashed. Without
        rewards each line has a look of its own, or is violet where each has a plot of its own.
        """
        if not self.rewards:
            return "amount" if self._many else HUES[self.samples.index(sample) % len(HUES)]
        known = [r for r in self.rewards.values() if np.isfinite(r)]
        middle = (min(known) + max(known)) / 2 if known else 0.0
        return "amount" if self.rewards.get(sample, np.nan) >= middle else "grey"

    @property
    def _many(self) -> bool:
        return len(self.samples) > TOGETHER

    @property
    def _names(self) -> dict[str, tuple[str, str]]:
        """Heading and unit of the sums that are drawn."""
        names = {
            "cumulative_log_ratio": (
                "cumulative log ratio",
                f"nats, log {self.against} − log student",
            ),
            "cumulative_kl": ("cumulative KL", f"nats, student to {self.against}"),
        }
        return {key: names[key] for key in names if key != "cumulative_kl" or "kl" in self._paths}

    def _plots(self) -> tuple[list[Plot], list[Plot]]:
        """Plots of one rollout each, if there are many, and those of all; thinned.

        The page marks forks and threshold itself.
        """
        own, shared, spans, forks = [], [], list(payload.find_spans(self.trace)), self.forks
        x = (0.0, float(max(1, *(size - 1 for *_, size in spans))))
        for key, (label, told) in self._names.items():
            values, ratio = self._paths[key].astype(float), key == "cumulative_log_ratio"
            y = find_range([values, np.array([0.0, -self.threshold * 1.1] if ratio else [0.0])])
            lines = [
                Line(f"rollout {s}", *thin(np.arange(n), values[i : i + n]), self._choose_look(s))
                for s, i, n in spans
            ]
            if ratio and self._many:
                own = [
                    Plot(key, line.name, [line], "nats", self._describe_fork(forks.loc[s]), x, y)
                    for line, (s, *_) in zip(lines, spans, strict=True)
                ]
            else:
                shared.append(Plot(key, label, lines, "nats", told, x, y))
        return own, shared

    def _describe_fork(self, row: pd.Series) -> str:
        """The line over the plot of one rollout where no script runs; `row` is one of `forks`."""
        fork = f"fork at {row.fork:.0f} {row.token}" if np.isfinite(row.fork) else "no fork"
        return f"reward {markup.format_number(row.reward)}, {fork}" if self.rewards else fork

    def _lines(self) -> list[str]:
        """The forks in words, and how common each kind is that a method names."""
        named = find_labelled_kinds(self.trace).values()
        by_turn = describe_turns(
            self.turns, {"tokens": "tokens", "log_ratio": "log ratio", "kl": "KL"}
        )
        said = [self._summary(), *map(markup.count_names, named)]
        return [*said, by_turn] if by_turn else said

    def _summary(self) -> str:
        told = [
            f"rollout {i} at position {r.fork:.0f} ({r.token})"
            for i, r in self.forks.iterrows()
            if np.isfinite(r.fork)
        ]
        return (
            f"Forks beyond {markup.format_number(self.threshold)} nats: {', '.join(told) or 'none'}"
        )


def _choose_samples(trace: Trace, samples: Sequence[int] | None) -> list[int]:
    held = [sample for sample, *_ in payload.find_spans(trace)]
    if not held:
        raise OpdlabError(
            "The trace has no tokens, so there is no road to follow. Sample with max_new_tokens"
            " above 0."
        )
    if samples is None:
        prompts = trace.meta["prompts"]
        return [s for s in held if prompts[s] == prompts[held[0]]][:MOST]
    if missing := [s for s in samples if s not in held]:
        raise OpdlabError(
            f"The trace holds no row of completion {missing[0]}, only of"
            f" {', '.join(map(str, held)) or 'none'}. Name these."
        )
    if len(samples) > MOST:
        raise OpdlabError(
            f"{len(samples)} rollouts are too many for one picture. Name {MOST} completions at"
            " most."
        )
    return sorted(int(s) for s in samples)


def find_rewards(
    trace: Trace, rewards: Sequence[float] | Mapping[int, float] | None, samples: Sequence[int]
) -> dict[int, float]:
    """Return the rewards of completions.

    Args:
        trace: The trace, whose column `reward` is taken where no rewards are given.
        rewards: A reward for each completion of the trace, or some by number.
        samples: The completions that are shown.

    Returns:
        Rewards by completion, of those shown; empty where there are none.

    Raises:
        OpdlabError: A list has not one reward for each completion.
    """
    if isinstance(rewards, Mapping):
        return {s: float(rewards[s]) for s in samples if s in rewards}
    if rewards is not None:
        if len(rewards) != len(trace.meta["texts"]):
            raise OpdlabError(
                f"There are {len(rewards)} rewards for {len(trace.meta['texts'])} completions. Give"
                " one for each, or a dict."
            )
        return {s: float(rewards[s]) for s in samples}
    if "reward" not in trace.table.column_names:
        return {}
    column = trace.column("reward")
    return {s: float(column[first]) for s, first, _ in payload.find_spans(trace) if s in samples}
