"""PrivilegeLens: is the hinted teacher teaching a skill, or telling what it was told?

The gap of every token, taken apart.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from opdlab.data.trace import Trace
from opdlab.errors import MissingPolicy, OpdlabError
from opdlab.support.expect import expect
from opdlab.viz import markup, payload
from opdlab.viz.channels import Channel, described
from opdlab.viz.glyphs import groups, visible
from opdlab.viz.segments import segments
from opdlab.viz.view import Trait, View

LEAST = 0.1  # nats of information below which nothing is flagged
ALL = "all"
_MEANS = ["gap", "information", "capability", "leak"]


class PrivilegeLens(View):
    """Is the teacher teaching a skill, or leaking the answer?

    One completion under three policies, by token and in sum.

        log p_T+ - log p_S  =  (log p_T+ - log p_T-)  +  (log p_T- - log p_S)
              gap                   information              capability

    as `opdlab.diagnose.privilege` defines `gap`, `information_teacher` and `capability_bare`.
    student, informed (T+), plain (T-), wrong (the teacher told another problem's hint, for
    control): policies of the trace, as in `opdlab.score(rollout, student, teacher,
    **{"teacher+hint": teacher.seeing()})`. A token is flagged as a leak where information outweighs
    capability, is more than 0.1 nats, and T- is undecided: its entropy is above `undecided` nats (a
    trait; 0.69 is two equal choices). Raises MissingPolicy and OpdlabError. `selected` is the
    position looked at, at first the one of largest gap.
    """

    name, scripts, styles = (
        "privilege",
        ("tracks.js", "minimap.js", "privilege.js"),
        ("privilege.css",),
    )
    undecided = Trait(0.69)

    def __init__(
        self,
        trace: Trace,
        student: str = "student",
        informed: str = "teacher+hint",
        plain: str = "teacher",
        wrong: str | None = None,
        sample: int = 0,
        title: str = "",
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        self.sides = {"student": student, "plain": plain, "informed": informed} | (
            {"wrong": wrong} if wrong else {}
        )
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

    @cached_property
    def channels(self) -> dict[str, Channel]:
        """The three numbers of the split, and the control, as what colours tokens."""
        parts, informed = _parts(self.trace, self.sides), self.sides["informed"]
        made = {
            "gap": ("gap", "log T₊(y) − log S(y)", "student over-confident", f"{informed} prefers"),
            "information": (
                "information",
                "log T₊(y) − log T₋(y)",
                "the hint speaks against it",
                "the hint speaks for it",
            ),
            "capability": (
                "capability",
                "log T₋(y) − log S(y)",
                "student over-confident",
                f"{self.sides['plain']} prefers",
            ),
            "wrong": (
                "wrong hint",
                "log T_wrong(y) − log T₋(y)",
                "it speaks against it",
                "it speaks for it",
            ),
        }
        return {
            key: Channel(
                key, label, parts[key], kind="ratio", less=less, more=more, formula=formula
            )
            for key, (label, formula, less, more) in made.items()
            if key in parts
        }

    @property
    def limit(self) -> float:
        """The size that gets full colour in all rows, so that they compare."""
        return max(c.limit for c in self.channels.values())

    @property
    def df(self) -> pd.DataFrame:
        """The trace's rows of this completion with `token`, `gap`, `information_teacher`,
        `capability_bare` and `leak`.
        """
        parts = _parts(self.trace, self.sides)
        names = {
            "information": "information_teacher",
            "capability": "capability_bare",
            "wrong": "information_wrong",
        }
        tokens = [visible(piece) for piece in self.trace.tokens()]
        columns = {names.get(key, key): values for key, values in parts.items()}
        return self.trace.to_pandas().assign(token=tokens, **columns, leak=self._leaks(self.trace))

    @property
    def table(self) -> pd.DataFrame:
        """Means in nats by type over all completions of the trace, with the share of flagged
        tokens; all of them in the row "all".
        """
        parts = pd.DataFrame(_parts(self.whole, self.sides)).assign(
            leak=self._leaks(self.whole).astype(float)
        )
        parts["type"] = self._types() or [ALL] * len(parts)
        kinds = parts["type"].value_counts().index
        rows = {ALL: parts} | {str(kind): parts[parts["type"] == kind] for kind in kinds}
        means = [*_MEANS, *(["wrong"] if "wrong" in parts else [])]
        return pd.DataFrame(
            {kind: {"tokens": len(part), **part[means].mean()} for kind, part in rows.items()}
        ).T.astype({"tokens": int})

    @property
    def sentence(self) -> str:
        """What the whole trace says."""
        m, n = self.table.loc[ALL], len(self.whole)
        flags = (
            f"{round(m['leak'] * n)} of {n:,} tokens are flagged as leaks"
            if self._can_flag
            else "T- has no entropies, so none is flagged"
        )
        control = (
            f" A wrong hint moves the teacher by {markup.number(m['wrong'], True)}."
            if "wrong" in m
            else ""
        )
        return (
            f"Gap {markup.number(m['gap'], True)} nats a token = information"
            f" {markup.number(m['information'], True)} + capability"
            f" {markup.number(m['capability'], True)}; {flags}.{control}"
        )

    def data(self) -> dict[str, Any]:
        entropy = {
            key: payload.numbers(self.trace.column(f"{name}_entropy"))
            for key, name in self.sides.items()
            if f"{name}_entropy" in self.trace.table.column_names
        }
        logp = {
            key: payload.numbers(self.trace.column(f"{name}_logp"))
            for key, name in self.sides.items()
        }
        return {
            "title": self.title,
            "prompt": self._prompt,
            "finish": str(self.trace.meta["finish"][self.sample]),
            "sides": self.sides,
            "text": payload.text(self.trace),
            "channels": [described(c, self.limit) for c in self.channels.values()],
            "logp": logp,
            "entropy": entropy,
            "least": LEAST,
            "all": self._everywhere(),
            "start": self._start,
            "segments": segments(self.trace),
        }

    def static(self) -> str:
        title = markup.title(self.title)
        gap, tokens = self.channels["gap"], self.trace.tokens()
        rows = "".join(
            f"<tr><th>{markup.safe(kind)}</th><td>{int(row['tokens'])}</td>"
            + "".join(
                f"<td>{markup.number(row[key], True)}</td>"
                for key in ("gap", "information", "capability")
            )
            + "</tr>"
            for kind, row in self.table.iterrows()
        )
        return (
            f'{title}<div class="opd-prompt" style="white-space:pre-wrap"'
            f' dir="auto">{markup.safe(self._prompt)}</div>'
            f'<div class="opd-bar">{markup.legend(gap, self.limit)}</div>'
            '<div class="opd-strip" dir="auto"'
            ' style="white-space:pre-wrap;font-family:monospace;line-height:1.9">'
            f"{markup.strip(groups(tokens), gap, self.limit)}</div>"
            "<div"
            f' class="opd-peaks">{markup.safe(self.sentence)}<table><tr><th>type</th><th>tokens</th><th>gap</th><th>information</th>'
            f"<th>capability</th></tr>{rows}</table></div>"
        )

    def __repr__(self) -> str:
        head = (
            f"PrivilegeLens: {self.title or f'completion {self.sample}'}, {len(self.trace)} tokens."
            f" {self.sentence}"
        )
        shared = [
            Channel(c.key, c.label, c.values, kind="ratio", fixed=self.limit)
            for c in self.channels.values()
        ]
        return "\n".join([head, *(f"{c.label:<12} {markup.sparkline(c)}" for c in shared)])

    @property
    def _prompt(self) -> str:
        return str(self.trace.meta["prompts"][self.sample])

    @property
    def _start(self) -> int:
        """The row of the whole trace where this completion begins."""
        return next(
            first for sample, first, _ in payload.spans(self.whole) if sample == self.sample
        )

    @property
    def _can_flag(self) -> bool:
        return f"{self.sides['plain']}_entropy" in self.whole.table.column_names

    def _leaks(self, trace: Trace) -> np.ndarray:
        if not self._can_flag:
            return np.zeros(len(trace), bool)
        parts = _parts(trace, self.sides)
        size, other = np.abs(parts["information"]), np.abs(parts["capability"])
        return (
            (size > other)
            & (size > LEAST)
            & (trace.column(f"{self.sides['plain']}_entropy") > self.undecided)
        )

    def _types(self) -> list[str] | None:
        known = "type" in self.whole.table.column_names
        return [str(kind) for kind in self.whole.column("type").tolist()] if known else None

    def _everywhere(self) -> dict[str, Any]:
        """What the page needs to flag and average by type over the whole trace."""
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
            "entropy": payload.numbers(entropy),
            **{key: payload.numbers(values) for key, values in parts.items()},
        }


def _parts(trace: Trace, sides: dict[str, str]) -> dict[str, np.ndarray]:
    """The gap and what it is made of, `[n]` each, nats; NaN where two policies both rule the token
    out.
    """
    logp = {key: trace.column(f"{name}_logp").astype(float) for key, name in sides.items()}
    with np.errstate(invalid="ignore"):
        parts = {
            "gap": logp["informed"] - logp["student"],
            "information": logp["informed"] - logp["plain"],
            "capability": logp["plain"] - logp["student"],
        }
        return parts | ({"wrong": logp["wrong"] - logp["plain"]} if "wrong" in logp else {})
