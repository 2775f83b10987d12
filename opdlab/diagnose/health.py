"""Live alarms for a run, each with a name, a sentence and advice.

    watch = diagnose.health(run)
    for step in run:
        for alarm in watch(step):
            print(alarm)

All numbers are read off what a step has at hand, so watching runs no model. The acceptance
E_{y~p} min(1, q/p) = sum min(p, q) needs only the log-probs of the sampled tokens (at temperature 1
and top_p 1). Each signature compares a moving average with the run's own beginning.

An alarm is one entry of `SIGNATURES`, at the end of this file. A new one needs its entry and its
test. The thresholds of `Limits` are starting guesses: those of section 8.10 of the survey's
practice notes (length +30 %, cut off above 10 %, entropy under a half) are untested there, the
others are ours.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd

from opdlab.diagnose.tables import to_html
from opdlab.diagnose.vitals import Vitals, read_vitals
from opdlab.errors import InvalidValue
from opdlab.support.expect import shortened
from opdlab.support.validation import Unchecked, validate_arguments
from opdlab.training.run import Run
from opdlab.training.sampler_gap import BEYOND
from opdlab.training.step import Step


@dataclass(frozen=True)
class Limits:
    """When alarms go off. All are starting guesses.

    Attributes:
        window: Steps in a moving average, and in the beginning that it is compared with.
        length: Growth of the 95th percentile of lengths, as a factor.
        cut: Share of texts cut off at the length limit.
        repetition: Growth of the share of repeated triples of tokens.
        entropy: Entropy as a share of that at the beginning.
        acceptance: Fall of the acceptance E min(1, q/p).
        stop: Acceptance of the student's last tokens.
        first: Acceptance of the student's first tokens.
        accuracy: Fall of the held-out accuracy since its peak, at two evaluations in a row.
        mass: The student's probability of the teacher's first choice, under which it is not found.
        pull: Pull of a method on such a token that is enough to learn it (forward KL has 1).
        stalled: Steps in a window in which a run that stalls is looked for.
        gap: Mean size of the sampler's gap to the trainer, in nats per token.
        beyond: Share of tokens whose probability differs by more than a factor of 2 between the
            two.
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
    mass: float = 1e-3
    pull: float = 0.1
    stalled: int = 3
    gap: float = 0.05
    beyond: float = 0.01


@dataclass(frozen=True)
class Alarm:
    """One signature, seen at one step.

    Attributes:
        step: The step.
        signature: The signature's name.
        sentence: The symptom in words, with its numbers.
        remedy: Advice.
        metric: The number of the run that it was read off, whose curve shows it; "" for none.
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
    """Watch a run: call this with each step.

    Attributes:
        limits: When alarms go off.
        alarms: All alarms so far.
        rows: The numbers of each step.
        ringing: Names of the signatures that the last step showed.
    """

    limits: Limits = field(default_factory=Limits)
    alarms: list[Alarm] = field(default_factory=list)
    rows: list[Vitals] = field(default_factory=list, repr=False)
    ringing: set[str] = field(default_factory=set, repr=False)

    def __call__(self, step: Step) -> list[Alarm]:
        """Return the alarms that a step sets off.

        A signature is reported once, and again if it comes back after it has gone.
        """
        return self.note(read_vitals(step))

    def note(self, now: Vitals) -> list[Alarm]:
        """Take in the numbers of a step.

        Args:
            now: `step`, and any of the numbers that `read_vitals` gives.

        Returns:
            The alarms that the step sets off.
        """
        self.rows.append(now)
        found = []
        for signature in SIGNATURES:
            name, sentence = signature.name, signature.find(self)
            if sentence is None:
                self.ringing.discard(name)
            elif name not in self.ringing:
                self.ringing.add(name)
                step = int(now["step"])
                found.append(Alarm(step, name, sentence, signature.remedy, signature.metric))
        self.alarms += found
        return found

    @property
    def vitals(self) -> pd.DataFrame:
        """One row per step, with its numbers."""
        return pd.DataFrame(self.rows)

    @property
    def table(self) -> pd.DataFrame:
        """One row per alarm."""
        columns = ["step", "signature", "sentence", "remedy"]
        return pd.DataFrame([vars(alarm) for alarm in self.alarms], columns=columns)

    @property
    def sentence(self) -> str:
        """The number of alarms, and the signature and step of each."""
        if not self.alarms:
            return f"No alarms in {len(self.rows)} steps."
        listed = "; ".join(f"{alarm.signature} (step {alarm.step})" for alarm in self.alarms)
        return (
            f"{len(self.alarms)} alarm{'s' * (len(self.alarms) > 1)} in {len(self.rows)} steps:"
            f" {listed}."
        )

    def __str__(self) -> str:
        return "\n".join([self.sentence, *map(str, self.alarms)])

    def _repr_html_(self) -> str:
        return to_html(self.sentence, self.table)

    def compare(self, name: str, window: int | None = None) -> tuple[float, float]:
        """Return the mean of metric `name` over the first and the last `window` steps.

        Both are NaN if fewer steps have it, or the last step does not.

        Args:
            name: Name of a metric, as in `Vitals`.
            window: Steps to average over; by default that of `limits`.

        Returns:
            The mean at the beginning and the mean now.
        """
        seen = [row[name] for row in self.rows if not math.isnan(row.get(name, math.nan))]
        steps = window or self.limits.window
        if len(seen) < steps or math.isnan(self.rows[-1].get(name, math.nan)):
            return math.nan, math.nan
        return sum(seen[:steps]) / steps, sum(seen[-steps:]) / steps


@validate_arguments
def health(
    run: Unchecked[Run | pd.DataFrame | None] = None, limits: Limits | None = None
) -> Health:
    """Make a watch for a run.

    Args:
        run: A run or its `history`, which is read first; None for a run that has not begun.
        limits: When alarms go off.

    Returns:
        A watch to call with each step.

    Raises:
        InvalidValue: `run` has no history.
    """
    watch = Health(limits or Limits())
    if run is None:
        return watch
    if not isinstance(run, pd.DataFrame) and not hasattr(run, "history"):
        raise InvalidValue(f"health got run={shortened(run)}. Use a Run, or a run's `history`.")
    history = run if isinstance(run, pd.DataFrame) else run.history
    for step, row in enumerate(history.to_dict("records"), 1):
        known = {str(key): float(x) for key, x in row.items() if isinstance(x, numbers.Real)}
        watch.note({"step": step, **known})
    return watch


# The signatures: each looks at a watch and returns a sentence, or None.


def find_long_texts(watch: Health) -> str | None:
    """See whether the 95th percentile of lengths grows, or more texts are cut off.

    Args:
        watch: The watch, with the steps so far.

    Returns:
        A sentence that says what was seen; None if neither is the case.
    """
    limits = watch.limits
    start, now = watch.compare("length_p95")
    if now > max(limits.length * start, start + 4):
        return (
            f"95 % of the texts were under {start:.0f} tokens at the beginning, and now under"
            f" {now:.0f}."
        )
    start, now = watch.compare("cut")
    if now > max(limits.cut, start + limits.cut / 2):
        return (
            f"{now:.0%} of the texts are cut off at the length limit, {start:.0%} were at the"
            " beginning."
        )
    return None


def find_repetition(watch: Health) -> str | None:
    """See whether texts repeat themselves more than at the beginning.

    Args:
        watch: The watch, with the steps so far.

    Returns:
        A sentence that says what was seen; None if it is not the case.
    """
    start, now = watch.compare("repetition")
    if now > start + watch.limits.repetition:
        return (
            f"{now:.0%} of the triples of tokens repeat an earlier one in their text, {start:.0%}"
            " did at the beginning."
        )
    return None


def find_collapse(watch: Health) -> str | None:
    """See whether the student grows sure without coming nearer to the teacher.

    A student that learns from a sure teacher may grow sure.

    Args:
        watch: The watch, with the steps so far.

    Returns:
        A sentence that says what was seen; None if it is not the case.
    """
    (start, now), (before, acceptance) = watch.compare("entropy"), watch.compare("acceptance")
    beside = ""
    if math.isnan(acceptance):  # a history has no acceptance
        far, near = watch.compare("reverse_kl")
    else:
        far, near = 1 - before, 1 - acceptance
        beside = f", while acceptance by the teacher went from {before:.2f} to {acceptance:.2f}"
    is_nearer = near < 0.9 * far  # false where there is no teacher
    if now < watch.limits.entropy * start and not is_nearer:
        return f"The student's entropy fell from {start:.3g} to {now:.3g} nats per token{beside}."
    return None


def find_falling_overlap(watch: Health) -> str | None:
    """See whether the teacher accepts fewer of the student's tokens than at the beginning.

    Args:
        watch: The watch, with the steps so far.

    Returns:
        A sentence that says what was seen; None if it is not the case.
    """
    start, now = watch.compare("acceptance")
    if now < start - watch.limits.acceptance:
        return (
            f"A token of the student's is accepted by the teacher with probability {now:.2f},"
            f" {start:.2f} at the beginning."
        )
    return None


def find_mismatch(watch: Health) -> str | None:
    """See whether the teacher refuses the student's stops or first tokens, and not the others.

    Args:
        watch: The watch, with the steps so far.

    Returns:
        A sentence that says what was seen; None if neither is the case.
    """
    _, everywhere = watch.compare("acceptance", 2)
    first, _ = watch.compare("first_acceptance", 2)
    _, stop = watch.compare("stop_acceptance", 2)
    if stop < watch.limits.stop and stop < everywhere / 2:
        return (
            f"Where the student stops, the teacher accepts it with probability {stop:.2f}"
            f" ({everywhere:.2f} over all tokens)."
        )
    if first < watch.limits.first and first < everywhere / 2:
        return (
            f"The teacher accepts the student's first token with probability {first:.2f}"
            f" ({everywhere:.2f} over all tokens)."
        )
    return None


def find_late_training(watch: Health) -> str | None:
    """See whether the last two held-out accuracies are below the best one before them.

    Args:
        watch: The watch, with the steps so far.

    Returns:
        A sentence that says what was seen; None if it is not the case, or fewer than three are
        known.
    """
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


def find_stall(watch: Health) -> str | None:
    """See whether the student cannot find what the teacher wants at the beginning of a text.

    Then the loss does not fall and the probability stays tiny, unless the method pulls on tokens
    that the student never writes, as forward KL does.

    Args:
        watch: The watch, with the steps so far.

    Returns:
        A sentence that says what was seen; None if it is not the case.
    """
    limits, steps = watch.limits, watch.limits.stalled
    if watch.rows[-1].get("pull", 0.0) > limits.pull:
        return None
    _, mass = watch.compare("first_mass", steps)
    last = [row["loss"] for row in watch.rows[-2 * steps :] if "loss" in row]
    if len(last) < 2 * steps or not mass < limits.mass:
        return None
    before, now = sum(last[:steps]) / steps, sum(last[steps:]) / steps
    if now > 0.7 * before:
        return (
            "The student gives the token that the teacher wants at the beginning a probability of"
            f" {mass:.1g}, and the loss does not fall ({before:.3g}, now {now:.3g})."
        )
    return None


def find_sampler_gap(watch: Health) -> str | None:
    """See whether the sampler's log-probs are far from the trainer's.

    Args:
        watch: The watch, with the steps so far.

    Returns:
        A sentence that says what was seen; None if it is not the case.
    """
    limits = watch.limits
    (first, gap), (_, beyond) = watch.compare("sampler_gap"), watch.compare("sampler_beyond")
    if gap > limits.gap or beyond > limits.beyond:
        return (
            f"Sampler and trainer give a token log-probs that differ by {gap:.2g} nats on average"
            f" ({first:.2g} at the beginning), and {beyond:.1%} of the tokens have a probability"
            f" that differs by more than a factor of {BEYOND:g}."
        )
    return None


@dataclass(frozen=True)
class Signature:
    """A way in which runs go wrong.

    Attributes:
        name: The name that alarms have.
        find: Looks at a watch. Returns a sentence if it shows the signature, else None.
        metric: The number that it is read off; pictures mark alarms on its curve.
        remedy: Advice.
    """

    name: str
    find: Callable[[Health], str | None]
    metric: str
    remedy: str


SIGNATURES = (
    Signature(
        "out of reach",
        find_stall,
        "first_mass",
        "A mode-seeking divergence has no gradient there, whoever wrote the text: use"
        " OPD('forward_kl'), alone or on a share of the teacher's texts, or train on its texts"
        " first (SequenceKD).",
    ),
    Signature(
        "length run-away",
        find_long_texts,
        "length",
        "Compare stop tokens and templates (opdlab.doctor); let the teacher write a share:"
        " OPD(on_policy=0.75).",
    ),
    Signature(
        "repetition",
        find_repetition,
        "repetition",
        "Go back to a snapshot (run.at(…)) and lower lr, or let the teacher write a share:"
        " OPD(on_policy=0.75).",
    ),
    Signature(
        "entropy collapse",
        find_collapse,
        "entropy",
        "Try a divergence that covers the teacher (OPD('jensen_shannon')) or a lower lr, and watch"
        " pass@k.",
    ),
    Signature(
        "falling overlap",
        find_falling_overlap,
        "acceptance",
        "Lower lr; if it was low from the start, train on the teacher's own texts first"
        " (SequenceKD).",
    ),
    Signature(
        "EOS or template mismatch",
        find_mismatch,
        "acceptance",
        "Run opdlab.doctor, and load the teacher with the student's eos=[…] and tokenizer=.",
    ),
    Signature(
        "late over-training",
        find_late_training,
        "accuracy",
        "Stop, and keep the best step: snapshot_every=… and run.at(…).",
    ),
    Signature(
        "sampler gap",
        find_sampler_gap,
        "sampler_gap",
        "Check that the sampler takes up every adapter and has the student's base model; give both"
        " the same dtype, or correct the rest: importance_cap=2.",
    ),
)
