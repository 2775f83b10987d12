"""Rollouts: all completions of a trace as a table, and the tokens of the one chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError
from opdlab.support.expect import expect
from opdlab.support.validation import Numbers, NumbersByRow, Text, Unchecked, validate_arguments
from opdlab.viz import markup, payload
from opdlab.viz.channel import Channel, describe_channel
from opdlab.viz.channels import find_channels
from opdlab.viz.glyphs import clean_text, show_piece
from opdlab.viz.made_up import make_trace
from opdlab.viz.timeline import find_rewards
from opdlab.viz.traits import Trait
from opdlab.viz.turns import describe_turns, find_turns, sum_by_turn
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

BINS = 40  # bars of a sparkline
ROOM = 20_000  # tokens that a page carries; the table itself always has all rollouts
CUT = 160  # characters of a prompt, and of a completion's end, that the table carries
LABELS = {"reverse_kl": "mean KL", "log_ratio": "mean log ratio", "peak": "largest"}
LABELS_OF_SUMS = {"tokens": "tokens", "reverse_kl": "KL", "log_ratio": "log ratio"}
COLUMNS = ("tokens", "turns", "reward", "reverse_kl", "log_ratio", "peak")
MEANS = ("tokens", "turns", "reward", "reverse_kl")  # those of the summary


class Rollouts(View):
    """One row for each rollout: prompt, end of the text, length, finish, reward, KL, a sparkline.

    Choosing a row shows its tokens below. A page carries the tokens of as many rollouts as 20,000
    tokens make, those with the largest KL; a live view fetches others.

    Args:
        trace: The trace.
        rewards: A reward for each completion, as a list or a dict; by default the trace's column
            `reward`, if it has one.
        sort: A column of `table`, with a minus for the largest first.
        title: The title above.

    Attributes:
        rollout: The completion chosen; -1 for none.
        sort: The column that the rows are sorted by.
        selected: The row of `df` (a token) that is looked at.
        whole: The trace; `trace` has the rows of the rollouts whose tokens a page carries.
        rewards: The rewards by completion; empty where there are none.

    Raises:
        OpdlabError: The trace has no tokens, or the table has no such column.
    """

    caption = "Which rollouts are worth reading?"
    name, scripts, styles = "rollouts", ("rollouts.js",), ("rollouts.css",)
    rollout = Trait(-1)
    sort = Trait("")

    @validate_arguments
    def __init__(
        self,
        trace: Unchecked[Trace],
        rewards: Numbers | NumbersByRow | None = None,
        sort: Text = "",
        title: Text = "",
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        if not len(trace):
            raise OpdlabError(
                "The trace has no tokens, so there is no rollout to show. Sample with"
                " max_new_tokens above 0."
            )
        self.whole, self.title = trace, title
        self.rewards = find_rewards(trace, rewards, [s for s, *_ in payload.find_spans(trace)])
        self.sort = sort or ("-reverse_kl" if "reverse_kl" in self.table else "-tokens")
        if self.sort.lstrip("-") not in self.table:
            raise OpdlabError(
                f"There is no column {self.sort.lstrip('-')!r} to sort by. There is"
                f" {', '.join(self.table.columns)}."
            )
        self.rollout = int(self._sort_table().index[0])

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is a trace of several completions, with tokens.

        Args:
            given: Anything.
            sample: Not used: the view shows all completions.

        Returns:
            Whether the view can be made of it.
        """
        return isinstance(given, Trace) and len(given.meta["texts"]) > 1 and len(given) > 0

    @classmethod
    def of_trace(cls, trace: Trace, sample: int = 0) -> Self:
        """Make the table of all completions of a trace.

        Args:
            trace: A trace that the view fits.
            sample: Not used: the view shows all completions.

        Returns:
            The view.
        """
        return cls(trace)

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make the table of one completion.

        Args:
            tokens: The bytes of the completion's tokens.
            words: All other texts: title, prompt, names.

        Returns:
            The view.
        """
        return cls(make_trace(tokens, prompt=words, finish=words), title=words)

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row for each rollout, by its number in the trace.

        Columns: `prompt`, `text`, `tokens`, `finish`, `turns` of conversations, `reward` where
        there are rewards, the means of `reverse_kl` and `log_ratio` in nats, and `peak`, the
        largest |log ratio|.
        """
        rows = [self._row(*span) for span in payload.find_spans(self.whole)]
        return pd.DataFrame(rows).set_index("sample")

    @property
    def turns(self) -> pd.DataFrame:
        """One row per turn: `sample`, `turn` (from 0), `tokens`, and sums in nats over it.

        Sums of `reverse_kl` and `log_ratio`, as far as they are known, over the student's own
        tokens.
        """
        return sum_by_turn(
            self.whole, {key: channel.values for key, channel in self._channels.items()}
        )

    def _row(self, sample: int, first: int, size: int) -> dict[str, Any]:
        meta = self.whole.meta
        row: dict[str, Any] = {
            "sample": sample,
            "prompt": meta["prompts"][sample],
            "text": meta["texts"][sample],
            "tokens": size,
            "finish": meta["finish"][sample],
        }
        if self._turn_counts:
            row["turns"] = self._turn_counts[sample]
        if self.rewards:
            row["reward"] = self.rewards.get(sample, np.nan)
        for key, channel in self._channels.items():
            values = channel.values[first : first + size]
            finite = values[np.isfinite(values)]
            row[key] = float(finite.mean()) if len(finite) else np.nan
            if key == "log_ratio":
                row["peak"] = float(np.nan_to_num(np.abs(values), nan=0.0, posinf=np.inf).max())
        return row

    @cached_property
    def _turn_counts(self) -> dict[int, int]:
        """The student's turns of each rollout; empty where all have one."""
        samples, found = self.whole.column("sample"), find_turns(self.whole)
        return {int(samples[first]): turn + 1 for first, _, turn, is_own in found if is_own}

    @cached_property
    def trace(self) -> Trace:
        """The rollouts whose tokens the page carries."""
        key = "reverse_kl" if "reverse_kl" in self.table else "tokens"
        order = self.table.sort_values(key, ascending=False, kind="stable").index
        totals = self.table["tokens"][order].cumsum()
        kept = order[totals <= ROOM].tolist() or [order[0]]
        is_kept = pc.is_in(self.whole.table["sample"], pa.array(kept))
        return Trace(self.whole.table.filter(is_kept), self.whole.meta)

    @property
    def df(self) -> pd.DataFrame:
        """One row per token of the rollouts that the page carries."""
        return self.trace.to_pandas().assign(
            token=[show_piece(piece) for piece in self.trace.tokens()]
        )

    def answer(self, question: Mapping[str, Any]) -> Any:
        """Return the tokens of a rollout that the page does not carry: `{"sample": 7}`.

        Args:
            question: `sample`, the number of a completion.

        Returns:
            The `text` and the `channels` of this completion, as plain data.
        """
        rows = self.whole.sample(int(question["sample"]))
        return payload.to_plain_data(
            {
                "text": payload.describe_text(rows),
                "channels": self._describe_channels(find_channels(rows)),
            }
        )

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with a table of at most 20 rollouts; every foreign string in it is escaped.
        """
        table = self._sort_table()
        keys = [key for key in ("tokens", "finish", *COLUMNS[1:]) if key in table]
        names = ["prompt", "…text", *map(label, keys), "log ratio"]
        head = "".join(f'<th scope="col">{name}</th>' for name in names)
        lines = "".join(self._table_row(int(i), row, keys) for i, row in table.head(20).iterrows())
        by_turn = describe_turns(self.turns, LABELS_OF_SUMS)
        more = f" (the first 20 of {len(table)})" if len(table) > 20 else ""
        return (
            f"{markup.draw_title(self.title)}"
            f'<table class="opd-rollouts-still"><thead><tr>{head}</tr></thead>'
            f"<tbody>{lines}</tbody></table>{markup.draw_words(self._summary() + more)}"
            f"{markup.draw_words(by_turn) if by_turn else ''}"
        )

    def _table_row(self, sample: int, row: pd.Series, keys: Sequence[str]) -> str:
        cells = [
            markup.escape(_start(row.prompt)),
            markup.escape(_end(row.text)),
            *(_draw_cell(row[key]) for key in keys),
            self._draw_sparkline(sample),
        ]
        return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/rollouts.js` reads them.
        """
        table, prompts = self.table, list(dict.fromkeys(self.table["prompt"]))
        at = {prompt: i for i, prompt in enumerate(prompts)}
        ratio = self._spark_channel
        bins = np.stack(
            [
                _pool(ratio.values[first : first + size])
                for _, first, size in payload.find_spans(self.whole)
            ]
        )
        return {
            "title": self.title,
            "text": payload.describe_text(self.trace),
            "channels": self._describe_channels(find_channels(self.trace)),
            "table": {
                "sample": table.index.to_numpy(),
                "prompt": np.array([at[p] for p in table["prompt"]]),
                "end": [_end(t) for t in table["text"]],
                "finish": [str(f) for f in table["finish"]],
                **{k: table[k].to_numpy(np.float32) for k in COLUMNS if k in table},
            },
            "prompts": [_start(p) for p in prompts],
            "by_turn": describe_turns(self.turns, LABELS_OF_SUMS),
            "spark": {
                "kind": ratio.kind,
                "limit": ratio.limit,
                "bins": payload.compact(bins.ravel()),
            },
        }

    def __repr__(self) -> str:
        lines = [
            f"{self._draw_sparkline(int(i)):{BINS}}  {i}: {_list_means(r)}"
            for i, r in self._sort_table().head(8).iterrows()
        ]
        more = [f"… {len(self.table) - 8} more"] if len(self.table) > 8 else []
        title = self.title or f"{len(self.table)} completions"
        head = f"Rollouts: {title}, by {self.sort.lstrip('-')}"
        by_turn = describe_turns(self.turns, LABELS_OF_SUMS)
        return "\n".join([head, *lines, *more, *([by_turn] if by_turn else [])])

    @cached_property
    def _channels(self) -> dict[str, Channel]:
        found = find_channels(self.whole)
        usual = [key for key in ("log_ratio", "reverse_kl") if key in found]
        return {key: found[key] for key in usual or list(found)[:1]}

    @property
    def _spark_channel(self) -> Channel:
        return self._channels.get("log_ratio") or next(iter(self._channels.values()))

    def _describe_channels(self, found: Mapping[str, Channel]) -> list[dict[str, Any]]:
        """The channels that strips show, on the scale of the whole trace."""
        return [describe_channel(found[key], c.limit) for key, c in self._channels.items()]

    def _sort_table(self) -> pd.DataFrame:
        return self.table.sort_values(
            self.sort.lstrip("-"), ascending=not self.sort.startswith("-"), kind="stable"
        )

    def _draw_sparkline(self, sample: int) -> str:
        channel = self._spark_channel
        first, size = next(
            (first, size) for s, first, size in payload.find_spans(self.whole) if s == sample
        )
        return markup.draw_sparkline(
            Channel("", "", channel.values[first : first + size], fixed=channel.limit), BINS
        )

    def _summary(self) -> str:
        finish = ", ".join(f"{n} {name}" for name, n in self.table["finish"].value_counts().items())
        means = [
            f"{label(k)} {markup.format_number(float(self.table[k].mean()))}"
            for k in MEANS
            if k in self.table
        ]
        return f"{len(self.table)} rollouts: {finish}; mean {', '.join(means)}"


def label(key: str) -> str:
    """Return the heading of a column.

    Args:
        key: The column's name in `Rollouts.table`.

    Returns:
        The heading; the name itself where it has no other.
    """
    return LABELS.get(key, key)


def _start(text: Any) -> str:
    text = clean_text(str(text))
    return text if len(text) <= CUT else f"{text[:CUT]}…"


def _end(text: Any) -> str:
    text = clean_text(str(text))
    return text if len(text) <= CUT else f"…{text[-CUT:]}"


def _draw_cell(value: Any) -> str:
    return markup.format_number(value) if isinstance(value, float) else markup.escape(str(value))


def _list_means(row: pd.Series) -> str:
    parts = [f"{label(k)} {markup.format_number(float(row[k]))}" for k in MEANS if k in row]
    return f"{', '.join(parts)}, {row['finish']}"


def _pool(values: np.ndarray) -> np.ndarray:
    """The value of largest size in each of `BINS` stretches.

    Of fewer tokens each stands alone, with NaN after them.
    """
    out = np.full(BINS, np.nan)
    for i, part in enumerate(np.array_split(values, min(BINS, len(values)) or 1)):
        known = part[~np.isnan(part)]
        out[i] = known[np.abs(known).argmax()] if len(known) else np.nan
    return out
