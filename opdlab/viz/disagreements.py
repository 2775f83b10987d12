"""Disagreements: places where the teacher wanted another token, gathered by the two tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError, UnknownColumn
from opdlab.support.expect import expect, shortened
from opdlab.support.validation import Amount, CountOrZero, Text, Unchecked, validate_arguments
from opdlab.viz import kept, markup, payload
from opdlab.viz.amounts import find_amounts
from opdlab.viz.channel import Channel
from opdlab.viz.channels import find_rivals
from opdlab.viz.glyphs import show_piece
from opdlab.viz.made_up import make_trace
from opdlab.viz.traits import Trait
from opdlab.viz.turns import learned_rows
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

MOST = 300  # groups that a page carries
LISTED = 8  # groups that the still picture and the terminal list


class Disagreements(View):
    """Find all places like one: the student wrote this token, and the teacher wanted that one.

    A place counts where the teacher's likeliest token is not the student's, and the teacher gives
    it `least` nats more. Places with the same two tokens are one group. Choosing a token in another
    view of the page shows its group here.

    Args:
        trace: A trace with the teacher's top tokens, of any number of completions.
        least: The difference in the teacher's log-probs from which a place counts, in nats.
        context: The number of tokens before that must agree as well; 0 for none.
        teacher: The policy that is compared with the student; by default the first other one.
        title: The title above.

    Attributes:
        group: The place of the chosen group in `groups`.
        by: The order of the groups: "share" of the loss (of the KL, where there is no loss), or
            "count".
        trace: The trace.
        groups: A table of all groups, the largest share first: `before`, `student` and `teacher`
            (tokens), `count`, `completions`, `preference` (mean difference, nats), and `share_of_…`
            each amount, in %.

    Raises:
        OpdlabError: The trace kept no top tokens of a teacher.
        UnknownColumn: It has no such policy.
    """

    caption = "Which disagreements come again and again?"
    name, scripts, styles = "disagreements", ("disagreements.js",), ("disagreements.css",)
    group = Trait(0)
    by = Trait("share")

    @validate_arguments
    def __init__(
        self,
        trace: Unchecked[Trace],
        least: Amount = 1.0,
        context: CountOrZero = 0,
        teacher: Text = "",
        title: Text = "",
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        rivals = [name for name in find_rivals(trace) if kept.has_top(trace, name)]
        if not rivals:
            raise OpdlabError(
                "The trace kept no top tokens of a teacher, so nothing says what it wanted. Make it"
                " with opdlab.score(rollout, student, teacher)."
            )
        if teacher and teacher not in rivals:
            raise UnknownColumn(
                f"The trace has no top tokens of {shortened(teacher)}. It has those of"
                f" {', '.join(rivals)}."
            )
        self.trace, self.title, self.least, self.context = trace, title, least, context
        self.teacher = teacher or rivals[0]
        self._wanted, self._preference = _find_wanted(trace, self.teacher)
        self._amounts = find_amounts(trace, with_loss=True)
        self.groups, self._rows = self._gather()
        self.selected = int(self._rows[0][0]) if self._rows else -1

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is a trace with tokens and a teacher's top tokens.

        Args:
            given: Anything.
            sample: Not used: the view shows all completions.

        Returns:
            Whether the view can be made of it.
        """
        if not isinstance(given, Trace) or not len(given):
            return False
        return any(kept.has_top(given, name) for name in find_rivals(given))

    @classmethod
    def of_trace(cls, trace: Trace, sample: int = 0) -> Self:
        """Make the view of all completions.

        Args:
            trace: A trace that the view fits.
            sample: Not used.

        Returns:
            The view.
        """
        return cls(trace)

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make the view of one completion.

        Args:
            tokens: The bytes of the completion's tokens.
            words: All other texts: title, prompt, names.

        Returns:
            The view.
        """
        return cls(make_trace(tokens, prompt=words, finish=words), least=0.0, title=words)

    @property
    def df(self) -> pd.DataFrame:
        """The trace's rows with `token`, `wanted`, `preference` and `group` (-1 for none)."""
        group = np.full(len(self.trace), -1)
        for i, rows in enumerate(self._rows):
            group[rows] = i
        wanted = [show_piece(self.trace.piece(int(i))) if i >= 0 else "" for i in self._wanted]
        return self.trace.to_pandas().assign(
            token=[show_piece(piece) for piece in self.trace.tokens()],
            wanted=wanted,
            preference=self._preference,
            group=group,
        )

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/disagreements.js` reads them.
        """
        shown = self._rows[:MOST]
        return {
            "title": self.title,
            "text": payload.describe_text(self.trace),
            "teacher": self.teacher,
            "amount": self._amount(),
            "groups": [
                {
                    "before": payload.shorten_word(str(row.before)),
                    "student": payload.shorten_word(str(row.student)),
                    "teacher": payload.shorten_word(str(row.teacher)),
                    "count": int(row.count_),
                    "completions": int(row.completions),
                    "preference": float(row.preference),
                    "share": float(row.share) / 100,
                }
                for row in self._named().head(MOST).itertuples()
            ],
            "left": len(self._rows) - len(shown),
            "places": sum(map(len, self._rows)),
            "row": np.concatenate([*shown, np.zeros(0, int)]).astype(int),
        }

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with the largest groups; every foreign string in it is escaped.
        """
        lines = "".join(f"<div>{markup.escape(line)}</div>" for line in self._lines())
        return (
            f"{markup.draw_title(self.title)}"
            f'<div class="opd-bar"><span>{markup.escape(self._head())}</span></div>'
            f'<div class="opd-still">{lines}</div>'
        )

    def __repr__(self) -> str:
        bars = markup.draw_sparkline(Channel("", "", np.nan_to_num(self._preference)))
        head = f"Disagreements: {self.title + ', ' if self.title else ''}{self._head()}"
        return "\n".join([head, f"{bars} preference along the tokens", *self._lines()])

    def _head(self) -> str:
        count, groups = sum(map(len, self._rows)), len(self._rows)
        return (
            f"{count:,} of {len(self.trace):,} tokens where {self.teacher} wanted another by"
            f" {markup.format_number(self.least)} nats or more, {groups:,} groups"
        )

    def _lines(self) -> list[str]:
        return [
            f"{row.before}{' ' if row.before else ''}{row.student} → {row.teacher}"
            f" {row.count_} times, {markup.format_number(row.share)} % of {self._amount()}"
            for row in self._named().head(LISTED).itertuples()
        ]

    def _named(self) -> pd.DataFrame:
        """The groups with names that `itertuples` can read."""
        share = f"share_of_{self._amount()}"
        return self.groups.rename(columns={"count": "count_", share: "share"})

    def _amount(self) -> str:
        """The amount that orders the groups."""
        return next(
            (name for name in ("loss", "kl", "gradient") if name in self._amounts), "tokens"
        )

    def _gather(self) -> tuple[pd.DataFrame, list[np.ndarray]]:
        """The groups as a table, and the rows of each, those of the largest preference first."""
        token, sample = self.trace.column("token_id"), self.trace.column("sample")
        chosen = (self._wanted >= 0) & (self._wanted != token) & (self._preference >= self.least)
        learned = learned_rows(self.trace)
        if learned is not None:
            chosen &= learned
        places: dict[tuple[int, ...], list[int]] = {}
        for row in np.flatnonzero(chosen):
            first = max(0, row - self.context)
            before = [
                int(i)
                for i, s in zip(token[first:row], sample[first:row], strict=True)
                if s == sample[row]
            ]
            key = (*before, int(token[row]), int(self._wanted[row]))
            places.setdefault(key, []).append(int(row))
        everything = dict(self._amounts) or {"tokens": np.ones(len(self.trace))}
        entries = [self._entry(key, rows, everything) for key, rows in places.items()]
        columns = ["before", "student", "teacher", "count", "completions", "preference"]
        table = pd.DataFrame(
            entries, columns=[*columns, *(f"share_of_{name}" for name in everything)]
        )
        order = table.sort_values(
            [f"share_of_{self._amount()}", "count"], ascending=False, kind="stable"
        ).index
        rows = [np.array(list(places.values())[i]) for i in order]
        rows = [one[np.argsort(-self._preference[one], kind="stable")] for one in rows]
        return table.loc[order].reset_index(drop=True), rows

    def _entry(
        self, key: tuple[int, ...], rows: list[int], amounts: dict[str, np.ndarray]
    ) -> list[Any]:
        *before, student, teacher = (show_piece(self.trace.piece(i)) for i in key)
        shares = [
            100.0 * float(values[rows].sum() / (values.sum() or 1.0)) for values in amounts.values()
        ]
        completions = len(set(self.trace.column("sample")[rows].tolist()))
        preference = float(self._preference[rows].mean())
        return [" ".join(before), student, teacher, len(rows), completions, preference, *shares]


def _find_wanted(trace: Trace, teacher: str) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's likeliest token at every place (-1 for none), and its lead in nats."""
    if not len(trace):
        return np.zeros(0, int), np.zeros(0)
    ids, top = trace.column("support"), trace.column(f"{teacher}_top").astype(float)
    top = np.where(ids < 0, -np.inf, top)
    best = top.argmax(1)
    at = np.arange(len(trace))
    with np.errstate(invalid="ignore"):
        lead = top[at, best] - trace.column(f"{teacher}_logp").astype(float)
    return np.asarray(ids[at, best]), np.nan_to_num(lead, nan=0.0, posinf=np.inf)
