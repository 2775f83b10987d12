"""Scrubber: one text, or the answers to one prompt, at every step of a run that was kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from opdlab.data.trace import Trace
from opdlab.errors import InvalidValue, OpdlabError, UnknownColumn
from opdlab.support.expect import shortened
from opdlab.support.validation import Text, Unchecked, Whole, validate_arguments
from opdlab.viz import markup, payload
from opdlab.viz.channel import Channel, describe_channel
from opdlab.viz.channels import find_channels, find_labelled_kinds
from opdlab.viz.given import check_traces
from opdlab.viz.glyphs import group_pieces, show_piece
from opdlab.viz.lines import Line, Plot, find_range
from opdlab.viz.made_up import make_trace
from opdlab.viz.traits import Trait
from opdlab.viz.view import EXAMPLE_TOKENS, EXAMPLE_WORDS, View

if TYPE_CHECKING:
    from typing_extensions import Self

FINE = 30_000  # numbers of all steps together that travel in half precision
KPIS = {
    "reverse_kl": ("KL in training", "nats"),
    "length": ("length in training", "tokens"),
    "reward": ("reward in training", ""),
    "accuracy": ("accuracy, held out", ""),
}


class Scrubber(View):
    """The same tokens graded at every step of a run, or the texts that were written at every step.

    Where all steps have the same tokens, only the colours move, and a token's panel shows the path
    of its probability, and its kinds (a method's routes, types). Else the text moves, with the
    words that changed.

    Args:
        traces: A trace for each step, as `opdlab.training.snapshots.rescore` (the same tokens) or
            `rewrite` (new texts) make them.
        history: `run.history`, for the small curves above.
        sample: The completion.
        channel: The channel that colours at first.
        title: The title above.

    Attributes:
        step: The step shown; at first the last.
        delta: Whether the change since the first step is shown.
        against: The step that the words are compared with: "previous" or "first".
        channel: The key of the channel that colours.
        steps: The steps, in order.
        traces: The rows of the completion at each step.
        probe: Whether all steps have the same tokens.
        channels: The channel of each step, by the keys that all steps share; no categories.
        kinds: The category of each step, by the keys that all steps share with the same names.
        selected: The position looked at; at first the one that moved most, -1 where texts differ.

    Raises:
        InvalidValue: `traces` holds something else.
        OpdlabError: There are no traces, or they answer different prompts.
        UnknownColumn: A trace lacks the channel.
    """

    caption = "How does a token's fate change over training?"
    takes = "a trace for each step of a run"
    name, scripts, styles = "scrubber", ("scrubber.js",), ("lines.css", "scrubber.css")
    step = Trait(0)
    delta = Trait(False)
    against = Trait("previous")
    channel = Trait("log_ratio")

    @validate_arguments
    def __init__(
        self,
        traces: Unchecked[Mapping[int, Trace]],
        history: pd.DataFrame | None = None,
        sample: Whole = 0,
        channel: Text = "log_ratio",
        title: Text = "",
    ) -> None:
        super().__init__()
        if not isinstance(traces, Mapping):
            raise InvalidValue(
                f"Scrubber got traces={shortened(traces)}. Use traces by step, as"
                " snapshots.rescore(run, rollout) gives."
            )
        check_traces(traces, "Scrubber", "{0: trace, 10: trace}")
        if not traces:
            raise OpdlabError(
                "A Scrubber needs a trace of at least one step, and there is none. Give those of"
                " snapshots.rescore(…)."
            )
        self.sample, self.title, self.history = sample, title, history
        self.steps = sorted(int(step) for step in traces)
        self.traces = [_select_completion(traces[step], sample, step) for step in self.steps]
        ids = [trace.column("token_id").tolist() for trace in self.traces]
        self.probe = all(other == ids[0] for other in ids)
        self._same_prompt()
        found = [find_channels(trace) for trace in self.traces]
        shared = {
            key: [other[key] for other in found]
            for key in found[0]
            if all(key in other for other in found)
        }
        self.channels: dict[str, list[Channel]] = {}
        self.kinds: dict[str, list[Channel]] = {}
        for key, steps in shared.items():
            if steps[0].kind == "category":
                if len({one.names for one in steps}) == 1:
                    self.kinds[key] = steps
            elif not steps[0].names and (not steps[0].minor or key == channel):
                self.channels[key] = steps
        if not self.channels:
            raise UnknownColumn(
                "The traces have no numbers in common that could be drawn. Score them under the"
                " same policies: opdlab.score(rollout, student, teacher)."
            )
        if channel not in self.channels and channel != "log_ratio":
            raise UnknownColumn(
                f"The traces have no channel {channel!r} in common. They have"
                f" {', '.join(self.channels)}."
            )
        self.channel = channel if channel in self.channels else next(iter(self.channels))
        self.step = self.steps[-1]
        self.selected = next(iter(self._most_moved()), -1) if self.probe else -1

    @classmethod
    def fits(cls, given: object, sample: int = 0) -> bool:
        """Return whether `given` holds traces by step.

        Args:
            given: Anything.
            sample: Not used: the steps decide.

        Returns:
            Whether it is a mapping, not empty, from whole numbers to traces.
        """
        return (
            isinstance(given, Mapping)
            and bool(given)
            and all(isinstance(step, int) for step in given)
            and all(isinstance(trace, Trace) for trace in given.values())
        )

    @classmethod
    def example(cls, tokens: Sequence[bytes] = EXAMPLE_TOKENS, words: str = EXAMPLE_WORDS) -> Self:
        """Make a scrubber of two gradings of the same tokens.

        Args:
            tokens: The bytes of the tokens, the same in both traces.
            words: All other texts: title, prompt, names.

        Returns:
            The view.
        """
        first = make_trace(tokens, prompt=words, finish=words)
        first = first.with_columns(type=[words] * len(tokens))
        later = first.with_columns(student_logp=np.linspace(-2, 0, len(first)))
        return cls({0: first, 10: later}, title=words)

    @property
    def df(self) -> pd.DataFrame:
        """One row per token: of the step shown if all steps have the same tokens, else of all."""
        pairs = list(zip(self.steps, self.traces, strict=True))
        if self.probe:
            pairs = [pair for pair in pairs if pair[0] == self.step]
        frames = [
            t.to_pandas().assign(step=step, token=[show_piece(piece) for piece in t.tokens()])
            for step, t in pairs
        ]
        return pd.concat(frames, ignore_index=True)

    @property
    def table(self) -> pd.DataFrame:
        """One row for each step: its tokens, and the mean of every channel over them."""
        means = {key: [_mean(c.values) for c in found] for key, found in self.channels.items()}
        return pd.DataFrame({"step": self.steps, "length": [len(t) for t in self.traces], **means})

    def data(self) -> dict[str, Any]:
        """Return all that the script draws.

        Returns:
            Plain data and numpy arrays, as `static/scrubber.js` reads them.
        """
        text = (
            payload.describe_text(self.traces[0])
            if self.probe
            else payload.describe_text(_join_steps(self.traces, self.sample))
        )
        if not self.probe:  # the same texts as in other views of the page
            for one, trace in zip(text["texts"], self.traces, strict=True):
                one["key"] = payload.make_key(trace.column("token_id"), one["prompt"], self.sample)
        return {
            "title": self.title,
            "prompt": self._prompt,
            "finish": [str(t.meta["finish"][self.sample]) for t in self.traces],
            "probe": self.probe,
            "steps": self.steps,
            "text": text,
            "sizes": [len(t) for t in self.traces],
            "channels": [self._channel(found) for found in self.channels.values()],
            "facts": [plot.data() for plot in self._facts()],
            "fate": self._fate() if self.probe else None,
            "kinds": [self._kind(found) for found in self.kinds.values()],
            "words": None if self.probe else self._words(),
        }

    def static(self) -> str:
        """Return the first and the last step, coloured on one scale.

        Returns:
            Markup with a strip for each of both steps; every foreign string in it is escaped.
        """
        found = self.channels[self.channel]
        limit, out = _limit(found), []
        for at in dict.fromkeys((0, len(self.steps) - 1)):
            tokens = group_pieces(self.traces[at].tokens())
            out.append(f'<div class="opd-soft">step {self.steps[at]}</div>')
            out.append(markup.draw_strip_box(tokens, found[at], limit))
        said = "".join(
            markup.draw_words(line) for line in (self._describe_course(), *self._kinds_in_words())
        )
        return (
            f"{markup.draw_title(self.title)}{markup.draw_prompt(self._prompt)}"
            f'<div class="opd-bar">{markup.draw_legend(found[0], limit)}</div>{"".join(out)}{said}'
        )

    def __repr__(self) -> str:
        kind = "the same tokens, graded" if self.probe else "what was written"
        means = np.array([_mean(np.abs(c.values)) for c in self.channels[self.channel]])
        bars = markup.draw_sparkline(Channel("", "", means))
        title = self.title or f"completion {self.sample}"
        head = f"Scrubber: {title}, {kind} at {len(self.steps)} steps"
        return "\n".join([head, bars, self._describe_course(), *self._kinds_in_words()])

    def _set(self, name: str, value: Any) -> None:
        if name == "step" and value not in self.steps:
            raise OpdlabError(
                f"There is no step {value} here, only {', '.join(map(str, self.steps))}. Set step"
                " to one of these."
            )
        super()._set(name, value)

    @property
    def _prompt(self) -> str:
        return str(self.traces[0].meta["prompts"][self.sample])

    def _same_prompt(self) -> None:
        for step, trace in zip(self.steps, self.traces, strict=True):
            if trace.meta["prompts"][self.sample] != self._prompt:
                raise OpdlabError(
                    f"Completion {self.sample} answers {self._prompt[:60]!r} at step"
                    f" {self.steps[0]} and another prompt at step {step}. Give traces of one"
                    " prompt."
                )

    def _describe_course(self) -> str:
        """From what to what, in words."""
        found = self.channels[self.channel]
        first, last = (markup.format_number(_mean(np.abs(c.values))) for c in (found[0], found[-1]))
        said = (
            f"Mean size of the {found[0].label}: {first} at step {self.steps[0]}, {last} at step"
            f" {self.steps[-1]}"
        )
        if not self.probe:
            return said
        tokens = self.traces[0].tokens()
        moved = [
            f"{show_piece(tokens[i])} {markup.format_number(found[0].values[i], True)} →"
            f" {markup.format_number(found[-1].values[i], True)}"
            for i in self._most_moved()
        ]
        return f"{said}. Moved most: {', '.join(moved) or 'none'}"

    def _kinds_in_words(self) -> list[str]:
        """The shares of each kind at the first and the last step, of kinds that a method names."""
        out = []
        for key in find_labelled_kinds(self.traces[0]):
            for at in dict.fromkeys((0, len(self.steps) - 1)):
                if key in self.kinds:
                    shares = markup.count_names(self.kinds[key][at])
                    out.append(f"step {self.steps[at]}, {shares}")
        return out

    def _most_moved(self) -> list[int]:
        found = self.channels[self.channel]
        return _largest(found[-1].values - found[0].values)

    def _channel(self, found: Sequence[Channel]) -> dict[str, Any]:
        """All steps of a channel on one scale, and the change since the first step."""
        values = np.concatenate([channel.values for channel in found])
        starts = np.cumsum([0, *(len(channel.values) for channel in found)])
        first, limit = found[0], _limit(found)
        out = describe_channel(first, limit) | {"values": _compact(values)}
        if not self.probe:
            return out | {
                "peaks": [
                    [int(a) + i for i in c.peaks()] for a, c in zip(starts, found, strict=False)
                ]
            }
        changes = [measure_change(first, c) for c in found]
        near = _measures_distance(first)
        return out | {
            "peaks": [c.peaks() for c in found],
            "delta": {
                "kind": "ratio" if near else "signed",
                "limit": _limit([Channel("", "", d, first.unit) for d in changes]),
                "near": near,
                "less": "farther from the teacher" if near else "fell",
                "more": "nearer to the teacher" if near else "rose",
                "peaks": [_largest(d) for d in changes],
            },
        }

    def _kind(self, found: Sequence[Channel]) -> dict[str, Any]:
        """All steps of a category, one after the other."""
        described = [describe_channel(channel, channel.limit) for channel in found]
        return described[0] | {"values": np.concatenate([one["values"] for one in described])}

    def _facts(self) -> list[Plot]:
        """The small curves above: numbers of these texts, then numbers of the run's history."""
        steps = np.array(self.steps, float)
        usual = [key for key in ("reverse_kl", "log_ratio") if key in self.channels]
        found = self.channels[next(iter([*usual, *self.channels]))]
        means = [_mean(np.abs(c.values) if c.kind == "ratio" else c.values) for c in found]
        facts = [(f"{found[0].label} of this text", found[0].unit, steps, np.array(means))]
        if not self.probe:
            lengths = np.array([len(trace) for trace in self.traces], float)
            facts.append(("length of this text", "tokens", steps, lengths))
        if self.history is not None and len(self.history):
            counted = np.arange(1, len(self.history) + 1)
            x = np.asarray(self.history.get("step", counted), float)
            for key, (label, unit) in KPIS.items():
                if key in self.history and self.history[key].notna().any():
                    facts.append((label, unit, x, np.asarray(self.history[key], float)))
        ends = find_range([x for _, _, x, _ in facts])
        return [
            Plot(label, label, [_line(label, x, y)], unit, x=ends, y=find_range([y], zero=True))
            for label, unit, x, y in facts
        ]

    def _fate(self) -> dict[str, Any] | None:
        """The path of every token: its probability at each step, and the likeliest token instead.

        Probabilities are in 255ths.
        """
        first = self.traces[0]
        graders = [name for name in first.policies if f"{name}_logp" in first.table.column_names]
        if "student" not in graders:
            return None
        rivals = [name for name in graders if name != "student"][:1]
        names = ["student", *rivals]
        paths = {}
        for name in names:
            p = np.stack([_probabilities(trace, name) for trace in self.traces])
            paths[name] = np.rint(255 * p).astype(np.uint8)
        rival = rivals[0] if rivals else None
        return {"rival": rival, "p": paths, "wanted": self._favourites(names)}

    def _favourites(self, names: Sequence[str]) -> dict[str, Any] | None:
        """The likeliest token of each policy at every step; None without top tokens."""
        needed = {"support", *(f"{name}_top" for name in names)}
        if not all(needed <= set(trace.table.column_names) for trace in self.traces):
            return None
        wanted = {
            name: np.stack([_likeliest(trace, name) for trace in self.traces]) for name in names
        }
        ids = np.unique(np.concatenate([tokens.ravel() for tokens in wanted.values()]))
        vocab: dict[str, str] = {}
        for trace in self.traces:
            vocab |= trace.meta["vocab"]
        pieces = [vocab[str(i)].encode("latin-1") for i in ids.tolist()]
        return {
            "names": [payload.shorten_word(show_piece(piece)) for piece in pieces],
            "at": {name: np.searchsorted(ids, tokens) for name, tokens in wanted.items()},
        }

    def _words(self) -> dict[str, list[Any]]:
        """The words of each step against those of the step before, and of the first step."""
        texts = [b"".join(trace.tokens()).decode("utf-8", "replace") for trace in self.traces]
        return {
            "previous": [word_diff(a, b) for a, b in zip([texts[0], *texts], texts, strict=False)],
            "first": [word_diff(texts[0], b) for b in texts],
        }


def word_diff(before: str, after: str) -> list[list[str]]:
    """Return the words that stayed, went and came: `[["same" | "gone" | "new", text], …]`.

    Spaces belong to the word after them.

    Args:
        before: The older text.
        after: The newer text.

    Returns:
        Stretches in order; without those that are "new" they make `before`, without those that are
        "gone" `after`.
    """
    from rapidfuzz.distance import LCSseq  # no other picture needs it

    a, b = (re.findall(r"\s*\S+|\s+", text) for text in (before, after))
    out: list[list[str]] = []
    gone, new = "", ""
    for op in [*LCSseq.opcodes(a, b), None]:
        if op is not None and op.tag != "equal":
            gone, new = (
                gone + "".join(a[op.src_start : op.src_end]),
                new + "".join(b[op.dest_start : op.dest_end]),
            )
            continue
        same = "" if op is None else "".join(b[op.dest_start : op.dest_end])
        out += [
            [kind, words] for kind, words in (("gone", gone), ("new", new), ("same", same)) if words
        ]
        gone, new = "", ""
    return out


def measure_change(first: Channel, now: Channel) -> np.ndarray:
    """Return how a channel moved since the first step.

    By how much nearer to the teacher, where it measures a distance; else the difference.

    Args:
        first: The channel at the first step.
        now: The same channel at another step, over the same tokens.

    Returns:
        `[n]`, in the channel's unit.
    """
    with np.errstate(invalid="ignore"):
        if _measures_distance(first):
            return np.asarray(np.abs(first.values) - np.abs(now.values))
        return np.asarray(now.values - first.values)


def _measures_distance(channel: Channel) -> bool:
    return channel.kind == "ratio" or channel.key.endswith("reverse_kl")


def _select_completion(trace: Trace, sample: int, step: int) -> Trace:
    held = len(trace.meta["texts"])
    if not 0 <= sample < held:
        raise OpdlabError(
            f"The trace of step {step} has completions 0 to {held - 1}, not {sample}. Give sample=0"
            f" up to {held - 1}."
        )
    return trace.sample(sample)


def _join_steps(traces: Sequence[Trace], sample: int) -> Trace:
    """The completions of all steps as one trace, the step's place as the sample's number."""
    rows = [
        t.table.select(["token_id"]).append_column("sample", pa.array(np.full(len(t), i)))
        for i, t in enumerate(traces)
    ]
    meta = {key: [t.meta[key][sample] for t in traces] for key in ("prompts", "texts", "finish")}
    vocab = {k: v for t in traces for k, v in t.meta["vocab"].items()}
    return Trace(pa.concat_tables(rows), {**traces[0].meta, **meta, "vocab": vocab})


def _compact(values: np.ndarray) -> np.ndarray:
    """Half precision while that is small, then the coarse numbers of long texts."""
    return payload.compact(values) if len(values) > FINE else payload.compact(values[None])[0]


def _limit(found: Sequence[Channel]) -> float:
    """The value that gets full colour, over all steps: the steps compare."""
    return Channel("", "", np.concatenate([c.values for c in found]), found[0].unit).limit


def _largest(values: np.ndarray, n: int = 5) -> list[int]:
    size = np.nan_to_num(np.abs(values), nan=0.0, posinf=np.inf)
    return [int(i) for i in np.argsort(-size, kind="stable")[:n] if size[i] > 0]


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _line(label: str, x: np.ndarray, y: np.ndarray) -> Line:
    there = np.isfinite(y)
    if "accuracy" in label or "reward" in label:
        look = "teacher"
    else:
        look = "student" if "KL" in label else "amount"
    return Line(label, x[there], y[there], look)


def _probabilities(trace: Trace, name: str) -> np.ndarray:
    return np.asarray(np.clip(np.exp(trace.column(f"{name}_logp").astype(float)), 0, 1))


def _likeliest(trace: Trace, name: str) -> np.ndarray:
    """The token that a policy held likeliest, `[n]`."""
    ids, logp = trace.column("support"), trace.column(f"{name}_top").astype(float)
    if not len(ids):
        return np.zeros(0, int)
    return np.take_along_axis(ids, np.where(ids < 0, -np.inf, logp).argmax(1)[:, None], 1)[:, 0]
