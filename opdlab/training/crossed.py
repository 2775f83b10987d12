"""95 % intervals for means over prompts and seeds at once.

A run is repeated with several seeds, and each run answers the same prompts. Both were drawn: other
prompts and other seeds would give other numbers. Each number is the sum of a mean, an effect of
its seed, an effect of its prompt, and a rest:

    x_sp = mean + a_s + b_p + e_sp,         Var(mean of x) = σ_a² / S + σ_b² / P + σ_e² / (S P)

The variance of the mean is estimated from the mean squares of the two-way layout without
repetition, (MS_seeds + MS_prompts - MS_rest) / (S P), and Student's t has the degrees of freedom of
Satterthwaite (Biometrics Bulletin 2, 1946). It is never taken to be less than what the seeds alone,
or the prompts alone, would give. One seed says nothing about others: the interval is then over
prompts alone, and says so.

Scores from 0 to 1 get pseudo prompts in addition, as Bonett and Price do for paired proportions
(J. Educ. Behav. Stat. 37, 2012): one that gained and one that lost. So an interval keeps a width
where every prompt changed alike.

A ratio of two means has the interval of Fieller (J. R. Stat. Soc. B 16, 1954): all r for which the
mean of `part - r whole` may be zero. It is bounded only if the whole is clearly not zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from opdlab.errors import EmptyPrompts, InvalidValue, NonFinite
from opdlab.training.intervals import LEAST_CHANGED, LEVEL

Numbers = npt.NDArray[np.float64]
FARTHEST = 1e6  # a ratio that far away is called unbounded


@dataclass(frozen=True)
class CrossedInterval:
    """A mean over prompts and seeds with its interval.

    Attributes:
        mean: The mean.
        low: The lower end.
        high: The upper end.
        prompts: Number of distinct prompts.
        seeds: Number of seeds, one run each.
        is_clear: Whether zero lies outside, and enough prompts changed to say so.
    """

    mean: float
    low: float
    high: float
    prompts: int
    seeds: int
    is_clear: bool

    def __repr__(self) -> str:
        counted = say_counts(self.prompts, self.seeds)
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}] (95 %, {counted})"


def say_counts(prompts: int, seeds: int) -> str:
    """Say on how many distinct prompts and seeds an interval rests.

    Args:
        prompts: Number of distinct prompts.
        seeds: Number of seeds.

    Returns:
        As "200 prompts, 3 seeds".
    """
    if seeds == 1:
        return f"{prompts} prompt{'s' * (prompts != 1)}, 1 seed: nothing about other seeds"
    return f"{prompts} prompt{'s' * (prompts != 1)}, {seeds} seeds"


def crossed_mean(change: Numbers, level: float = LEVEL) -> CrossedInterval:
    """Compute the mean of paired changes of scores over prompts and seeds, with an interval.

    Args:
        change: `[S, P]`, from -1 to 1: a score less its pair, of each seed and prompt.
        level: The level of the interval.

    Returns:
        The mean, and an interval within -1 to 1.

    Raises:
        InvalidValue: The numbers are no table, or out of range.
        EmptyPrompts: There are none.
        NonFinite: A number is NaN or infinite.
    """
    _check(change)
    padded = np.concatenate([change, _pseudo(len(change), [1.0, -1.0])], 1)
    error, freedom = _standard_error(_mean_squares(padded, padded), *padded.shape)
    half = _quantile(level, freedom) * error
    middle = float(padded.mean())
    mean = float(change.mean())
    low, high = min(mean, max(-1.0, middle - half)), max(mean, min(1.0, middle + half))
    changed = int(np.count_nonzero(np.any(change != 0, 0)))
    is_clear = changed >= LEAST_CHANGED and (low > 0 or high < 0)
    return CrossedInterval(mean, low, high, change.shape[1], len(change), is_clear)


def crossed_ratio(
    part: Numbers, whole: Numbers, lower: float = LEVEL, upper: float = LEVEL
) -> tuple[float, float, float]:
    """Compute the ratio of two means over the same prompts and seeds, with Fieller's interval.

    Args:
        part: `[S, P]`, changes of scores, from -1 to 1.
        whole: `[S, P]`, likewise.
        lower: The level of the two-sided interval whose lower end is returned.
        upper: The level of the one whose upper end is returned.

    Returns:
        The ratio and the two ends; an end is infinite where no ratio can be excluded.

    Raises:
        InvalidValue: The tables do not fit each other.
        EmptyPrompts: There are no numbers.
        NonFinite: A number is NaN or infinite.
    """
    _check(part)
    _check(whole)
    if part.shape != whole.shape:
        raise InvalidValue(
            f"crossed_ratio got tables of shapes {list(part.shape)} and {list(whole.shape)}. Give"
            " one number for each of the same seeds and prompts."
        )
    if whole.mean() == 0:
        return math.nan, -math.inf, math.inf
    ratio = float(part.mean() / whole.mean())
    # Pseudo prompts on which the part alone changed, or the whole alone, in either direction.
    parts = np.concatenate([part, _pseudo(len(part), [1.0, -1.0, 0.0, 0.0])], 1)
    wholes = np.concatenate([whole, _pseudo(len(whole), [0.0, 0.0, 1.0, -1.0])], 1)
    squares = [_mean_squares(a, b) for a, b in ((parts, parts), (parts, wholes), (wholes, wholes))]
    means = float(parts.mean()), float(wholes.mean())

    def is_plausible(r: float) -> bool:
        """Tell whether the mean of `part - r whole` may be zero, at the level asked for now."""
        own = squares[0] - 2 * r * squares[1] + r**2 * squares[2]
        error, freedom = _standard_error(own, *parts.shape)
        return abs(means[0] - r * means[1]) <= _quantile(asked, freedom) * error

    asked = lower
    low = _farthest(is_plausible, ratio, -1.0)
    asked = upper
    return ratio, low, _farthest(is_plausible, ratio, 1.0)


def _farthest(is_plausible: Callable[[float], bool], ratio: float, direction: float) -> float:
    """The ratio farthest from `ratio` in one direction that is plausible."""
    if is_plausible(ratio + direction * FARTHEST):
        return direction * math.inf
    inside, outside = 0.0, 1e-3
    while is_plausible(ratio + direction * outside):
        inside, outside = outside, 2 * outside
    for _ in range(40):
        middle = (inside + outside) / 2
        holds = is_plausible(ratio + direction * middle)
        inside, outside = (middle, outside) if holds else (inside, middle)
    return ratio + direction * inside


def _mean_squares(x: Numbers, y: Numbers) -> Numbers:
    """The mean squares of seeds, prompts and the rest, `[3]`; mean products for two tables."""
    seeds, prompts = x.shape
    rows, columns, rests = [], [], []
    for table in (x, y):
        rows.append(table.mean(1) - table.mean())
        columns.append(table.mean(0) - table.mean())
        rests.append(table - table.mean() - rows[-1][:, None] - columns[-1])
    return np.array(
        [
            prompts * (rows[0] @ rows[1]) / max(1, seeds - 1),
            seeds * (columns[0] @ columns[1]) / (prompts - 1),
            (rests[0] * rests[1]).sum() / max(1, (seeds - 1) * (prompts - 1)),
        ]
    )


def _standard_error(squares: Numbers, seeds: int, prompts: int) -> tuple[float, float]:
    """The standard error of the mean of `[S, P]`, and its degrees of freedom."""
    of_seeds, of_prompts, of_rest = (max(0.0, float(square)) for square in squares)
    if seeds == 1:
        return math.sqrt(of_prompts / prompts), prompts - 1.0
    variance = max(of_seeds + of_prompts - of_rest, of_seeds, of_prompts)
    spread = of_seeds**2 / (seeds - 1) + of_prompts**2 / (prompts - 1)
    spread += of_rest**2 / ((seeds - 1) * (prompts - 1))
    least = min(seeds, prompts) - 1.0
    freedom = max(least, variance**2 / spread) if spread > 0 else least
    return math.sqrt(variance / (seeds * prompts)), freedom


def _pseudo(seeds: int, values: list[float]) -> Numbers:
    """Prompts that changed in a given way with every seed, `[S, len(values)]`."""
    return np.tile(np.asarray(values), (seeds, 1))


def _quantile(level: float, freedom: float) -> float:
    return float(special.stdtrit(freedom, 0.5 + level / 2))


def _check(change: Numbers) -> None:
    if change.ndim != 2:
        raise InvalidValue(
            f"An interval over prompts and seeds got an array of shape {list(change.shape)}. Give"
            " [seeds, prompts], one number for each."
        )
    if not change.size:
        raise EmptyPrompts("An interval needs at least one prompt and one seed. Evaluate on some.")
    if not np.isfinite(change).all():
        raise NonFinite("An interval got NaN or infinity. Leave out what has no number.")
    if np.abs(change).max() > 1:
        raise InvalidValue(
            f"Changes of scores lie between -1 and 1, and one is {np.abs(change).max():.3g}. Give"
            " scores from 0 to 1."
        )
