"""Rollouts that a run kept, by step: what a board opens when a step of a curve is chosen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from opdlab.data.trace import Trace
from opdlab.errors import InvalidValue
from opdlab.support.expect import expect, shortened
from opdlab.viz import payload
from opdlab.viz.channel import describe_channel
from opdlab.viz.channels import find_channels
from opdlab.viz.glyphs import clean_text
from opdlab.viz.timeline import find_rewards

ROOM = 20_000  # tokens of all steps together whose strips a page carries
CUT = 120  # characters of a prompt, and of a completion's end


@dataclass(frozen=True, eq=False)
class KeptSteps:
    """Traces by step.

    Attributes:
        traces: The traces by step, in order.
    """

    traces: dict[int, Trace]

    @classmethod
    def read(cls, given: Any) -> KeptSteps:
        """Read traces, or the paths of their files, by step.

        Args:
            given: A dict by step, as `{20: trace}` or `{20: "step-20.parquet"}`; None for none.

        Returns:
            The traces.

        Raises:
            InvalidValue: It is something else.
        """
        if given is None:
            return cls({})
        if not isinstance(given, Mapping):
            raise InvalidValue(
                f"RunBoard got traces={shortened(given)}. Give the kept traces by step, as {{20:"
                " step.trace()}, or the paths of their files."
            )
        found = {}
        for step, one in given.items():
            if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or step < 0:
                raise InvalidValue(
                    f"RunBoard got a trace for step {shortened(step)}. Use whole numbers from 0."
                )
            trace = Trace.load(one) if isinstance(one, (str, os.PathLike)) else one
            found[int(step)] = expect(trace, Trace, "RunBoard", f"traces[{step}]")
        return cls(dict(sorted(found.items())))

    def data(self) -> dict[str, Any]:
        """Return what the page draws: the texts, one channel, and a table of each step's rollouts.

        Returns:
            `text`, `channel` and `kept`; the page carries the tokens of as many rollouts of each
            step as fit, those of the largest |log ratio| first. Nothing where there are no traces.
        """
        if not self.traces:
            return {}
        room = ROOM // len(self.traces)
        picked = {step: _pick(trace, room) for step, trace in self.traces.items()}
        joint, places = _join(self.traces, picked)
        found = find_channels(joint)
        channel = found.get("log_ratio") or next(iter(found.values()), None)
        spans = {sample: (first, size) for sample, first, size in payload.find_spans(joint)}
        kept = [
            {
                "step": step,
                "rollouts": [
                    _rollout(trace, row, spans.get(places.get((step, row["sample"]), -1)))
                    for row in _rows(trace)
                ],
            }
            for step, trace in self.traces.items()
        ]
        return {
            "text": payload.describe_text(joint),
            "channel": describe_channel(channel, channel.limit) if channel else None,
            "kept": kept,
        }


def _rows(trace: Trace) -> list[dict[str, Any]]:
    """One entry per completion: its reward and the means of its numbers, grouped by prompt."""
    spans = list(payload.find_spans(trace))
    rewards = find_rewards(trace, None, [sample for sample, *_ in spans])
    channels = find_channels(trace)
    rows = []
    for sample, first, size in spans:
        row: dict[str, Any] = {"sample": sample, "tokens": size, "reward": rewards.get(sample)}
        for key in ("reverse_kl", "log_ratio"):
            values = np.zeros(0)
            if key in channels:
                values = np.asarray(channels[key].values[first : first + size], float)
            finite = values[np.isfinite(values)]
            row[key] = float(np.mean(finite)) if len(finite) else None
        rows.append(row)
    prompts = trace.meta["prompts"]
    order = {prompt: i for i, prompt in reversed(list(enumerate(prompts)))}
    return sorted(rows, key=lambda row: (order[prompts[row["sample"]]], row["sample"]))


def _rollout(trace: Trace, row: dict[str, Any], span: tuple[int, int] | None) -> dict[str, Any]:
    sample = row["sample"]
    text, prompt = (clean_text(str(trace.meta[name][sample])) for name in ("texts", "prompts"))
    first, size = span or (-1, 0)
    return {
        "prompt": prompt if len(prompt) <= CUT else f"{prompt[:CUT]}…",
        "end": text if len(text) <= CUT else f"…{text[-CUT:]}",
        "finish": str(trace.meta["finish"][sample]),
        "tokens": row["tokens"],
        "reward": row["reward"],
        "kl": row["reverse_kl"],
        "first": first,
        "size": size,
    }


def _pick(trace: Trace, room: int) -> list[int]:
    """The completions whose tokens the page carries."""
    rows = sorted(_rows(trace), key=lambda row: -(row["reverse_kl"] or 0.0))
    picked: list[int] = []
    spent = 0
    for row in rows:
        if spent + row["tokens"] > room and picked:
            continue
        picked.append(row["sample"])
        spent += row["tokens"]
    return picked


def _join(
    traces: Mapping[int, Trace], picked: Mapping[int, list[int]]
) -> tuple[Trace, dict[tuple[int, int], int]]:
    """One trace of the picked completions, and each one's number in it, by (step, sample)."""
    tables: list[pa.Table] = []
    places: dict[tuple[int, int], int] = {}
    meta: dict[str, Any] = {"texts": [], "finish": [], "prompts": [], "vocab": {}}
    shared = set.intersection(*(set(trace.table.column_names) for trace in traces.values()))
    lists = {"support"}
    for step, trace in traces.items():
        for sample in picked[step]:
            number = len(meta["texts"])
            places[step, sample] = number
            part = trace.sample(sample).table
            names = [
                name
                for name in part.column_names
                if name in shared and name not in lists and not name.endswith("_top")
            ]
            part = part.select(names)
            at = part.column_names.index("sample")
            tables.append(part.set_column(at, "sample", pa.array([number] * len(part), pa.int64())))
            for name in ("texts", "finish", "prompts"):
                meta[name].append(trace.meta[name][sample])
        meta["vocab"] |= trace.meta["vocab"]
    first = next(iter(traces.values()))
    everyone = [name for name in first.policies if f"{name}_logp" in shared]
    whole = {**first.meta, **meta, "policies": everyone, "notes": {}}
    return Trace(pa.concat_tables(tables, promote_options="permissive"), whole), places
