"""Distances between sets of feature vectors, accuracies, and the intervals that belong to them.

Slices of one volume resemble their neighbours, so a thousand of them are not a thousand samples. Every interval here
resamples whole blocks (contiguous slabs on the real side, seeds on the generated side), and pairs from one block are
left out of the kernel means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist, pdist
from scipy.stats import binomtest

from eval.stats.arrays import Floats, Ints

Kernel = Callable[[Floats, Floats], Floats]

SHRINKAGE = 0.2
"""Share of the two-sample classifier's covariance that is replaced by a multiple of the identity."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Feature vectors of one set of pictures with what is known of their dependence.

    Attributes:
        features: (N, D), one row a picture.
        strata: (N,) label of the class a picture belongs to, such as its caption.
        blocks: (N,) label of the block a picture was cut from; pictures of one block are not independent.
    """

    features: Floats
    strata: Ints
    blocks: Ints

    def __len__(self) -> int:
        return len(self.features)

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> Sample:
        """Return the pictures at ``index``."""
        return Sample(features=self.features[index], strata=self.strata[index], blocks=self.blocks[index])


def cubic_kernel(a: Floats, b: Floats) -> Floats:
    """Return k(x, y) = (x . y / D + 1)^3 for all pairs of rows, (N, D) and (M, D) -> (N, M).

    Source: Binkowski et al. 2018, Demystifying MMD GANs, section 4.
    """
    kernel: Floats = (a @ b.T / a.shape[1] + 1.0) ** 3
    return kernel


def kid(a: Floats, b: Floats) -> float:
    """Return the kernel inception distance: the unbiased squared MMD under the cubic kernel; it may be negative.

    Args:
        a: features of one set, (N, D) with N >= 2.
        b: features of the other set, (N, D), the same N.

    Raises:
        ValueError: fewer than two rows, or different shapes.

    Source: Binkowski et al. 2018, equation 4.
    """
    _check_pair(a, b)
    n = len(a)
    within = sum(kernel.sum() - np.trace(kernel) for kernel in (cubic_kernel(a, a), cubic_kernel(b, b))) / (n * (n - 1))
    return float(within - 2 * cubic_kernel(a, b).mean())


def gaussian_kernel(bandwidth: float) -> Kernel:
    """Return k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)) as a function of (N, D) and (M, D) -> (N, M).

    Source: Gretton et al. 2012, A kernel two-sample test; it sees a loss of diversity that a linear kernel misses.
    """

    def kernel(a: Floats, b: Floats) -> Floats:
        return np.asarray(np.exp(-cdist(a, b, "sqeuclidean") / (2 * bandwidth**2)))

    return kernel


def median_distance(features: Floats) -> float:
    """Return the median distance of two different rows of (N, D): the usual bandwidth of a Gaussian kernel."""
    return float(np.median(pdist(features)))


def blocked_kid(a: Sample, b: Sample, *, kernel: Kernel = cubic_kernel, draws: int = 1000, seed: int = 0) -> Interval:
    """Return the KID of two stratified samples of correlated pictures, with its block-bootstrap interval.

    The mean kernel of each pair of strata is taken over pairs from different blocks, and the strata are weighted by
    their share of the pictures, so neither neighbouring slices nor the mix of captions bias the distance. With one
    stratum and one picture per block it is ``kid``. A stratum with a single block has no pair to offer; its pictures
    then count as independent.

    Args:
        a: one set.
        b: the other set, with the same number of pictures in each stratum.
        kernel: another one gives the squared MMD under it.
        draws: bootstrap resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: the strata do not hold equal numbers on both sides, or fewer than two pictures each.
    """
    _check_pair(a.features, b.features)
    strata, counts = np.unique(a.strata, return_counts=True)
    other, other_counts = np.unique(b.strata, return_counts=True)
    if not (np.array_equal(strata, other) and np.array_equal(counts, other_counts)):
        raise ValueError("the two sets must hold the same number of pictures in each stratum")
    if counts.min() < 2:
        raise ValueError("each stratum needs at least two pictures")
    share = counts / counts.sum()
    sides = [_split_lone_blocks(sample) for sample in (a, b)]
    onehots = [np.equal.outer(sample.strata, strata).astype(np.float64) for sample in sides]
    allowed = [np.not_equal.outer(sample.blocks, sample.blocks).astype(np.float64) for sample in sides]
    kernels = [kernel(sample.features, sample.features) * pairs for sample, pairs in zip(sides, allowed, strict=True)]
    cross = kernel(a.features, b.features)

    def means(side: int, weights: Floats) -> Floats:
        members = onehots[side] * weights[:, None]
        number = members.T @ allowed[side] @ members
        mean: Floats = members.T @ kernels[side] @ members / np.where(number > 0, number, np.nan)
        return mean

    whole = [means(side, np.ones(len(a))) for side in (0, 1)]

    def distance(*weights: Floats) -> float:
        # A draw may pick one block of a stratum only, which then has no pair: the mean over all pairs stands in for it.
        drawn = [means(side, weight) for side, weight in enumerate(weights)]
        within = sum(np.where(np.isnan(mean), full, mean) for mean, full in zip(drawn, whole, strict=True))
        members = [onehot * weight[:, None] for onehot, weight in zip(onehots, weights, strict=True)]
        between = members[0].T @ cross @ members[1] / np.outer(members[0].sum(axis=0), members[1].sum(axis=0))
        return float(share @ (within - 2 * between) @ share)

    generator = np.random.default_rng(seed)
    weights = [_draw_weights(sample, draws, generator) for sample in sides]
    resampled = [distance(*pair) for pair in zip(*weights, strict=True)]
    return _interval(distance(*(np.ones(len(sample)) for sample in sides)), resampled)


def block_bootstrap(
    statistic: Callable[[Floats], float], strata: Ints, blocks: Ints, *, draws: int = 1000, seed: int = 0
) -> Interval:
    """Return ``statistic(weights)`` with the interval from resampling the blocks of each stratum with replacement.

    Args:
        statistic: function of (N,) weights; all ones gives the value, whole multiplicities the resamples.
        strata: (N,) class labels; blocks are resampled within them.
        blocks: (N,) block labels.
        draws: bootstrap resamples.
        seed: seed of the resampling.
    """
    sample = _split_lone_blocks(Sample(features=np.zeros((len(strata), 1)), strata=strata, blocks=blocks))
    resampled = [statistic(weights) for weights in _draw_weights(sample, draws, np.random.default_rng(seed))]
    return _interval(statistic(np.ones(len(strata))), resampled)


def block_weights(strata: Ints, blocks: Ints, *, draws: int = 1000, seed: int = 0) -> Floats:
    """Return how often each picture occurs in each resample, (draws, N): whole blocks, drawn again per stratum."""
    sample = _split_lone_blocks(Sample(features=np.zeros((len(strata), 1)), strata=strata, blocks=blocks))
    return _draw_weights(sample, draws, np.random.default_rng(seed))


def one_a_block(strata: Ints, blocks: Ints) -> Ints:
    """Return the indices of the first picture of every block of every stratum: a reference without near copies."""
    return np.unique(np.stack([strata, blocks]), axis=1, return_index=True)[1].astype(np.int64)


def density_coverage(reference: Floats, generated: Floats, *, neighbours: int = 5) -> tuple[float, float]:
    """Return density and coverage of generated features (M, D) among real ones (N, D).

    Density is the mean number of real spheres a generated picture lies in, over ``neighbours``: about 1 for the same
    distribution. Coverage is the share of real spheres that hold a generated picture. A sphere reaches to the real
    picture's k-th neighbour, so near copies among the real ones shrink it to nothing: thin them first.

    Raises:
        ValueError: no more real pictures than neighbours.

    Source: Naeem et al. 2020, Reliable fidelity and diversity metrics, equations 3 and 4.
    """
    if len(reference) <= neighbours:
        raise ValueError(f"{len(reference)} real pictures; more than {neighbours} are needed")
    own = np.sort(cdist(reference, reference), axis=1)
    inside = cdist(reference, generated) <= own[:, neighbours, None]  # (N, M); column 0 is the picture itself
    return float(inside.sum() / (neighbours * len(generated))), float(inside.any(axis=1).mean())


def two_sample_scores(a: Sample, b: Sample, *, folds: int = 5, seed: int = 0) -> tuple[Floats, Floats]:
    """Return what a linear classifier says of pictures it has not learned: the larger, the more like those of ``a``.

    Whole blocks are left out in turn, on both sides. The classifier is Fisher's discriminant with a shrunk covariance,
    on features scaled by the learning part.

    Args:
        a: one set, (N, D) features.
        b: the other set, (M, D).
        folds: parts the blocks are dealt into; fewer where there are fewer blocks.
        seed: seed of the deal.

    Returns:
        (N,) and (M,) scores; 0 everywhere where a side has a single block.

    Source: Lopez-Paz and Oquab 2017, Revisiting classifier two-sample tests.
    """
    generator = np.random.default_rng(seed)
    sides = [_split_lone_blocks(sample) for sample in (a, b)]
    names = [np.unique(np.stack([side.strata, side.blocks]), axis=1, return_inverse=True)[1].ravel() for side in sides]
    folds = min(folds, *(int(name.max()) + 1 for name in names))
    scores = [np.zeros(len(a)), np.zeros(len(b))]
    if folds < 2:
        return scores[0], scores[1]
    dealt = [generator.permutation(int(name.max()) + 1)[name] % folds for name in names]
    for fold in range(folds):
        learn = [side.features[own != fold] for side, own in zip(sides, dealt, strict=True)]
        both = np.concatenate(learn)
        mean, spread = both.mean(axis=0), both.std(axis=0) + 1e-9
        scaled = [(features - mean) / spread for features in learn]
        centres = [features.mean(axis=0) for features in scaled]
        rest = np.concatenate([features - centre for features, centre in zip(scaled, centres, strict=True)])
        covariance = rest.T @ rest / len(rest)
        dimension = len(covariance)
        ridge = SHRINKAGE * np.trace(covariance) / dimension * np.eye(dimension)
        direction = np.linalg.solve((1 - SHRINKAGE) * covariance + ridge, centres[0] - centres[1])
        middle = (centres[0] + centres[1]) / 2
        for score, side, own in zip(scores, sides, dealt, strict=True):
            held = own == fold
            score[held] = ((side.features[held] - mean) / spread - middle) @ direction
    return scores[0], scores[1]


def auc_interval(a: Sample, b: Sample, scores: tuple[Floats, Floats], *, draws: int = 1000, seed: int = 0) -> Interval:
    """Return how often a picture of ``a`` scores above one of ``b`` (ties count half), with its block bootstrap.

    0.5: they cannot be told apart; 1: always. The interval resamples the blocks of both sides.
    """
    wins = (np.sign(np.subtract.outer(scores[0], scores[1])) + 1) / 2

    def auc(first: Floats, second: Floats) -> float:
        return float(first @ wins @ second / (first.sum() * second.sum()))

    weights = [
        block_weights(sample.strata, sample.blocks, draws=draws, seed=seed + side) for side, sample in enumerate((a, b))
    ]
    resampled = [auc(*pair) for pair in zip(*weights, strict=True)]
    return _interval(auc(np.ones(len(a)), np.ones(len(b))), resampled)


def confusion(expected: Ints, seen: Ints, classes: int, weights: Floats | None = None) -> Floats:
    """Return the (classes, classes) table of counts, rows as expected, columns as seen."""
    table = np.zeros((classes, classes))
    np.add.at(table, (expected, seen), 1.0 if weights is None else weights)
    return table


def balanced_accuracy(table: Floats) -> float:
    """Return the mean recall over the classes that occur, from a confusion table."""
    total = table.sum(axis=1)
    present = total > 0
    return float((np.diag(table)[present] / total[present]).mean())


def accuracy_interval(
    expected: Ints, seen: Ints, classes: int, strata: Ints, blocks: Ints, *, draws: int = 1000, seed: int = 0
) -> Interval:
    """Return the balanced accuracy with the wider of its block-bootstrap and Wilson intervals.

    A bootstrap of a perfect score has no width; the Wilson interval says what so few pictures can promise.
    """
    boot = block_bootstrap(
        lambda weights: balanced_accuracy(confusion(expected, seen, classes, weights)),
        strata,
        blocks,
        draws=draws,
        seed=seed,
    )
    hits = round(boot.value * len(expected))
    wilson = binomtest(hits, len(expected)).proportion_ci(method="wilson")
    return Interval(value=boot.value, low=min(boot.low, float(wilson.low)), high=max(boot.high, float(wilson.high)))


def _check_pair(a: Floats, b: Floats) -> None:
    """Refuse sets of different size: distances at unequal N cannot be compared with each other."""
    if a.shape != b.shape or len(a) < 2:
        raise ValueError(f"two sets of equal size, at least two pictures each, are needed; got {a.shape} and {b.shape}")


def _split_lone_blocks(sample: Sample) -> Sample:
    """Give each picture of a stratum with a single block a block of its own: nothing else is left to resample."""
    blocks = np.unique(sample.blocks, return_inverse=True)[1]
    fresh = np.arange(len(sample)) + blocks.max() + 1
    for stratum in np.unique(sample.strata):
        members = sample.strata == stratum
        if len(np.unique(blocks[members])) == 1:
            blocks = np.where(members, fresh, blocks)
    return Sample(features=sample.features, strata=sample.strata, blocks=blocks)


def _draw_weights(sample: Sample, draws: int, generator: np.random.Generator) -> Floats:
    """Return how often each picture occurs, (draws, N), when the blocks of every stratum are drawn with replacement."""
    weights = np.zeros((draws, len(sample)))
    for stratum in np.unique(sample.strata):
        members = np.flatnonzero(sample.strata == stratum)
        names, index = np.unique(sample.blocks[members], return_inverse=True)
        chosen = generator.integers(len(names), size=(draws, len(names)))
        places = chosen + len(names) * np.arange(draws)[:, None]
        multiplicity = np.bincount(places.ravel(), minlength=draws * len(names)).reshape(draws, -1)  # (draws, blocks)
        weights[:, members] = multiplicity[:, index]
    return weights


def _interval(value: float, resampled: list[float]) -> Interval:
    """Return the 2.5 and 97.5 % quantiles of the resampled values around the value."""
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(value=value, low=float(min(low, value)), high=float(max(high, value)))
