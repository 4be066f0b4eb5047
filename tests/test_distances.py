from __future__ import annotations

import numpy as np
import pytest

from eval.distances import Sample, accuracy_interval, balanced_accuracy, block_bootstrap, blocked_kid, confusion, kid


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
