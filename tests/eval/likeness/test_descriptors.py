"""Descriptors against closed forms, brute force, the phantom's known geometry, and porespy where it is installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from scipy.stats import wasserstein_distance

from data_prep.worlds.config import PhantomConfig
from data_prep.worlds.geometry import geometry_of
from data_prep.worlds.volume import draw
from data_prep.worlds.yarns import MATRIX
from eval.likeness.descriptors import (
    DESCRIPTORS,
    axis_spectra,
    chord_lengths,
    circular_distance,
    describe,
    directional_spectrum,
    histogram,
    histogram_distance,
    log_spectral_distance,
    mean_chords_px,
    orientation,
    phase_mask,
    phase_threshold,
    pitch_px,
    radial_spectrum,
    standardised_distance,
    structure,
    texture,
    two_point,
    values_distance,
    waviness,
)

SIDE = 96


def stripes(period: float, degrees: float, side: int = SIDE, noise: float = 0.0) -> np.ndarray:
    """One tile of sinusoidal stripes that run at an angle from the columns' axis, 0 being horizontal stripes."""
    row, column = np.mgrid[:side, :side]
    across = row * np.cos(np.radians(degrees)) - column * np.sin(np.radians(degrees))
    wave = 127 + 80 * np.sin(2 * np.pi * across / period)
    return (wave + np.random.default_rng(0).normal(0, noise, wave.shape)).clip(0, 255).astype(np.uint8)[None]


def discs(seed: int, side: int = 160) -> np.ndarray:
    """An isotropic two-phase medium: a smooth random field cut at its median."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(side, side)), 4, mode="wrap")
    return (field > np.median(field))[None]


def ones(values: np.ndarray) -> np.ndarray:
    return np.ones(len(values))


def compare(name: str, a: np.ndarray, b: np.ndarray) -> float:
    chosen = next(item for item in DESCRIPTORS if item.name == name)
    return chosen.distance(a, ones(a), b, ones(b))


@pytest.mark.parametrize("period", [9.0, 14.5, 26.0, 40.0])
def test_the_pitch_of_stripes_is_found_within_two_percent(period: float) -> None:
    spectra = axis_spectra(stripes(period, 0, noise=20))
    assert pitch_px(spectra, SIDE)[0] == pytest.approx(period, rel=0.02)


@pytest.mark.parametrize("degrees", [0.0, 30.0, 45.0, 90.0, 150.0])
def test_the_direction_of_stripes_is_found_in_spectrum_and_structure(degrees: float) -> None:
    tile = stripes(12, degrees, noise=15)
    angles, coherence = structure(tile)
    bins = orientation(angles, coherence)[0]
    # Bins are 5 and 10 degrees wide; the wave vector is perpendicular to the stripes.
    assert min(abs(bins.argmax() * 5 - degrees), 180 - abs(bins.argmax() * 5 - degrees)) <= 2.5
    wave = (directional_spectrum(tile)[0].argmax() * 10 - (90 - degrees)) % 180
    across = (directional_spectrum(tile)[0].argmax() * 10 - 90 - degrees) % 180
    assert min(across, 180 - across) <= 5 or min(wave, 180 - wave) <= 5


def test_stripes_are_coherent_and_white_noise_is_not() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE)).astype(np.uint8)
    assert structure(stripes(12, 30))[1].mean() > 0.95
    assert structure(noise)[1].mean() < 0.25


def test_waviness_grows_with_the_slope_of_a_wave() -> None:
    """A yarn whose slope is sinusoidal with amplitude A deviates by A / sqrt(2) on average."""
    row, column = np.mgrid[:SIDE, :SIDE]
    found = []
    for slope in (4.0, 12.0):
        path = np.tan(np.radians(slope)) * 48 / (2 * np.pi) * np.sin(2 * np.pi * column / 48)
        tile = (127 + 80 * np.sin(2 * np.pi * (row - path) / 12)).astype(np.uint8)[None]
        found.append(waviness(*structure(tile))[0, 0])
    assert found[0] == pytest.approx(4 / np.sqrt(2), rel=0.15)
    assert found[1] == pytest.approx(12 / np.sqrt(2), rel=0.15)


def test_white_noise_has_the_same_power_in_every_ring() -> None:
    noise = np.random.default_rng(0).normal(127, 20, (40, SIDE, SIDE)).clip(0, 255).astype(np.uint8)
    power = radial_spectrum(noise).mean(axis=0)[2:]
    assert power == pytest.approx(400.0, rel=0.1)  # the variance, by Parseval


def test_two_point_probability_equals_the_count_of_pairs() -> None:
    mask = np.random.default_rng(0).random((1, 12, 12)) < 0.4
    expected = [
        [mask[0, : 12 - lag, :] & mask[0, lag:, :], mask[0, :, : 12 - lag] & mask[0, :, lag:]] for lag in range(6)
    ]
    assert two_point(mask)[0] == pytest.approx(np.array([[pair.mean() for pair in lag] for lag in expected]).T)


def test_chords_of_one_line_are_its_inner_runs() -> None:
    line = np.array([1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 1, 0], dtype=bool)
    chords = chord_lengths(np.tile(line, (12, 1))[None])[0]
    yarn, matrix = chords[0, 1], chords[1, 1]  # along the columns
    assert (yarn[1], yarn[4], yarn.sum()) == (12, 12, 24)  # the first run touches the edge
    assert (matrix[3], matrix[1], matrix.sum()) == (12, 12, 24)
    assert chords[:, 0].sum() == 0  # down the rows nothing changes, and every run touches both edges


def test_a_checkerboard_of_blocks_has_chords_of_one_length() -> None:
    board = (np.indices((60, 60)) // 5).sum(axis=0) % 2 == 0
    assert mean_chords_px(chord_lengths(board[None])) == pytest.approx(np.full((2, 2), 5.0))


def test_chords_of_a_random_line_have_a_geometric_length() -> None:
    """Independent pixels: a yarn chord ends with probability 1 - p at each step, so its mean is 1 / (1 - p)."""
    mask = np.random.default_rng(0).random((20, 128, 128)) < 0.6
    assert mean_chords_px(chord_lengths(mask))[:, 0] == pytest.approx([1 / 0.4, 1 / 0.6], rel=0.02)


def test_glcm_contrast_is_the_mean_squared_step() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (1, 48, 48)).astype(np.uint8)
    grey = (levels[0] // 8).astype(float)
    steps = [
        grey[:, 1:] - grey[:, :-1],
        grey[1:] - grey[:-1],
        grey[1:, 1:] - grey[:-1, :-1],
        grey[1:, :-1] - grey[:-1, 1:],
    ]
    assert texture(levels)[0, 0] == pytest.approx(np.mean([np.mean(step**2) for step in steps]), rel=1e-9)


def test_the_histogram_distance_is_that_of_scipy() -> None:
    random = np.random.default_rng(0)
    a, b = (random.integers(low, 200, (5, 32, 32)).astype(np.uint8) for low in (0, 60))
    expected = wasserstein_distance((a // 4).ravel() * 4, (b // 4).ravel() * 4)
    found = histogram_distance(4)(histogram(a), ones(a), histogram(b), ones(b))
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_circular_distance_goes_the_short_way_round() -> None:
    peaks = np.eye(36)
    near, far = peaks[[35]], peaks[[9]]
    assert circular_distance(5)(near, ones(near), peaks[[0]], ones(near)) == pytest.approx(5)
    assert circular_distance(5)(far, ones(far), peaks[[0]], ones(far)) == pytest.approx(45)


def test_the_log_spectral_distance_of_twice_the_power_is_three_decibels() -> None:
    power = np.random.default_rng(0).random((4, 16)) + 0.5
    assert log_spectral_distance(2 * power, ones(power), power, ones(power)) == pytest.approx(10 * np.log10(2))


def test_value_and_standardised_distances_read_a_shift() -> None:
    values = np.random.default_rng(0).normal(0, 2, (400, 3))
    assert values_distance(values + 1, ones(values), values, ones(values)) == pytest.approx(1)
    assert standardised_distance(values + 1, ones(values), values, ones(values)) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("name", [item.name for item in DESCRIPTORS])
def test_a_set_is_at_no_distance_from_itself_and_weights_are_copies(name: str) -> None:
    tiles = np.concatenate([stripes(9, 20 * i, side=48, noise=30) for i in range(6)])
    values = describe(tiles, 127.0)[name]
    twice = np.repeat(values, 2, axis=0)
    chosen = next(item for item in DESCRIPTORS if item.name == name)
    assert compare(name, values, values) == pytest.approx(0, abs=1e-9)
    weighted = chosen.distance(values[:3], np.array([2.0, 1.0, 0.0]), values, ones(values))
    copied = chosen.distance(twice[[0, 1, 2]], ones(twice[:3]), values, ones(values))
    assert weighted == pytest.approx(copied, abs=1e-9)


def weave(state: str, **options: float) -> tuple[np.ndarray, np.ndarray, PhantomConfig]:
    """Return grey levels and labels of a small woven volume."""
    config = PhantomConfig(state=state, shape=(56, 200, 200), output=Path("unused.tif"), seed=3, **options)  # type: ignore[arg-type]
    planes = list(draw(config))
    grey = np.stack([plane for plane, _ in planes]).clip(0, 255).astype(np.uint8)
    return grey, np.stack([labels for _, labels in planes]), config


@pytest.fixture(scope="module")
def dry() -> tuple[np.ndarray, np.ndarray, PhantomConfig]:
    return weave("dry")


@pytest.mark.parametrize("state", ["dry", "dry_compacted", "injected"])
def test_the_yarn_fraction_of_a_phantom_is_recovered_within_five_percent(state: str) -> None:
    grey, labels, _ = weave(state)
    tiles = grey[::4, :196, :196]
    truth = (labels[::4, :196, :196] != MATRIX).mean()
    assert phase_mask(tiles, phase_threshold(tiles)).mean() == pytest.approx(truth, rel=0.05)


@pytest.mark.parametrize(("crimp", "repeats"), [(0.0, 1), (0.8, 2)])
def test_the_pitches_of_a_phantom_are_recovered_within_five_percent(crimp: float, repeats: int) -> None:
    """Straight yarns repeat after one pitch; waving warp yarns after two, since neighbours are in opposite phase."""
    grey, _, config = weave("dry", crimp=crimp, weft_crimp=crimp / 10)
    found = pitch_px(axis_spectra(grey[::2, :196, :196]), 196)  # thickness slices: weft columns down Y, warp along X
    geometry = geometry_of(config)
    assert found == pytest.approx([geometry.weft_pitch, repeats * geometry.warp_pitch], rel=0.05)


@pytest.mark.parametrize("turn", [0.0, 30.0])
def test_the_direction_of_a_phantoms_yarns_is_recovered_within_five_percent_of_a_right_angle(
    dry: tuple[np.ndarray, np.ndarray, PhantomConfig], turn: float
) -> None:
    turned = ndimage.rotate(dry[0][::4], -turn, axes=(1, 2), reshape=False, order=1, mode="reflect")[:, 36:164, 36:164]
    bins = orientation(*structure(turned)).mean(axis=0)
    # Warp and weft are at right angles: folded to 90 degrees both point the same way.
    folded = np.exp(4j * np.radians(np.arange(36) * 5)) @ bins
    found = np.degrees(np.angle(folded)) / 4
    assert min(abs(found - turn), 90 - abs(found - turn)) <= 4.5


def porespy() -> object:
    """Return porespy, or skip: it is no dependency; TISSERAND_EXTRA_PACKAGES may name a folder that holds it."""
    extra = os.environ.get("TISSERAND_EXTRA_PACKAGES")
    if extra and extra not in sys.path:
        sys.path.append(extra)
    if importlib.util.find_spec("porespy") is None:
        pytest.skip("porespy is not installed; it brings VTK and numba, too much for one comparison")
    import porespy

    return porespy


@pytest.mark.filterwarnings("default")
def test_two_point_probability_is_that_of_porespy() -> None:
    """Porespy averages over all directions; on an isotropic medium the mean of two axes is the same within 0.01."""
    masks, bins = np.concatenate([discs(seed) for seed in range(6)]), np.arange(0.5, 20.5)
    found = [porespy().metrics.two_point_correlation(mask, bins=bins) for mask in masks]  # type: ignore[attr-defined]
    expected = np.mean([curve.probability_scaled for curve in found], axis=0)
    assert two_point(masks).mean(axis=(0, 1))[1:20] == pytest.approx(expected[:19], abs=0.01)


@pytest.mark.filterwarnings("default")
def test_chord_lengths_are_those_of_porespy() -> None:
    """Porespy draws chords on every other line and drops the outermost lines with the edges."""
    mask = discs(0)
    lines = np.zeros_like(mask)
    lines[:, 2:-2:2] = mask[:, 2:-2:2]
    chords = porespy().filters.apply_chords(mask[0], axis=1, spacing=1, label=True)  # type: ignore[attr-defined]
    lengths = np.bincount(np.unique(chords[chords > 0], return_counts=True)[1])
    found = chord_lengths(lines)[0, 0, 1]
    assert found[: len(lengths)].tolist() == lengths.tolist()
