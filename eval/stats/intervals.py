"""Intervals for scores over prompts and seeds: prompts are drawn again, then the seeds within each.

Pictures of one prompt resemble each other, so a hundred of them over eight prompts are not a hundred samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import betabinom, binomtest
from scipy.stats import t as student_t

from eval.stats.arrays import Floats
from eval.stats.distances import Interval

Statistic = Callable[..., Floats]
_USUAL = 0.9995


def hierarchical(statistic: Statistic, *arrays: Floats, draws: int = 1000, seed: int = 0) -> Interval:
    """Return a mean over prompts with its 95 % interval from a bootstrap of prompts, then of seeds.

    Args:
        statistic: takes arrays (..., P, S) and returns (..., P), a value per prompt: over seeds, on the last axis.
        arrays: (P, S) each, prompts by seeds, drawn together, so that pairs stay pairs.
        draws: bootstrap resamples.
        seed: seed of the resampling.

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


def noise_band(again: Floats, base: Floats, rows: NDArray[np.int64]) -> Interval:
    """Return where a mean ratio over some prompts falls when nothing changed, in 999 cases of 1000.

    Args:
        again: (P, S) what is measured on pictures of one model ...
        base: ... and on those of other seeds; the true ratio of their means is 1.
        rows: indices of the prompts the judged mean is made of.

    Student's t on the logarithms, with the wider of two noises: that of all P ratios, and that of the pictures of the
    judged prompts themselves, since some prompts leave more open than others.
    """
    ratios = ratio_of_means(again, base)
    logs, seeds = np.log(ratios), base.shape[1]
    half = float(student_t.ppf(_USUAL, len(logs)) * np.sqrt(np.square(logs).mean() / len(rows)))
    if seeds > 1:
        pictures = np.stack([again[rows], base[rows]])  # (2, R, S)
        relative = pictures.var(axis=-1, ddof=1) / np.square(pictures.mean(axis=-1))
        own = relative.sum(axis=0) / seeds  # of log(again / base), a prompt each
        freedom = own.sum() ** 2 / np.square(own).sum() * 2 * (seeds - 1) if own.any() else 1.0  # Welch-Satterthwaite
        half = max(half, float(student_t.ppf(_USUAL, freedom) * np.sqrt(own.sum()) / len(rows)))
    return Interval(value=float(ratios.mean()), low=float(np.exp(-half)), high=float(np.exp(half)))


def chance_of_hits(hits: int, of: int, pictures: int) -> float:
    """Return the share that false alarms reach at most among some pictures, in 995 cases of 1000.

    Args:
        hits: false alarms that were seen ...
        of: ... among so many pictures.
        pictures: that are judged.

    Quantile of the beta-binomial prediction from Jeffreys' prior: no alarm among a few pictures promises little.
    """
    return float(betabinom.ppf(0.995, pictures, hits + 0.5, of - hits + 0.5)) / pictures


def mean_interval(values: Sequence[float] | Floats) -> tuple[float, float | None, float | None]:
    """Return a mean and the ends of its 95 % interval by Student's t; None for those of a single value."""
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return mean, None, None
    half = float(student_t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return mean, mean - half, mean + half
