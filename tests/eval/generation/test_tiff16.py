"""Generated slices in the counts of the volume: they read back through the same window as the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from configs.errors import InputError
from data_prep.folders.manifest import SliceRow, write_manifest, write_rows
from data_prep.folders.window import Window
from eval.generate import GenerateConfig, main
from eval.generation.tiff16 import Scale, scales_of, write_slice
from finetune.diffusion.config import SamplingConfig

WINDOW = {"low": 12_000.0, "high": 52_000.0}


def write_dataset(folder: Path, *windows: dict[str, float], dtype: str = "uint16") -> Path:
    """Write the list and manifest of a dataset of dry volumes, one a window; its pixels are 80 x 40 um."""
    (folder / "train").mkdir(parents=True)
    row = SliceRow(
        file_name="a.png",
        text="sf_dry sf_warp",
        volume="v",
        state="dry",
        axis="warp",
        index=0,
        box=(0, 8, 0, 1, 0, 8),
        width=8,
        height=8,
        um_per_px=(80.0, 40.0),
    )
    write_rows(folder / "train", [row])
    volumes = [
        {"name": f"v{number}", "state": "dry", "dtype": dtype, "window": window}
        for number, window in enumerate(windows)
    ]
    write_manifest(folder, {"volumes": volumes})
    return folder


def picture(seed: int = 0) -> np.ndarray:
    grey = np.random.default_rng(seed).integers(0, 256, (6, 10, 1), dtype=np.uint8)
    return np.repeat(grey, 3, axis=-1)


def test_a_slice_read_back_through_the_window_is_the_picture(tmp_path: Path) -> None:
    window = Window(**WINDOW)
    spread = write_slice(tmp_path / "a.tif", picture(), Scale(window=window, um_per_px=None))
    counts = tifffile.imread(tmp_path / "a.tif")
    assert (counts.dtype, counts.shape) == (np.uint16, (6, 10))
    assert np.array_equal(window.to_uint8(counts), picture()[..., 0])
    assert (counts.min() >= 12_000, counts.max() <= 52_000, spread) == (True, True, 0.0)


def test_an_inverted_window_is_turned_round_as_well(tmp_path: Path) -> None:
    window = Window(low=52_000, high=12_000)
    write_slice(tmp_path / "a.tif", picture(), Scale(window=window, um_per_px=None))
    assert np.array_equal(window.to_uint8(tifffile.imread(tmp_path / "a.tif")), picture()[..., 0])


def test_the_size_of_a_voxel_is_in_the_tags(tmp_path: Path) -> None:
    write_slice(tmp_path / "a.tif", picture(), Scale(window=Window(**WINDOW), um_per_px=(80.0, 40.0)))
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        tags = tiff.pages[0].tags
        per_cm = [tags[name].value[0] / tags[name].value[1] for name in ("XResolution", "YResolution")]
        assert int(tags["ResolutionUnit"].value) == 3  # pixels per centimetre
    assert per_cm == pytest.approx([1e4 / 40, 1e4 / 80], rel=1e-6)


def test_colour_becomes_the_mean_of_the_channels_and_its_spread_is_told(tmp_path: Path) -> None:
    tinted = picture().astype(int).clip(10, 240) + np.array([3, 0, -3])
    spread = write_slice(tmp_path / "a.tif", tinted.astype(np.uint8), Scale(window=Window(**WINDOW), um_per_px=None))
    assert spread == pytest.approx(6)
    assert np.array_equal(
        Window(**WINDOW).to_uint8(tifffile.imread(tmp_path / "a.tif")), picture()[..., 0].clip(10, 240)
    )


def test_a_prompt_has_the_window_of_its_state_and_the_pixels_of_its_direction(tmp_path: Path) -> None:
    scales = scales_of(write_dataset(tmp_path / "weave", WINDOW), ["sf_dry sf_warp"])
    assert scales == {"sf_dry sf_warp": Scale(window=Window(**WINDOW), um_per_px=(80.0, 40.0))}


def test_prompts_are_read_in_the_words_of_the_dataset(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "foam", WINDOW)
    (folder / "vocabulary.yaml").write_text("prefix: fm_\nstates: {dry: [fresh]}\n", encoding="utf-8")
    assert list(scales_of(folder, ["fm_fresh fm_warp"])) == ["fm_fresh fm_warp"]
    with pytest.raises(InputError, match="'sf_dry sf_warp' is no caption of it"):
        scales_of(folder, ["sf_dry sf_warp"])


@pytest.mark.parametrize(
    ("windows", "dtype", "prompt", "message"),
    [
        ((WINDOW,), "uint16", "two zebras", "'two zebras' is no caption of it"),
        ((WINDOW,), "uint16", "sf_injected sf_warp", "'sf_injected sf_warp' is no caption of it"),
        ((WINDOW, {"low": 0.0, "high": 9.0}), "uint16", "sf_dry sf_warp", "2 volumes of 'dry' have different windows"),
        ((WINDOW,), "float32", "sf_dry sf_warp", "volume v0 is float32"),
        (({"low": -5.0, "high": 9.0},), "int16", "sf_dry sf_warp", "16-bit counts are whole numbers from 0"),
        (({},), "uint16", "sf_dry sf_warp", "records no grey window"),
    ],
)
def test_what_has_no_counts_is_refused(
    tmp_path: Path, windows: tuple[dict[str, float], ...], dtype: str, prompt: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        scales_of(write_dataset(tmp_path / "weave", *windows, dtype=dtype), [prompt])


def test_generate_writes_counts_beside_the_pictures(toy_sd: Path, tmp_path: Path) -> None:
    main(
        GenerateConfig(
            pretrained_model_name_or_path=str(toy_sd),
            prompts=("sf_dry sf_warp",),
            num_images=2,
            format="tiff16",
            dataset=write_dataset(tmp_path / "weave", WINDOW),
            sampling=SamplingConfig(num_inference_steps=1),
            output_dir=tmp_path / "slices",
        )
    )
    records = [json.loads(line) for line in (tmp_path / "slices" / "records.jsonl").read_text().splitlines()]
    assert [Path(record["tiff"]).stem for record in records] == [Path(record["file_name"]).stem for record in records]
    counts = tifffile.imread(tmp_path / "slices" / records[0]["tiff"])
    assert counts.shape == (32, 32)
    assert 12_000 <= counts.min() <= counts.max() <= 52_000
    assert records[0]["channel_spread"] >= 0


def test_a_frozen_grid_asks_for_the_same_pictures(toy_sd: Path, tmp_path: Path) -> None:
    common = {"pretrained_model_name_or_path": str(toy_sd), "sampling": SamplingConfig(num_inference_steps=1)}
    main(GenerateConfig(**common, prompts=("a", "b"), num_images=2, seed=5, output_dir=tmp_path / "one"))  # type: ignore[arg-type]
    main(GenerateConfig(**common, grid=tmp_path / "one" / "grid.json", output_dir=tmp_path / "two"))  # type: ignore[arg-type]
    first, second = ((tmp_path / name / "records.jsonl").read_text() for name in ("one", "two"))
    assert first == second


def test_tiff16_without_a_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="--format tiff16: --dataset goes with tiff16"):
        GenerateConfig(pretrained_model_name_or_path="m", prompts=("a",), format="tiff16", output_dir=Path("o"))
