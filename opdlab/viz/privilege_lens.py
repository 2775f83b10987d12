"""PrivilegeLens: the gap to a hinted teacher, taken apart into information and capability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from opdlab.data.trace import Trace
from opdlab.errors import MissingPolicy, OpdlabError
from opdlab.support.expect import expect
from opdlab.support.validation import Text, Unchecked, Whole, validate_arguments
from opdlab.viz import markup, payload
from opdlab.viz.channel import Channel, describe_channel
from opdlab.viz.glyphs import group_pieces, show_piece
from opdlab.viz.made_up import make_trace
from opdlab.viz.segments import find_segments
from opdlab.viz.traits import Trait
from opdlab.viz.turns import learned_rows
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

LEAST = 0.1  # nats of information below which nothing is flagged
ALL = "all"
PARTS = ("gap", "information", "capability")


class PrivilegeLens(View):
    """One completion under three policies: the gap of every token, taken apart, and the sums.

        log p_T+ - log p_S  =  (log p_T+ - log p_T-)  +  (log p_T- - log p_S)
              gap                   information              capability

    `opdlab.diagnose.privilege` defines the same as `gap`, `information_teacher` and
    `capability_bare`. A token is flagged as a leak where information outweighs capability, is more
    than 0.1 nats, and T- is undecided.

    Args:
        trace: A trace under all three, as of `opdlab.score(rollout, student, teacher,
            **{"teacher+hint": teacher.seeing()})`.
        student: The student's name in the trace.
        informed: The name of T+, the teacher that sees the hint.
        plain: The name of T-, the teacher that does not.
        wrong: The name of the teacher that sees another problem's hint, for control; None for none.
        sample: The completion.
        title: The title above.

    Attributes:
        undecided: The entropy of T- in nats from which a token can be flagged; 0.69 is two equal
            choices.
        selected: The position looked at; at first the one of largest gap.
        sides: The policies' names by role: "student", "plain", "informed" and perhaps "wrong".
        whole: The trace.
        trace: The rows of the completion.

    Raises:
        MissingPolicy: The trace lacks one of the policies.
        OpdlabError: The trace has no such completion.
    """

    caption = "Is the hinted teacher teaching a skill, or leaking the answer?"
    takes = "a trace under a teacher with and without its hint"
    name = "privilege"
    scripts = ("privilege.js",)
    styles = ("privilege.css",)
    undecided = Trait(0.69)

    @validate_arguments
    def __init__(
        self,
        trace: Unchecked[Trace],
        student: Text = "student",
        informed: Text = "teacher+hint",
        plain: Text = "teacher",
        wrong: Text | None = None,
        sample: Whole = 0,
        title: Text = "",
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        self.sides = {"student": student, "plain": plain, "informed": informed}
        if wrong:
            self.sides["wrong"] = wrong
        for name in self.sides.values():
            if f"{name}_logp" not in trace.table.column_names:
                raise MissingPolicy(
                    f"The trace has no policy {name!r}; it has {', '.join(trace.policies)}. Make it"
                    " with opdlab.score(rollout, student, teacher, **{'teacher+hint':"
                    " teacher.seeing()})."
                )
        self.whole, self.sample, self.title = trace, sample, title
        self.trace = trace.sample(sample)
        if not len(self.trace):
            held = ", ".join(map(str, sorted(set(trace.column("sample").tolist())))) or "none"
            raise OpdlabError(
                f"The trace holds no row of completion {sample}, only of {held}. Give sample= one"
                " of these."
            )
        self.selected = next(iter(self.channels["gap"].peaks()), 0)

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is a trace under the teacher with and without its hint.

        Args:
            given: Anything.
            sample: Not used: the names of the policies decide.

        Returns:
            Whether the trace has both policies under their usual names, "teacher" and
            "teacher+hint".
        """
        return isinstance(given, Trace) and {"teacher", "teacher+hint"} <= set(given.policies)

    @classmethod
    def of_trace(cls, trace: Trace, sample: int = 0) -> Self:
        """Make the lens of one completion.

        Args:
            trace: A trace that the view fits.
            sample: The completion.

        Returns:
            The view.
        """
        return cls(trace, sample=sample)

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make the lens of one completion whose tokens all have the type `words`.

        Args:
            tokens: The bytes of the completion's tokens.
            words: All other texts: title, prompt, names.

        Returns:
            The view.
        """
        policies = ("student", "teacher", "teacher+hint")
        trace = make_trace(tokens, policies, prompt=words, finish=words)
        return cls(trace.with_columns(type=[words] * len(tokens)), title=words)

    @cached_property
    def channels(self) -> dict[str, Channel]:
        """The three parts of the gap, and the control, as channels."""
        parts = _parts(self.trace, self.sides)
        informed, plain = self.sides["informed"], self.sides["plain"]
        prefers_informed = ("student over-confident", f"{informed} prefers")
        prefers_plain = ("student over-confident", f"{plain} prefers")
        hint = ("the hint speaks against it", "the hint speaks for it")
        wrong_hint = ("it speaks against it", "it speaks for it")
        described = (
            ("gap", "gap", "log T₊(y) − log S(y)", prefers_informed),
            ("information", "information", "log T₊(y) − log T₋(y)", hint),
            ("capability", "capability", "log T₋(y) − log S(y)", prefers_plain),
            ("wrong", "wrong hint", "log T_wrong(y) − log T₋(y)", wrong_hint),
        )
        return {
            key: Channel(
                key, label, parts[key], kind="ratio", less=less, more=more, formula=formula
            )
            for key, label, formula, (less, more) in described
            if key in parts
        }

    @property
    def limit(self) -> float:
        """The size that gets full colour in all rows, so that they compare."""
        return max(c.limit for c in self.channels.values())

    @property
    def df(self) -> pd.DataFrame:
        """The completion's rows with `token`, the parts of the gap and `leak`.

        The parts are `gap`, `information_teacher` and `capability_bare`, in nats.
        """
        parts = _parts(self.trace, self.sides)
        names = {
            "information": "information_teacher",
            "capability": "capability_bare",
            "wrong": "information_wrong",
        }
        tokens = [show_piece(piece) for piece in self.trace.tokens()]
        columns = {names.get(key, key): values for key, values in parts.items()}
        return self.trace.to_pandas().assign(token=tokens, **columns, leak=self._leaks(self.trace))

    @property
    def table(self) -> pd.DataFrame:
        """Means in nats by type of token over all completions, and the share of flagged tokens.

        The row "all" has all tokens.
        """
        parts = pd.DataFrame(_parts(self.whole, self.sides))
        parts["leak"] = self._leaks(self.whole).astype(float)
        parts["type"] = self._types() or [ALL] * len(parts)
        groups_of_rows = {ALL: parts}
        for kind in parts["type"].value_counts().index:
            groups_of_rows[str(kind)] = parts[parts["type"] == kind]
        means = [*PARTS, "leak", *(["wrong"] if "wrong" in parts else [])]
        rows = {
            kind: {"tokens": len(part), **part[means].mean()}
            for kind, part in groups_of_rows.items()
        }
        return pd.DataFrame(rows).T.astype({"tokens": int})

    @property
    def sentence(self) -> str:
        """The means over the whole trace, in words."""
        m, n = self.table.loc[ALL], len(self.whole)
        flags = (
            f"{round(m['leak'] * n)} of {n:,} tokens are flagged as leaks"
            if self._can_flag
            else "T- has no entropies, so none is flagged"
        )
        control = (
            f" A wrong hint moves the teacher by {markup.format_number(m['wrong'], True)}."
            if "wrong" in m
            else ""
        )
        return (
            f"Gap {markup.format_number(m['gap'], True)} nats per token = information"
            f" {markup.format_number(m['information'], True)} + capability"
            f" {markup.format_number(m['capability'], True)}; {flags}.{control}"
        )

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/privilege.js` reads them.
        """
        entropy = {
            key: payload.compact(self.trace.column(f"{name}_entropy"))
            for key, name in self.sides.items()
            if f"{name}_entropy" in self.trace.table.column_names
        }
        logp = {
            key: payload.compact(self.trace.column(f"{name}_logp"))
            for key, name in self.sides.items()
        }
        return {
            "title": self.title,
            "prompt": self._prompt,
            "finish": str(self.trace.meta["finish"][self.sample]),
            "sides": self.sides,
            "text": payload.describe_text(self.trace),
            "channels": [describe_channel(c, self.limit) for c in self.channels.values()],
            "logp": logp,
            "entropy": entropy,
            "least": LEAST,
            "all": self._everywhere(),
            "start": self._start,
            "segments": find_segments(self.trace),
        }

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with the strip of the gap and the table by type; every foreign string in it is
            escaped.
        """
        gap = self.channels["gap"]
        tokens, own = group_pieces(self.trace.tokens()), learned_rows(self.trace)
        strip = markup.draw_strip_box(tokens, gap, self.limit, learned=own)
        head = "".join(f"<th>{name}</th>" for name in ("type", "tokens", *PARTS))
        rows = "".join(_table_row(str(kind), row) for kind, row in self.table.iterrows())
        return (
            f"{markup.draw_title(self.title)}{markup.draw_prompt(self._prompt)}"
            f'<div class="opd-bar">{markup.draw_legend(gap, self.limit)}</div>'
            f"{strip}"
            f'<div class="opd-peaks">{markup.escape(self.sentence)}'
            f"<table><tr>{head}</tr>{rows}</table></div>"
        )

    def __repr__(self) -> str:
        head = (
            f"PrivilegeLens: {self.title or f'completion {self.sample}'}, {len(self.trace)} tokens."
            f" {self.sentence}"
        )
        shared = [replace(channel, fixed=self.limit) for channel in self.channels.values()]
        return "\n".join([head, *(f"{c.label:<12} {markup.draw_sparkline(c)}" for c in shared)])

    @property
    def _prompt(self) -> str:
        return str(self.trace.meta["prompts"][self.sample])

    @property
    def _start(self) -> int:
        """The row of the whole trace where this completion begins."""
        return next(
            first for sample, first, _ in payload.find_spans(self.whole) if sample == self.sample
        )

    @property
    def _can_flag(self) -> bool:
        return f"{self.sides['plain']}_entropy" in self.whole.table.column_names

    def _leaks(self, trace: Trace) -> np.ndarray:
        if not self._can_flag:
            return np.zeros(len(trace), bool)
        parts = _parts(trace, self.sides)
        size, other = np.abs(parts["information"]), np.abs(parts["capability"])
        is_undecided = trace.column(f"{self.sides['plain']}_entropy") > self.undecided
        return np.asarray((size > other) & (size > LEAST) & is_undecided)

    def _types(self) -> list[str] | None:
        known = "type" in self.whole.table.column_names
        return [str(kind) for kind in self.whole.column("type").tolist()] if known else None

    def _everywhere(self) -> dict[str, Any]:
        """The numbers by which the page flags tokens and averages by type over the whole trace."""
        kinds, parts = self._types(), _parts(self.whole, self.sides)
        names = [kind for kind in self.table.index if kind != ALL] if kinds else []
        entropy = (
            self.whole.column(f"{self.sides['plain']}_entropy")
            if self._can_flag
            else np.full(len(self.whole), np.nan)
        )
        return {
            "names": names,
            "type": np.array([names.index(kind) for kind in kinds] if kinds else [], int),
            "entropy": payload.compact(entropy),
            **{key: payload.compact(values) for key, values in parts.items()},
        }


def _table_row(kind: str, row: pd.Series) -> str:
    cells = [f"{int(row['tokens'])}", *(markup.format_number(row[key], True) for key in PARTS)]
    return f"<tr><th>{markup.escape(kind)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _parts(trace: Trace, sides: dict[str, str]) -> dict[str, np.ndarray]:
    """The gap and its parts, `[n]` each, in nats; NaN where both policies rule the token out."""
    logp = {key: trace.column(f"{name}_logp").astype(float) for key, name in sides.items()}
    with np.errstate(invalid="ignore"):
        parts = {
            "gap": logp["informed"] - logp["student"],
            "information": logp["informed"] - logp["plain"],
            "capability": logp["plain"] - logp["student"],
        }
        return parts | ({"wrong": logp["wrong"] - logp["plain"]} if "wrong" in logp else {})
