"""Correlation between slices, and how many of them are independent."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from data_prep.folders.window import Window
from data_prep.slicing.audit import Samples, audit, effective_number, histogram

SHAPE = (160, 120, 200)


def sampled(volume: np.ndarray, order: list[int] | None = None) -> Samples:
    samples = Samples(depth=len(volume))
    for z in order or range(len(volume)):
        samples.keep(z, volume[z], volume[z])
    return samples


def smooth(sigma: tuple[float, float, float]) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(2).normal(size=SHAPE), sigma)
    return (128 + 40 * noise / noise.std()).clip(0, 255).astype(np.uint8)


WANTED = {axis: list(range(length)) for axis, length in enumerate(SHAPE)}


def test_each_axis_has_the_correlation_length_of_its_own_smoothing() -> None:
    found = audit(sampled(smooth((2, 4, 6))), WANTED)
    # Smoothing by sigma leaves a correlation of 1/e at two sigma.
    assert [found[axis].correlation_length for axis in range(3)] == [
        pytest.approx(4, abs=1.5), pytest.approx(8, abs=1.5), pytest.approx(12, abs=2)
    ]  # fmt: skip


def test_independent_slices_all_count() -> None:
    found = audit(sampled(np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)), WANTED)
    assert [found[axis].effective_number for axis in range(3)] == [*SHAPE]


@pytest.mark.parametrize("rho", [0.3, 0.8, 0.95])
def test_the_effective_number_of_a_first_order_series_is_the_known_one(rho: float) -> None:
    # rho^k sums to rho / (1 - rho): N_eff = N (1 - rho) / (1 + rho) for long series.
    correlation = rho ** np.arange(2000)
    assert effective_number(correlation, 4000, 1) == pytest.approx(4000 * (1 - rho) / (1 + rho), rel=0.02)


def test_taking_every_nth_slice_loses_few_independent_ones() -> None:
    correlation = 0.9 ** np.arange(1000)
    every, tenth = effective_number(correlation, 2000, 1), effective_number(correlation, 200, 10)
    assert 0.8 < tenth / every < 1.1


def test_a_weave_counts_until_its_correlation_first_vanishes() -> None:
    correlation = np.cos(np.arange(200) / 5)
    assert effective_number(correlation, 400, 1) == effective_number(np.maximum(correlation[:8], 0), 400, 1)


def test_slices_along_z_are_measured_at_the_stride_they_were_read_in() -> None:
    volume = smooth((6, 2, 2))
    found = audit(sampled(volume, list(range(0, 160, 3))), {0: list(range(0, 160, 3))})
    assert found[0].correlation_length == pytest.approx(12, abs=4)
    assert found[0].num_slices == 54


def test_samples_of_two_processes_join_to_the_same() -> None:
    volume = smooth((2, 2, 2))
    whole, first, second = sampled(volume), sampled(volume, list(range(90))), sampled(volume, list(range(70, 160)))
    first.add(second)
    assert audit(first, WANTED) == audit(whole, WANTED)
    assert histogram(first, Window(low=0, high=255)) == histogram(whole, Window(low=0, high=255))


def test_the_histogram_counts_finite_values_near_the_window() -> None:
    volume = np.random.default_rng(0).normal(100, 10, (5, 40, 40)).astype(np.float32)
    volume[:, :, 0] = np.nan
    volume[0, 0, 1] = 1e9
    samples = Samples(depth=5)
    for z in range(5):
        samples.keep(z, volume[z], np.zeros((40, 40), np.uint8))
    found = histogram(samples, Window(low=80, high=120))
    assert (found["low"] >= 60, found["high"] <= 140) == (True, True)  # type: ignore[operator]
    assert sum(found["counts"]) == 5 * 40 * 39 - 1  # type: ignore[arg-type]
    assert sum(samples.num_non_finite.values()) == 200
