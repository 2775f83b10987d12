"""Rollouts: all completions of a trace as a table to sort and filter, and the tokens of the one
chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError
from opdlab.support.expect import expect
from opdlab.viz import markup, payload
from opdlab.viz.channels import Channel, channels, described
from opdlab.viz.glyphs import clean, visible
from opdlab.viz.timeline import rewards_of
from opdlab.viz.view import Trait, View

BINS = 40  # bars of a sparkline
ROOM = 20_000  # tokens that a page carries; the table itself always has all rollouts
CUT = 160  # characters of a prompt, and of a completion's end, that the table carries
LABELS = {"reverse_kl": "mean KL", "log_ratio": "mean log ratio", "peak": "largest"}
COLUMNS = ("tokens", "reward", "reverse_kl", "log_ratio", "peak")


class Rollouts(View):
    """Which rollouts are worth reading?

    One row each: prompt, end of the text, length, finish, reward, mean KL, a sparkline.

    rewards: by completion, a list or a dict; by default the trace's column `reward`, if it has one.
        sort: a column of `table`, with
    a minus for largest first. Choosing a row shows its tokens below. Raises OpdlabError for a trace
    without tokens.

    `table` has a row for each rollout, and `rollout` is the one chosen; `selected`, `hovered` and
    `brush` are rows of `df`, the tokens. A page carries the tokens of as many rollouts as 20,000
    tokens make, those with the largest KL; a live view fetches others.
    """

    name, scripts, styles = "rollouts", ("rollouts.js",), ("rollouts.css",)
    rollout = Trait(-1)
    sort = Trait("")

    def __init__(
        self,
        trace: Trace,
        rewards: Sequence[float] | Mapping[int, float] | None = None,
        sort: str = "",
        title: str = "",
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        if not len(trace):
            raise OpdlabError(
                "The trace has no tokens, so there is no rollout to show. Sample with"
                " max_new_tokens above 0."
            )
        self.whole, self.title = trace, title
        self.rewards = rewards_of(trace, rewards, [s for s, *_ in payload.spans(trace)])
        self.sort = sort or ("-reverse_kl" if "reverse_kl" in self.table else "-tokens")
        if self.sort.lstrip("-") not in self.table:
            raise OpdlabError(
                f"There is no column {self.sort.lstrip('-')!r} to sort by. There is"
                f" {', '.join(self.table.columns)}."
            )
        self.rollout = int(
            self.table.sort_values(
                self.sort.lstrip("-"), ascending=self.sort[0] != "-", kind="stable"
            ).index[0]
        )

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a rollout, by its place in the trace:

        `prompt`, `text`, `tokens`, `finish`, means in nats, `peak` |log ratio|.
        """
        meta, rows = self.whole.meta, []
        for sample, first, size in payload.spans(self.whole):
            row: dict[str, Any] = {
                "sample": sample,
                "prompt": meta["prompts"][sample],
                "text": meta["texts"][sample],
                "tokens": size,
                "finish": meta["finish"][sample],
            }
            if self.rewards:
                row["reward"] = self.rewards.get(sample, np.nan)
            for key, channel in self._channels.items():
                values = channel.values[first : first + size]
                finite = values[np.isfinite(values)]
                row[key] = float(finite.mean()) if len(finite) else np.nan
                if key == "log_ratio":
                    row["peak"] = float(np.nan_to_num(np.abs(values), nan=0.0, posinf=np.inf).max())
            rows.append(row)
        return pd.DataFrame(rows).set_index("sample")

    @cached_property
    def trace(self) -> Trace:
        """The rollouts whose tokens the page carries."""
        sizes, key = (
            self.table["tokens"],
            next(k for k in ("reverse_kl", "tokens") if k in self.table),
        )
        order = self.table.sort_values(key, ascending=False, kind="stable").index
        kept = [
            s for s, total in zip(order, sizes[order].cumsum(), strict=True) if total <= ROOM
        ] or [order[0]]
        return Trace(
            self.whole.table.filter(pc.is_in(self.whole.table["sample"], pa.array(kept))),
            self.whole.meta,
        )

    @property
    def df(self) -> pd.DataFrame:
        """One row a token of the rollouts that the page carries."""
        return self.trace.to_pandas().assign(
            token=[visible(piece) for piece in self.trace.tokens()]
        )

    def answer(self, question: Mapping[str, Any]) -> Any:
        """The tokens of a rollout that the page does not carry: `{"sample": 7}`."""
        rows = self.whole.sample(int(question["sample"]))
        return payload.plain(
            {"text": payload.text(rows), "channels": self._described(channels(rows))}
        )

    def static(self) -> str:
        table = self._sorted()
        keys = [k for k in ("tokens", "finish", *COLUMNS[1:]) if k in table]
        head = "".join(
            f'<th scope="col">{label(k)}</th>' for k in ("prompt", "…text", *keys, "log ratio")
        )
        lines = "".join(
            f"<tr><td>{markup.safe(_start(r.prompt))}</td><td>{markup.safe(_end(r.text))}</td>"
            f"{''.join(f'<td>{_cell(r[k])}</td>' for k in keys)}<td>{self._spark(int(i))}</td></tr>"
            for i, r in table.head(20).iterrows()
        )
        more = f" (the first 20 of {len(table)})" if len(table) > 20 else ""
        title = markup.title(self.title)
        return (
            f"{title}<table"
            f' class="opd-rollouts-still"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table><div'
            f' class="opd-peaks">{markup.safe(self._summary() + more)}</div>'
        )

    def data(self) -> dict[str, Any]:
        table, prompts = self.table, list(dict.fromkeys(self.table["prompt"]))
        at = {prompt: i for i, prompt in enumerate(prompts)}
        ratio = self._channels.get("log_ratio") or next(iter(self._channels.values()))
        bins = np.stack(
            [
                _pooled(ratio.values[first : first + size])
                for _, first, size in payload.spans(self.whole)
            ]
        )
        return {
            "title": self.title,
            "text": payload.text(self.trace),
            "channels": self._described(channels(self.trace)),
            "table": {
                "sample": table.index.to_numpy(),
                "prompt": np.array([at[p] for p in table["prompt"]]),
                "end": [_end(t) for t in table["text"]],
                "finish": [str(f) for f in table["finish"]],
                **{k: table[k].to_numpy(np.float32) for k in COLUMNS if k in table},
            },
            "prompts": [_start(p) for p in prompts],
            "spark": {
                "kind": ratio.kind,
                "limit": ratio.limit,
                "bins": payload.numbers(bins.ravel()),
            },
        }

    def __repr__(self) -> str:
        lines = [
            f"{self._spark(int(i)):{BINS}}  {i}: {_words(r)}"
            for i, r in self._sorted().head(8).iterrows()
        ]
        more = [f"… {len(self.table) - 8} more"] if len(self.table) > 8 else []
        return "\n".join(
            [
                (
                    f"Rollouts: {self.title or f'{len(self.table)} completions'}, by"
                    f" {self.sort.lstrip('-')}"
                ),
                *lines,
                *more,
            ]
        )

    @cached_property
    def _channels(self) -> dict[str, Channel]:
        found = channels(self.whole)
        return {k: found[k] for k in ("log_ratio", "reverse_kl") if k in found} or dict(
            list(found.items())[:1]
        )

    def _described(self, found: Mapping[str, Channel]) -> list[dict[str, Any]]:
        """The channels that strips show, on the scale of the whole trace."""
        return [described(found[k], c.limit) for k, c in self._channels.items()]

    def _sorted(self) -> pd.DataFrame:
        return self.table.sort_values(
            self.sort.lstrip("-"), ascending=not self.sort.startswith("-"), kind="stable"
        )

    def _spark(self, sample: int) -> str:
        channel = self._channels.get("log_ratio") or next(iter(self._channels.values()))
        first, size = next(
            (first, size) for s, first, size in payload.spans(self.whole) if s == sample
        )
        return markup.sparkline(
            Channel("", "", channel.values[first : first + size], fixed=channel.limit), BINS
        )

    def _summary(self) -> str:
        finish = ", ".join(f"{n} {name}" for name, n in self.table["finish"].value_counts().items())
        means = [
            f"{label(k)} {markup.number(float(self.table[k].mean()))}"
            for k in COLUMNS[:3]
            if k in self.table
        ]
        return f"{len(self.table)} rollouts: {finish}; mean {', '.join(means)}"


def label(key: str) -> str:
    """The heading of a column."""
    return LABELS.get(key, key)


def _start(text: Any) -> str:
    text = clean(str(text))
    return text if len(text) <= CUT else f"{text[:CUT]}…"


def _end(text: Any) -> str:
    text = clean(str(text))
    return text if len(text) <= CUT else f"…{text[-CUT:]}"


def _cell(value: Any) -> str:
    return markup.number(value) if isinstance(value, float) else markup.safe(str(value))


def _words(row: pd.Series) -> str:
    parts = [f"{label(k)} {markup.number(float(row[k]))}" for k in COLUMNS[:3] if k in row]
    return f"{', '.join(parts)}, {row['finish']}"


def _pooled(values: np.ndarray) -> np.ndarray:
    """The value of largest size in each of `BINS` stretches; of fewer tokens each stands alone,
    with NaN after them.
    """
    out = np.full(BINS, np.nan)
    for i, part in enumerate(np.array_split(values, min(BINS, len(values)) or 1)):
        known = part[~np.isnan(part)]
        out[i] = known[np.abs(known).argmax()] if len(known) else np.nan
    return out
