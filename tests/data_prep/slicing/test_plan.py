"""Splits, scales, captions and parts: the same volume cut by every rule, checked against its own voxels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.ndimage import gaussian_filter

from configs.errors import InputError, NothingLeftError, TisserandError, UsageError
from configs.load import load
from data_prep.folders.checks import verify
from data_prep.folders.manifest import SliceRow, read_manifest, read_rows
from data_prep.folders.window import window_from
from data_prep.slice import main
from data_prep.slicing.config import SliceConfig
from prompts.captions import parse_caption
from prompts.vocabulary import read_vocabulary

SHAPE = (20, 60, 100)
VOLUME = (gaussian_filter(np.random.default_rng(1).normal(0, 9000, SHAPE), 1) + 30000 + np.arange(100) * 20).astype(
    np.uint16
)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A folder with two volumes of one state in it."""
    tifffile.imwrite(tmp_path / "a.tif", VOLUME, photometric="minisblack")
    tifffile.imwrite(tmp_path / "b.tif", 60000 - VOLUME, photometric="minisblack")
    return tmp_path


def cut(folder: Path, *words: str, volumes: tuple[str, ...] = ("a",), out: str = "out") -> dict[str, list[SliceRow]]:
    paths = [f"dry={folder / name}.tif" for name in volumes]
    split = [] if "--split" in words else ["--split", "none"]
    main(load(SliceConfig, ["--volumes", *paths, "--output_dir", str(folder / out), *split, *words]))
    return {path.parent.name: read_rows(path.parent) for path in sorted((folder / out).glob("*/metadata.jsonl"))}


def entry(folder: Path) -> dict[str, object]:
    (found,) = read_manifest(folder / "out")["volumes"]  # type: ignore[misc]  # JSON
    return found


def grey(folder: Path) -> np.ndarray:
    return window_from(entry(folder)["window"]).to_uint8(VOLUME)  # type: ignore[arg-type]  # JSON


def pixels(folder: Path, split: str, row: SliceRow) -> np.ndarray:
    return np.asarray(Image.open(folder / "out" / split / row.file_name))


def marked(rows: list[SliceRow]) -> np.ndarray:
    """Return which voxels the boxes of some rows hold."""
    seen = np.zeros(SHAPE, bool)
    for row in rows:
        z0, z1, y0, y1, x0, x1 = row.box
        seen[z0:z1, y0:y1, x0:x1] = True
    return seen


# ---- Splits ----


@pytest.mark.parametrize(
    "words",
    [
        ("--split", "region"),
        ("--split", "region", "--fit", "tile", "--tile_size", "16"),
        ("--split", "region", "--fit", "pad", "--pad_multiple", "32"),
        ("--split", "region", "--fit", "resize", "--resize_voxels_per_px", "2"),
        ("--split", "region", "--roi_x", "7", "93", "--roi_z", "2", "18"),
        ("--split", "region", "--stride", "3", "--dedupe", "--drop_blank"),
        ("--split", "index", "--slice_axes", "warp"),
        ("--split", "index", "--slice_axes", "thickness"),
    ],
)
def test_no_voxel_that_is_held_out_is_in_training(scan: Path, words: tuple[str, ...]) -> None:
    rows = cut(scan, "--guard_voxels", "4", *words)
    train, validation = marked(rows["train"]), marked(rows["validation"])
    assert train.any()
    assert validation.any()
    assert not (train & validation).any()
    # Nor is a voxel of one within the guard of the other.
    near = np.stack([np.roll(train, shift, axis) for axis in range(3) for shift in (-4, 4)]).any(axis=0) & validation
    edge = 4
    assert not near[edge:-edge, edge:-edge, edge:-edge].any()
    assert verify(scan / "out").leak == "no voxel is in two splits"


def test_an_index_split_says_that_directions_cross(scan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = cut(scan, "--split", "index", "--guard_voxels", "2")
    assert "share lines of voxels" in capsys.readouterr().err
    # Within a direction nothing is shared; between directions it is, and the verdict says so.
    for axis in ("thickness", "warp", "weft"):
        train, validation = ([one for one in rows[split] if one.axis == axis] for split in ("train", "validation"))
        assert not (marked(train) & marked(validation)).any()
        assert min(one.index for one in validation) - max(one.index for one in train) == 3
    assert "cross" in verify(scan / "out").leak
    assert [block["axis"] for block in entry(scan)["blocks"]] == ["z", "y", "x"]  # type: ignore[attr-defined]


def test_whole_volumes_can_be_held_out(scan: Path) -> None:
    rows = cut(scan, "--split", "volume", "--validation_volumes", "b", volumes=("a", "b"))
    assert {row.volume for row in rows["train"]} == {"a"}
    assert {row.volume for row in rows["validation"]} == {"b"}
    assert marked(rows["validation"]).all()
    assert "Whole volumes are held out: b" in (scan / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--split", "volume"), "--validation_volumes: goes with --split volume"),
        (("--split", "none", "--validation_volumes", "a"), "--validation_volumes: goes with --split volume"),
        (("--split", "volume", "--validation_volumes", "c"), "no such volume; named are a, b"),
        (("--split", "volume", "--validation_volumes", "a", "b"), "none is left to train on"),
    ],
)
def test_volumes_that_cannot_be_held_out_are_refused(scan: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cut(scan, *words, volumes=("a", "b"))


def test_a_guard_can_be_given_in_micrometres(scan: Path) -> None:
    cut(scan, "--split", "region", "--guard_um", "100", "--voxel_size_um", "30")
    first, end = entry(scan)["split"]["guard"]  # type: ignore[index]  # JSON
    assert end - first == 4
    with pytest.raises(UsageError, match="the voxel size of volume 'a' is unknown"):
        cut(scan, "--split", "region", "--guard_um", "100", out="other")


# ---- Which slices ----


def test_a_region_of_interest_keeps_the_stored_coordinates(scan: Path) -> None:
    rows = cut(scan, "--roi_z", "3", "17", "--roi_y", "10", "50", "--roi_x", "25", "90")
    box = np.zeros(SHAPE, bool)
    box[3:17, 10:50, 25:90] = True
    assert np.array_equal(marked(rows["train"]), box)
    whole = grey(scan)
    for row in rows["train"]:
        z0, z1, y0, y1, x0, x1 = row.box
        assert np.array_equal(pixels(scan, "train", row), np.squeeze(whole[z0:z1, y0:y1, x0:x1]))
        assert row.index == (z0, y0, x0)[("thickness", "warp", "weft").index(row.axis)]
    assert entry(scan)["shape"] == [*SHAPE]
    assert entry(scan)["box"] == [3, 17, 10, 50, 25, 90]


def test_the_split_of_a_region_of_interest_is_told_in_stored_voxels(scan: Path) -> None:
    cut(scan, "--split", "region", "--roi_x", "20", "100", "--guard_voxels", "5")
    split = entry(scan)["split"]
    assert (split["train"][0], split["validation"][1]) == (20, 100)  # type: ignore[index]  # JSON


def test_padding_around_a_cylinder_is_in_no_picture(tmp_path: Path) -> None:
    y, x = np.ogrid[:60, :100]
    volume = np.where(((y - 30) / 29) ** 2 + ((x - 50) / 48) ** 2 <= 1, VOLUME, 0).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", volume, photometric="minisblack")
    rows = cut(tmp_path, "--trim", "inscribed")["train"]
    for row in rows:
        z0, z1, y0, y1, x0, x1 = row.box
        assert volume[z0:z1, y0:y1, x0:x1].all()
    assert {row.width * row.height for row in rows if row.axis == "thickness"} == {
        (entry(tmp_path)["box"][3] - entry(tmp_path)["box"][2])
        * (entry(tmp_path)["box"][5] - entry(tmp_path)["box"][4])  # type: ignore[index]
    }


def test_directions_can_be_chosen(scan: Path) -> None:
    rows = cut(scan, "--slice_axes", "weft", "thickness")["train"]
    assert {row.axis for row in rows} == {"thickness", "weft"}
    assert len(rows) == 20 + 100


# ---- Fit and scale ----


def test_padding_reflects_to_a_multiple_at_the_same_scale(scan: Path) -> None:
    rows = cut(scan, "--fit", "pad", "--pad_multiple", "32", "--voxel_size_um", "5", "--stride", "10")["train"]
    assert {(row.axis, row.height, row.width) for row in rows} == {
        ("thickness", 64, 128), ("warp", 32, 128), ("weft", 32, 64)
    }  # fmt: skip
    assert {row.um_per_px for row in rows} == {(5.0, 5.0)}
    row = rows[0]
    assert np.array_equal(pixels(scan, "train", row)[2:62, 14:114], grey(scan)[0])


@pytest.mark.parametrize(
    ("words", "scales"),
    [
        (("--resize_voxels_per_px", "2"), {"thickness": (2, 2), "warp": (2, 2), "weft": (2, 2)}),
        (("--resize_voxels_per_px", "1", "2", "0.5"), {"thickness": (1, 1), "warp": (2, 2), "weft": (0.5, 0.5)}),
        (("--resize_um_per_px", "10"), {"thickness": (2, 1), "warp": (0.5, 1), "weft": (0.5, 2)}),
    ],
)
def test_resized_pictures_say_their_scale_in_every_row(
    scan: Path, words: tuple[str, ...], scales: dict[str, tuple[float, float]]
) -> None:
    rows = cut(scan, "--fit", "resize", *words, "--voxel_size_um", "20", "5", "10", "--stride", "20")["train"]
    edges = {"z": 20, "y": 5, "x": 10}
    for row in rows:
        assert row.voxels_per_px == scales[row.axis]
        letters = {"thickness": "yx", "warp": "zx", "weft": "zy"}[row.axis]
        assert row.um_per_px == tuple(edges[one] * n for one, n in zip(letters, scales[row.axis], strict=True))
        extent = [row.box[2 * axis + 1] - row.box[2 * axis] for axis in range(3)]
        extent.remove(1)
        assert (row.height, row.width) == tuple(round(n / s) for n, s in zip(extent, scales[row.axis], strict=True))
        assert pixels(scan, "train", row).shape == (row.height, row.width)


def test_resizing_averages_what_a_coarse_pixel_covers(scan: Path) -> None:
    rows = cut(scan, "--fit", "resize", "--resize_voxels_per_px", "4", "--slice_axes", "thickness")["train"]
    means = grey(scan)[0].reshape(15, 4, 25, 4).mean(axis=(1, 3))
    found = pixels(scan, "train", rows[0]).astype(float)
    # The filter reaches over neighbours, so the means agree only in the large.
    assert np.corrcoef(means.ravel(), found.ravel())[0, 1] > 0.95
    assert found.mean() == pytest.approx(means.mean(), abs=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fit", "resize"), "--fit resize: resize takes one of"),
        (("--resize_um_per_px", "3"), "--fit native: resize takes one of"),
        (("--fit", "resize", "--resize_um_per_px", "3"), "the voxel size of volume 'a' is unknown"),
        (("--fit", "resize", "--resize_voxels_per_px", "1", "2"), "one or three"),
        (("--fit", "resize", "--resize_voxels_per_px", "50"), "would become"),
        (("--fit", "pad", "--pad_multiple", "16384"), "too large for loaders"),
    ],
)
def test_a_fit_that_cannot_be_is_refused(scan: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cut(scan, *words)
    assert not (scan / "out").exists()


# ---- Captions ----


def test_captions_carry_identifier_free_text_and_place(scan: Path) -> None:
    words = "{identifier} X-ray slice, {state} {axis}, {position} percent, {um_per_px} um"
    rows = cut(scan, "--caption_template", words, "--identifier", "zwx", "--voxel_size_um", "5", "--stride", "5")
    texts = {(row.axis, row.index): row.text for row in rows["train"]}
    assert texts["weft", 25] == "zwx X-ray slice, sf_dry sf_weft, 26 percent, 5 um"
    assert texts["thickness", 0] == "zwx X-ray slice, sf_dry sf_thickness, 2 percent, 5 um"
    vocabulary = read_manifest(scan / "out")["vocabulary"]
    assert (vocabulary["identifier"], vocabulary["template"]) == ("zwx", words)  # type: ignore[index]  # JSON
    known = read_vocabulary(scan / "out" / "vocabulary.yaml")
    assert {parse_caption(row.text, known) for row in rows["train"]} == {
        ("dry", axis) for axis in ("thickness", "warp", "weft")
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--caption_template", "{axsi}"), r"unknown field \{axsi\}.* did you mean \{axis\}"),
        (("--caption_template", "{axis} {um_per_px}"), r"nothing is known for \{um_per_px\}"),
        (("--caption_template", "{axis}", "--identifier", "zwx"), r"has no field \{identifier\}"),
    ],
)
def test_a_caption_that_cannot_be_written_is_refused(scan: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cut(scan, *words)


def test_the_pieces_of_each_caption_are_counted(scan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--caption_template", "{state} {axis} " + "and on " * 40, "--caption_tokenizer", "assets/tiny-sd")
    cut(scan, *words, "--dry_run")
    printed = capsys.readouterr()
    assert "cut off after 75" in printed.out
    assert "3 of 3 captions are longer than the 75 pieces" in printed.err


# ---- What is left out ----


def volume_with_copies(folder: Path) -> None:
    volume = VOLUME.copy()
    volume[4:7] = volume[3]
    volume[:, 10:13] = volume.min()
    tifffile.imwrite(folder / "a.tif", volume, photometric="minisblack")


def test_filters_drop_what_they_find_and_count_it_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volume_with_copies(tmp_path)
    before = len(cut(tmp_path)["train"])
    found = entry(tmp_path)
    rows = cut(tmp_path, "--drop_blank", "--dedupe", "--overwrite")["train"]
    left_out = entry(tmp_path)["left_out"]
    assert left_out["blank pictures"] == {"warp": 3}  # type: ignore[index]  # JSON
    assert left_out["near copies of a neighbour"]["thickness"] == 3  # type: ignore[index]  # JSON
    assert found["num_blank_pictures"] == 3
    gone = {(axis, index) for axis, some in entry(tmp_path)["dropped_slices"].items() for index in some}  # type: ignore[attr-defined]
    assert {("thickness", 4), ("thickness", 6), ("warp", 11)} <= gone
    assert len(rows) == before - len(gone)
    assert len(list((tmp_path / "out" / "train").glob("*.png"))) == len(rows)
    assert "left out: blank pictures 3, near copies of a neighbour" in capsys.readouterr().out


def test_slices_never_cut_are_counted_too(scan: Path) -> None:
    cut(scan, "--split", "region", "--guard_voxels", "6", "--stride", "2", "--roi_y", "0", "50")
    left_out = entry(scan)["left_out"]
    assert left_out == {
        "outside the part that is cut": {"warp": 10},
        "stride": {"thickness": 10, "warp": 25, "weft": 50},
        "guard slab": {"weft": 3},
        "planes that cannot be decoded": {},
    }


def test_a_filter_that_leaves_nothing_is_refused_with_its_numbers(scan: Path) -> None:
    with pytest.raises(NothingLeftError, match=r"no thickness picture .* of 20: 20 are blank \(--blank_below 127,"):
        cut(scan, "--drop_blank", "--blank_below", "127")
    assert not (scan / "out").exists()


def test_copies_across_the_guard_do_not_empty_the_held_out_part(tmp_path: Path) -> None:
    noise = np.random.default_rng(5).integers(0, 50, SHAPE, dtype=np.uint16)  # so that no two are the same
    tifffile.imwrite(tmp_path / "a.tif", np.repeat(VOLUME[:, :, :1], 100, axis=2) + noise, photometric="minisblack")
    rows = cut(tmp_path, "--split", "region", "--dedupe", "--slice_axes", "weft")
    assert {split: len(some) for split, some in rows.items()} == {"train": 1, "validation": 1}


def test_the_number_of_independent_slices_is_measured_and_printed(
    scan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(scan)
    found = entry(scan)["audit"]
    for name, length in zip(("thickness", "warp", "weft"), SHAPE, strict=True):
        assert found[name]["num_slices"] == length  # type: ignore[index]  # JSON
        assert 1 < found[name]["effective_number"] < length  # type: ignore[index]  # JSON
    assert "correlation length 2 voxels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--slice_axes", "warp", "warp"), UsageError),
        (("--blank_below", "0"), UsageError),
        (("--dedupe_above", "1.1"), UsageError),
        (("--processes", "0"), UsageError),
        (("--guard_um", "1", "--guard_voxels", "1"), UsageError),
        (("--trim", "inscribed"), InputError),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    scan: Path, words: tuple[str, ...], error: type[TisserandError]
) -> None:
    with pytest.raises(error, match=words[0]):
        cut(scan, *words)


def test_slices_that_show_mostly_padding_are_blank(tmp_path: Path) -> None:
    volume = VOLUME.copy()
    volume[:, 40:], volume[:, :20] = 0, 0
    volume[:, 25:35, :30] = 0
    tifffile.imwrite(tmp_path / "a.tif", volume, photometric="minisblack")
    rows = cut(tmp_path, "--drop_blank", "--slice_axes", "warp")["train"]
    with pytest.raises(NothingLeftError, match="no weft picture"):
        cut(tmp_path, "--drop_blank", "--slice_axes", "weft", out="other")
    assert {row.index for row in rows} == set(range(20, 40))
