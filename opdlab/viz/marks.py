"""Marks: give tokens labels and comments, by hand, and keep them beside the trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from opdlab.data.labels import FORMAT, LONGEST_COMMENT, LONGEST_LABEL, Labels
from opdlab.data.trace import Trace
from opdlab.errors import OpdlabError
from opdlab.support.expect import expect
from opdlab.support.validation import Text, Unchecked, Whole, validate_arguments
from opdlab.viz import markup, payload
from opdlab.viz.channel import Channel
from opdlab.viz.given import select_completion
from opdlab.viz.glyphs import group_pieces, show_piece
from opdlab.viz.made_up import make_trace
from opdlab.viz.traits import Trait
from opdlab.viz.turns import learned_rows
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self


class Marks(View):
    """Label tokens of a completion and write comments. Where the view is live, Python keeps them.

    `Marks(trace, Labels.beside("trace.parquet")).live()` writes every change to the file beside the
    trace. A page without a kernel keeps the labels until it is closed, and offers them as a file
    for `Labels(trace, file)`.

    Args:
        trace: The trace.
        labels: The labels (`opdlab.data.labels.Labels`); new ones without a file by default.
        sample: The completion.
        title: The title above.

    Attributes:
        marks: The labels of all completions, as dicts; a change is checked and saved.
        labels: The labels.
        trace: The rows of the completion.

    Raises:
        OpdlabError: The trace has no such completion.
        InvalidValue: The labels are those of another trace.
    """

    caption = "What did you find in this text?"
    name, scripts, styles = "marks", ("marks.js",), ("marks.css",)
    marks = Trait([])

    @validate_arguments
    def __init__(
        self,
        trace: Unchecked[Trace],
        labels: Unchecked[Labels | None] = None,
        sample: Whole = 0,
        title: Text = "",
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        if labels is not None and not isinstance(labels, Labels):
            raise OpdlabError(
                f"Marks got a {type(labels).__name__} for labels. Open them with"
                " Labels.beside('trace.parquet')."
            )
        self.labels = Labels(trace) if labels is None else labels
        self.labels.add_to(trace)  # refuses those of another trace
        self.sample, self.title = sample, title
        self.trace = select_completion(trace, sample)
        self._traits["marks"] = self.labels.as_json()
        self.selected = 0 if len(self.trace) else -1

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is a trace with labels, as `Labels.add_to` makes one.

        Args:
            given: Anything.
            sample: Not used.

        Returns:
            Whether it is a trace with labels.
        """
        return isinstance(given, Trace) and "label" in given.table.column_names and len(given) > 0

    @classmethod
    def of_trace(cls, trace: Trace, sample: int = 0) -> Self:
        """Make the view of a completion, with the labels in the trace's column `label`.

        Args:
            trace: A trace that the view fits.
            sample: The completion.

        Returns:
            The view.
        """
        return cls(trace, _labels_of_column(trace), sample)

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make the view of a completion with a label on its second token.

        Args:
            tokens: The bytes of the completion's tokens.
            words: All other texts: title, prompt, label, comment.

        Returns:
            The view.
        """
        trace = make_trace(tokens, prompt=words, finish=words)
        labels = Labels(trace)
        label = "".join(c for c in words if c.isprintable()).strip()[:LONGEST_LABEL] or "label"
        labels.add(0, min(1, len(tokens) - 1), label, words)
        return cls(labels.add_to(trace), labels, title=words)

    def _set(self, name: str, value: Any) -> None:
        """Check and save labels that came from the page, or from the user."""
        if name == "marks":
            value = self.labels.replace(value)
        super()._set(name, value)

    @property
    def df(self) -> pd.DataFrame:
        """The trace's rows of this completion with `token`, `label` and `comment` ("" for none)."""
        label, comment = [""] * len(self.trace), [""] * len(self.trace)
        for mark in self._own():
            for position in range(mark["position"], mark["position"] + mark["length"]):
                label[position], comment[position] = mark["label"], mark["comment"]
        return self.trace.to_pandas().assign(
            token=[show_piece(piece) for piece in self.trace.tokens()],
            label=label,
            comment=comment,
        )

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/marks.js` reads them.
        """
        return {
            "title": self.title,
            "prompt": str(self.trace.meta["prompts"][self.sample]),
            "finish": str(self.trace.meta["finish"][self.sample]),
            "text": payload.describe_text(self.trace),
            "sample": self.sample,
            "is_kept": self.labels.path is not None,
            "file": {"format": FORMAT, "tokens": self.labels.fingerprint},
            "longest": [LONGEST_LABEL, LONGEST_COMMENT],
        }

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with the strip and the comments; every foreign string in it is escaped.
        """
        kind = self._channel()
        lines = "".join(f"<div>{markup.escape(line)}</div>" for line in self._lines())
        return (
            f"{markup.draw_title(self.title)}"
            f"{markup.draw_prompt(str(self.trace.meta['prompts'][self.sample]))}"
            f'<div class="opd-bar">{markup.draw_legend(kind, kind.limit)}</div>'
            + markup.draw_strip_box(
                group_pieces(self.trace.tokens()),
                kind,
                kind.limit,
                str(self.trace.meta["finish"][self.sample]),
                learned_rows(self.trace),
            )
            + f'<div class="opd-still">{lines}</div>'
        )

    def __repr__(self) -> str:
        head = f"Marks: {self.title or f'completion {self.sample}'}, {len(self._own())} labels"
        bars = markup.draw_sparkline(Channel("", "", (self.df["label"] != "").to_numpy(float)))
        return "\n".join([head, bars, *self._lines()])

    def _own(self) -> list[dict[str, Any]]:
        return [mark for mark in self.marks if mark["sample"] == self.sample]

    def _channel(self) -> Channel:
        names = tuple(dict.fromkeys(str(mark["label"]) for mark in self._own())) or ("none",)
        given = self.df["label"].tolist()
        values = np.array([names.index(one) if one else np.nan for one in given], float)
        return Channel("label", "label", values, "", "category", names=names, marks=names)

    def _lines(self) -> list[str]:
        pieces = self.trace.tokens()
        lines = []
        for mark in self._own():
            first, last = mark["position"], mark["position"] + mark["length"]
            text = " ".join(show_piece(piece) for piece in pieces[first:last])
            said = f": {mark['comment']}" if mark["comment"] else ""
            lines.append(f"{text} (position {first}) {mark['label']}{said}")
        return lines


def _labels_of_column(trace: Trace) -> Labels:
    """The labels in a trace's column `label`, neighbours with the same one together."""
    labels = Labels(trace)
    names = trace.describe("label").labels
    values = trace.table["label"].to_pylist()
    samples, positions = trace.column("sample").tolist(), trace.column("position").tolist()
    marks: list[dict[str, Any]] = []
    for value, sample, position in zip(values, samples, positions, strict=True):
        name = (
            names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value
        )
        if not isinstance(name, str) or not name.strip():
            continue
        last = marks[-1] if marks else None
        if last and (last["sample"], last["label"], last["position"] + last["length"]) == (
            sample,
            name,
            position,
        ):
            last["length"] += 1
        else:
            marks.append({"sample": sample, "position": position, "label": name, "length": 1})
    labels.replace(marks)
    return labels
