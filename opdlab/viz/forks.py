"""Forks: where student and teacher would go from the same prefix.

Two texts from before a token tell whether its high loss is a real fork or a false alarm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from opdlab.data.notes import Windows
from opdlab.data.prompt import Prompt
from opdlab.data.tokens import token_bytes
from opdlab.data.trace import Trace
from opdlab.errors import MissingPolicy, OpdlabError
from opdlab.support.expect import expect
from opdlab.support.validation import ByName, Text, Unchecked, validate_arguments
from opdlab.viz import markup, payload
from opdlab.viz.channel import Channel, describe_channel
from opdlab.viz.channels import find_channels
from opdlab.viz.glyphs import show_piece
from opdlab.viz.made_up import make_trace
from opdlab.viz.traits import Trait
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

SAME = 1e-9  # a distance that is above the threshold by less is equal to it up to rounding
LEFT = 8  # tokens of a continuation at least
SHOWN = 8  # windows that the plain text lists
VERDICTS = ("false alarm", "real fork")
FIELDS = {"sample", "position", "student", "teacher", "distance"}  # of a window
SIDES = ("student", "teacher")


class Forks(View):
    """The texts of student and teacher from before a token, their transport plan and distance.

    Any method may note such windows (`opdlab.data.notes.Windows`), as TOPD does.

    Args:
        trace: The trace of a step whose plan noted windows, `step.trace()`.
        policies: `student` and `teacher`, to ask for new windows at any token and for the rest of
            the text: here by `at` and `continue_text`, on the page where the view is `.live()`.
        prompts: The prompt of each completion (`step.rollout.prompts`), which the policies read.
            Without them each prompt of the trace is taken for a chat of one message, where the
            tokenizer has a chat template.
        title: The title above.

    Attributes:
        threshold: The distance from which a fork is real; at first that of the notes.
        windows: The windows by row of `df`.
        selected: The row of `df` that is looked at.
        trace: The trace.
        policies: The policies that can be asked, by side.
        prompts: The prompts that they read; None for those of the trace.

    Raises:
        OpdlabError: The trace has no windows, and there are no policies to ask.
    """

    caption = "Is a token of high loss a real fork, or a false alarm?"
    name, scripts, styles = "forks", ("forks.js",), ("dots.css", "forks.css")
    threshold = Trait(0.0)

    @validate_arguments
    def __init__(
        self,
        trace: Unchecked[Trace],
        policies: ByName | None = None,
        prompts: Unchecked[Sequence[Any] | None] = None,
        title: Text = "",
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        self.trace, self.title = trace, title
        self.policies, self.prompts = dict(policies or {}), prompts
        self.windows: dict[int, dict[str, Any]] = {}
        for noted in _find_windows(trace):
            row = self._rows.get((int(noted["sample"]), int(noted["position"])))
            if row is not None:
                self.windows[row] = _read_window(noted)
        if not self.windows and not self._can_ask:
            raise OpdlabError(
                "The trace has no windows. Take step.trace() of a run with TOPD, or hand in"
                " policies={'student': …, 'teacher': …} to ask."
            )
        note = trace.note(Windows)
        self.threshold = float(note.threshold or 0.0) if note else 0.0
        self.selected = max(self.windows, key=lambda row: self.windows[row]["distance"], default=0)

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is a trace whose plan noted windows.

        Args:
            given: Anything.
            sample: Not used: the view shows all completions.

        Returns:
            Whether at least one window was noted.
        """
        return isinstance(given, Trace) and bool(_find_windows(given))

    @classmethod
    def of_trace(cls, trace: Trace, sample: int = 0) -> Self:
        """Make the view of all windows of a trace.

        Args:
            trace: A trace that the view fits.
            sample: Not used: the view shows all completions.

        Returns:
            The view.
        """
        return cls(trace)

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make the view of one window of two tokens, at the first token.

        Args:
            tokens: The bytes of the completion's tokens.
            words: All other texts: title, prompt, names.

        Returns:
            The view.
        """
        last = len(set(tokens)) - 1
        window = {
            "sample": 0,
            "position": 0,
            "student": [0, last],
            "teacher": [last, 0],
            "distance": 0.5,
            "plan": [[0.5, 0], [0, 0.5]],
        }
        trace = make_trace(tokens, prompt=words, finish=words)
        note = Windows([window], threshold=0.2).as_json()
        return cls(Trace(trace.table, trace.meta | {"notes": {"": {"windows": note}}}), title=words)

    @property
    def df(self) -> pd.DataFrame:
        """The trace's rows with `token`, the `distance` of the windows there and the `verdict`.

        The distance is NaN and the verdict "" where there are no windows.
        """
        distance = np.full(len(self.trace), np.nan)
        for row, window in self.windows.items():
            distance[row] = window["distance"]
        is_real = (distance > self.threshold + SAME).astype(int)
        verdict = np.where(np.isnan(distance), "", np.array(VERDICTS)[is_real])
        return self.trace.to_pandas().assign(
            token=[show_piece(p) for p in self.trace.tokens()], distance=distance, verdict=verdict
        )

    @property
    def table(self) -> pd.DataFrame:
        """One row for each window, the largest distance first.

        Columns: `row`, `sample`, `position`, `distance`, `verdict` and the texts of `student` and
        `teacher`.
        """
        columns = ["row", "sample", "position", "distance", "verdict", "student", "teacher"]
        rows = [
            {
                "row": row,
                "sample": int(self._samples[row]),
                "position": int(self._positions[row]),
                "distance": w["distance"],
                "verdict": self._verdict(w),
                "student": self._decode(w["student"]),
                "teacher": self._decode(w["teacher"]),
            }
            for row, w in self.windows.items()
        ]
        return pd.DataFrame(rows, columns=columns).sort_values(
            "distance", ascending=False, kind="stable", ignore_index=True
        )

    def at(self, row: int, window: int | None = None) -> dict[str, Any]:
        """Ask for new windows from before a token, and keep them in `table`.

        Both policies write greedily; distance and plan are exact.

        Args:
            row: A row of `df`.
            window: Tokens of each text; by default as many as the longest window has.

        Returns:
            The window: both texts as token ids, `distance` and `plan`.

        Raises:
            OpdlabError: No policies were handed in, or there is no such row.
        """
        from opdlab.methods import windows

        prompt, prefix = self._begin(row)
        size = window or self._size
        texts = {side: self._write(side, prompt, prefix, size) for side in SIDES}
        pair = [texts["student"]], [texts["teacher"]]
        try:
            cost = windows.costs(*pair, "student", self.policies)
        except MissingPolicy:  # a student without token embeddings
            cost = windows.costs(*pair, "onehot", self.policies)
        distance, plans = windows.solve(cost)
        self.windows[row] = {
            **texts,
            "distance": float(distance[0]),
            "plan": plans[0].tolist(),
            "asked": True,
        }
        return self.windows[row]

    def continue_text(self, row: int, side: str, tokens: int | None = None) -> str:
        """Return the text that a policy writes greedily from before a token.

        Args:
            row: A row of `df`.
            side: "student" or "teacher".
            tokens: Tokens to write; by default as many as the longest completion has left.

        Returns:
            The text, without what stands before the token.

        Raises:
            OpdlabError: No policies were handed in, or there is no such row.
        """
        prompt, prefix = self._begin(row)
        room = tokens or max(int(self._positions.max()) + 1 - len(prefix), LEFT)
        return self._decode(self._write(side, prompt, prefix, room))

    def answer(self, question: Mapping[str, Any]) -> Any:
        """Return new windows, or the text that one side goes on with, from before a row.

        Args:
            question: `row`, and `do`: "windows" for new windows; else also `side`, "student" or
                "teacher", whose text is wanted.

        Returns:
            The window as the page reads it, or `{"text": …}`.

        Raises:
            OpdlabError: There is no such side or row, or no policies were handed in.
        """
        row = int(question["row"])
        if question["do"] == "windows":
            return self._describe_window(row, self.at(row))
        side = str(question["side"])
        if side not in SIDES:
            raise OpdlabError(f"There is no side {side!r}. Ask for student or teacher.")
        return {"text": self.continue_text(row, side)}

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/forks.js` reads them.
        """
        channel = self._channel
        drawn = describe_channel(channel, channel.limit) | {"peaks": sorted(self.windows)}
        return {
            "title": self.title,
            "text": payload.describe_text(self.trace),
            "channel": drawn,
            "asks": self._can_ask,
            "windows": [self._describe_window(row, window) for row, window in self.windows.items()],
            "size": self._size,
        }

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with a table of the windows; every foreign string in it is escaped.
        """
        names = ("token", "distance", "verdict", "the student goes on", "the teacher goes on")
        head = "".join(f"<th>{name}</th>" for name in names)
        rows = "".join(_table_row(window) for window in self.table.to_dict("records"))
        return (
            f"{markup.draw_title(self.title)}"
            f'<div class="opd-bar"><span>{markup.escape(self._count)}</span></div>'
            f'<div class="opd-fork-table"><table><tr>{head}</tr>{rows}</table></div>'
        )

    def __repr__(self) -> str:
        lines = [
            f"{w['sample']}:{w['position']}  {markup.format_number(w['distance'])}  {w['verdict']} "
            f" {w['student']!r} | {w['teacher']!r}"
            for w in self.table.head(SHOWN).to_dict("records")
        ]
        more = [f"… {len(self.windows) - SHOWN} more"] if len(self.windows) > SHOWN else []
        head = f"Forks: {self.title + ', ' if self.title else ''}{self._count}"
        bars = markup.draw_sparkline_of(self.trace, self._channel, self.selected)
        return "\n".join([head, *bars, *lines, *more])

    @cached_property
    def _samples(self) -> np.ndarray:
        return self.trace.column("sample")

    @cached_property
    def _positions(self) -> np.ndarray:
        return self.trace.column("position")

    @cached_property
    def _rows(self) -> dict[tuple[int, int], int]:
        places = zip(self._samples.tolist(), self._positions.tolist(), strict=True)
        return {place: row for row, place in enumerate(places)}

    @property
    def _can_ask(self) -> bool:
        return set(SIDES) <= set(self.policies)

    @property
    def _count(self) -> str:
        real = sum(self._verdict(w) == VERDICTS[1] for w in self.windows.values())
        return (
            f"{len(self.windows)} tokens of high loss: {real} real forks,"
            f" {len(self.windows) - real} false alarms (distance above"
            f" {markup.format_number(self.threshold)} or not)"
        )

    @property
    def _size(self) -> int:
        """Tokens of the longest text."""
        sizes = [len(window[side]) for window in self.windows.values() for side in SIDES]
        return max(sizes, default=LEFT)

    @property
    def _channel(self) -> Channel:
        """The log ratio, or another channel where the trace has none."""
        found = find_channels(self.trace)
        plain = Channel("none", "no numbers", np.zeros(len(self.trace)))
        return found.get("log_ratio") or next(
            (c for c in found.values() if c.kind in ("ratio", "amount")), plain
        )

    def _verdict(self, window: Mapping[str, Any]) -> str:
        return VERDICTS[window["distance"] > self.threshold + SAME]

    def _begin(self, row: int) -> tuple[Prompt, list[int]]:
        """The prompt of a row's completion and the tokens before it."""
        if not self._can_ask:
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
        prompt = self._make_prompt(sample) if self.prompts is None else self.prompts[sample]
        return prompt, ids

    def _make_prompt(self, sample: int) -> Prompt:
        """A prompt of the trace as a user's message, or as plain text without a chat template."""
        text = str(self.trace.meta["prompts"][sample])
        chat = getattr(self.policies["student"].tokenizer, "chat_template", None)
        return Prompt(messages=({"role": "user", "content": text},)) if chat else Prompt(text=text)

    def _write(self, side: str, prompt: Prompt, prefix: list[int], size: int) -> list[int]:
        rollout = self.policies[side].sample(
            [prompt], prefixes=[prefix], temperature=0, max_new_tokens=size
        )
        return list(rollout.completions()[0])

    def _find_pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of tokens, which the trace knows only of those that occur in it."""
        known = self.trace.meta["vocab"]
        if "student" in self.policies and any(str(i) not in known for i in ids):
            return token_bytes(self.policies["student"].tokenizer, list(ids))
        return [self.trace.piece(i) if str(i) in known else f"‹{i}›".encode() for i in ids]

    def _decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._find_pieces(ids)).decode("utf-8", "replace")

    def _show_pieces(self, ids: Sequence[int]) -> list[str]:
        return [payload.shorten_word(show_piece(piece)) for piece in self._find_pieces(ids)]

    def _describe_window(self, row: int, window: Mapping[str, Any]) -> dict[str, Any]:
        """A window as the page reads it: tokens by name, which are the same, the plan by rows."""
        words = {side: self._show_pieces(window[side]) for side in SIDES}
        same = [[int(s == t) for t in window["teacher"]] for s in window["student"]]
        return {
            "row": row,
            "distance": window["distance"],
            **words,
            "same": same,
            "plan": window.get("plan"),
            "asked": window["asked"],
        }


def _find_windows(trace: Trace) -> list[dict[str, Any]]:
    """The windows of the trace's notes that have all fields."""
    note = trace.note(Windows)
    return [window for window in note.windows if set(window) >= FIELDS] if note else []


def _table_row(window: Mapping[str, Any]) -> str:
    cells = [
        f"{window['sample']}:{window['position']}",
        markup.format_number(window["distance"]),
        window["verdict"],
        markup.escape(window["student"]),
        markup.escape(window["teacher"]),
    ]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _read_window(note: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "student": [int(i) for i in note["student"]],
        "teacher": [int(i) for i in note["teacher"]],
        "distance": float(note["distance"]),
        "plan": note.get("plan"),
        "asked": False,
    }
