"""95 % intervals for scores from 0 to 1, counted over prompts.

A prompt is one observation, however many texts were written for it: texts of one prompt are alike,
and counting them one by one would make intervals too narrow. Both intervals invert a score test, so
they keep a width where every prompt has the same score, unlike a bootstrap, which then sees no
spread at all.

- A mean: Wilson's interval (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927). Scores between 0 and 1
vary less than right-or-wrong
  ones with the same mean, so for them it is on the wide side.
- A paired difference: Tango's score interval (T. Tango, Statistics in Medicine 17, 1998), made for
right-or-wrong answers to
  the same prompts. It reads how many prompts got better and how many got worse; of scores in
  between, the sums of the gains and of the losses take their place, again on the wide side.
- A paired difference of numbers without bounds: Student's t.

An evaluation is of one policy, the result of one seed: these intervals say nothing about other
seeds. `opdlab.training.crossed` has intervals over prompts and seeds.

No difference is called clear from fewer than six prompts that changed: with five, even the best
case, all changing the same way, has a chance of 2 / 2^5 = 0.06 under the exact sign test.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from opdlab.errors import EmptyPrompts, InvalidValue, NonFinite

LEVEL = 0.95
Z = float(special.ndtri(0.5 + LEVEL / 2))
LEAST_CHANGED = (
    6  # prompts that must change before a difference can be clear: 2 / 2^6 < 0.05 < 2 / 2^5
)


@dataclass(frozen=True)
class Interval:
    """A 95 % interval for a mean over `prompts` prompts.

    Attributes:
        low: The lower end.
        high: The upper end.
        prompts: Number of prompts that the mean is over.
    """

    low: float
    high: float
    prompts: int

    def __repr__(self) -> str:
        return f"[{self.low:.3f}, {self.high:.3f}] (95 % Wilson, {_counted(self.prompts)})"


@dataclass(frozen=True, eq=False)
class Difference:
    """A paired difference of means with a 95 % interval over prompts.

    Attributes:
        mean: The mean of `after - before`.
        low: The lower end of the interval.
        high: The upper end of the interval.
        prompts: Number of prompts that the mean is over.
    """

    mean: float
    low: float
    high: float
    prompts: int

    @property
    def clear(self) -> bool:
        """Tell whether zero lies outside the interval, which takes at least six prompts."""
        return self.prompts >= LEAST_CHANGED and (self.low > 0 or self.high < 0)

    def __repr__(self) -> str:
        return (
            f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}] (95 % paired,"
            f" {_counted(self.prompts)})"
        )


def wilson(mean: float, prompts: int) -> Interval:
    """Compute Wilson's interval for the mean of `prompts` scores from 0 to 1.

    It is the textbook interval where all scores are 0 or 1.

    Args:
        mean: Mean of the scores, from 0 to 1.
        prompts: Number of scores, at least 1.

    Returns:
        The 95 % interval, within 0 to 1.

    Raises:
        EmptyPrompts: There are no prompts.
    """
    if prompts < 1:
        raise EmptyPrompts("An interval needs at least one prompt. Evaluate on some.")
    shrink = 1 + Z**2 / prompts
    center = (mean + Z**2 / (2 * prompts)) / shrink
    half = Z / shrink * math.sqrt(max(0.0, mean * (1 - mean)) / prompts + (Z / (2 * prompts)) ** 2)
    # at 0 and 1 the limit is exact, and rounding must not move it
    low = 0.0 if mean <= 0 else max(0.0, center - half)
    high = 1.0 if mean >= 1 else min(1.0, center + half)
    return Interval(low, high, prompts)


def paired(after: Sequence[float] | np.ndarray, before: Sequence[float] | np.ndarray) -> Difference:
    """Compute the mean of `after - before`, one number per prompt each, with a 95 % interval.

    Scores from 0 to 1 get Tango's interval, other numbers Student's. Where numbers without bounds
    all changed alike, their common change bounds what the next prompt is taken to do.

    Args:
        after: One number per prompt, `[P]`.
        before: One number for each of the same prompts, `[P]`.

    Returns:
        The difference; its interval contains 0 where fewer than `LEAST_CHANGED` numbers changed.

    Raises:
        InvalidValue: The two do not have one number for each of the same prompts.
        EmptyPrompts: There are no prompts.
        NonFinite: A number is NaN or infinite.
    """
    new, old = (np.asarray(values, float) for values in (after, before))
    if new.shape != old.shape or new.ndim != 1:
        raise InvalidValue(
            f"paired got arrays of shapes {list(new.shape)} and {list(old.shape)}. Give one number"
            " a prompt, for the same prompts."
        )
    if not new.size:
        raise EmptyPrompts("paired got no prompts. Give one number a prompt.")
    if not (np.isfinite(new).all() and np.isfinite(old).all()):
        raise NonFinite(
            "paired got NaN or infinity. Leave out the prompts without a number, in both arrays."
        )
    change = new - old
    mean = float(change.mean())
    if min(new.min(), old.min()) >= 0 and max(new.max(), old.max()) <= 1:
        low, high = tango(change)
    elif np.ptp(change) > 1e-9 * max(np.abs(new).max(), np.abs(old).max()):  # more than rounding
        half = float(
            special.stdtrit(len(change) - 1, 0.5 + LEVEL / 2)
            * change.std(ddof=1)
            / math.sqrt(len(change))
        )
        low, high = mean - half, mean + half
    else:
        scale = float(np.abs(change).max()) or float(np.abs(new).max())
        low, high = (scale * limit for limit in tango(change / scale))
    if np.count_nonzero(change) < LEAST_CHANGED:
        low, high = min(low, 0.0), max(high, 0.0)
    return Difference(mean, low, high, len(change))


def tango(change: np.ndarray) -> tuple[float, float]:
    """Compute Tango's score interval for the mean of changes from -1 to 1, one per prompt.

    Args:
        change: The changes, `[P]`.

    Returns:
        The lower and the upper end of the 95 % interval.
    """
    gained, lost, prompts = (
        float(change.clip(min=0).sum()),
        float(-change.clip(max=0).sum()),
        len(change),
    )
    mean = (gained - lost) / prompts

    def is_plausible(difference: float) -> bool:
        return abs(_score(difference, gained, lost, prompts)) <= Z

    return _boundary(is_plausible, mean, -1.0), _boundary(is_plausible, mean, 1.0)


def _score(difference: float, gained: float, lost: float, prompts: int) -> float:
    """Compute the score statistic of one true difference.

    It says how many standard errors the observed difference is away from the true one.

    The standard error is that under the assumed difference, with the share of prompts that get
    worse at its likeliest value.
    """
    surplus = gained - lost - prompts * difference
    if surplus == 0:
        return 0.0
    linear = (2 * prompts - gained + lost) * difference - gained - lost
    constant = -lost * difference * (1 - difference)
    worse = (math.sqrt(max(0.0, linear**2 - 8 * prompts * constant)) - linear) / (4 * prompts)
    variance = prompts * (2 * worse + difference * (1 - difference))
    return surplus / math.sqrt(variance) if variance > 0 else math.inf


def _boundary(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """Find where a claim that holds at `inside` ceases to hold on the way to `outside`.

    Returns `outside` where it never does.
    """
    if holds(outside):
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside


def _counted(prompts: int) -> str:
    """The counts that an interval rests on: an evaluation is of one policy, so of one seed."""
    return f"{prompts} prompt{'s' * (prompts != 1)}, 1 seed"
