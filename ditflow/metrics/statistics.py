"""Means with their uncertainty: what a table of metrics reports instead of bare numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Interval:
    """The mean of `count` values, and the bounds of its confidence interval, in the values' unit."""

    mean: float
    low: float
    high: float
    count: int


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return the mean of values [N] and its percentile bootstrap interval; the same input gives the same interval.

    From `resamples` means of N values drawn with replacement, the interval holds the middle share `level`. It is
    too narrow below some 20 values, and has no width for a single one. Raises ValueError for no values, values that
    are not finite, fewer than 1 resample, or a level not between 0 and 1.
    """
    numbers = _checked("values", values)
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"{resamples} resamples and the level {level} came, expected 1 or more and a share between 0 and 1. A "
            "95 % interval has the level 0.95."
        )
    rng = np.random.default_rng(seed)
    # So many resamples at a time that memory stays bounded.
    together = max(1, 1_000_000 // len(numbers))
    sizes = [min(together, resamples - done) for done in range(0, resamples, together)]
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
    """Return the mean of a - b over pairs [N], and its interval by `bootstrap_interval`, which draws whole pairs.

    The difference is clear if the interval leaves out 0. Raises ValueError as `bootstrap_interval` does, and if the
    lengths differ.
    """
    left, right = _checked("a", a), _checked("b", b)
    if len(left) != len(right):
        raise ValueError(
            f"{len(left)} values of a and {len(right)} of b came, expected as many: a[i] and b[i] are of the same "
            "clip. Most likely a row failed on one side; leave it out on both."
        )
    return bootstrap_interval(left - right, resamples=resamples, level=level, seed=seed)


def _checked(name: str, values: Sequence[float] | np.ndarray) -> Float[np.ndarray, " values"]:
    numbers = np.asarray(values, dtype=float)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"{name} have the shape {list(numbers.shape)}, expected [N] with N >= 1. Did every row fail?")
    if not np.isfinite(numbers).all():
        raise ValueError(
            f"{np.sum(~np.isfinite(numbers))} of {len(numbers)} {name} are not finite. Most likely rows that failed "
            "were filled with NaN; leave them out, so that the count tells how many are left."
        )
    return numbers
