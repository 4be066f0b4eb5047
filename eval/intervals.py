"""Intervals for scores over prompts and seeds: prompts are drawn again, then the seeds within each.

Pictures of one prompt resemble each other, so a hundred of them over eight prompts are not a hundred samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from scipy.stats import t as student_t

from eval.distances import Interval

Floats = NDArray[np.float64]
Statistic = Callable[..., Floats]


def hierarchical(statistic: Statistic, *arrays: Floats, draws: int = 1000, seed: int = 0) -> Interval:
    """Return a mean over prompts with its 95 % interval from a bootstrap of prompts, then of seeds.

    Args:
        statistic: takes arrays (..., P, S) and returns (..., P), a value per prompt: over seeds, on the last axis.
        arrays: (P, S) each, prompts by seeds, drawn together, so that pairs stay pairs.
        draws: bootstrap resamples.
        seed: of the resampling.

    With one prompt the seeds alone are drawn. With one seed as well the interval is the value.
    """
    return interval_of(float(statistic(*arrays).mean()), resample(statistic, *arrays, draws=draws, seed=seed))


def resample(statistic: Statistic, *arrays: Floats, draws: int = 1000, seed: int = 0) -> Floats:
    """Return the means over prompts of the resamples, (draws,); arguments as for ``hierarchical``."""
    num_prompts, num_seeds = arrays[0].shape
    random = np.random.default_rng(seed)
    prompts = random.integers(num_prompts, size=(draws, num_prompts))
    seeds = random.integers(num_seeds, size=(draws, num_prompts, num_seeds))
    drawn = [array[prompts[:, :, None], seeds] for array in arrays]  # (draws, P, S)
    return np.asarray(statistic(*drawn).mean(axis=-1))


def interval_of(value: float, resamples: Floats) -> Interval:
    """Return the 2.5 and 97.5 % quantiles of the resamples around the value."""
    low, high = np.quantile(resamples, (0.025, 0.975))
    return Interval(value=value, low=float(min(low, value)), high=float(max(high, value)))


def share_interval(hits: Floats, *, seed: int = 0) -> Interval:
    """Return the mean over prompts of a share, (P, S) of 0 and 1, with the wider of bootstrap and Wilson intervals.

    A bootstrap of all zeros has no width; the Wilson interval says what so few pictures can promise.
    """
    boot = hierarchical(lambda values: values.mean(axis=-1), hits, seed=seed)
    wilson = binomtest(round(float(hits.sum())), hits.size).proportion_ci(method="wilson")
    return Interval(value=boot.value, low=min(boot.low, float(wilson.low)), high=max(boot.high, float(wilson.high)))


def ratio_of_means(above: Floats, below: Floats) -> Floats:
    """Return mean(above) / mean(below) over the last axis: steadier than a mean of ratios."""
    return np.asarray(above.mean(axis=-1) / below.mean(axis=-1))


def noise_band(ratios_again: Floats, num_prompts: int) -> Interval:
    """Return where a mean ratio over ``num_prompts`` falls when nothing changed, in 999 cases of 1000.

    Args:
        ratios_again: (P,) ratio of each prompt between two sets of seeds of one model; the true ratio is 1.
        num_prompts: prompts the judged mean is made of; 1 for a single prompt.

    Student's t with P degrees of freedom on the logarithms: the noise of one prompt is itself known from P only.
    """
    logs = np.log(ratios_again)
    half = float(student_t.ppf(0.9995, len(logs)) * np.sqrt(np.square(logs).mean() / num_prompts))
    return Interval(value=float(ratios_again.mean()), low=float(np.exp(-half)), high=float(np.exp(half)))


def mean_interval(values: Sequence[float] | Floats) -> tuple[float, float | None, float | None]:
    """Return a mean and the ends of its 95 % interval by Student's t; None for those of a single value."""
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return mean, None, None
    half = float(student_t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return mean, mean - half, mean + half
