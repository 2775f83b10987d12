"""TailAudit: how much of a divergence a scoring of the top k tokens would miss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.support.expect import expect
from opdlab.support.validation import Text, Unchecked, Whole, validate_arguments
from opdlab.viz import kept, markup, payload
from opdlab.viz.channel import Channel
from opdlab.viz.channels import find_rivals
from opdlab.viz.given import select_completion
from opdlab.viz.glyphs import group_pieces, show_piece
from opdlab.viz.lines import Line, Plot
from opdlab.viz.made_up import make_trace
from opdlab.viz.traits import Trait
from opdlab.viz.turns import learned_rows
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

MANY, FEW = 12, 4  # values of k that a page carries for each token, of short and of long texts


class TailAudit(View):
    """Mass covered and KL read by the top k tokens, against k over the trace and at each token.

    The KL is KL(student ‖ teacher). "bucket" puts all other tokens into one outcome and is a lower
    bound; "renormalized" forgets them. Both are compared with the trace's exact KL, or with the
    bucket of all kept tokens where it has none.

    Args:
        trace: The trace.
        sample: The completion whose tokens are shown; the curves are over all completions.
        k: The number of tokens read at first; by default all that the trace kept.
        by: The policy whose likeliest tokens are read.
        against: The other side of the KL; by default the first rival.
        title: The title above.

    Attributes:
        k: The number of tokens read.
        channel: The channel that colours the tokens.
        by: The policy whose likeliest tokens are read.
        against: The other side of the KL.
        whole: The trace.
        trace: The rows of the completion.
        width: The number of likeliest tokens that the trace kept of each policy.
        selected: The position looked at; at first the one where most is missed.

    Raises:
        OpdlabError: The trace kept no top tokens or not as many, has the student alone, or has no
            such completion.
        UnknownColumn: There is no such policy.
    """

    caption = "What would a loss on the top k tokens not see?"
    name, scripts, styles = "tail", ("tail.js",), ("lines.css", "tail.css")
    k = Trait(0)
    channel = Trait("missed")

    @validate_arguments
    def __init__(
        self,
        trace: Unchecked[Trace],
        sample: Whole = 0,
        k: Whole = 0,
        by: Text = "student",
        against: Text = "",
        title: Text = "",
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        rivals = find_rivals(trace)
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
        self.whole, self.trace = trace, select_completion(trace, sample)
        self.sample, self.title = sample, title
        self.width = max(1, kept.width(trace))
        if not 0 <= k <= self.width:
            raise OpdlabError(
                f"The trace kept the {self.width} likeliest tokens, not {k}. Give k from 1 to"
                f" {self.width}."
            )
        self.k = k or self.width
        self.selected = next(iter(self._missed(self.k).peaks()), self._widest)

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is a trace that kept the top tokens of the student and a rival.

        Args:
            given: Anything.
            sample: Not used: the trace as a whole decides.

        Returns:
            Whether the trace has what the view needs.
        """
        if not isinstance(given, Trace) or not len(given):
            return False
        rivals = find_rivals(given)
        return bool(rivals) and kept.has_top(given, "student", rivals[0])

    @classmethod
    def of_trace(cls, trace: Trace, sample: int = 0) -> Self:
        """Make the audit of a trace, with the tokens of one completion.

        Args:
            trace: A trace that the view fits.
            sample: The completion whose tokens are shown.

        Returns:
            The view.
        """
        return cls(trace, sample)

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make the audit of one completion with three kept tokens of each policy.

        Args:
            tokens: The bytes of the completion's tokens.
            words: All other texts: title, prompt, names.

        Returns:
            The view.
        """
        return cls(make_trace(tokens, prompt=words, finish=words), title=words)

    @cached_property
    def curve(self) -> pd.DataFrame:
        """One row for each k: the means over all tokens of the trace.

        Columns: the mass that the top k cover of each side, the KL read by each rule, `exact`, and
        `read`, the share of it that the bucket reads.
        """
        ks = pd.RangeIndex(1, self.width + 1, name="k")
        rows = [self._at(self.whole, k) for k in ks]
        full = float(self._full(self.whole, rows[-1]["bucket"]).mean())
        means = [{key: float(v.mean()) for key, v in row.items()} for row in rows]
        table = pd.DataFrame(means, index=ks)
        return table.assign(exact=full, read=table["bucket"] / full if full > 0 else 1.0)

    @property
    def df(self) -> pd.DataFrame:
        """One row per token: mass covered of each side at `k`, KL read, `exact` KL and `missed`."""
        row = self._at(self.trace, self.k)
        full = self._full(self.trace, self._at(self.trace, self.width)["bucket"])
        tokens = [show_piece(piece) for piece in self.trace.tokens()]
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
        """Return the picture as HTML without a script.

        Returns:
            Markup with the plots and the strip of missed KL; every foreign string in it is escaped.
        """
        missed = self._missed(self.k)
        plots = "".join(plot.html() for plot in self._plots())
        tokens, own = group_pieces(self.trace.tokens()), learned_rows(self.trace)
        strip = markup.draw_strip_box(tokens, missed, missed.limit, learned=own)
        return (
            f"{markup.draw_title(self.title)}"
            f'<div class="opd-tail-plots">{plots}</div>'
            f'<div class="opd-bar">{markup.draw_legend(missed, missed.limit)}</div>'
            f"{strip}"
            f"{markup.draw_words(self._summary())}"
        )

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/tail.js` reads them.
        """
        ks = self._ks()
        rows = [self._at(self.trace, k) for k in ks]
        full = self._full(self.trace, rows[-1]["bucket"])
        missed = np.concatenate([np.maximum(full - row["bucket"], 0.0) for row in rows])
        mass = {
            key: np.concatenate([100 * row[key] for row in rows])
            for key in ("student_mass", "rival_mass")
        }
        finish = self.whole.meta["finish"][self.sample]
        return {
            "title": self.title,
            "text": payload.describe_text(self.trace),
            "finish": str(finish),
            "by": self.by,
            "against": self.against,
            "ks": ks,
            "curve": {
                "k": [int(k) for k in self.curve.index],
                **{c: self.curve[c].to_numpy(np.float32) for c in self.curve},
            },
            "plots": [plot.data() for plot in self._plots()],
            "exact": payload.compact(full),
            "missed": payload.compact(missed),
            "student": payload.compact(mass["student_mass"]),
            "rival": payload.compact(mass["rival_mass"]),
            "limit": max(self._missed(k).limit for k in ks),
        }

    def __repr__(self) -> str:
        line = "".join(markup.draw_bar(float(share)) for share in self.curve["read"])
        title = f"{self.title}: " if self.title else ""
        return (
            f"TailAudit: {title}share of the KL that the top k read, k = 1 …"
            f" {self.width}\n{line}\n{self._summary()}"
        )

    def _at(self, trace: Trace, k: int) -> dict[str, np.ndarray]:
        """Mass of both sides on the k likeliest tokens of `by`, and both coarse KLs, per token."""
        if not len(trace):
            none = np.zeros(0)
            return dict.fromkeys(("student_mass", "rival_mass", "bucket", "renormalized"), none)
        order = np.argsort(-trace.column(f"{self.by}_top").astype(float), 1, kind="stable")
        student, student_rest = _split_at(trace, "student", order, k)
        rival, rival_rest = _split_at(trace, self.against, order, k)
        return {
            "student_mass": np.exp(student).sum(1),
            "rival_mass": np.exp(rival).sum(1),
            "bucket": kept.kl(np.c_[student, student_rest], np.c_[rival, rival_rest]),
            "renormalized": kept.kl(_norm(student), _norm(rival)),
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
        """The values of k that the page carries: the first, the last, the present, some between."""
        most = MANY if len(self.trace) <= payload.LONG else FEW
        even = np.linspace(1, self.width, min(most, self.width)).round()
        return sorted({int(k) for k in even} | {self.k})

    def _plots(self) -> Sequence[Plot]:
        k, table = self.curve.index.to_numpy(float), self.curve
        ends = (1.0, float(max(2, self.width)))
        read = table[["exact", "bucket", "renormalized"]].replace(np.inf, np.nan)
        top = max(1e-3, float(read.max().max()))
        mass = [
            Line("student", k, 100 * table["student_mass"].to_numpy(float), "student"),
            Line(self.against, k, 100 * table["rival_mass"].to_numpy(float), "teacher", "dash"),
        ]
        kl = [
            Line(name, k, table[name].to_numpy(float), look)
            for name, look in (("exact", "grey"), ("bucket", "amount"), ("renormalized", "pink"))
        ]
        label = f"mass on the {self.by}'s top k"
        return [
            Plot("mass", label, mass, "%", "%, mean over tokens", ends, (0.0, 100.0)),
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
            f" {markup.format_number(row.bucket)} of {markup.format_number(row.exact)} nats"
            f" ({100 * row['read']:.0f} %)"
        )


def _split_at(trace: Trace, name: str, order: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of a policy on the first k tokens in `order` `[n, k]`, and of all others `[n]`."""
    log_p = np.take_along_axis(trace.column(f"{name}_top").astype(float), order, 1)
    rest = np.exp(log_p[:, k:]).sum(1) + trace.column(f"{name}_tail").astype(float)
    none = np.full(len(rest), -np.inf)
    return log_p[:, :k], np.log(rest, out=none, where=rest > kept.DUST)


def _norm(logp: np.ndarray) -> np.ndarray:
    """Log-probs renormalised over the row; a row of -inf stays so."""
    total = np.log(np.exp(logp).sum(1, keepdims=True).clip(1e-300))
    return np.asarray(logp - total)
