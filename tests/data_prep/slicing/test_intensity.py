from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from configs.errors import InputError, UsageError
from data_prep.folders.manifest import write_manifest
from data_prep.folders.window import Window, window_from
from data_prep.slicing.intensity import (
    MAX_PLANES,
    WindowConfig,
    WindowEstimate,
    estimate,
    sampled_planes,
    window_of_dataset,
)

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
    return estimate(planes, config=WindowConfig(window_percentile=percentiles), is_inverted=is_inverted, path=PATH)


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


# ---- Other ways to a window ----

RAMP = np.arange(1001, dtype=np.uint16).reshape(7, 143)


def test_extremes_are_those_of_all_voxels_of_all_planes() -> None:
    plane = np.full((1200, 1500), 500, np.uint16)
    plane[700, 801], plane[3, 3] = 9, 60000
    found = estimate([plane, plane + 1], config=WindowConfig(window="minmax"), path=PATH)
    assert found.window == Window(low=9, high=60001)
    assert (found.clipped_low, found.clipped_high, found.method) == (0, 0, "minmax")
    assert sampled_planes(1000, WindowConfig(window="minmax")) == list(range(1000))


def test_a_range_is_taken_as_it_is_and_what_it_clips_is_counted() -> None:
    found = estimate([RAMP], config=WindowConfig(window="range", window_range=(100, 900)), path=PATH)
    assert found.window == Window(low=100, high=900)
    assert (found.clipped_low, found.clipped_high) == (100 / 1001, 100 / 1001)


@pytest.mark.parametrize(
    ("invert", "declared", "expected"),
    [("auto", True, True), ("auto", False, False), ("yes", False, True), ("no", True, False)],
)
def test_who_decides_that_low_values_are_bright(invert: str, declared: bool, expected: bool) -> None:
    config = WindowConfig(window="minmax", invert=invert)  # type: ignore[arg-type]  # one of its words
    found = estimate([RAMP], config=config, is_inverted=declared, path=PATH).window
    assert (found.low > found.high) == expected


def test_a_known_window_is_only_measured() -> None:
    known = Window(low=900, high=100)
    found = estimate([RAMP], window=known, path=PATH)
    assert found.window == known
    assert (found.clipped_low, found.clipped_high, found.method) == (100 / 1001, 100 / 1001, "campaign")


def padded(value: float, dtype: str = "u2") -> np.ndarray:
    """A disc of rising values in a square of one value."""
    y, x = np.ogrid[-50:50, -50:50]
    inside = np.arange(10_000, dtype=dtype).reshape(100, 100) + np.array(20_000, dtype)
    return np.where(y * y + x * x < 45**2, inside, np.array(value, dtype))


@pytest.mark.parametrize(("value", "dtype"), [(0, "u2"), (-1000, "i4"), (-1000, "f4"), (65535, "u2")])
def test_padding_in_all_corners_stays_out_of_the_window(value: float, dtype: str) -> None:
    plane = padded(value, dtype)
    found = look_at(plane, percentiles=(0.1, 99.9))
    assert found.padding == value
    inside = plane[plane != value]
    assert [found.window.low, found.window.high] == pytest.approx(np.percentile(inside, [0.1, 99.9]))
    assert found.padding_share == pytest.approx(1 - inside.size / plane.size)
    assert (found.minimum, found.maximum) == (inside.min(), inside.max())


def test_padding_can_be_named_or_kept() -> None:
    plane = padded(0)
    plane[0, 0] = 7
    lows = [
        estimate([plane], config=WindowConfig(padding=said), path=PATH).window.low for said in ("auto", "none", "0")
    ]
    assert lows[0] == lows[1] == 0
    assert lows[2] > 20_000
    assert look_at(padded(0)).padding == 0


def test_grey_of_what_is_not_finite_can_be_chosen() -> None:
    plane = np.array([[math.nan, 0.0, 10.0]], np.float32)
    assert Window(low=0.0, high=10.0, fill=128).to_uint8(plane).tolist() == [[128, 0, 255]]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
def test_grey_goes_back_into_the_type_of_the_volume(dtype: str) -> None:
    window = Window(low=-5.0, high=300.0)
    stored = window.to_stored(np.arange(256), dtype)
    assert stored.dtype == dtype
    counts = window.to_counts(np.arange(256))
    limits = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype != "float32" else (-math.inf, math.inf)
    assert np.allclose(stored, np.clip(counts, *limits), atol=0.5 if dtype != "float32" else 1e-4)


def dataset(folder: Path, *entries: tuple[str, str, float]) -> Path:
    volumes = [
        {"name": name, "state": state, "window": look_at(RAMP + int(shift)).as_dict()} for name, state, shift in entries
    ]
    write_manifest(folder, {"volumes": volumes})
    return folder


def test_a_dataset_gives_the_window_that_its_volumes_share(tmp_path: Path) -> None:
    dataset(tmp_path, ("a", "dry", 0), ("b", "injected", 0))
    assert window_of_dataset(tmp_path, "c", "wet") == look_at(RAMP).window
    assert window_of_dataset(tmp_path / "manifest.json", "c", "wet") == look_at(RAMP).window


def test_a_dataset_of_several_windows_gives_that_of_the_name_or_the_state(tmp_path: Path) -> None:
    dataset(tmp_path, ("a", "dry", 0), ("b", "dry", 5), ("c", "injected", 9))
    assert window_of_dataset(tmp_path, "b", "dry").low == 15
    assert window_of_dataset(tmp_path, "new", "injected").low == 19
    with pytest.raises(UsageError, match=r"--window_manifest .* have several windows"):
        window_of_dataset(tmp_path, "new", "dry")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": "range"}, "--window_range goes with"),
        ({"window_range": (1, 2)}, "--window_range goes with"),
        ({"window": "range", "window_range": (1, 1)}, "two different finite"),
        ({"window": "manifest"}, "--window_manifest goes with"),
        ({"window": "manifest", "window_manifest": Path("a"), "invert": "yes"}, "--invert yes: --window manifest"),
        ({"window": "manifest", "window_manifest": Path("a"), "fill": 9}, "--fill 9: --window manifest"),
        ({"window": "range", "window_range": (1, 2), "window_scope": "campaign"}, "same for all volumes already"),
        ({"padding": "some"}, "--padding some"),
        ({"padding": "nan"}, "--padding nan"),
        ({"fill": 256}, "--fill 256"),
        ({"window_percentile": (99, 1)}, "--window_percentile 99 1"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowConfig(**settings)  # type: ignore[arg-type]  # on purpose
