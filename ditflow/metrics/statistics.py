"""Means with bootstrap confidence intervals, for tables of metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ditflow.metrics.errors import MetricInputError


@dataclass(frozen=True)
class Interval:
    """Mean of `count` values with the bounds of its confidence interval, in the values' unit."""

    mean: float
    low: float
    high: float
    count: int


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return the mean of values [N] and its percentile bootstrap interval; the same input gives the same interval.

    The bounds are quantiles of the means of `resamples` resamples of N values with replacement. The interval is too
    narrow below some 20 values, and has no width for a single one. Raises MetricInputError for no values, values that
    are not finite, fewer than 1 resample, or a level outside 0 to 1.
    """
    numbers = _checked("values", values)
    if resamples < 1 or not 0 < level < 1:
        raise MetricInputError(
            f"{resamples} resamples and the level {level} came, expected 1 or more and a fraction between 0 and 1. A "
            "95 % interval has the level 0.95.",
            code="interval-options-invalid",
        )
    rng = np.random.default_rng(seed)
    batch = max(1, 1_000_000 // len(numbers))  # bounds the memory
    sizes = [min(batch, resamples - done) for done in range(0, resamples, batch)]
    means = np.concatenate([numbers[rng.integers(len(numbers), size=(n, len(numbers)))].mean(axis=1) for n in sizes])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(numbers.mean()), float(low), float(high), len(numbers))


def paired_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    *,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the mean of a - b over pairs [N] with its interval by `bootstrap_interval`, which resamples whole pairs.

    The difference is significant if the interval excludes 0. Raises MetricInputError as `bootstrap_interval` does, and
    if the lengths differ.
    """
    left, right = _checked("a", a), _checked("b", b)
    if len(left) != len(right):
        raise MetricInputError(
            f"{len(left)} values of a and {len(right)} of b came, expected as many: a[i] and b[i] are of the same "
            "clip. Most likely a row failed on one side; leave it out on both.",
            code="pairs-incomplete",
        )
    return bootstrap_interval(left - right, resamples=resamples, level=level, seed=seed)


def _checked(name: str, values: Sequence[float] | np.ndarray) -> Float[np.ndarray, " values"]:
    numbers = np.asarray(values, dtype=float)
    if numbers.ndim != 1 or not len(numbers):
        raise MetricInputError(
            f"{name} have the shape {list(numbers.shape)}, expected [N] with N >= 1. Did every row fail?",
            code="values-missing",
        )
    if not np.isfinite(numbers).all():
        raise MetricInputError(
            f"{np.sum(~np.isfinite(numbers))} of {len(numbers)} {name} are not finite. Most likely rows that failed "
            "were filled with NaN; leave them out, so that the count is that of the measured rows.",
            code="values-not-finite",
        )
    return numbers
