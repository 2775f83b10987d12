"""TwoRules: two rules on the tokens of one strip: only the one, only the other, both."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import pandas as pd

from opdlab.data.trace import Trace
from opdlab.errors import InvalidValue, OpdlabError, UnknownColumn
from opdlab.support.expect import expect, shortened
from opdlab.support.validation import Text, Unchecked, Whole, validate_arguments
from opdlab.viz import markup, payload
from opdlab.viz.amounts import find_amounts
from opdlab.viz.axes import Axis, find_axes
from opdlab.viz.channel import Channel
from opdlab.viz.channels import find_kinds
from opdlab.viz.given import select_completion
from opdlab.viz.glyphs import group_pieces, show_piece
from opdlab.viz.made_up import make_trace
from opdlab.viz.questions import read_condition, read_number
from opdlab.viz.traits import Trait
from opdlab.viz.turns import learned_rows
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

SETS = ("neither", "only A", "only B", "both")
EXACT = 5000  # tokens up to which the page gets single precision


class Rule(TypedDict):
    """A rule as page and Python share it.

    Attributes:
        key: A key of `find_axes`, or a column of names.
        sign: ">=" or "<=" for numbers, "=" for names.
        value: The threshold, or the name.
    """

    key: str
    sign: str
    value: float | str


class TwoRules(View):
    """Two rules on one strip, with thresholds to drag: which tokens does only one of them touch?

    Args:
        trace: The trace; counts and shares are over all its completions.
        a: The first rule, such as "log_ratio <= -1" or "route = imitate": a key of `find_axes` and
            a threshold, or a column of names and one of them. "" takes the first divergence, or the
            first number there is, at the place where its line begins in `Regimes`.
        b: The second rule; "" takes an entropy, or the next number.
        sample: The completion whose strip is drawn.
        title: The title above.

    Attributes:
        a: The first rule: `key`, `sign` (">=", "<=", or "=" for names) and `value`.
        b: The second rule.
        trace: The trace.

    Raises:
        OpdlabError: The trace has no such completion or no numbers.
        UnknownColumn: There is no such axis or column.
        InvalidValue: A rule cannot be read.
    """

    caption = "Which tokens does one rule touch, and the other not?"
    name, scripts, styles = "rules", ("two_rules.js",), ("two_rules.css",)
    a = Trait({})
    b = Trait({})

    @validate_arguments
    def __init__(
        self,
        trace: Unchecked[Trace],
        a: Text = "",
        b: Text = "",
        sample: Whole = 0,
        title: Text = "",
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        self.trace, self.sample, self.title = trace, sample, title
        self._shown = select_completion(trace, sample)
        if not self.axes:
            raise OpdlabError(
                "The trace has no numbers to make a rule of. Make it with opdlab.score(…), or take"
                " one of training: step.trace()."
            )
        keys = self._usual_keys()
        self.a = self._read(a, "a") if a else self._usual(keys[0])
        self.b = self._read(b, "b") if b else self._usual(keys[1])
        self.selected = self._first if len(self._shown) else -1

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is a trace with tokens and numbers.

        Args:
            given: Anything.
            sample: The completion whose strip is drawn; it may be any.

        Returns:
            Whether the view can be made of it.
        """
        return isinstance(given, Trace) and len(given) > 0 and bool(find_axes(given))

    @classmethod
    def of_trace(cls, trace: Trace, sample: int = 0) -> Self:
        """Make the view with the usual rules.

        Args:
            trace: A trace that the view fits.
            sample: The completion whose strip is drawn.

        Returns:
            The view.
        """
        return cls(trace, sample=sample)

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make the view of a completion whose tokens all have the type `words`.

        Args:
            tokens: The bytes of the completion's tokens.
            words: All other texts: title, prompt, names.

        Returns:
            The view.
        """
        trace = make_trace(tokens, prompt=words, finish=words)
        return cls(trace.with_columns(type=[words] * len(tokens)), title=words)

    @cached_property
    def axes(self) -> dict[str, Axis]:
        """The numbers that a rule may read, by key."""
        return find_axes(self.trace)

    @cached_property
    def kinds(self) -> dict[str, Channel]:
        """The columns of names that a rule may read, by key."""
        return {key: kind for key, kind in find_kinds(self.trace).items() if key not in self.axes}

    @property
    def sets(self) -> np.ndarray:
        """Return the set of `SETS` that every row of the trace belongs to, `[n]`."""
        return np.asarray(self._holds(self.a) + 2 * self._holds(self.b))

    @property
    def df(self) -> pd.DataFrame:
        """The trace's rows with `token` and `set`, one of `SETS`."""
        return self.trace.to_pandas().assign(
            token=[show_piece(piece) for piece in self.trace.tokens()],
            set=np.array(SETS)[self.sets],
        )

    @property
    def table(self) -> pd.DataFrame:
        """Tokens of each set, and their shares of all tokens, KL and gradient, in %."""
        sets = self.sets
        out: dict[str, np.ndarray] = {}
        learned = learned_rows(self.trace)
        own = np.ones(len(sets), bool) if learned is None else learned
        counts = np.bincount(sets[own], minlength=len(SETS))
        out["tokens"] = counts
        out["of tokens"] = 100.0 * counts / max(int(own.sum()), 1)
        for name, values in find_amounts(self.trace).items():
            sums = np.bincount(sets[own], values[own], minlength=len(SETS))
            out[f"of {name}"] = 100.0 * sums / (values[own].sum() or 1.0)
        return pd.DataFrame(out, index=list(SETS))

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/two_rules.js` reads them.
        """
        drawn = np.float32 if len(self.trace) <= EXACT else np.float16
        with np.errstate(over="ignore"):
            axes = [
                {
                    "key": axis.key,
                    "label": axis.label,
                    "unit": axis.unit,
                    "scale": axis.scale,
                    "soft": axis.soft,
                    "start": axis.start,
                    "ends": list(axis.ends),
                    "less": axis.less,
                    "more": axis.more,
                    "values": axis.values.astype(drawn),
                }
                for axis in self.axes.values()
            ]
        learned = learned_rows(self.trace)
        return {
            "title": self.title,
            "prompt": str(self.trace.meta["prompts"][self.sample]),
            "finish": str(self.trace.meta["finish"][self.sample]),
            "text": payload.describe_text(self.trace),
            "first": self._first,
            "size": len(self._shown),
            "axes": axes,
            "kinds": [
                {
                    "key": key,
                    "label": kind.label,
                    "names": list(kind.names),
                    "values": np.nan_to_num(np.asarray(kind.values, float), nan=-1).astype(int),
                }
                for key, kind in self.kinds.items()
            ],
            "own": np.ones(len(self.trace), int) if learned is None else learned.astype(int),
            "amounts": {
                key: values.astype(drawn) for key, values in find_amounts(self.trace).items()
            },
        }

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with the rules, the strip and the table; every foreign string in it is escaped.
        """
        rows = slice(self._first, self._first + len(self._shown))
        kind = _channel_of_sets(self.sets[rows])
        lines = "".join(f"<div>{markup.escape(line)}</div>" for line in self._lines())
        return (
            f"{markup.draw_title(self.title)}"
            f'<div class="opd-bar"><span>{markup.escape(self._head())}</span>'
            f"{markup.draw_legend(kind, kind.limit)}</div>"
            + markup.draw_strip_box(
                group_pieces(self._shown.tokens()),
                kind,
                kind.limit,
                str(self.trace.meta["finish"][self.sample]),
                learned_rows(self._shown),
            )
            + f'<div class="opd-still">{lines}</div>'
        )

    def __repr__(self) -> str:
        bars = markup.draw_sparkline(Channel("", "", self.sets.astype(float)))
        head = f"TwoRules: {self.title + ', ' if self.title else ''}{self._head()}"
        return "\n".join([head, f"{bars} sets along the tokens", *self._lines()])

    @property
    def _first(self) -> int:
        """The first row of the completion whose strip is drawn."""
        rows = np.flatnonzero(self.trace.column("sample") == self.sample)
        return int(rows[0]) if len(rows) else 0

    def _head(self) -> str:
        return f"A: {_say(self.a)} · B: {_say(self.b)}"

    def _lines(self) -> list[str]:
        table, lines = self.table, []
        for name, row in table.iterrows():
            shares = [
                f"{markup.format_number(row[column])} % {column.replace('kl', 'KL')}"
                for column in table.columns[1:]
            ]
            lines.append(f"{name}: {int(row['tokens'])} tokens, {', '.join(shares)}")
        return lines

    def _usual_keys(self) -> tuple[str, str]:
        """A divergence and an entropy, or the first numbers that there are."""
        keys = list(self.axes)
        first = next((key for key in ("reverse_kl", "log_ratio") if key in keys), keys[0])
        others = [key for key in keys if key != first] or keys
        return first, "student_entropy" if "student_entropy" in others else others[0]

    def _usual(self, key: str) -> Rule:
        return {"key": key, "sign": ">=", "value": self.axes[key].start}

    def _read(self, text: str, name: str) -> Rule:
        """Read a rule of the user's."""
        key, sign, value = read_condition(text, "TwoRules")
        if key in self.kinds:
            if sign not in ("=", "==") or value not in self.kinds[key].names:
                names = ", ".join(self.kinds[key].names)
                raise InvalidValue(
                    f"TwoRules got {name}={shortened(text)}. Use {key} = and one of {names}."
                )
            return {"key": key, "sign": "=", "value": value}
        if key not in self.axes:
            raise UnknownColumn(
                f"The trace has no axis {shortened(key)}. It has"
                f" {', '.join([*self.axes, *self.kinds])}."
            )
        if sign[0] not in "<>":
            raise InvalidValue(
                f"TwoRules got {name}={shortened(text)}. Compare a number by >= or <=."
            )
        return {"key": key, "sign": f"{sign[0]}=", "value": read_number(value, text, "TwoRules")}

    def _holds(self, rule: Rule) -> np.ndarray:
        """Mark the rows that a rule touches; a missing number is not touched."""
        key, value = rule["key"], rule["value"]
        if key in self.kinds:
            names = self.kinds[key].names
            at = names.index(value) if value in names else -2
            return np.asarray(self.kinds[key].values == at).astype(int)
        values = self.axes[key].values
        return np.asarray(values >= value if rule["sign"] == ">=" else values <= value).astype(int)


def _say(rule: Rule) -> str:
    value = rule["value"]
    sign = {">=": "≥", "<=": "≤"}.get(rule["sign"], rule["sign"])
    shown = value if isinstance(value, str) else markup.format_number(value)
    return f"{rule['key']} {sign} {shown}"


def _channel_of_sets(sets: np.ndarray) -> Channel:
    """The sets of some tokens as a channel; those of neither rule have no colour."""
    values = np.where(sets > 0, sets - 1.0, np.nan)
    return Channel("set", "rules", values, "", "category", names=SETS[1:], marks=("A", "B", "AB"))
