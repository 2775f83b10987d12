"""Tail audit: how much of a divergence a scoring of the top k tokens would miss, told by the tokens
that the trace kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.support.expect import expect
from opdlab.viz import kept, markup, payload
from opdlab.viz.channels import Channel
from opdlab.viz.glyphs import groups, visible
from opdlab.viz.lines import Line, Plot
from opdlab.viz.token_lens import rows_of
from opdlab.viz.view import Trait, View

MANY, FEW = 12, 4  # values of k that a page carries for each token, of short and of long texts


class TailAudit(View):
    """What would a loss on the top k tokens not see?

    Mass covered and KL read against k over the trace, and both at each token.

    sample: whose tokens are shown; the curves are over all completions. by: whose likeliest tokens
        are taken, by default the
    student's. against: the other side of the KL, by default the first rival. k: at first all that
    the trace kept. Raises OpdlabError for a trace without top tokens, a student alone or a k that
    was not kept, and UnknownColumn for an unknown policy.

    The KL is KL(student ‖ teacher). "bucket" puts all other tokens into one outcome and is a lower
    bound; "renormalized" forgets them. What they are compared with is the trace's exact KL, else
    the bucket of all kept tokens. `curve` has a row for each k.
    """

    name, scripts, styles = "tail", ("tail.js",), ("lines.css", "tail.css")
    k = Trait(0)
    channel = Trait("missed")

    def __init__(
        self,
        trace: Trace,
        sample: int = 0,
        k: int = 0,
        by: str = "student",
        against: str = "",
        title: str = "",
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        rivals = [name for name in trace.policies if name != "student"]
        if not rivals:
            raise OpdlabError(
                "The trace has the student alone, so there is no KL to miss. Score it under a"
                " teacher too: opdlab.score(…)."
            )
        self.against, self.by = against or rivals[0], by
        for name in (self.against, by):
            if name not in trace.policies:
                raise UnknownColumn(
                    f"The trace has no policy {name!r}. It has {', '.join(trace.policies)}."
                )
        if not kept.has_top(trace, "student", self.against, by):
            raise OpdlabError(
                "The trace kept no top tokens, so nothing is known of tails. Make it with"
                " opdlab.score(…, k=8)."
            )
        self.whole, self.trace, self.sample, self.title = (
            trace,
            rows_of(trace, sample),
            sample,
            title,
        )
        self.width = max(1, kept.width(trace))
        if not 0 <= k <= self.width:
            raise OpdlabError(
                f"The trace kept the {self.width} likeliest tokens, not {k}. Give k from 1 to"
                f" {self.width}."
            )
        self.k = k or self.width
        self.selected = next(iter(self._missed(self.k).peaks()), self._widest)

    @cached_property
    def curve(self) -> pd.DataFrame:
        """By k: the mass that the top k cover of each side, the KL read by each rule, `exact`, and
        `read`, the share that bucket reads.
        """
        ks = pd.RangeIndex(1, self.width + 1, name="k")
        rows = [self._at(self.whole, k) for k in ks]
        full = float(self._full(self.whole, rows[-1]["bucket"]).mean())
        table = pd.DataFrame(
            [{key: float(v.mean()) for key, v in row.items()} for row in rows],
            index=pd.RangeIndex(1, self.width + 1, name="k"),
        )
        return table.assign(exact=full, read=table["bucket"] / full if full > 0 else 1.0)

    @property
    def df(self) -> pd.DataFrame:
        """One row a token: the mass covered of each side at `k`, the KL that the bucket reads
        there, `exact`, and what is `missed`.
        """
        row = self._at(self.trace, self.k)
        full = self._full(self.trace, self._at(self.trace, self.width)["bucket"])
        tokens = [visible(piece) for piece in self.trace.tokens()]
        return pd.DataFrame(
            {"token": tokens, **row, "exact": full, "missed": np.maximum(full - row["bucket"], 0.0)}
        )

    @property
    def _widest(self) -> int:
        """The token of the largest KL."""
        return (
            int(np.nan_to_num(self.df["exact"].to_numpy(float)).argmax()) if len(self.trace) else 0
        )

    def static(self) -> str:
        missed = self._missed(self.k)
        title = markup.title(self.title)
        return (
            f"{title}<div"
            f' class="opd-tail-plots">{"".join(plot.html() for plot in self._plots())}</div><div'
            f' class="opd-bar">{markup.legend(missed, missed.limit)}</div><div class="opd-strip"'
            ' dir="auto"'
            f' style="white-space:pre-wrap;font-family:monospace;line-height:1.9">{markup.strip(groups(self.trace.tokens()), missed, missed.limit)}</div><div'
            f' class="opd-peaks">{markup.safe(self._summary())}</div>'
        )

    def data(self) -> dict[str, Any]:
        ks = self._ks()
        rows = [self._at(self.trace, k) for k in ks]
        full = self._full(self.trace, rows[-1]["bucket"])
        stack = lambda key: np.concatenate([row[key] for row in rows]) if len(full) else np.zeros(0)
        missed = np.concatenate([np.maximum(full - row["bucket"], 0.0) for row in rows])
        finish = self.whole.meta["finish"][self.sample]
        return {
            "title": self.title,
            "text": payload.text(self.trace),
            "finish": str(finish),
            "by": self.by,
            "against": self.against,
            "ks": ks,
            "curve": {
                "k": [int(k) for k in self.curve.index],
                **{c: self.curve[c].to_numpy(np.float32) for c in self.curve},
            },
            "plots": [plot.data() for plot in self._plots()],
            "exact": payload.numbers(full),
            "missed": payload.numbers(missed),
            "student": payload.numbers(100 * stack("student_mass")),
            "rival": payload.numbers(100 * stack("rival_mass")),
            "limit": max(self._missed(k).limit for k in ks),
        }

    def __repr__(self) -> str:
        line = "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * max(0.0, share)))] for share in self.curve["read"])
        title = f"{self.title}: " if self.title else ""
        return (
            f"TailAudit: {title}share of the KL that the top k read, k = 1 …"
            f" {self.width}\n{line}\n{self._summary()}"
        )

    def _at(self, trace: Trace, k: int) -> dict[str, np.ndarray]:
        """Of each token: mass of both sides on the k likeliest tokens of `by`, and both coarse KLs
        there, nats.
        """
        if not len(trace):
            return {
                key: np.zeros(0) for key in ("student_mass", "rival_mass", "bucket", "renormalized")
            }
        order = np.argsort(-trace.column(f"{self.by}_top").astype(float), 1, kind="stable")
        pair = []
        for name in ("student", self.against):
            logp = np.take_along_axis(trace.column(f"{name}_top").astype(float), order, 1)
            rest = np.exp(logp[:, k:]).sum(1) + trace.column(f"{name}_tail").astype(float)
            pair.append(
                (logp[:, :k], np.log(rest, out=np.full(len(rest), -np.inf), where=rest > kept.DUST))
            )
        (s, s_rest), (t, t_rest) = pair
        bucket = kept.kl(np.c_[s, s_rest], np.c_[t, t_rest])
        return {
            "student_mass": np.exp(s).sum(1),
            "rival_mass": np.exp(t).sum(1),
            "bucket": bucket,
            "renormalized": kept.kl(_norm(s), _norm(t)),
        }

    def _full(self, trace: Trace, coarsest: np.ndarray) -> np.ndarray:
        name = f"{self.against}_reverse_kl"
        return trace.column(name).astype(float) if name in trace.table.column_names else coarsest

    def _missed(self, k: int) -> Channel:
        row = self._at(self.trace, k)
        full = self._full(self.trace, self._at(self.trace, self.width)["bucket"])
        return Channel(
            "missed",
            "missed KL",
            np.maximum(full - row["bucket"], 0.0),
            less="read whole",
            more="not seen",
        )

    def _ks(self) -> list[int]:
        """The values of k that the page carries: all, or evenly many of them, with the first, the
        last and the one asked for.
        """
        most = MANY if len(self.trace) <= payload.LONG else FEW
        return sorted(
            {int(k) for k in np.linspace(1, self.width, min(most, self.width)).round()} | {self.k}
        )

    def _plots(self) -> Sequence[Plot]:
        k, table = self.curve.index.to_numpy(float), self.curve
        line = lambda name, column, look, kind="line": Line(
            name, k, table[column].to_numpy(float), look, kind
        )
        top = float(
            np.nanmax(
                [
                    *table["exact"],
                    *table["bucket"],
                    *table["renormalized"].replace(np.inf, np.nan).fillna(0),
                    1e-3,
                ]
            )
        )
        ends = (1.0, float(max(2, self.width)))
        mass = [
            Line("student", k, 100 * table["student_mass"].to_numpy(float), "student"),
            Line(self.against, k, 100 * table["rival_mass"].to_numpy(float), "teacher", "dash"),
        ]
        kl = [
            line("exact", "exact", "grey"),
            line("bucket", "bucket", "amount"),
            line("renormalized", "renormalized", "pink"),
        ]
        return [
            Plot(
                "mass",
                f"mass on the {self.by}'s top k",
                mass,
                "%",
                "%, mean over tokens",
                ends,
                (0.0, 100.0),
            ),
            Plot(
                "kl",
                "KL that the top k read",
                kl,
                "nats",
                "nats, mean over tokens",
                ends,
                (0.0, top * 1.05),
            ),
        ]

    def _summary(self) -> str:
        row = self.curve.loc[self.k]
        return (
            f"The {self.by}'s top {self.k} cover {100 * row.student_mass:.1f} % of the student and"
            f" {100 * row.rival_mass:.1f} % of {self.against}; they read"
            f" {markup.number(row.bucket)} of {markup.number(row.exact)} nats"
            f" ({100 * row['read']:.0f} %)"
        )


def _norm(logp: np.ndarray) -> np.ndarray:
    """Log-probs that forget what is outside; all -inf stays so."""
    total = np.log(np.exp(logp).sum(1, keepdims=True).clip(1e-300))
    return logp - total
