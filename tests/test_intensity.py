from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from configs.errors import InputError
from data_prep.intensity import MAX_PLANES, Window, WindowEstimate, estimate, sampled_planes, window_from

PATH = Path("scan.tif")


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"])
@pytest.mark.parametrize(("low", "high"), [(3.5, 100.0), (100.0, 3.5), (-20.0, 90.0)])
def test_grey_levels_follow_the_line_for_every_type(dtype: str, low: float, high: float) -> None:
    values = np.arange(127).astype(dtype)
    expected = [round(min(max((int(v) - low) / (high - low) * 255, 0), 255)) for v in values]
    grey = Window(low=low, high=high).to_uint8(values)
    assert grey.dtype == np.uint8
    assert grey.tolist() == expected


def test_the_table_covers_all_signed_values() -> None:
    values = np.arange(-32768, 32768).astype(np.int16)
    window = Window(low=-30000.0, high=30000.0)
    assert np.array_equal(window.to_uint8(values), window.to_uint8(values.astype(np.float64)))


def test_counts_come_back_to_half_a_grey_level() -> None:
    window = Window(low=-300.0, high=20000.0)
    values = np.linspace(-300, 20000, 1001)
    assert np.abs(window.to_counts(window.to_uint8(values)) - values).max() <= 0.5 / 255 * 20300 * (1 + 1e-9)


def test_grey_levels_come_back_exactly() -> None:
    window = Window(low=0.0021, high=0.0049)
    grey = np.arange(256, dtype=np.uint8)
    assert np.array_equal(window.to_uint8(window.to_counts(grey)), grey)


def test_what_is_not_finite_becomes_black() -> None:
    plane = np.array([[math.nan, math.inf, -math.inf, 10.0]], np.float32)
    assert Window(low=0.0, high=10.0).to_uint8(plane).tolist() == [[0, 0, 0, 255]]


@pytest.mark.parametrize("ends", [(1.0, 1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_a_window_without_width_is_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="two different finite ends"):
        Window(low=ends[0], high=ends[1])


def look_at(
    *planes: np.ndarray, is_inverted: bool = False, percentiles: tuple[float, float] = (1, 99)
) -> WindowEstimate:
    return estimate(planes, percentiles=percentiles, is_inverted=is_inverted, path=PATH)


def test_the_window_is_at_the_percentiles_and_says_what_it_clips() -> None:
    found = look_at(np.arange(1001, dtype=np.uint16).reshape(7, 143))
    assert (found.window.low, found.window.high) == (10.0, 990.0)
    # Ten of 1001 values lie below 10, ten above 990.
    assert found.clipped_low == found.clipped_high == 10 / 1001
    assert (found.minimum, found.maximum) == (0, 1000)


def test_the_window_of_a_large_plane_is_close_to_that_of_all_its_voxels() -> None:
    plane = np.random.default_rng(0).normal(30000, 4000, (1200, 1500)).astype(np.uint16)
    found = look_at(plane, percentiles=(0.1, 99.9)).window
    exact = np.percentile(plane, [0.1, 99.9])
    # Standard error of a 0.1 % quantile of 128,000 normal draws is 0.03 sigma; four of them.
    assert np.abs(np.array([found.low, found.high]) - exact).max() < 4 * 0.03 * 4000


def test_thinning_does_not_miss_columns() -> None:
    plane = np.zeros((1024, 1024), np.uint8)
    plane[:, 1::2] = 200
    assert look_at(plane).window == Window(low=0.0, high=200.0)


def test_nan_stays_out_of_the_window_and_is_counted() -> None:
    plane = np.arange(100, dtype=np.float32).reshape(10, 10)
    plane[0] = math.nan
    found = look_at(plane, percentiles=(0, 100))
    assert (found.window.low, found.window.high) == (10.0, 99.0)
    assert found.non_finite == pytest.approx(0.1)


def test_low_values_can_be_bright() -> None:
    assert look_at(np.arange(1001, dtype=np.uint16).reshape(7, 143), is_inverted=True).window == Window(
        low=990, high=10
    )


@pytest.mark.parametrize(
    ("plane", "message"),
    [
        (np.full((4, 4), 7, np.uint8), "the value 7; there is nothing to see"),
        (np.full((4, 4), math.nan, np.float32), "finite number"),
    ],
)
def test_a_volume_without_contrast_is_refused(plane: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        look_at(plane)


def test_a_few_bright_voxels_in_a_constant_volume_are_seen() -> None:
    plane = np.zeros((100, 100), np.uint16)
    plane[5, 5] = 1000
    assert look_at(plane).window == Window(low=0, high=1000)


@pytest.mark.parametrize("num_planes", [1, 5, 64, 65, 5000])
def test_sampled_planes_are_few_distinct_and_inside(num_planes: int) -> None:
    numbers = sampled_planes(num_planes)
    assert len(numbers) == len(set(numbers)) == min(num_planes, MAX_PLANES)
    assert 0 <= min(numbers) <= max(numbers) < num_planes


def test_the_manifest_gives_the_window_back() -> None:
    found = look_at(np.arange(1001, dtype=np.uint16).reshape(7, 143))
    assert window_from(found.as_dict()) == found.window
