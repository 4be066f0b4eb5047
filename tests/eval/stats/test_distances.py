from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch

from configs.errors import UsageError
from eval.likeness.encoder_rows import check_torch_fidelity
from eval.stats.distances import (
    Sample,
    accuracy_interval,
    auc_interval,
    balanced_accuracy,
    block_bootstrap,
    blocked_kid,
    confusion,
    density_coverage,
    gaussian_kernel,
    kid,
    median_distance,
    one_a_block,
    two_sample_scores,
)


def normal(n: int, seed: int, shift: float = 0.0, dimensions: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (n, dimensions))


def sample(features: np.ndarray, strata: np.ndarray | None = None, blocks: np.ndarray | None = None) -> Sample:
    zeros = np.zeros(len(features), dtype=np.int64)
    own = np.arange(len(features))
    return Sample(
        features=features, strata=zeros if strata is None else strata, blocks=own if blocks is None else blocks
    )


def naive_kid(a: np.ndarray, b: np.ndarray) -> float:
    """Binkowski et al. 2018, equation 4, written out pair by pair."""

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    n = len(a)
    within = sum(k(s[i], s[j]) for s in (a, b) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within - 2 * sum(k(x, y) for x in a for y in b) / n**2


def test_kid_equals_the_double_loop() -> None:
    a, b = normal(7, 0), normal(7, 1, shift=0.5)
    assert kid(a, b) == pytest.approx(naive_kid(a, b), rel=1e-12)


def test_kid_of_one_distribution_is_centred_on_zero() -> None:
    values = [kid(normal(40, 2 * seed), normal(40, 2 * seed + 1)) for seed in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_kid_refuses_unequal_numbers() -> None:
    with pytest.raises(ValueError, match="equal size"):
        kid(normal(8, 0), normal(9, 1))


def test_blocked_kid_without_strata_and_blocks_is_kid() -> None:
    a, b = normal(20, 0), normal(20, 1, shift=0.3)
    assert blocked_kid(sample(a), sample(b), draws=100).value == pytest.approx(kid(a, b), rel=1e-12)


def test_the_interval_of_one_distribution_holds_zero_and_that_of_a_shift_does_not() -> None:
    same = blocked_kid(sample(normal(60, 0)), sample(normal(60, 1)), draws=200)
    shifted = blocked_kid(sample(normal(60, 0)), sample(normal(60, 1, shift=1.0)), draws=200)
    assert same.low < 0 < same.high
    assert shifted.low > 0


def correlated(seed: int, blocks: int = 12, each: int = 8) -> Sample:
    """Blocks of nearly equal pictures: what neighbouring slices are."""
    random = np.random.default_rng(seed)
    centres = np.repeat(random.normal(size=(blocks, 4)), each, axis=0)
    return sample(centres + 0.1 * random.normal(size=centres.shape), blocks=np.repeat(np.arange(blocks), each))


def test_neighbouring_slices_do_not_swell_the_distance() -> None:
    pairs = [(correlated(2 * seed), correlated(2 * seed + 1)) for seed in range(60)]
    blocked = [blocked_kid(a, b, draws=100).value for a, b in pairs]
    plain = [kid(a.features, b.features) for a, b in pairs]
    assert abs(np.mean(blocked)) < 3 * np.std(blocked) / np.sqrt(len(blocked))
    assert np.mean(plain) > 3 * np.std(plain) / np.sqrt(len(plain))


def test_strata_are_compared_pair_by_pair_so_blocks_within_them_leave_no_bias() -> None:
    values = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        strata = np.repeat(np.arange(3), 16)
        blocks = np.repeat(np.arange(12), 4)
        a, b = (
            sample(
                random.normal(size=(48, 4)) + 3 * strata[:, None] + random.normal(size=(12, 4))[blocks], strata, blocks
            )
            for _ in range(2)
        )
        values.append(blocked_kid(a, b, draws=100).value)
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))


def test_blocked_kid_refuses_another_mix_of_captions() -> None:
    a = sample(normal(8, 0), strata=np.repeat([0, 1], 4))
    b = sample(normal(8, 1), strata=np.repeat([0, 1], [2, 6]))
    with pytest.raises(ValueError, match="each stratum"):
        blocked_kid(a, b)


def test_the_block_bootstrap_covers_where_a_slice_bootstrap_does_not() -> None:
    covered = {"blocks": 0, "slices": 0}
    for seed in range(60):
        random = np.random.default_rng(seed)
        values = np.repeat(random.normal(size=20), 10) + 0.1 * random.normal(size=200)
        strata = np.zeros(200, dtype=np.int64)
        for name, blocks in (("blocks", np.repeat(np.arange(20), 10)), ("slices", np.arange(200))):
            interval = block_bootstrap(lambda w, v=values: float((w * v).sum() / w.sum()), strata, blocks, draws=200)
            covered[name] += interval.low <= 0 <= interval.high
    assert covered["blocks"] >= 0.8 * 60
    assert covered["slices"] < 0.6 * 60


def test_confusion_counts_every_picture_in_the_row_of_what_was_asked() -> None:
    table = confusion(np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 2, 0]), 3)
    assert table.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]


def test_balanced_accuracy_weighs_rare_classes_like_common_ones() -> None:
    assert balanced_accuracy(np.array([[90.0, 0.0], [5.0, 5.0]])) == 0.75


def test_a_perfect_score_of_few_pictures_keeps_an_interval() -> None:
    """The Wilson interval of 10 hits in 10 starts at 10 / (10 + 1.96^2)."""
    labels, own = np.zeros(10, dtype=np.int64), np.arange(10)
    interval = accuracy_interval(labels, labels, 2, labels, own, draws=100)
    assert interval.value == 1
    assert interval.low == pytest.approx(10 / (10 + 1.959964**2), abs=1e-4)


def test_intervals_depend_on_the_seed_alone() -> None:
    a, b = correlated(0), correlated(1)
    assert blocked_kid(a, b, draws=100, seed=3) == blocked_kid(a, b, draws=100, seed=3)
    assert blocked_kid(a, b, draws=100, seed=3) != blocked_kid(a, b, draws=100, seed=4)


def stack(random: np.random.Generator, slices: int, length: float, dimensions: int) -> np.ndarray:
    """A stack of slices as a smooth Gaussian process along the stack, of variance 1."""
    from scipy.ndimage import gaussian_filter1d

    white = random.normal(size=(slices + 8 * int(length), dimensions))
    smooth = gaussian_filter1d(white, length / np.sqrt(2), axis=0, mode="wrap")[4 * int(length) :][:slices]
    return smooth * np.sqrt(2 * np.sqrt(np.pi) * length / np.sqrt(2))  # a filtered white noise has this much less


def test_intervals_over_blocks_cover_on_a_correlated_stack_and_those_over_slices_do_not() -> None:
    """700 slices with a correlation length of 15: a nominal 95 % interval of the mean, 200 stacks."""
    covered = {"blocks": 0, "slices": 0}
    number = np.arange(700)
    strata = np.zeros(700, dtype=np.int64)
    for seed in range(200):
        values = stack(np.random.default_rng(seed), 700, 15, 1)[:, 0]
        for name, blocks in (("blocks", number // 60), ("slices", number)):
            interval = block_bootstrap(lambda w, v=values: float(w @ v / w.sum()), strata, blocks, draws=200, seed=seed)
            covered[name] += interval.low <= 0 <= interval.high
    assert covered["blocks"] >= 0.80 * 200
    assert covered["slices"] < 0.40 * 200


def test_density_and_coverage_of_a_perfect_generator_need_a_thinned_reference() -> None:
    random = np.random.default_rng(0)
    real = stack(random, 700, 15, 64)
    made = np.concatenate([stack(random, 1, 15, 64) for _ in range(100)])
    crowded = density_coverage(real, made, neighbours=3)
    thinned = density_coverage(
        real[one_a_block(np.zeros(700, dtype=np.int64), np.arange(700) // 45)], made, neighbours=3
    )
    assert max(crowded) < 0.05
    assert thinned[0] == pytest.approx(1, abs=0.35)
    assert thinned[1] > 0.9


def test_density_and_coverage_equal_the_definition() -> None:
    real, made = normal(12, 0, dimensions=2), normal(9, 1, dimensions=2)
    radii = [sorted(np.linalg.norm(real - point, axis=1))[3] for point in real]  # the first is the point itself
    inside = [[np.linalg.norm(x - y) <= radius for y in made] for x, radius in zip(real, radii, strict=True)]
    density, coverage = density_coverage(real, made, neighbours=3)
    assert density == pytest.approx(np.sum(inside) / (3 * 9))
    assert coverage == pytest.approx(np.mean(np.any(inside, axis=1)))


@pytest.mark.parametrize(("shift", "expected"), [(0.0, 0.5), (1.0, 0.958)])
def test_the_two_sample_test_reads_what_a_linear_classifier_can_reach(shift: float, expected: float) -> None:
    """The AUC of two unit Gaussians d apart is Phi(d / sqrt(2)), Green and Swets 1966; here d is sqrt(6) or 0."""
    found = []
    for seed in range(10):
        pair = sample(normal(150, 2 * seed, shift=shift)), sample(normal(150, 2 * seed + 1))
        found.append(auc_interval(*pair, two_sample_scores(*pair), draws=100).value)
    assert np.mean(found) == pytest.approx(expected, abs=0.05)


def test_near_copies_of_one_block_never_sit_on_both_sides_of_the_classifier() -> None:
    """Blocks of one distribution: with slices dealt at random a block recognises itself, block by block it cannot."""
    a, b = correlated(0, blocks=20), correlated(1, blocks=20)
    alone = [sample(side.features) for side in (a, b)]
    leaked = auc_interval(*alone, two_sample_scores(*alone), draws=100)
    honest = auc_interval(a, b, two_sample_scores(a, b), draws=100)
    assert leaked.value > honest.value
    assert honest.low < 0.5 < honest.high


def test_the_gaussian_kernel_sees_a_loss_of_diversity() -> None:
    real = sample(normal(128, 0))
    few = sample(np.tile(normal(8, 1), (16, 1)) + 0.01 * normal(128, 2))
    again = sample(normal(128, 3))
    kernel = gaussian_kernel(median_distance(real.features))
    lost = blocked_kid(few, real, kernel=kernel, draws=100)
    same = blocked_kid(again, real, kernel=kernel, draws=100)
    assert same.low < 0 < same.high
    assert lost.low > same.high


def test_the_squared_mmd_equals_the_double_loop() -> None:
    a, b = normal(9, 0), normal(9, 1, shift=0.4)
    k = np.vectorize(lambda i, j: np.exp(-((x := both[i] - both[j]) @ x) / (2 * 1.5**2)))
    both = np.concatenate([a, b])
    kernel = np.fromfunction(k, (18, 18), dtype=int)
    within = [part.sum() - np.trace(part) for part in (kernel[:9, :9], kernel[9:, 9:])]
    expected = sum(within) / 72 - 2 * kernel[:9, 9:].mean()
    assert blocked_kid(sample(a), sample(b), kernel=gaussian_kernel(1.5), draws=100).value == pytest.approx(expected)


def test_kid_is_that_of_torch_fidelity() -> None:
    """One subset of all pictures: torch-fidelity's own function where it is installed."""
    extra = os.environ.get("TISSERAND_EXTRA_PACKAGES")
    if extra and extra not in sys.path:
        sys.path.append(extra)
    try:
        check_torch_fidelity()
    except UsageError as error:
        pytest.skip(str(error))
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = normal(40, 0, dimensions=16), normal(40, 1, shift=0.3, dimensions=16)
    both = [torch.from_numpy(side) for side in (a, b)]
    theirs = kid_features_to_metric(*both, kid_subsets=1, kid_subset_size=40, verbose=False)
    assert kid(a, b) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
