"""Profile a run: the seconds and bytes of each phase of a step, beside the limit of the device.

The limit is the time of the least work that a step of OPD needs, if nothing but its matrix products
and its reading of weights took time. `A` are the numbers of a model that a token is multiplied
with, `VH` those of its head, `P` the tokens of the distinct prompts, `C` those of the completions,
and `S` the length of the longest completion:

    generate   operations 2 A (P + C) + 2 VH C; bytes of the student's weights and head, S times
    grade      operations 2 A (P + C) of every other policy, which has its prompts; its weights once
    learn      operations 2 A (P + C) twice for a LoRA (forward, and back to the inputs), three
               times for all weights; 2 VH C of every policy forward and of the student backward
               (twice where its head trains); the optimizer moves seven float32 for each number
               that trains

A phase cannot be faster than its operations at the measured rate of products, nor than its bytes
at the measured bandwidth. Attention is left out, so the limit of long texts is too low.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from opdlab.data.rollout import Rollout
from opdlab.diagnose.shapes import Shape, shape_of_config
from opdlab.diagnose.tables import to_html
from opdlab.errors import OpdlabError
from opdlab.models.policy import Policy
from opdlab.support.expect import expect
from opdlab.support.validation import Whole, validate_arguments
from opdlab.training.phase_clock import PHASES
from opdlab.training.run import Run

GIB = 2**30
# Bytes per number: AdamW reads weight, gradient and two moments, and writes all but the gradient.
MOVED_BY_ADAMW = 7 * 4
TRIES = 5  # of a measurement of the device, of which the fastest counts


@dataclass(frozen=True)
class Rates:
    """Say how fast a device is in the precision of a model.

    Attributes:
        device: Its name and threads.
        compute: Operations per second in a large matrix product.
        bandwidth: Bytes per second that a product of a matrix and a vector reads.
    """

    device: str
    compute: float
    bandwidth: float


@dataclass(frozen=True)
class PhaseCost:
    """Hold the cost of a phase of a step.

    Attributes:
        name: `generate`, `grade` or `learn`.
        seconds: Mean wall seconds per step.
        limit: Least seconds for its work on this device; NaN where the work is not known.
        bound: What sets the limit: "compute" or "memory".
        bytes: Most memory in use during the phase; NaN if it was not measured.
    """

    name: str
    seconds: float
    limit: float
    bound: str
    bytes: float

    @property
    def share_of_limit(self) -> float:
        """The limit as a share of the seconds: 1 is as fast as the device can."""
        return self.limit / self.seconds if self.seconds else math.nan


@dataclass(frozen=True, eq=False)
class Profile:
    """Hold where the time of a run goes.

    Attributes:
        phases: The phases of a step, in order.
        rates: The device.
        steps: Number of steps that the seconds are a mean of.
        unknown: Policies whose work is not known, such as servers.
    """

    phases: tuple[PhaseCost, ...]
    rates: Rates
    steps: int
    unknown: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Mean wall seconds per step."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def table(self) -> pd.DataFrame:
        """One row per phase."""
        rows = [
            {
                "phase": phase.name,
                "seconds": phase.seconds,
                "share": phase.seconds / self.seconds,
                "limit_s": phase.limit,
                "bound by": phase.bound,
                "times the limit": phase.seconds / phase.limit if phase.limit else math.nan,
                "peak GiB": phase.bytes / GIB,
            }
            for phase in self.phases
        ]
        return pd.DataFrame(rows).set_index("phase")

    @property
    def sentence(self) -> str:
        """The slowest phase and its distance from the limit, in words."""
        slowest = max(self.phases, key=lambda phase: phase.seconds)
        parts = ", ".join(
            f"{phase.name} {phase.seconds / self.seconds:.0%}" for phase in self.phases
        )
        said = f"A step takes {self.seconds:.3g} s on {self.rates.device} ({parts})."
        if math.isfinite(slowest.limit) and slowest.limit:
            times = slowest.seconds / slowest.limit
            said += (
                f" {slowest.name.capitalize()} takes {times:.3g} times the limit that"
                f" {_LIMITS[slowest.bound]} sets for its work."
            )
        if self.unknown:
            said += f" The work of {', '.join(self.unknown)} is not known, so it has no limit."
        return said

    def to_json(self) -> dict[str, Any]:
        """Return plain data; numbers that are not known are None."""

        def plain(value: float) -> float | None:
            return value if math.isfinite(value) else None

        phases = {
            phase.name: {
                "seconds": plain(phase.seconds),
                "limit_s": plain(phase.limit),
                "bound": phase.bound,
                "bytes": plain(phase.bytes),
            }
            for phase in self.phases
        }
        rates = {
            "device": self.rates.device,
            "operations_per_s": self.rates.compute,
            "bytes_per_s": self.rates.bandwidth,
        }
        return {"steps": self.steps, "phases": phases, **rates, "unknown": list(self.unknown)}

    def __repr__(self) -> str:
        return f"Profile({self.sentence})"

    def _repr_html_(self) -> str:
        return to_html(self.sentence, self.table)


_LIMITS = {"compute": "the device's rate of products", "memory": "the bandwidth of its memory"}


@validate_arguments
def profile(run: Run, steps: Whole = 3) -> Profile:
    """Measure the seconds and the memory of each phase of a step, beside the limit of the device.

    The run goes on by ordinary steps, which count: they move the weights and stand in its history.
    The first step after a start is slower than the others, so it is left out if there are others.

    Args:
        run: The run to profile.
        steps: Number of steps to run. With 0, or where the run has none left, the seconds are those
            that the run has recorded, and the memory is not known.

    Returns:
        The profile.

    Raises:
        OpdlabError: No step has run in this process, so nobody knows what work a step is.
    """
    expect(run, Run, "profile", "run")
    measured = _measure_steps(run, steps)
    if run.last is None:
        raise OpdlabError(
            "The run has done no step in this process, so there is nothing to profile. Call"
            " profile(run, steps=3), or run.train() first."
        )
    rates = measure_rates(run.student)
    works, unknown = _work_of_step(run)
    found = tuple(
        PhaseCost(
            name,
            _mean(measured, f"{name}_s"),
            *works[name].limit(rates),
            max((row.get(f"{name}_bytes", math.nan) for row in measured), default=math.nan),
        )
        for name in PHASES
    )
    return Profile(found, rates, len(measured), unknown)


def _measure_steps(run: Run, steps: int) -> list[dict[str, float]]:
    """The numbers of the steps to average."""
    before = len(run.metrics)
    run.is_profiled = True
    try:
        for _, _step in zip(range(min(steps, run.settings.steps - run.done)), run, strict=False):
            pass
    finally:
        run.is_profiled = False
    rows = run.metrics[before:] or run.metrics
    return rows[1:] if len(rows) > 1 else rows


def _mean(rows: list[dict[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows) if rows else math.nan


@dataclass
class _Work:
    """Operations and bytes that a phase needs at least."""

    operations: float = 0.0
    bytes: float = 0.0

    def limit(self, rates: Rates) -> tuple[float, str]:
        """Least seconds, and what sets them."""
        compute, memory = self.operations / rates.compute, self.bytes / rates.bandwidth
        return max(compute, memory), "memory" if memory > compute else "compute"


def _work_of_step(run: Run) -> tuple[dict[str, _Work], tuple[str, ...]]:
    """Count the work of the last step, and name the policies whose work is not known."""
    assert run.last is not None
    rollout, batch = run.last.rollout, run.last.planned.batch
    works = {name: _Work() for name in PHASES}
    new = float(rollout.lengths.sum())
    unknown = []
    for name in batch.distributions:
        policy = batch.policies[name]
        shape = _shape_of(policy)
        if shape is None:
            unknown.append(name)
            continue
        width = policy.weights.model.dtype.itemsize
        tokens = _distinct_tokens(policy, rollout) + new
        works["learn"].operations += 2 * shape.head * new
        if name == "student":
            _add_student(works, run, shape, tokens, width)
        else:
            works["grade"].operations += 2 * shape.active * tokens
            works["grade"].bytes += shape.active * width
    if run.sampler is not None or any(writer != "student" for writer in rollout.writer):
        works["generate"] = _Work(math.nan, math.nan)
        unknown.append("who writes the texts")
    if any(name != "student" for name in unknown if name in batch.policies):
        works["grade"] = _Work(math.nan, math.nan)
    return works, tuple(unknown)


def _add_student(
    works: dict[str, _Work], run: Run, shape: Shape, tokens: float, width: int
) -> None:
    """Add the student's writing, its passes forward and back, and the optimizer's work."""
    assert run.last is not None
    rollout = run.last.rollout
    new, longest = float(rollout.lengths.sum()), float(rollout.lengths.max())
    trains_all = run.settings.lora is None
    inside = 2 * shape.active * tokens
    works["generate"].operations += inside + 2 * shape.head * new
    works["generate"].bytes += longest * (shape.active + shape.head) * width
    works["learn"].operations += inside * (3 if trains_all else 2)
    works["learn"].operations += 2 * shape.head * new * (2 if trains_all else 1)
    trained = sum(parameter.numel() for parameter in run.parameters.values())
    works["learn"].bytes += MOVED_BY_ADAMW * trained


def _distinct_tokens(policy: Policy, rollout: Rollout) -> float:
    """Tokens of the prompts, each counted once, as the policy reads them."""
    prompts = {tuple(policy.encode(prompt)) for prompt in rollout.prompts}
    return float(sum(map(len, prompts)))


def _shape_of(policy: object) -> Shape | None:
    """The shape of a local policy; None for servers and for unusual configurations."""
    if not isinstance(policy, Policy):
        return None
    try:
        return shape_of_config(policy.weights.model.config, "")
    except (AttributeError, KeyError, ValueError):
        return None


def measure_rates(policy: Policy) -> Rates:
    """Measure products and bandwidth of a policy's device, in the precision of its weights.

    Args:
        policy: The policy.

    Returns:
        The rates, each the fastest of a few tries; about a quarter of a second on a CPU.
    """
    device, dtype = policy.weights.device, policy.weights.model.dtype
    is_gpu = device.type == "cuda"
    side = 4096 if is_gpu else 768
    square = torch.randn(side, side, device=device).to(dtype)
    rows = 2**29 if is_gpu else 2**26  # bytes: more than any cache holds
    matrix = torch.ones(rows // (side * dtype.itemsize), side, device=device, dtype=dtype)
    product = _fastest(lambda: square @ square, device)
    reading = _fastest(lambda: matrix @ square[0], device)
    name = torch.cuda.get_device_name(device) if is_gpu else _name_of_cpu()
    return Rates(name, 2 * side**3 / product, matrix.numel() * matrix.dtype.itemsize / reading)


def _name_of_cpu() -> str:
    threads = torch.get_num_threads()
    return f"a CPU with {threads} thread{'s' * (threads > 1)}"


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few tries, in wall seconds."""
    best = math.inf
    for _ in range(TRIES):
        _wait_for(device)
        began = time.perf_counter()
        work()
        _wait_for(device)
        best = min(best, time.perf_counter() - began)
    return best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
