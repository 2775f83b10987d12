"""Forks: where student and teacher would go from the same prefix, and whether a high loss is a real
fork or a false alarm (TOPD).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from opdlab.data.tokens import token_bytes
from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError
from opdlab.methods import windows
from opdlab.support.expect import expect
from opdlab.viz import markup, payload
from opdlab.viz.channels import Channel, channels, described
from opdlab.viz.glyphs import visible
from opdlab.viz.provenance import notes_of
from opdlab.viz.view import Trait, View

SAME = 1e-9  # a distance above the threshold by less is equal to it, as in TOPD
LEFT = 8  # tokens of a continuation at least
SHOWN = 8  # windows that the plain text lists
VERDICTS = ("false alarm", "real fork")


class Forks(View):
    """Is a token of high loss a real fork, or a false alarm?

    The two windows from its prefix, their transport plan and distance.

    trace: of a TOPD step, `step.trace()`, whose notes hold the windows. policies: `student` and
        `teacher`, to ask for new windows
    at any token and for the rest of the text, here by `at` and `goes_on`, on the page where the
    view is `.live()`; `prompts`, one a completion (`step.rollout.prompts`), are then what they
    read; without them each prompt of the trace is taken for a chat of one message where the
    tokenizer has a template. Raises OpdlabError for a trace without windows and no policies.

    `threshold` (a trait; TOPD's own at first) parts real forks, whose distance is above it, from
    false alarms. `selected` is a row of `df`; `table` has the windows.
    """

    name, scripts, styles = "forks", ("dots.js", "forks.js"), ("dots.css", "forks.css")
    threshold = Trait(0.0)

    def __init__(
        self,
        trace: Trace,
        policies: Mapping[str, Any] | None = None,
        prompts: Sequence[Any] | None = None,
        title: str = "",
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        self.trace, self.policies, self.prompts, self.title = (
            trace,
            dict(policies or {}),
            prompts,
            title,
        )
        notes = notes_of(trace, "TOPD")
        self.windows = {
            row: _window(note)
            for note in notes.get("windows", [])
            if (row := self._row(note)) is not None
        }
        if not self.windows and not {"student", "teacher"} <= set(self.policies):
            raise OpdlabError(
                "The trace has no windows. Take step.trace() of a run with TOPD, or hand in"
                " policies={'student': …, 'teacher': …} to ask."
            )
        self.threshold = float(notes.get("topd", {}).get("threshold", 0.0))
        self.selected = max(self.windows, key=lambda row: self.windows[row]["distance"], default=0)

    @property
    def df(self) -> pd.DataFrame:
        """The trace's rows with `token`, the `distance` of the windows from there (NaN: none) and
        the `verdict`.
        """
        distance = np.full(len(self.trace), np.nan)
        for row, window in self.windows.items():
            distance[row] = window["distance"]
        verdict = np.where(
            np.isnan(distance),
            "",
            np.array(VERDICTS)[(distance > self.threshold + SAME).astype(int)],
        )
        return self.trace.to_pandas().assign(
            token=[visible(p) for p in self.trace.tokens()], distance=distance, verdict=verdict
        )

    @property
    def table(self) -> pd.DataFrame:
        """One row a window:

        `row`, `sample`, `position`, `distance`, `verdict` and the two texts, the largest distance
        first.
        """
        columns = ["row", "sample", "position", "distance", "verdict", "student", "teacher"]
        rows = [
            {
                "row": row,
                "sample": int(self._samples[row]),
                "position": int(self._positions[row]),
                "distance": w["distance"],
                "verdict": self._verdict(w),
                "student": self._said(w["student"]),
                "teacher": self._said(w["teacher"]),
            }
            for row, w in self.windows.items()
        ]
        return pd.DataFrame(rows, columns=columns).sort_values(
            "distance", ascending=False, kind="stable", ignore_index=True
        )

    def at(self, row: int, window: int | None = None) -> dict[str, Any]:
        """New windows from before a token: greedy texts of both policies, their exact distance and
        plan; kept in `table`.

        Raises OpdlabError where no policies were handed in or there is no such row.
        """
        prompt, prefix = self._begun(row)
        size = window or self._size
        texts = {side: self._write(side, prompt, prefix, size) for side in ("student", "teacher")}
        embedding = "student" if hasattr(self.policies["student"], "weights") else "onehot"
        cost = windows.costs([texts["student"]], [texts["teacher"]], embedding, self.policies)
        distance, plans = windows.solve(cost)
        self.windows[row] = {
            **texts,
            "distance": float(distance[0]),
            "plan": plans[0].tolist(),
            "asked": True,
        }
        return self.windows[row]

    def goes_on(self, row: int, side: str, tokens: int | None = None) -> str:
        """What `student` or `teacher` writes greedily from before a token:

        `tokens`, by default as the longest completion has left.
        """
        prompt, prefix = self._begun(row)
        room = tokens or max(int(self._positions.max()) + 1 - len(prefix), LEFT)
        return b"".join(self._pieces(self._write(side, prompt, prefix, room))).decode(
            "utf-8", "replace"
        )

    def answer(self, question: Mapping[str, Any]) -> Any:
        row = int(question["row"])
        if question["do"] == "windows":
            return self._drawn(row, self.at(row))
        side = str(question["side"])
        if side not in ("student", "teacher"):
            raise OpdlabError(f"There is no side {side!r}. Ask for student or teacher.")
        return {"text": self.goes_on(row, side)}

    def data(self) -> dict[str, Any]:
        channel = self._channel
        drawn = described(channel, channel.limit) | {"peaks": sorted(self.windows)}
        return {
            "title": self.title,
            "text": payload.text(self.trace),
            "channel": drawn,
            "asks": {"student", "teacher"} <= set(self.policies),
            "windows": [self._drawn(row, window) for row, window in self.windows.items()],
            "size": self._size,
        }

    def static(self) -> str:
        title = markup.title(self.title)
        rows = "".join(
            f"<tr><td>{w['sample']}:{w['position']}</td><td>{markup.number(w['distance'])}</td><td>{w['verdict']}</td>"
            f"<td>{markup.safe(w['student'])}</td><td>{markup.safe(w['teacher'])}</td></tr>"
            for w in self.table.to_dict("records")
        )
        head = (
            "<tr><th>token</th><th>distance</th><th>verdict</th><th>the student goes on</th><th>the"
            " teacher goes on</th></tr>"
        )
        bar = f'<div class="opd-bar"><span>{markup.safe(self._count)}</span></div>'
        return f'{title}{bar}<div class="opd-fork-table"><table>{head}{rows}</table></div>'

    def __repr__(self) -> str:
        lines = [
            f"{w['sample']}:{w['position']}  {markup.number(w['distance'])}  {w['verdict']} "
            f" {w['student']!r} | {w['teacher']!r}"
            for w in self.table.head(SHOWN).to_dict("records")
        ]
        more = [f"… {len(self.windows) - SHOWN} more"] if len(self.windows) > SHOWN else []
        head = f"Forks: {self.title + ', ' if self.title else ''}{self._count}"
        return "\n".join(
            [head, *markup.sparkline_of(self.trace, self._channel, self.selected), *lines, *more]
        )

    @cached_property
    def _samples(self) -> np.ndarray:
        return self.trace.column("sample")

    @cached_property
    def _positions(self) -> np.ndarray:
        return self.trace.column("position")

    @cached_property
    def _rows(self) -> dict[tuple[int, int], int]:
        return {
            pair: row
            for row, pair in enumerate(
                zip(self._samples.tolist(), self._positions.tolist(), strict=True)
            )
        }

    @property
    def _count(self) -> str:
        real = sum(self._verdict(w) == VERDICTS[1] for w in self.windows.values())
        return (
            f"{len(self.windows)} tokens of high loss: {real} real forks,"
            f" {len(self.windows) - real} false alarms (distance above"
            f" {markup.number(self.threshold)} or not)"
        )

    @property
    def _size(self) -> int:
        return max(
            (max(len(w["student"]), len(w["teacher"])) for w in self.windows.values()), default=8
        )

    @property
    def _channel(self) -> Channel:
        """The log ratio, or what the trace has instead."""
        found = channels(self.trace)
        plain = Channel("none", "no numbers", np.zeros(len(self.trace)))
        return found.get("log_ratio") or next(
            (c for c in found.values() if c.kind in ("ratio", "amount")), plain
        )

    def _row(self, note: Mapping[str, Any]) -> int | None:
        return self._rows.get((int(note["sample"]), int(note["position"])))

    def _verdict(self, window: Mapping[str, Any]) -> str:
        return VERDICTS[window["distance"] > self.threshold + SAME]

    def _begun(self, row: int) -> tuple[Any, list[int]]:
        """The prompt of a row's completion and the tokens before it."""
        if not {"student", "teacher"} <= set(self.policies):
            raise OpdlabError(
                "Nobody can be asked: no policies were handed in. Make it with Forks(trace,"
                " policies={'student': …, 'teacher': …})."
            )
        if not 0 <= row < len(self.trace):
            raise OpdlabError(
                f"The trace has rows 0 to {len(self.trace) - 1}, not {row}. Give one of these."
            )
        sample, position = int(self._samples[row]), int(self._positions[row])
        ids = self.trace.column("token_id")[row - position : row].tolist()
        return (self.prompts[sample] if self.prompts is not None else self._plain(sample)), ids

    def _plain(self, sample: int) -> Any:
        from opdlab.data.prompt import Prompt

        text = str(self.trace.meta["prompts"][sample])
        chat = getattr(self.policies["student"].tokenizer, "chat_template", None)
        return Prompt(messages=({"role": "user", "content": text},)) if chat else Prompt(text=text)

    def _write(self, side: str, prompt: Any, prefix: list[int], size: int) -> list[int]:
        return list(
            self.policies[side]
            .sample([prompt], prefixes=[prefix], temperature=0, max_new_tokens=size)
            .completions()[0]
        )

    def _pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of tokens, which the trace knows only of those that occur in it."""
        known = self.trace.meta["vocab"]
        if "student" in self.policies and any(str(i) not in known for i in ids):
            return token_bytes(self.policies["student"].tokenizer, list(ids))
        return [self.trace.piece(i) if str(i) in known else f"‹{i}›".encode() for i in ids]

    def _said(self, ids: Sequence[int]) -> str:
        return b"".join(self._pieces(ids)).decode("utf-8", "replace")

    def _drawn(self, row: int, window: Mapping[str, Any]) -> dict[str, Any]:
        """A window as the page reads it: names of tokens, which of them are the same, the plan row
        by row.
        """
        words = {
            side: [payload.word(visible(piece)) for piece in self._pieces(window[side])]
            for side in ("student", "teacher")
        }
        same = [[int(s == t) for t in window["teacher"]] for s in window["student"]]
        return {
            "row": row,
            "distance": window["distance"],
            **words,
            "same": same,
            "plan": window.get("plan"),
            "asked": window["asked"],
        }


def _window(note: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "student": [int(i) for i in note["student"]],
        "teacher": [int(i) for i in note["teacher"]],
        "distance": float(note["distance"]),
        "plan": note.get("plan"),
        "asked": False,
    }
