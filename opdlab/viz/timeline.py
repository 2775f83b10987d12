"""Timeline: when rollouts leave the teacher's road.

Cumulative log ratio and cumulative KL along the tokens, one line a rollout.
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
from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.support.expect import expect
from opdlab.viz import markup, payload
from opdlab.viz.channels import channels
from opdlab.viz.glyphs import visible
from opdlab.viz.lines import HUES, Line, Plot, span, thinned
from opdlab.viz.view import Trait, View

MOST = 16  # rollouts that one picture holds
TOGETHER = 6  # rollouts whose lines can be told apart in one plot; more get a plot each


class Timeline(View):
    """When did a rollout leave the teacher's road?

    Sums along its tokens, and the first token beyond a threshold, its fork.

    The upper plot sums log T(y) − log S(y): at −3 the path so far is e³ = 20 times less likely
    under the teacher than under the student. There the rollout forks, if `threshold` is 3. The
    lower one sums the KL of the student to the teacher. More than six rollouts get an upper plot
    each, all on one scale.

    samples: which completions; by default those of the first one's prompt, 16 at most. rewards: by
        completion, a list or a dict;
    by default the trace's column `reward`, if it has one. against: the policy compared with, by
    default the first. Raises OpdlabError for a student alone and for completions that are not
    there, UnknownColumn for an unknown policy.

    `selected` and `brush` are rows of `df`; `threshold`, in nats, can be moved. `forks` has a row
    for each rollout.
    """

    name, scripts, styles = "timeline", ("timeline.js",), ("lines.css", "timeline.css")
    threshold = Trait(3.0)

    def __init__(
        self,
        trace: Trace,
        samples: Sequence[int] | None = None,
        rewards: Sequence[float] | Mapping[int, float] | None = None,
        threshold: float = 3.0,
        against: str = "",
        title: str = "",
    ) -> None:
        super().__init__(threshold=float(threshold))
        expect(trace, Trace, type(self).__name__, "trace")
        self.samples, self.title = _chosen(trace, samples), title
        self.trace = Trace(
            trace.table.filter(pc.is_in(trace.table["sample"], pa.array(self.samples))), trace.meta
        )
        rivals = [name for name in trace.policies if name != "student"]
        if not rivals or (against and against not in rivals):
            raise (UnknownColumn if rivals else OpdlabError)(
                f"There is no policy {against!r} to compare with, only {', '.join(rivals)}. Name"
                " one of these."
                if rivals
                else (
                    "The trace has the student alone, so nothing to depart from. Score it under a"
                    " teacher too: opdlab.score(…)."
                )
            )
        self.against, self._prefix = (
            against or rivals[0],
            "" if against in ("", rivals[0]) else f"{against}_",
        )
        self.rewards = rewards_of(trace, rewards, self.samples)
        fork = self.forks["row"].dropna()
        self.selected = int(fork.iloc[0]) if len(fork) else 0

    @cached_property
    def _paths(self) -> dict[str, np.ndarray]:
        """Per token:

        `log_ratio`, and the sums `cumulative_log_ratio` and `cumulative_kl`, in the precision of
        the page.
        """
        found = channels(self.trace)
        ratio = found[f"{self._prefix}log_ratio"].values
        kl = (
            found[f"{self._prefix}reverse_kl"].values
            if f"{self._prefix}reverse_kl" in found
            else np.full(len(ratio), np.nan)
        )
        sums: dict[str, list[np.ndarray]] = {"cumulative_log_ratio": [], "cumulative_kl": []}
        for _, first, size in payload.spans(self.trace):
            for key, values in zip(sums, (ratio, kl), strict=True):
                sums[key].append(
                    np.cumsum(
                        np.nan_to_num(
                            values[first : first + size], nan=0.0, posinf=1e4, neginf=-1e4
                        )
                    )
                )
        total = {
            key: np.concatenate([*parts, np.zeros(0)]).clip(-6e4, 6e4).astype(np.float16)
            for key, parts in sums.items()
        }
        return {"log_ratio": ratio, **({} if np.isnan(kl).all() else {"kl": kl}), **total}

    @property
    def df(self) -> pd.DataFrame:
        """One row a token of the rollouts:

        `sample`, `position`, `token`, `log_ratio`, `kl`, and the two sums up to it.
        """
        base = {
            "sample": self.trace.column("sample"),
            "position": self.trace.column("position"),
            "token": [visible(piece) for piece in self.trace.tokens()],
        }
        return pd.DataFrame({**base, **{k: v.astype(float) for k, v in self._paths.items()}})

    @property
    def forks(self) -> pd.DataFrame:
        """One row a rollout:

        `fork`, the first position beyond the threshold (NaN for none), with its `token` and `row`
        of `df`.
        """
        rows = []
        for sample, first, size in payload.spans(self.trace):
            path = self._paths["cumulative_log_ratio"][first : first + size].astype(float)
            beyond = np.flatnonzero(path <= -self.threshold)
            at = int(beyond[0]) if len(beyond) else None
            token = (
                ""
                if at is None
                else visible(self.trace.piece(int(self.trace.column("token_id")[first + at])))
            )
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

    def static(self) -> str:
        title = markup.title(self.title)
        own, shared = ("".join(plot.html() for plot in plots) for plots in self._plots())
        if own:
            label, told = self._names["cumulative_log_ratio"]
            head = (
                f'<div class="opd-timeline-head"><b>{label}</b> <span'
                f' class="opd-soft">{markup.safe(told)}</span></div>'
            )
            own = f'{head}<div class="opd-timeline-own">{own}</div>'
        return (
            f'{title}<div class="opd-timeline">{own}{shared}</div><div'
            f' class="opd-peaks">{markup.safe(self._summary())}</div>'
        )

    def data(self) -> dict[str, Any]:
        paths = {
            key: v if key.startswith("cumulative") else payload.numbers(v)
            for key, v in self._paths.items()
        }
        limit, (own, shared) = channels(self.trace)[f"{self._prefix}log_ratio"].limit, self._plots()
        return {
            "title": self.title,
            "against": self.against,
            "text": payload.text(self.trace),
            "paths": paths,
            "limit": limit,
            "looks": [self._look(s) for s in self.samples],
            "own": [p.data() for p in own],
            "plots": [p.data() for p in shared],
            "head": self._names["cumulative_log_ratio"],
            "rewards": (
                [self.rewards.get(s, np.nan) for s in self.samples] if self.rewards else None
            ),
        }

    def __repr__(self) -> str:
        lost, lines = -self._paths["cumulative_log_ratio"].astype(float).clip(max=0), []
        most = max(float(lost.max(initial=0.0)), 0.1)
        for sample, first, size in payload.spans(self.trace):
            bins = np.array_split(lost[first : first + size], min(48, size))
            lines.append(
                f"{''.join('▁▂▃▄▅▆▇█'[min(7, int(8 * b.max() / most))] for b in bins)}  rollout"
                f" {sample}"
            )
        head = (
            f"Timeline: {self.title or f'{len(self.samples)} rollouts'}, nats lost against"
            f" {self.against} so far"
        )
        return "\n".join([head, *lines, self._summary()])

    def _look(self, sample: int) -> str:
        """Rewards at or above the middle are violet and whole, those below grey and dashed; without
        rewards each has its own.

        Where each has a plot of its own, no rewards are violet too.
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
        own, shared, spans, forks = [], [], list(payload.spans(self.trace)), self.forks
        x = (0.0, float(max(1, *(size - 1 for *_, size in spans))))
        for key, (label, told) in self._names.items():
            values, ratio = self._paths[key].astype(float), key == "cumulative_log_ratio"
            y = span([values, np.array([0.0, -self.threshold * 1.1] if ratio else [0.0])])
            lines = [
                Line(f"rollout {s}", *thinned(np.arange(n), values[i : i + n]), self._look(s))
                for s, i, n in spans
            ]
            if ratio and self._many:
                own = [
                    Plot(key, line.name, [line], "nats", self._told(forks.loc[s]), x, y)
                    for line, (s, *_) in zip(lines, spans, strict=True)
                ]
            else:
                shared.append(Plot(key, label, lines, "nats", told, x, y))
        return own, shared

    def _told(self, row: pd.Series) -> str:
        """What stands over a plot of one rollout where no script runs; `row` of `forks`."""
        fork = f"fork at {row.fork:.0f} {row.token}" if np.isfinite(row.fork) else "no fork"
        return f"reward {markup.number(row.reward)}, {fork}" if self.rewards else fork

    def _summary(self) -> str:
        told = [
            f"rollout {i} at position {r.fork:.0f} ({r.token})"
            for i, r in self.forks.iterrows()
            if np.isfinite(r.fork)
        ]
        return f"Forks beyond {markup.number(self.threshold)} nats: {', '.join(told) or 'none'}"


def _chosen(trace: Trace, samples: Sequence[int] | None) -> list[int]:
    held = [sample for sample, *_ in payload.spans(trace)]
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


def rewards_of(
    trace: Trace, rewards: Sequence[float] | Mapping[int, float] | None, samples: Sequence[int]
) -> dict[int, float]:
    """Rewards by completion, of those shown; empty where there are none."""
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
    return {s: float(column[first]) for s, first, _ in payload.spans(trace) if s in samples}
