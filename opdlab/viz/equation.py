"""Equation: the formula of the loss with one token's numbers, and the slope on its top tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from opdlab.data.formula import Formula, read_formula
from opdlab.data.trace import Trace
from opdlab.errors import InvalidValue, OpdlabError, UnknownColumn
from opdlab.support.expect import expect
from opdlab.support.validation import Text, Unchecked, Whole, validate_arguments
from opdlab.viz import markup, payload
from opdlab.viz.channel import Channel, describe_channel
from opdlab.viz.channels import find_channels, find_log_probs
from opdlab.viz.duel import find_duel
from opdlab.viz.given import select_completion
from opdlab.viz.glyphs import group_pieces, show_piece
from opdlab.viz.made_up import make_trace
from opdlab.viz.turns import learned_rows
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

GRADIENTS = ("logit_gradient", "logp_gradient")
TARGET = "target"  # the name of a soft target in a formula, and of its column of token ids


class Equation(View):
    """The loss of one token, filled in: formula, numbers, result, and which tokens it moves.

    The formula is that of the trace (`score(…, method=…)` and `step.trace()` keep it), or that of
    `method`. A method without one gets the general form: what went into its loss, and what came
    out. Sums run over the kept top tokens and one bucket for all others, so a divergence reads as a
    lower bound of the recorded one. A trace of a run with `trace_k=…` explains an update by itself:
    it has the gradients too.

    Args:
        trace: The trace.
        method: A method or a loss of your own; with it, the gradient on the top tokens is computed
            (`opdlab.audit.what_if.with_gradients`). Traces that have such columns need none.
        sample: The completion.
        title: The title above.

    Attributes:
        trace: The rows of the completion.
        formula: The formula, or None.
        method: The method's name; "" where nobody knows it.

    Raises:
        OpdlabError: The trace has no such completion or no numbers.
        InvalidValue: `method` is no method, or declares something that is no formula.
    """

    caption = "What is the loss of one token made of, and which tokens does it move?"
    name, scripts, styles = "equation", ("equation.js",), ("equation.css",)

    @validate_arguments
    def __init__(
        self,
        trace: Unchecked[Trace],
        method: Unchecked[Any] = None,
        sample: Whole = 0,
        title: Text = "",
    ) -> None:
        super().__init__()
        expect(trace, Trace, type(self).__name__, "trace")
        self.sample, self.title = sample, title
        rows = select_completion(trace, sample)
        text, self.method = trace.meta.get("formula", ""), str(trace.meta.get("method") or "")
        if method is not None:
            rows, text, self.method = _differentiate(rows, method)
        self.trace = rows
        self.formula = _read(text)
        self.channels = _find_inputs(rows, self.formula)
        if not self.channels:
            raise OpdlabError(
                "The trace has no numbers to fill in. Make it with opdlab.score(…, method=…), or"
                " take one of training: step.trace()."
            )
        self.values = self._evaluate()
        shown = self._shown()
        self.selected = next(iter(shown.peaks()), 0 if len(rows) else -1)

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` is a trace with a loss per token.

        Args:
            given: Anything.
            sample: Not used.

        Returns:
            Whether the view can be made of it.
        """
        if not isinstance(given, Trace) or not len(given):
            return False
        return "loss" in given.table.column_names or bool(given.meta.get("formula"))

    @classmethod
    def of_trace(cls, trace: Trace, sample: int = 0) -> Self:
        """Make the view of a completion.

        Args:
            trace: A trace that the view fits.
            sample: The completion.

        Returns:
            The view.
        """
        return cls(trace, sample=sample)

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make the view of a completion under the reverse KL.

        Args:
            tokens: The bytes of the completion's tokens.
            words: All other texts: title, prompt, names.

        Returns:
            The view.
        """
        trace = make_trace(tokens, prompt=words, finish=words)
        support = trace.column("support").shape[1] + 1 if len(trace) else 1
        rng = np.random.default_rng(0)
        gradient = rng.normal(size=(len(trace), support))
        filled = trace.with_columns(
            type=[words] * len(tokens),
            loss=trace.column("teacher_reverse_kl"),
            logit_gradient=gradient - gradient.mean(1, keepdims=True),
            logp_gradient=gradient,
        )
        meta = {**filled.meta, "formula": "sum(student * log(student / teacher))"}
        return cls(Trace(filled.table, meta), title=words)

    @property
    def df(self) -> pd.DataFrame:
        """The trace's rows of this completion with each token's name and the formula's value."""
        return self.trace.to_pandas().assign(
            token=[show_piece(piece) for piece in self.trace.tokens()], value=self.values
        )

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/equation.js` reads them.
        """
        have = self.trace.table.column_names
        beside = {name: self.trace.column(name).astype(float) for name in GRADIENTS if name in have}
        if self.formula and TARGET in self.formula.policies:
            target = _target_on(self.trace)
            beside |= {} if target is None else {TARGET: target}
        return {
            "title": self.title,
            "prompt": str(self.trace.meta["prompts"][self.sample]),
            "finish": str(self.trace.meta["finish"][self.sample]),
            "policies": self.trace.policies,
            "text": payload.describe_text(self.trace),
            "duel": find_duel(self.trace, beside),
            "method": self.method,
            "formula": self.formula.text if self.formula else "",
            "tree": self.formula.tree if self.formula else [],
            "values": self.values.astype(np.float32),
            "channels": [_describe(channel) for channel in self.channels.values()],
            "shown": self._shown().key,
        }

    def static(self) -> str:
        """Return the picture as HTML without a script.

        Returns:
            Markup with the formula and the strip; every foreign string in it is escaped.
        """
        chosen = self._shown()
        said = self.formula.text if self.formula else "a function of the numbers of each token"
        return (
            f"{markup.draw_title(self.title)}"
            f"{markup.draw_prompt(str(self.trace.meta['prompts'][self.sample]))}"
            f'<div class="opd-bar"><span>loss = {markup.escape(said)}</span>'
            f"{markup.draw_legend(chosen, chosen.limit)}</div>"
            + markup.draw_strip_box(
                group_pieces(self.trace.tokens()),
                chosen,
                chosen.limit,
                str(self.trace.meta["finish"][self.sample]),
                learned_rows(self.trace),
            )
        )

    def __repr__(self) -> str:
        said = self.formula.text if self.formula else "no formula"
        head = f"Equation: {self.title or f'completion {self.sample}'}, {len(self.trace)} tokens"
        lines = [f"{head}, loss = {said}", markup.draw_sparkline(self._shown())]
        if len(self.trace) and self.selected >= 0:
            row = self.selected
            values = ", ".join(
                f"{key} {markup.format_number(channel.values[row])}"
                for key, channel in self.channels.items()
                if not channel.names and not np.isnan(channel.values[row])
            )
            lines.append(f"{show_piece(self.trace.tokens()[row])} (position {row}): {values}")
        return "\n".join(lines)

    def _shown(self) -> Channel:
        """The channel that colours the strip."""
        return self.channels.get("loss") or next(iter(self.channels.values()))

    def _evaluate(self) -> np.ndarray:
        """The formula's value at every token; NaN where the trace cannot say."""
        nothing = np.full(len(self.trace), np.nan)
        if self.formula is None:
            return nothing
        have = self.trace.table.column_names
        columns = {name: self.trace.column(name) for name in self.formula.names if name in have}
        columns |= {name: self.trace.column(name) for name in self.formula.policies if name in have}
        try:
            return np.broadcast_to(
                self.formula.evaluate(columns, _probabilities(self.trace)), nothing.shape
            )
        except UnknownColumn:  # as a trace of training, which keeps no top tokens
            return nothing


def _read(text: Any) -> Formula | None:
    """The formula of a trace; a file may hold anything."""
    if not text:
        return None
    try:
        return read_formula(text)
    except InvalidValue:
        return None


def _differentiate(trace: Trace, method: Any) -> tuple[Trace, str, str]:
    """The trace with the loss of a method and its gradient, the method's formula and its name."""
    from opdlab.audit.what_if import what_if, with_gradients
    from opdlab.methods.contract import name_of
    from opdlab.methods.conversion import as_method
    from opdlab.methods.formulas import formula_of

    chosen = as_method(method, "Equation")
    name = name_of(chosen)
    if not len(trace):
        return trace, formula_of(chosen), name
    found = with_gradients(trace, method)
    if "loss" not in found.table.column_names:
        found = what_if(found, method)
    return found, formula_of(chosen, found.table.column_names), name


def _probabilities(trace: Trace) -> dict[str, np.ndarray]:
    """Probabilities of every policy on the kept tokens and in the bucket of all others."""
    have, out = trace.table.column_names, {}
    for name in trace.policies:
        if {"support", f"{name}_top", f"{name}_tail"} <= set(have):
            top = np.exp(trace.column(f"{name}_top").astype(float))
            top = np.where(trace.column("support") < 0, 0.0, top)
            # As in `what_if`: of an empty bucket, rounding leaves nothing that a KL would count.
            tail = np.clip(trace.column(f"{name}_tail").astype(float), np.exp(-200), 1)
            out[name] = np.concatenate([top, tail[:, None]], 1)
    target = _target_on(trace)
    return out if target is None else {**out, TARGET: target}


def _target_on(trace: Trace) -> np.ndarray | None:
    """The mass of a soft target on the kept tokens and in the bucket of all others."""
    if not {"support", TARGET, f"{TARGET}_weight"} <= set(trace.table.column_names):
        return None
    support, ids = trace.column("support"), trace.column(TARGET)
    weight = trace.column(f"{TARGET}_weight").astype(float)
    if not (len(trace) and ids.ndim == weight.ndim == support.ndim == 2):
        return None
    out = np.zeros((len(trace), support.shape[1] + 1))
    for place in range(ids.shape[1]):
        is_here = support == ids[:, place, None]
        out[:, :-1] += is_here * weight[:, place, None]
        out[:, -1] += np.where(is_here.any(1), 0.0, weight[:, place])
    return out


def _find_inputs(trace: Trace, formula: Formula | None) -> dict[str, Channel]:
    """The numbers of each token: those that the formula reads first, then all channels."""
    found = find_log_probs(trace) | find_channels(trace)
    names = [name for name in (formula.names if formula else []) if name in found]
    return {key: found[key] for key in dict.fromkeys([*names, *found])}


def _describe(channel: Channel) -> dict[str, Any]:
    """A channel as the page reads it, with single precision where it is filled in."""
    described = describe_channel(channel, channel.limit)
    if not channel.names and len(channel.values) <= payload.LONG:
        with np.errstate(over="ignore"):
            described["values"] = np.asarray(channel.values, np.float32)
    return described
