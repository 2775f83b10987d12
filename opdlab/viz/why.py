"""Why: what weighed in the teacher's wish at a token, and where in depth the two models part."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from opdlab.data.reasons import Depth, Reading, Reason, load_reasons, save_reasons
from opdlab.data.trace import Trace
from opdlab.errors import InvalidValue, OpdlabError, UnsupportedModel
from opdlab.support.expect import expect, shortened
from opdlab.support.validation import ByName, Text, Unchecked, Whole, validate_arguments
from opdlab.viz import markup, payload
from opdlab.viz.channel import Channel, describe_channel
from opdlab.viz.channels import find_channels
from opdlab.viz.given import select_completion
from opdlab.viz.glyphs import show_piece
from opdlab.viz.lines import Line, Plot
from opdlab.viz.made_up import make_trace
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

    from opdlab.data.rollout import Rollout

LARGEST = 5  # weights that are listed in words
SIDES = ("teacher", "student")


class Why(View):
    """Why teacher and student gave a token their probabilities: input weights, and layers.

    The weights are gradient times input of the token's log-prob over hint, prompt and prefix
    (`opdlab.diagnose.attribute`). The layers are those of the logit lens, for two models of one
    architecture (`opdlab.diagnose.depth`). What was computed once is drawn without a model; a live
    page with `policies` and the `rollout` asks for more. Choosing a token in another view of the
    page, such as `PrivilegeLens`, chooses it here: a large share of the hint is a leak.

    Args:
        trace: The trace of the rollout.
        reasons: What was computed already, or the path of a file that `save` wrote.
        policies: `student` and `teacher`, to ask for more; the teacher with its hint
            (`teacher.seeing()`) where it has one.
        rollout: The rollout that was graded.
        sample: The completion.
        title: The title above.

    Attributes:
        reasons: The weights of this completion, by position.
        depths: The layers of this completion, by position.
        trace: The rows of the completion.

    Raises:
        OpdlabError: The trace has no such completion, or there is nothing to draw and nobody to
            ask.
        InvalidValue: A reason belongs to another text.
    """

    caption = "Why did the teacher want it, and where in depth do the two part?"
    takes = "a trace, with reasons or with policies"
    name, scripts, styles = "why", ("why.js",), ("lines.css", "why.css")

    @validate_arguments
    def __init__(
        self,
        trace: Unchecked[Trace],
        reasons: Unchecked[Sequence[Reason | Depth] | str | os.PathLike[str]] = (),
        policies: ByName | None = None,
        rollout: Unchecked[Rollout | None] = None,
        sample: Whole = 0,
        title: Text = "",
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        if rollout is not None:
            _expect_rollout(rollout, type(self).__name__)
        self.trace = select_completion(trace, sample)
        self.sample, self.title = sample, title
        self.policies, self.rollout = dict(policies or {}), rollout
        self.reasons: dict[int, Reason] = {}
        self.depths: dict[int, Depth] = {}
        given = load_reasons(reasons) if isinstance(reasons, (str, os.PathLike)) else reasons
        for one in given:
            self._add(one)
        if not self.reasons and not self.depths and not self._can_ask:
            raise OpdlabError(
                "There is nothing to draw. Compute it with opdlab.diagnose.attribute(rollout,"
                " student, teacher, sample, position), or hand in policies={'student': …,"
                " 'teacher': …} and rollout=… to ask here."
            )
        self.selected = next(iter({**self.reasons, **self.depths}), 0)

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return False: a trace alone has no reasons.

        Args:
            given: Anything.
            sample: Not used.

        Returns:
            False.
        """
        return False

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make the view of made-up weights and layers at the last token.

        Args:
            tokens: The bytes of the completion's tokens.
            words: All other texts: title, prompt.

        Returns:
            The view.
        """
        trace = make_trace(tokens, prompt=words, finish=words)
        at = max(0, len(tokens) - 1)
        said = words.encode("utf-8", "replace").decode("latin-1")
        pieces = [said, said, *(piece.decode("latin-1") for piece in tokens[:at])]
        parts = ["hint", "prompt", *["prefix"] * at]
        parts[-1] = "last"
        weights = np.linspace(-1, 1, len(pieces)).tolist()
        teacher = Reading(-0.1, pieces, parts, weights)
        student = Reading(-2.0, pieces[1:], parts[1:], weights[1:])
        ids = trace.column("token_id").tolist()
        reason = Reason(0, at, ids[at], tokens[at].decode("latin-1"), teacher, student)
        layers = Depth(0, at, [0.0, 0.1, 0.8, 0.7], [-4, -3, -2, -2.0], [-4, -3, -1, -0.1])
        return cls(trace, [reason, layers], title=words)

    def ask(self, row: int) -> None:
        """Compute the weights of a token, and its layers where both models have as many.

        Args:
            row: A row of `df`.

        Raises:
            OpdlabError: No policies were handed in, or there is no such row.
        """
        if not self._can_ask or self.rollout is None:
            raise OpdlabError(
                "Nobody can be asked. Make it with Why(trace, policies={'student': …, 'teacher':"
                " …}, rollout=rollout)."
            )
        if not 0 <= row < len(self.trace):
            raise OpdlabError(
                f"The completion has tokens 0 to {len(self.trace) - 1}, not {shortened(row)}. Give"
                " one of these."
            )
        from opdlab.diagnose.attribution import attribute, depth

        given = (self.rollout, self.policies["student"], self.policies["teacher"])
        self._add(attribute(*given, self.sample, int(row)))
        try:
            self._add(depth(*given, self.sample, int(row)))
        except (InvalidValue, UnsupportedModel):
            return  # of two architectures, no layer stands for another

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write weights and layers to a file, atomically, for `Why(trace, path)`.

        Args:
            path: The file.

        Returns:
            The path.
        """
        return save_reasons([*self.reasons.values(), *self.depths.values()], path)

    def answer(self, question: Mapping[str, Any]) -> Any:
        """Compute the reasons of a row.

        Args:
            question: `row`.

        Returns:
            The reasons as the page reads them.

        Raises:
            OpdlabError: There is no such row, or no policies were handed in.
        """
        row = int(question["row"])
        self.ask(row)
        return payload.to_plain_data(self._describe(row))

    @property
    def df(self) -> pd.DataFrame:
        """The trace's rows of this completion with `token` and, where known, `hint_share`."""
        share = [
            self.reasons[i].teacher.shares()["hint"] if i in self.reasons else np.nan
            for i in range(len(self.trace))
        ]
        return self.trace.to_pandas().assign(
            token=[show_piece(piece) for piece in self.trace.tokens()], hint_share=share
        )

    @property
    def table(self) -> pd.DataFrame:
        """One row per position and policy: `logp`, and the shares of `hint`, `prompt`, `prefix`."""
        rows = [
            {"position": position, "policy": side, "logp": reading.logp, **reading.shares()}
            for position, reason in self.reasons.items()
            for side in SIDES
            for reading in [getattr(reason, side)]
        ]
        return pd.DataFrame(rows)

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/why.js` reads them.
        """
        channel = self._channel
        rows = self._rows
        return {
            "title": self.title,
            "prompt": str(self.trace.meta["prompts"][self.sample]),
            "finish": str(self.trace.meta["finish"][self.sample]),
            "text": payload.describe_text(self.trace),
            "channel": describe_channel(channel, channel.limit) | {"peaks": rows},
            "asks": self._can_ask,
            "reasons": [self._describe(row) for row in rows],
        }

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with a line per position and policy; every foreign string in it is escaped.
        """
        lines = "".join(f"<div>{markup.escape(line)}</div>" for line in self._lines())
        return (
            f"{markup.draw_title(self.title)}"
            f"{markup.draw_prompt(str(self.trace.meta['prompts'][self.sample]))}"
            f'<div class="opd-still">{lines}</div>'
        )

    def __repr__(self) -> str:
        head = f"Why: {self.title or f'completion {self.sample}'}, {len(self._rows)} tokens asked"
        return "\n".join([head, markup.draw_sparkline(self._channel), *self._lines()])

    @property
    def _rows(self) -> list[int]:
        return sorted({*self.reasons, *self.depths})

    @property
    def _can_ask(self) -> bool:
        return set(SIDES) <= set(self.policies) and self.rollout is not None

    @cached_property
    def _channel(self) -> Channel:
        """The log ratio, or another channel where the trace has none."""
        found = find_channels(self.trace)
        plain = Channel("none", "no numbers", np.zeros(len(self.trace)))
        return found.get("log_ratio") or next(
            (one for one in found.values() if one.kind in ("ratio", "amount")), plain
        )

    def _add(self, one: Any) -> None:
        """Keep what belongs to this completion; refuse what belongs to another text."""
        if not isinstance(one, (Reason, Depth)):
            raise InvalidValue(
                f"Why got {shortened(one)} for a reason. Give what opdlab.diagnose.attribute and"
                " depth make, or the path of their file."
            )
        if one.sample != self.sample:
            return
        ids = self.trace.column("token_id").tolist()
        is_other = one.position >= len(ids)
        if isinstance(one, Reason) and one.position and not is_other:
            read = zip(one.teacher.pieces, one.teacher.parts, strict=True)
            prefix = "".join(piece for piece, part in read if part in ("prefix", "last"))
            is_other = prefix != "".join(
                self.trace.meta["vocab"][str(i)] for i in ids[: one.position]
            )
        if is_other:
            raise InvalidValue(
                f"A reason at position {one.position} of completion {one.sample} belongs to another"
                " text. Draw it with the trace of the rollout that it was computed from."
            )
        kept: dict[int, Any] = self.reasons if isinstance(one, Reason) else self.depths
        kept[one.position] = one

    def _describe(self, row: int) -> dict[str, Any]:
        """All that is known of a row, as the page reads it."""
        reason, layers = self.reasons.get(row), self.depths.get(row)
        sides = []
        if reason:
            limit = max(
                (abs(w) for side in SIDES for w in getattr(reason, side).weights), default=1.0
            )
            sides = [
                {"name": side, "limit": limit or 1.0, **_read_side(getattr(reason, side))}
                for side in SIDES
            ]
        token = show_piece(reason.token.encode("latin-1")) if reason else ""
        return {
            "row": row,
            "token": payload.shorten_word(token),
            "sides": sides,
            "depth": _plot(layers).data() if layers else None,
        }

    def _lines(self) -> list[str]:
        lines = []
        for position, reason in self.reasons.items():
            for side in SIDES:
                reading = getattr(reason, side)
                shares = ", ".join(
                    f"{part} {100 * x:.0f} %" for part, x in reading.shares().items()
                )
                lines.append(
                    f"position {position}, {show_piece(reason.token.encode('latin-1'))}: {side}"
                    f" {markup.format_number(reading.logp)} nats; {shares}"
                )
        for position, layers in self.depths.items():
            kl = ", ".join(markup.format_number(one) for one in layers.kl)
            lines.append(f"position {position}: KL by layer {kl} nats")
        return lines


def _expect_rollout(value: Any, where: str) -> None:
    """Refuse what is no rollout; only a view that may ask a model imports the class."""
    from opdlab.data.rollout import Rollout

    expect(value, Rollout, where, "rollout")


def _read_side(reading: Reading) -> dict[str, Any]:
    """A reading as the page reads it, with its largest weights in words."""
    seen = [payload.shorten_word(show_piece(p.encode("latin-1"))) for p in reading.pieces]
    order = sorted(range(len(seen)), key=lambda i: -abs(reading.weights[i]))
    return {
        "logp": reading.logp,
        "pieces": seen,
        "parts": reading.parts,
        "weights": reading.weights,
        "shares": reading.shares(),
        "largest": order[:LARGEST],
    }


def _plot(layers: Depth) -> Plot:
    x = np.arange(len(layers.kl), dtype=float)
    y = np.array(layers.kl)
    finite = y[np.isfinite(y)]
    top = float(finite.max()) if len(finite) and finite.max() > 0 else 1.0
    return Plot(
        "depth",
        "KL of the two models after each layer, nats",
        [Line("KL", x, y, "amount")],
        told="0: embeddings",
        x=(0.0, float(len(y) - 1)),
        y=(0.0, top),
    )
