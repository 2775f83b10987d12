"""Live alarms for a run, each with a name, a sentence and a remedy.

    watch = diagnose.health(run)
    for step in run:
        for alarm in watch(step):
            print(alarm)

Everything is read off what a step has at hand, so watching runs no model. The acceptance E_{y~p}
min(1, q/p) = sum min(p, q) needs nothing but the log-probs of the sampled tokens (at temperature 1
and top_p 1). Each signature compares a moving average with the run's own beginning. The thresholds
of `Limits` are starting guesses: those of section 8.10 of the survey's practice notes (length +30
%, cut off above 10 %, entropy under a half) are untested there, the others are ours.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from opdlab.data.rollout import Rollout
from opdlab.diagnose.probe import render
from opdlab.training.resolution import grader_names

if TYPE_CHECKING:
    from opdlab.training.run import Run, Step

Vitals = dict[str, float]


@dataclass(frozen=True)
class Limits:
    """When alarms go off; all are starting guesses.

    window: steps in a moving average, and in what counts as the beginning. length: growth of the
        95th percentile. cut: share cut
    off at the length limit. repetition: growth of the share of repeated triples of tokens. entropy:
    share of the beginning's.
    acceptance: fall of E min(1, q/p). stop, first: acceptance of the student's last and first
        tokens. accuracy: fall of the
    held-out accuracy since its peak, at two evaluations in a row.
    """

    window: int = 5
    length: float = 1.3
    cut: float = 0.1
    repetition: float = 0.2
    entropy: float = 0.5
    acceptance: float = 0.1
    stop: float = 0.2
    first: float = 0.1
    accuracy: float = 0.05


@dataclass(frozen=True)
class Alarm:
    """One signature seen at one step. metric: the number of the run that it was read off, for the
    curve that shows it.
    """

    step: int
    signature: str
    sentence: str
    remedy: str
    metric: str = ""

    def __str__(self) -> str:
        return f"step {self.step}, {self.signature}: {self.sentence} {self.remedy}"


@dataclass(eq=False)
class Health:
    """What `health` returns: call it with each step.

    `alarms` so far, `vitals` (a row a step) and, of the alarms, a `table`.
    """

    limits: Limits = field(default_factory=Limits)
    alarms: list[Alarm] = field(default_factory=list)
    rows: list[Vitals] = field(default_factory=list, repr=False)
    ringing: set[str] = field(default_factory=set, repr=False)

    def __call__(self, step: Step) -> list[Alarm]:
        """The alarms that this step sets off.

        A signature is reported once, and again if it comes back after it has gone.
        """
        return self.note(vitals(step))

    def note(self, now: Vitals) -> list[Alarm]:
        """`__call__` for the numbers of a step (`step` and any of those that `vitals` gives)."""
        self.rows.append(now)
        found = []
        for name, (sees, remedy) in SIGNATURES.items():
            sentence = sees(self)
            if sentence and name not in self.ringing:
                found.append(Alarm(int(now["step"]), name, sentence, remedy))
            (self.ringing.add if sentence else self.ringing.discard)(name)
        self.alarms += found
        return found

    @property
    def vitals(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)

    @property
    def table(self) -> pd.DataFrame:
        columns = ["step", "signature", "sentence", "remedy"]
        return pd.DataFrame([vars(alarm) for alarm in self.alarms], columns=columns)

    @property
    def sentence(self) -> str:
        if not self.alarms:
            return f"No alarms in {len(self.rows)} steps."
        what = "; ".join(f"{alarm.signature} (step {alarm.step})" for alarm in self.alarms)
        return (
            f"{len(self.alarms)} alarm{'s' * (len(self.alarms) > 1)} in {len(self.rows)} steps:"
            f" {what}."
        )

    def __str__(self) -> str:
        return "\n".join([self.sentence, *map(str, self.alarms)])

    def _repr_html_(self) -> str:
        return render(self.sentence, self.table)

    def pair(self, name: str, window: int | None = None) -> tuple[float, float]:
        """A number at the beginning and now, averaged over the window; nan before there are steps
        enough, or without it.
        """
        seen = [row[name] for row in self.rows if not math.isnan(row.get(name, math.nan))]
        w = window or self.limits.window
        if len(seen) < w or math.isnan(self.rows[-1].get(name, math.nan)):
            return math.nan, math.nan
        return sum(seen[:w]) / w, sum(seen[-w:]) / w


def health(run: Run | pd.DataFrame | None = None, limits: Limits | None = None) -> Health:
    """A watch for a run.

    What the run (or a `history`) has already done is read first, as far as its history tells.
    """
    watch = Health(limits or Limits())
    history = (
        run if isinstance(run, pd.DataFrame) else run.history if run is not None else pd.DataFrame()
    )
    for i, row in enumerate(history.to_dict("records"), 1):
        watch.note(
            {"step": i, **{str(k): float(v) for k, v in row.items() if isinstance(v, numbers.Real)}}
        )
    return watch


def vitals(step: Step) -> Vitals:
    """A step's numbers: its metrics, and lengths, repetition and acceptances of what the student
    wrote.
    """
    rollout, columns = step.rollout, step.columns
    own = torch.tensor([w == "student" for w in rollout.writer], device=rollout.ids.device)
    out = {"step": float(step.number), **step.metrics}
    if not bool(own.any()):  # others' texts say nothing about what the student would write
        return {
            name: value for name, value in out.items() if name not in ("entropy", "length", "cut")
        }
    out["length_p95"] = float(rollout.lengths[own].float().quantile(0.95))
    out["cut"] = sum(
        f == "length" for f, o in zip(rollout.finish, own.tolist(), strict=True) if o
    ) / int(own.sum())
    out["repetition"] = float(repetition(rollout.ids, rollout.lengths)[own].mean())
    mine = rollout.mask & own[:, None]
    out["entropy"] = float(columns["student_entropy"][mine[rollout.mask]].mean())
    teacher = _teacher(step)
    if teacher:
        flat = (columns[f"{teacher}_logp"] - columns["student_logp"]).clamp(max=0).exp()
        kept = torch.zeros(rollout.ids.shape, device=flat.device, dtype=flat.dtype).masked_scatter(
            rollout.mask, flat
        )
        out |= _acceptances(
            kept, rollout, mine, told=getattr(step.policies[teacher], "context", None) is not None
        )
    return out


def repetition(ids: Tensor, lengths: Tensor) -> Tensor:
    """`[B]`: the share of a text's triples of tokens that stand in it before; 0 for texts under
    four tokens. ids `[B, T]`.
    """
    if ids.shape[1] < 4:
        return torch.zeros(len(ids), device=ids.device)
    base = int(ids.max()) + 1
    triple = (ids[:, :-2] * base + ids[:, 1:-1]) * base + ids[:, 2:]
    count = (lengths - 2).clamp(min=0)
    triple = triple.masked_fill(
        torch.arange(triple.shape[1], device=ids.device) >= count[:, None], -1
    )
    ordered = triple.sort(1).values
    new = (ordered[:, 1:] != ordered[:, :-1]).sum(1) + (
        ordered[:, 0] != -1
    )  # the step from -1 to the first triple, or the first itself
    return torch.where(count > 1, 1 - new / count.clamp(min=1), 0.0)


def _teacher(step: Step) -> str | None:
    """The policy that the student is drawn to: a teacher before a hinted or averaged self; a
    reference is none.
    """
    names = [
        n
        for n in grader_names(step.policies)
        if n not in ("student", "reference") and f"{n}_logp" in step.columns
    ]
    return min(names, key=lambda n: not n.startswith("teacher"), default=None)


def _acceptances(kept: Tensor, rollout: Rollout, mine: Tensor, told: bool) -> Vitals:
    """E min(1, q/p) over all tokens, the stops, and the first tokens (not where the teacher is told
    more: it may differ there).
    """
    out = {"acceptance": float(kept[mine].mean())}
    stopped = torch.tensor([f == "stop" for f in rollout.finish], device=kept.device) & mine[:, 0]
    if bool(stopped.any()):
        out["stop_acceptance"] = float(
            kept.gather(1, (rollout.lengths - 1).clamp(min=0)[:, None])[stopped].mean()
        )
    if not told:
        out["first_acceptance"] = float(kept[:, 0][mine[:, 0]].mean())
    return out


def _length(watch: Health) -> str | None:
    """The 95th percentile of lengths grows, or more texts are cut off."""
    limits = watch.limits
    (start, now), (cut_before, cut) = watch.pair("length_p95"), watch.pair("cut")
    if now > max(limits.length * start, start + 4):
        return (
            f"95 % of the texts were under {start:.0f} tokens at the beginning, and now under"
            f" {now:.0f}."
        )
    if cut > max(limits.cut, cut_before + limits.cut / 2):
        return (
            f"{cut:.0%} of the texts are cut off at the length limit, {cut_before:.0%} were at the"
            " beginning."
        )
    return None


def _repetition(watch: Health) -> str | None:
    start, now = watch.pair("repetition")
    if now > start + watch.limits.repetition:
        return (
            f"{now:.0%} of the triples of tokens repeat an earlier one in their text, {start:.0%}"
            " did at the beginning."
        )
    return None


def _entropy(watch: Health) -> str | None:
    """The student grows sure without coming nearer to the teacher: a student that learns from a
    sure teacher may.
    """
    (start, now), (before, acceptance) = watch.pair("entropy"), watch.pair("acceptance")
    far, near = (
        (1 - before, 1 - acceptance) if not math.isnan(acceptance) else watch.pair("reverse_kl")
    )  # a history has no acceptance
    nearer = near < 0.9 * far  # false where there is no teacher
    if now < watch.limits.entropy * start and not nearer:
        beside = (
            ""
            if math.isnan(acceptance)
            else f", while acceptance by the teacher went from {before:.2f} to {acceptance:.2f}"
        )
        return f"The student's entropy fell from {start:.3g} to {now:.3g} nats a token{beside}."
    return None


def _overlap(watch: Health) -> str | None:
    start, now = watch.pair("acceptance")
    if now < start - watch.limits.acceptance:
        return (
            f"A token of the student's is accepted by the teacher with probability {now:.2f},"
            f" {start:.2f} at the beginning."
        )
    return None


def _mismatch(watch: Health) -> str | None:
    (_, everywhere), (first, _), (_, stop) = (
        watch.pair(n, 2) for n in ("acceptance", "first_acceptance", "stop_acceptance")
    )
    if stop < watch.limits.stop and stop < everywhere / 2:
        return (
            f"Where the student stops, the teacher accepts it with probability {stop:.2f}"
            f" ({everywhere:.2f} elsewhere)."
        )
    if first < watch.limits.first and first < everywhere / 2:
        return (
            f"The teacher accepts the student's first token with probability {first:.2f}"
            f" ({everywhere:.2f} elsewhere)."
        )
    return None


def _late(watch: Health) -> str | None:
    seen = [
        (int(row["step"]), row["accuracy"])
        for row in watch.rows
        if not math.isnan(row.get("accuracy", math.nan))
    ]
    if len(seen) < 3:
        return None
    step, best = max(seen[:-2], key=lambda pair: pair[1])
    if max(value for _, value in seen[-2:]) < best - watch.limits.accuracy:
        return (
            f"Held-out accuracy was {best:.2f} at step {step} and is {seen[-1][1]:.2f}: the peak is"
            " behind."
        )
    return None


SIGNATURES: dict[str, tuple[Callable[[Health], str | None], str]] = {
    "length run-away": (
        _length,
        (
            "Compare stop tokens and templates (opdlab.doctor); let the teacher write a share:"
            " OPD(on_policy=0.75)."
        ),
    ),
    "repetition": (
        _repetition,
        (
            "Go back to a snapshot (run.at(…)) and lower lr, or let the teacher write a share:"
            " OPD(on_policy=0.75)."
        ),
    ),
    "entropy collapse": (
        _entropy,
        (
            "Try a divergence that covers the teacher (OPD('jensen_shannon')) or a lower lr, and"
            " watch pass@k."
        ),
    ),
    "falling overlap": (
        _overlap,
        (
            "Lower lr; if it was low from the start, train on the teacher's own texts first"
            " (SequenceKD)."
        ),
    ),
    "EOS or template mismatch": (
        _mismatch,
        "Run opdlab.doctor, and load the teacher with the student's eos=[…] and tokenizer=.",
    ),
    "late over-training": (_late, "Stop, and keep the best step: snapshot_every=… and run.at(…)."),
}
