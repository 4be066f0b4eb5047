"""Phantoms have the geometry that their truth states, and are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import resource
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from skimage.feature import structure_tensor

from configs.errors import TisserandError, UsageError
from configs.load import load
from data_prep.phantom import main
from data_prep.worlds.config import PhantomConfig
from data_prep.worlds.looks import LOOKS
from data_prep.worlds.volume import draw
from data_prep.worlds.writing import write
from data_prep.worlds.yarns import MATRIX, OUTSIDE, WARP, WEFT

STATES = tuple(LOOKS)
SMALL = (5, 40, 48)


def read(output: Path) -> tuple[np.ndarray, np.ndarray, dict]:
    """Return the volume, the labels and the truth."""
    labels = tifffile.imread(output.with_suffix(".labels.tif"))
    return tifffile.imread(output), labels, json.loads(output.with_suffix(".truth.json").read_text())


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[np.ndarray, np.ndarray, dict]]:
    folder = tmp_path_factory.mktemp("phantoms")
    found = {}
    for state in STATES:
        output = folder / f"{state}.tif"
        write(PhantomConfig(state=state, shape=(80, 180, 208), output=output, labels=True, seed=3))
        found[state] = read(output)
    return found


def small(folder: Path, **options: object) -> PhantomConfig:
    defaults: dict[str, object] = {"state": "dry", "shape": SMALL, "output": folder / "small.tif"}
    return PhantomConfig(**{**defaults, **options})  # type: ignore[arg-type]


def planes(config: PhantomConfig, **options: int) -> np.ndarray:
    return np.stack([grey for grey, _ in draw(config, **options)])


def period(profile: np.ndarray, near: float) -> float:
    """Return the period in px of the strongest wave between half and twice ``near``."""
    padded = 64 * profile.size
    power = np.abs(np.fft.rfft((profile - profile.mean()) * np.hanning(profile.size), padded))
    frequency = np.fft.rfftfreq(padded)
    power[(frequency < 0.6 / near) | (frequency > 1.7 / near)] = 0
    return float(1 / frequency[power.argmax()])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_file_is_a_contiguous_series_of_the_type_asked_for(tmp_path: Path, dtype: str) -> None:
    config = small(tmp_path, dtype=dtype)
    write(config)
    with tifffile.TiffFile(config.output) as tiff:
        series = tiff.series[0]
        assert (series.shape, series.dtype, series.axes) == (SMALL, np.dtype(dtype), "ZYX")
        assert series.dataoffset is not None
        assert not tiff.is_bigtiff


def test_file_carries_the_voxel_size(tmp_path: Path) -> None:
    config = small(tmp_path, voxel_um=50.0)
    write(config)
    with tifffile.TiffFile(config.output) as tiff:
        numerator, denominator = tiff.pages[0].tags["XResolution"].value
        assert tiff.imagej_metadata["spacing"] == 50.0
        assert tiff.imagej_metadata["unit"] == "um"
    assert denominator / numerator == pytest.approx(50.0, rel=1e-6)


def test_float32_is_uint16_in_other_units(tmp_path: Path) -> None:
    write(small(tmp_path, dtype="float32"))
    level = tifffile.imread(tmp_path / "small.tif") * 255
    truth = write(small(tmp_path, dtype="uint16", overwrite=True))
    counts = truth["grey"]["counts_at_0"] + truth["grey"]["counts_per_level"] * level
    np.testing.assert_allclose(tifffile.imread(tmp_path / "small.tif"), counts, atol=0.51)


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = small(tmp_path / "a", labels=True), small(tmp_path / "b", labels=True)
    write(first)
    write(second, workers=2)
    for name in ("small.tif", "small.labels.tif", "small.truth.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_another_seed_gives_another_volume(tmp_path: Path) -> None:
    assert not np.array_equal(planes(small(tmp_path)), planes(small(tmp_path, seed=1)))


@pytest.mark.parametrize("state", STATES)
def test_values_do_not_depend_on_the_grouping_of_planes(tmp_path: Path, state: str) -> None:
    config = small(tmp_path, state=state, shape=(11, 40, 48), rings=2.0, cylinder=True)
    together = planes(config, block=16)
    np.testing.assert_array_equal(planes(config, block=1), together)
    np.testing.assert_array_equal(planes(config, block=3, workers=2), together)


def test_a_plane_does_not_depend_on_the_number_of_planes(tmp_path: Path) -> None:
    config = small(tmp_path, state="injected")
    np.testing.assert_array_equal(planes(replace(config, shape=(9, 40, 48)))[:5], planes(config))


def test_memory_does_not_grow_with_the_number_of_planes(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        drawn = draw(small(tmp_path, shape=(count, 160, 160)))
        next(drawn)
        tracemalloc.reset_peak()  # the texture is drawn before the first plane
        for _ in drawn:
            pass
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    # The 64 planes more would be 8 MB.
    assert peak(96) - peak(32) < 2e6


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    ("kind", "axes", "name", "loose_um"),
    [
        (WARP, (0, 1), "warp_pitch", 2080.0),
        (WEFT, (0, 2), "weft_pitch", 3200.0),
        (WEFT, (1, 2), "layer_height", 1440.0),
    ],
)
def test_period_of_the_labels_is_that_of_the_truth(
    phantoms: dict, state: str, kind: int, axes: tuple[int, int], name: str, loose_um: float
) -> None:
    _, labels, truth = phantoms[state]
    expected = loose_um * (LOOKS[state].compaction if name == "layer_height" else 1)
    assert truth[f"{name}_um"] == pytest.approx(expected)
    # Wander of the yarns moves the peak of the spectrum by up to 0.5 %.
    measured = period((labels == kind).mean(axis=axes), truth[f"{name}_px"])
    assert measured * truth["voxel_um"] == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize("state", STATES)
def test_fractions_are_those_of_the_labels(phantoms: dict, state: str) -> None:
    _, labels, truth = phantoms[state]
    assert truth["warp_fraction"] == pytest.approx((labels == WARP).mean(), abs=1e-12)
    assert truth["weft_fraction"] == pytest.approx((labels == WEFT).mean(), abs=1e-12)
    assert truth["matrix_fraction"] == pytest.approx((labels == MATRIX).mean(), abs=1e-12)
    assert truth["fibre_fraction"] == pytest.approx((labels != MATRIX).mean() * LOOKS[state].packing, abs=1e-12)


def test_warp_angle_is_that_of_the_truth(tmp_path: Path) -> None:
    """The structure tensor of warp alone, in weft slices, without noise; its windows cut the crests of the wave."""
    config = small(tmp_path, shape=(80, 160, 78), noise_sigma=0.0, layer_height_um=2400.0, streak_grey=0.0, labels=True)
    truth = write(config)
    labels = tifffile.imread(config.output.with_suffix(".labels.tif"))
    angles, weights = [], []
    for x in range(0, 78, 3):
        zz, zy, yy = structure_tensor((labels[:, :, x] == WARP).astype(float), sigma=2.0, order="rc")
        angles.append(np.degrees(np.abs(np.arctan2(-zy, zz))))
        weights.append(zz + yy)
    measured = np.average(angles, weights=weights)
    assert measured == pytest.approx(truth["warp_crimp"]["mean_deg"], abs=4.0)


def test_fibre_texture_runs_along_the_yarns(tmp_path: Path) -> None:
    config = small(tmp_path, shape=(24, 90, 120), noise_sigma=0.0, weft_crimp=0.0)
    grey, labels = map(np.stack, zip(*draw(config), strict=True))
    inside = labels == WEFT
    for axis in (0, 1):  # keep voxels well inside, where no edge is near
        for step in (-2, 2):
            inside &= np.roll(labels, step, axis=axis) == WEFT
    along, across = np.abs(np.gradient(grey, axis=2)), np.abs(np.gradient(grey, axis=1))
    assert along[inside].mean() < 0.5 * across[inside].mean()


def test_compaction_closes_gaps_and_thins_layers(phantoms: dict) -> None:
    gaps = {state: (phantoms[state][1] == MATRIX).mean() for state in STATES}
    heights = {state: phantoms[state][2]["layer_height_um"] for state in STATES}
    assert gaps["dry_compacted"] < 0.5 * gaps["dry"]
    assert heights["dry_compacted"] < heights["injected"] < heights["dry"]


def test_compaction_option_scales_the_layers(tmp_path: Path) -> None:
    loose, pressed = write(small(tmp_path)), write(small(tmp_path, compaction=0.5, overwrite=True))
    assert pressed["layer_height_um"] == pytest.approx(0.5 * loose["layer_height_um"])


def test_injected_has_the_lowest_contrast(phantoms: dict) -> None:
    contrast = {}
    for state, (volume, labels, _) in phantoms.items():
        contrast[state] = float(volume[labels != MATRIX].mean() - np.median(volume[labels == MATRIX]))
    assert 0 < contrast["injected"] < 0.6 * min(contrast["dry"], contrast["dry_compacted"])


@pytest.mark.parametrize("state", STATES)
def test_noise_after_windowing_is_at_least_eight_levels(phantoms: dict, state: str) -> None:
    volume, _, truth = phantoms[state]
    low, high = np.percentile(volume, [0.1, 99.9])
    sigma = truth["noise_sigma"] * truth["grey"]["counts_per_level"] * 255 / (high - low)
    assert sigma >= 8
    # The truth's window comes from every fourth row.
    assert truth["noise_sigma_windowed"] == pytest.approx(sigma, rel=0.02)


def test_noise_is_white_and_of_the_sigma_asked_for(tmp_path: Path) -> None:
    config = small(tmp_path, shape=(12, 100, 100), noise_sigma=12.0)
    noise = planes(config) - planes(replace(config, noise_sigma=0.0))
    # 120,000 draws: the spread of a standard deviation is 0.2 %, of a correlation 0.003.
    assert noise.std() == pytest.approx(12.0, rel=0.01)
    for axis in range(3):
        neighbour = np.roll(noise, 1, axis=axis)
        assert abs(np.corrcoef(noise.ravel(), neighbour.ravel())[0, 1]) < 0.015


def test_rings_are_circles_about_the_centre(tmp_path: Path) -> None:
    config = small(tmp_path, rings=5.0)
    added = (planes(config) - planes(replace(config, rings=0.0)))[2]
    y, x = np.mgrid[:40, :48]
    radius = np.rint(np.hypot(y - 19.5, x - 23.5)).astype(int)
    within = [added[radius == r].std() for r in range(1, 20)]
    assert max(within) < 1e-3  # float32 rounding of levels near 200
    assert added.std() > 2


def test_cylinder_is_padded_with_zeros(tmp_path: Path) -> None:
    config = small(tmp_path, cylinder=True, labels=True)
    truth = write(config)
    volume, labels, _ = read(config.output)
    y, x = np.mgrid[:40, :48]
    outside = np.broadcast_to(np.hypot(y - 19.5, x - 23.5) > 20, SMALL)
    np.testing.assert_array_equal(labels == OUTSIDE, outside)
    np.testing.assert_array_equal(volume == 0, outside)
    assert truth["yarn_fraction"] + truth["matrix_fraction"] == pytest.approx(1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 50, 3), (40, 2, 2), (3, 7, 90)])
def test_any_shape_is_drawn(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    config = small(tmp_path, shape=shape, state="injected", cylinder=True, rings=1.0)
    write(config)
    assert tifffile.imread(config.output).reshape(shape).shape == shape


def test_truth_holds_the_hash_of_the_volume(tmp_path: Path) -> None:
    config = small(tmp_path)
    write(config)
    truth = json.loads(config.output.with_suffix(".truth.json").read_text())
    assert truth["sha256"]["volume"] == hashlib.sha256(config.output.read_bytes()).hexdigest()


def test_command_writes_the_volume_and_names_the_next_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "dry.tif"
    main(load(PhantomConfig, ["--state", "dry", "--shape", "3", "20", "30", "--output", str(output)]))
    assert tifffile.imread(output).shape == (3, 20, 30)
    assert f"python -m data_prep.slice --volumes dry={output}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"shape": (0, 3, 4)}, "--shape 0 3 4"),
        ({"output": Path("dry.png")}, "--output dry.png"),
        ({"seed": -1}, "--seed -1"),
        ({"voxel_um": 0.0}, "--voxel_um 0"),
        ({"warp_pitch_um": 100.0}, "--warp_pitch_um 100"),
        ({"compaction": 0.1}, "--compaction 0.1"),
        ({"noise_sigma": float("nan")}, "--noise_sigma nan"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, options: dict[str, object], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        small(tmp_path, **options)


@pytest.mark.parametrize("name", ["small.tif", "small.truth.json", "small.labels.tif"])
def test_an_output_that_exists_is_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=f"{name} exists.*--overwrite"):
        write(small(tmp_path, labels=True))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_overwrite_replaces_all_files(tmp_path: Path) -> None:
    write(small(tmp_path))
    truth = write(small(tmp_path, seed=1, overwrite=True))
    assert json.loads((tmp_path / "small.truth.json").read_text()) == truth


def test_overwrite_removes_labels_of_the_volume_replaced(tmp_path: Path) -> None:
    write(small(tmp_path, labels=True))
    write(small(tmp_path, seed=1, overwrite=True))
    assert not (tmp_path / "small.labels.tif").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written there"):
        write(small(tmp_path / "file"))


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Let writes beyond ``size`` bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    with files_end_at(8000), pytest.raises(TisserandError, match="writing failed"):
        write(small(tmp_path, labels=True))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_leaves_the_volume_it_was_to_replace(tmp_path: Path) -> None:
    write(small(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with files_end_at(8000), pytest.raises(TisserandError, match="writing failed"):
        write(small(tmp_path, seed=1, overwrite=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("voxel_um", 1e-300), ("voxel_um", 1e300), ("weft_pitch_um", 1e300), ("streak_width_um", 1e-300)],
)
def test_an_absurd_length_is_refused(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^--{name} .*: must "):
        PhantomConfig(state="dry", shape=(2, 2, 2), output=tmp_path / "a.tif", **{name: value})  # type: ignore[arg-type]


def test_a_partial_file_of_somebody_else_is_left(tmp_path: Path) -> None:
    (tmp_path / "a.tif.partial").write_text("kept")
    write(PhantomConfig(state="dry", shape=(2, 8, 8), output=tmp_path / "a.tif"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tif", "a.tif.partial", "a.truth.json"]
    assert (tmp_path / "a.tif.partial").read_text() == "kept"


def test_a_place_where_no_file_can_be_made_is_a_wrong_setting() -> None:
    with pytest.raises(UsageError, match=r"^--output /proc/x\.tif: cannot be written there"):
        write(PhantomConfig(state="dry", shape=(2, 8, 8), output=Path("/proc/x.tif")))
