from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from configs.errors import InputError, TisserandError, UsageError
from configs.load import load
from data_prep.folders.checks import verify
from data_prep.folders.manifest import SliceRow, read_manifest, read_rows
from data_prep.folders.window import Window, window_from
from data_prep.readers.info import VolumeInfo
from data_prep.slice import main
from data_prep.slicing.config import SliceConfig
from data_prep.slicing.intensity import WindowEstimate
from data_prep.slicing.plan import make_plans, plan_pictures
from data_prep.slicing.planes import buffer_budget
from data_prep.slicing.survey import Volume
from prompts.vocabulary import DEFAULT

SHAPE = (12, 60, 100)
VOLUME = (
    gaussian_filter(np.random.default_rng(1).normal(0, 9000, SHAPE), (0, 1, 1)) + 30000 + np.arange(100) * 20
).astype(np.uint16)


def config(tmp_path: Path, *arguments: str, volumes: Sequence[str] = ("dry=dry.tif",)) -> SliceConfig:
    """Parse a command line, with volumes relative to ``tmp_path`` and no split unless asked for."""
    paths = [str(tmp_path / text) if "=" not in text else text.replace("=", f"={tmp_path}/") for text in volumes]
    split = [] if "--split" in arguments else ["--split", "none"]
    return load(SliceConfig, ["--volumes", *paths, "--output_dir", str(tmp_path / "out"), *split, *arguments])


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A folder with one volume in it."""
    tifffile.imwrite(tmp_path / "dry.tif", VOLUME, photometric="minisblack")
    return tmp_path


def rows_of(out: Path) -> dict[str, list[SliceRow]]:
    return {path.parent.name: read_rows(path.parent) for path in sorted(out.glob("*/metadata.jsonl"))}


def pixels_of(out: Path, split: str, row: SliceRow) -> NDArray[np.uint8]:
    with Image.open(out / split / row.file_name) as image:
        assert image.mode == "L"
        return np.asarray(image)


def voxels_of(volume: NDArray[Any], row: SliceRow) -> NDArray[Any]:
    z0, z1, y0, y1, x0, x1 = row.box
    return volume[z0:z1, y0:y1, x0:x1]


def window_of(out: Path) -> Window:
    return window_from(read_manifest(out)["volumes"][0]["window"])  # type: ignore[index]  # JSON


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- What is in the pictures ----


def test_every_pixel_is_the_windowed_voxel(scan: Path) -> None:
    main(config(scan))
    grey = window_of(scan / "out").to_uint8(VOLUME)
    rows = rows_of(scan / "out")["train"]
    for row in rows:
        expected = grey.take(row.index, ("thickness", "warp", "weft").index(row.axis))
        assert np.array_equal(pixels_of(scan / "out", "train", row), expected)
        assert (row.height, row.width) == expected.shape
    assert Counter(row.axis for row in rows) == {"thickness": 12, "warp": 60, "weft": 100}
    # 64 of 12 planes are all of them, so the window is that of the whole volume.
    assert [window_of(scan / "out").low, window_of(scan / "out").high] == np.percentile(VOLUME, [0.1, 99.9]).tolist()


@pytest.mark.parametrize("order", list(itertools.permutations("zyx")))
def test_any_axis_can_have_any_role(scan: Path, order: tuple[str, str, str]) -> None:
    roles = zip(("thickness", "warp", "weft"), order, strict=True)
    flags = [word for role, axis in roles for word in (f"--{role}_axis", axis)]
    main(config(scan, *flags, "--stride", "7"))
    turned = np.transpose(window_of(scan / "out").to_uint8(VOLUME), ["zyx".index(axis) for axis in order])
    seen = Counter[str]()
    for row in rows_of(scan / "out")["train"]:
        axis = ("thickness", "warp", "weft").index(row.axis)
        pixels = pixels_of(scan / "out", "train", row)
        assert np.array_equal(pixels, turned.take(row.index, axis))
        assert pixels.size == voxels_of(VOLUME, row).size
        seen[row.axis] += 1
    assert list(seen.values()) == [-(-size // 7) for size in turned.shape]


@pytest.mark.parametrize(
    ("shape", "total"), [((359, 702, 970), 2031), ((197, 863, 773), 1833), ((287, 701, 633), 1621)]
)
def test_the_shapes_of_three_real_volumes_give_the_known_numbers(shape: tuple[int, int, int], total: int) -> None:
    settings = SliceConfig(volumes=("dry=dry.tif",), output_dir=Path("out"), split="none")
    pictures = plan_pictures(pretended(shape), settings, DEFAULT, has_size=False)
    rows = [picture.row for several in pictures.values() for picture in several]
    assert len(rows) == len({row.file_name for row in rows}) == total
    sizes = {row.axis: (row.height, row.width) for row in rows}
    assert sizes == {"thickness": shape[1:], "warp": (shape[0], shape[2]), "weft": shape[:2]}


def pretended(shape: tuple[int, int, int]) -> Volume:
    """A volume that is only planned for."""

    class Source:
        info = VolumeInfo(path=Path("dry.tif"), shape=shape, dtype="uint16", storage="", num_bytes=0)

        def planes(self, indices: Sequence[int]) -> Iterator[tuple[int, NDArray[Any]]]:
            raise NotImplementedError

    window = WindowEstimate(
        window=Window(low=0, high=1), percentiles=(0, 100), num_planes=0, clipped_low=0, clipped_high=0, non_finite=0,
        minimum=0, maximum=1,
    )  # fmt: skip
    wanted = {axis: list(range(size)) for axis, size in enumerate(shape)}
    return Volume(
        name="dry", state="dry", stem="dry", source=Source(), window=window, region=None, wanted=wanted, voxel_um=None,
        box=((0, shape[0]), (0, shape[1]), (0, shape[2])), stored_shape=shape, blocks={}, split="train",
    )  # fmt: skip


def test_nan_becomes_black_stays_out_of_the_window_and_is_counted(tmp_path: Path) -> None:
    volume = VOLUME.astype(np.float32)
    volume[:, :10] = np.nan
    tifffile.imwrite(tmp_path / "dry.tif", volume, photometric="minisblack")
    main(config(tmp_path))
    (entry,) = read_manifest(tmp_path / "out")["volumes"]  # type: ignore[misc]  # JSON
    assert entry["num_non_finite_voxels"] == 12 * 10 * 100
    assert entry["window"]["minimum"] == VOLUME[:, 10:].min()
    row = next(row for row in rows_of(tmp_path / "out")["train"] if row.axis == "thickness")
    pixels = pixels_of(tmp_path / "out", "train", row)
    assert not pixels[:10].any()
    assert np.array_equal(pixels[10:], window_of(tmp_path / "out").to_uint8(volume[0, 10:]))


def test_low_values_declared_white_become_bright(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tifffile.imwrite(tmp_path / "dry.tif", VOLUME, photometric="miniswhite")
    main(config(tmp_path, "--stride", "50"))
    window = window_of(tmp_path / "out")
    assert window.low > window.high
    assert "low values are white" in capsys.readouterr().err


# ---- Split ----


@pytest.mark.parametrize(
    ("flags", "train", "validation"),
    [
        ((), (0, 80), (85, 100)),
        (("--weft_axis", "y", "--warp_axis", "x"), (0, 80), (85, 100)),
        (("--fit", "tile", "--tile_size", "16"), (0, 75), (80, 100)),
    ],
)
def test_no_voxel_is_in_both_splits_and_none_in_the_guard(
    scan: Path, flags: tuple[str, ...], train: tuple[int, int], validation: tuple[int, int]
) -> None:
    main(config(scan, "--split", "region", "--guard_voxels", "5", *flags))
    grey = window_of(scan / "out").to_uint8(VOLUME)
    for split, part in (("train", train), ("validation", validation)):
        seen = np.zeros(SHAPE, bool)
        for row in rows_of(scan / "out")[split]:
            z0, z1, y0, y1, x0, x1 = row.box
            seen[z0:z1, y0:y1, x0:x1] = True
            # Reflected pixels repeat those of the box; their order is tested elsewhere.
            pixels = pixels_of(scan / "out", split, row)
            assert np.array_equal(np.unique(pixels), np.unique(voxels_of(grey, row)))
        expected = np.zeros(SHAPE, bool)
        expected[:, :, slice(*part)] = True
        assert np.array_equal(seen, expected)


def test_all_three_directions_are_held_out(scan: Path) -> None:
    main(config(scan, "--split", "region"))
    assert all({row.axis for row in rows} == {"thickness", "warp", "weft"} for rows in rows_of(scan / "out").values())


def test_the_guard_is_measured_on_the_volume(tmp_path: Path) -> None:
    noise = np.random.default_rng(3).normal(0, 9000, (12, 60, 300))
    lengths = []
    for sigma in (1, 5):
        volume = gaussian_filter(noise, (0, 0, sigma)) * sigma + 30000
        tifffile.imwrite(tmp_path / "dry.tif", volume.astype(np.uint16), photometric="minisblack")
        main(config(tmp_path, "--split", "region", "--stride", "10", "--overwrite"))
        parts = read_manifest(tmp_path / "out")["volumes"][0]["split"]  # type: ignore[index]  # JSON
        lengths.append(parts["correlation_length"])
        assert parts["guard"][1] - parts["guard"][0] == max(3 * parts["correlation_length"], 6)
    # A Gaussian kernel leaves a correlation of 1/e at two sigma.
    assert lengths == [pytest.approx(2, abs=1), pytest.approx(10, abs=2)]


def test_a_cut_along_the_planes_own_axis_is_measured_too(tmp_path: Path) -> None:
    volume = gaussian_filter(np.random.default_rng(3).normal(0, 9000, (120, 20, 60)), (4, 0, 0)) * 4 + 30000
    tifffile.imwrite(tmp_path / "dry.tif", volume.astype(np.uint16), photometric="minisblack")
    main(config(tmp_path, "--split", "region", "--thickness_axis", "y", "--warp_axis", "z", "--stride", "9"))
    parts = read_manifest(tmp_path / "out")["volumes"][0]["split"]  # type: ignore[index]  # JSON
    assert parts["axis"] == "z"
    assert parts["correlation_length"] == pytest.approx(8, abs=2)


def test_a_volume_too_small_for_the_split_is_refused_with_the_numbers(scan: Path) -> None:
    with pytest.raises(UsageError, match=r"100 voxels long; 60 held out .* leave 37 to train on"):
        main(config(scan, "--split", "region", "--fit", "tile", "--tile_size", "48", "--guard_voxels", "3"))
    assert sorted(path.name for path in scan.iterdir()) == ["dry.tif"]


# ---- How many, how large, what they are called ----


@pytest.mark.parametrize(
    ("flags", "numbers"),
    [
        (["--stride", "5"], [3, 12, 20]),
        (["--max_per_axis", "10"], [6, 10, 10]),
        (["--stride", "5", "--max_per_axis", "15"], [3, 12, 15]),
    ],
)
def test_slices_can_be_thinned_out(scan: Path, flags: list[str], numbers: list[int]) -> None:
    main(config(scan, *flags))
    assert list(Counter(row.axis for row in rows_of(scan / "out")["train"]).values()) == numbers


def test_tiles_are_square_and_padded_where_a_slice_is_thinner(scan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(config(scan, "--fit", "tile", "--tile_size", "32", "--stride", "20"))
    rows = rows_of(scan / "out")["train"]
    assert {(row.height, row.width) for row in rows} == {(32, 32)}
    grey = window_of(scan / "out").to_uint8(VOLUME)
    for row in rows:
        inside = np.squeeze(voxels_of(grey, row))
        top = (32 - inside.shape[0]) // 2
        assert np.array_equal(pixels_of(scan / "out", "train", row)[top : top + inside.shape[0]], inside)
    assert read_manifest(scan / "out")["volumes"][0]["num_padded_pictures"] == sum(  # type: ignore[index]  # JSON
        row.axis != "thickness" for row in rows
    )
    assert "padded by reflection" in capsys.readouterr().err


def test_file_names_say_state_direction_and_place(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", VOLUME, photometric="minisblack")
    main(config(tmp_path, "--stride", "50", volumes=["dry_compacted=a.tif"]))
    names = [row.file_name for row in rows_of(tmp_path / "out")["train"]]
    assert names[0] == "dry-compacted-thickness-00000.png"
    assert names[2] == "dry-compacted-warp-00050.png"


def test_two_volumes_of_a_state_are_told_apart(tmp_path: Path) -> None:
    for name in ("a.tif", "B \u00fc_1.ome.tif"):
        tifffile.imwrite(tmp_path / name, VOLUME, photometric="minisblack", metadata=None)
    main(config(tmp_path, "--stride", "99", volumes=["dry=a.tif", "dry=B \u00fc_1.ome.tif"]))
    rows = rows_of(tmp_path / "out")["train"]
    assert {row.volume for row in rows} == {"a", "b-1"}
    assert {row.file_name for row in rows} >= {"dry-a-warp-00000.png", "dry-b-1-warp-00000.png"}
    assert all(re.fullmatch(r"[a-z0-9-]+\.png", row.file_name) for row in rows)


def test_captions_come_from_state_and_direction(scan: Path) -> None:
    (scan / "words.yaml").write_text("prefix: x_\nstates: {wet: [resin, wet]}\n")
    main(config(scan, "--stride", "99", "--vocabulary", str(scan / "words.yaml"), volumes=["wet=dry.tif"]))
    texts = [row.text for row in rows_of(scan / "out")["train"]]
    assert sorted(set(texts)) == ["x_resin x_wet x_thickness", "x_resin x_wet x_warp", "x_resin x_wet x_weft"]


def test_a_vocabulary_without_an_axis_is_refused(scan: Path) -> None:
    (scan / "words.yaml").write_text("axes: {thickness: t, warp: w}\n")
    with pytest.raises(UsageError, match=r"--vocabulary .*words.yaml: no word for the axes weft"):
        main(config(scan, "--vocabulary", str(scan / "words.yaml")))


@pytest.mark.parametrize(("size", "expected"), [(["3"], (3, 3, 3)), (["3", "4", "5"], (3, 4, 5))])
def test_pixel_sizes_follow_the_direction(scan: Path, size: list[str], expected: tuple[int, int, int]) -> None:
    main(config(scan, "--stride", "99", "--voxel_size_um", *size))
    z, y, x = expected
    found = {row.axis: row.um_per_px for row in rows_of(scan / "out")["train"]}
    assert found == {"thickness": (y, x), "warp": (z, x), "weft": (z, y)}


def test_pixel_sizes_known_for_one_volume_only_are_left_out(scan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = {"axes": "ZYX", "spacing": 5.0, "unit": "um"}
    tifffile.imwrite(scan / "b.tif", VOLUME, imagej=True, metadata=metadata, resolution=(0.2, 0.2))
    main(config(scan, "--stride", "99", volumes=["dry=dry.tif", "injected=b.tif"]))
    assert {row.um_per_px for row in rows_of(scan / "out")["train"]} == {None}
    assert "no voxel size is known for dry" in capsys.readouterr().err


# ---- The folder ----


def test_datasets_loads_it_both_ways(scan: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    cache = str(scan / "cache")
    main(config(scan, "--split", "region", "--stride", "10"))
    rows = rows_of(scan / "out")
    whole = datasets.load_dataset(str(scan / "out"), cache_dir=cache)
    assert {split: len(whole[split]) for split in whole} == {split: len(some) for split, some in rows.items()}
    alone = datasets.load_dataset("imagefolder", data_dir=str(scan / "out" / "train"), cache_dir=cache)["train"]
    assert len(alone) == len(rows["train"])
    for loaded in (whole["train"], alone):
        by_name = {(row.text, row.index): row for row in rows["train"]}
        assert {"image", "text"} <= set(loaded.column_names)
        for example in loaded:
            row = by_name[example["text"], example["index"]]
            assert np.array_equal(np.asarray(example["image"]), pixels_of(scan / "out", "train", row))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("how", ["the folder", "the glob of diffusers"])
def test_pictures_and_captions_arrive_in_trainers_whole_and_streamed(scan: Path, how: str, streaming: bool) -> None:
    import datasets

    datasets.disable_progress_bars()
    main(config(scan, "--split", "region", "--stride", "20"))
    rows = {row.text + str(row.index): row for row in rows_of(scan / "out")["train"]}
    # diffusers' scripts search what --train_data_dir names for files at any depth.
    glob = {"train": str(scan / "out" / "train" / "**")}
    where = {"path": str(scan / "out")} if how == "the folder" else {"path": "imagefolder", "data_files": glob}
    loaded = datasets.load_dataset(**where, split="train", streaming=streaming, cache_dir=str(scan / "cache"))
    found = {example["text"] + str(example["index"]): np.asarray(example["image"]) for example in loaded}
    assert found.keys() == rows.keys()
    assert all(np.array_equal(found[key], pixels_of(scan / "out", "train", row)) for key, row in rows.items())


def test_workers_and_memory_change_nothing(scan: Path) -> None:
    found = []
    for flags in (["--workers", "1"], ["--workers", "4"], ["--memory_gb", "0.5"]):
        main(config(scan, "--split", "region", *flags, "--overwrite"))
        found.append({name: data for name, data in contents(scan / "out").items() if name != "config.yaml"})
    assert found[0] == found[1] == found[2]


def test_the_settings_beside_it_make_it_again(scan: Path) -> None:
    main(config(scan, "--split", "region", "--stride", "9", "--guard_voxels", "4"))
    before = contents(scan / "out")
    main(load(SliceConfig, ["--config", str(scan / "out" / "config.yaml"), "--overwrite"]))
    after = contents(scan / "out")
    assert {name for name in before if before[name] != after[name]} == {"config.yaml"}


def test_only_the_settings_name_folders_of_this_machine(scan: Path) -> None:
    main(config(scan, "--split", "region", "--stride", "9"))
    naming = {name for name, data in contents(scan / "out").items() if str(scan).encode() in data}
    assert naming == {"config.yaml"}


def test_the_manifest_describes_the_volume(scan: Path) -> None:
    main(config(scan, "--split", "region", "--stride", "9"))
    found = read_manifest(scan / "out")
    (entry,) = found["volumes"]  # type: ignore[misc]  # JSON
    assert (entry["file"], entry["state"], entry["shape"], entry["dtype"]) == ("dry.tif", "dry", [*SHAPE], "uint16")
    assert re.fullmatch(r"[0-9a-f]{64}", entry["sha256"])
    assert found["counts"]["train"]["dry thickness"] == 2  # type: ignore[index,call-overload]  # JSON


def test_volumes_can_stand_in_a_preset_as_a_mapping(scan: Path) -> None:
    preset = scan / "slices.yaml"
    preset.write_text(f"volumes:\n  dry: {scan}/dry.tif\n  injected: {scan}/b.tif\noutput_dir: {scan}/out\n")
    found = load(SliceConfig, ["--config", str(preset)])
    assert found.volumes == (f"dry={scan}/dry.tif", f"injected={scan}/b.tif")


def test_a_dry_run_prints_the_plan_and_writes_nothing(scan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(config(scan, "--dry_run"))
    out = capsys.readouterr().out
    assert "12x60x100 uint16" in out
    assert "passes 1" in out
    assert "172 pictures" in out
    assert sorted(path.name for path in scan.iterdir()) == ["dry.tif"]


def test_blank_and_like_slices_are_counted_and_kept(tmp_path: Path) -> None:
    volume = VOLUME.copy()
    volume[0] = volume[0].min()
    volume[2] = volume[1]
    tifffile.imwrite(tmp_path / "dry.tif", volume, photometric="minisblack")
    main(config(tmp_path))
    (entry,) = read_manifest(tmp_path / "out")["volumes"]  # type: ignore[misc]  # JSON
    assert entry["num_blank_pictures"] == 1
    assert entry["num_near_duplicate_slices"] == {"thickness": 1, "warp": 0, "weft": 0}
    assert len(rows_of(tmp_path / "out")["train"]) == 172


# ---- Refusals: one line, and nothing left behind ----


@pytest.mark.parametrize(
    ("flags", "volumes", "error", "message"),
    [
        ([], ["dry.tif"], UsageError, "the state is missing; write state=path"),
        ([], ["dry.tif"], UsageError, r"a file: --vocabulary \(docs/another_material.md\)"),
        ([], ["injectd=dry.tif"], UsageError, "did you mean 'injected'"),
        ([], ["foam=dry.tif"], UsageError, r"'foam' is not .*: --vocabulary \(docs/another_material.md\)"),
        ([], ["dry=nowhere.tif"], InputError, "no such file"),
        ([], ["dry=dry.tif", "dry=dry.tif"], UsageError, "the same file is given twice"),
        (["--fit", "tile", "--tile_size", "128"], ["dry=dry.tif"], UsageError, "--tile_size 128: .* allowed up to 96"),
        (["--memory_gb", "0.01"], ["dry=dry.tif"], UsageError, "--memory_gb 0.01: .* needs at least 0.3"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    scan: Path, flags: list[str], volumes: list[str], error: type[TisserandError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        main(config(scan, *flags, volumes=volumes))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in scan.iterdir()) == ["dry.tif"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tile_size", "70"], "--tile_size 70"),
        (["--tile_size", "8"], "--tile_size 8"),
        (["--stride", "0"], "--stride 0"),
        (["--window_percentile", "99", "1"], "--window_percentile 99.0 1.0"),
        (["--voxel_size_um", "1", "2"], "--voxel_size_um 1.0 2.0"),
        (["--thickness_axis", "y"], "each of z, y and x"),
        (["--tile_overlap", "1"], "--tile_overlap 1"),
        (["--validation_fraction", "0.7"], "--validation_fraction 0.7"),
        (["--guard_voxels", "-1"], "--guard_voxels -1"),
    ],
)
def test_a_setting_out_of_range_is_named(scan: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(scan, *flags)


def test_a_dataset_is_not_replaced_unasked(scan: Path) -> None:
    main(config(scan, "--stride", "50"))
    before = contents(scan / "out")
    with pytest.raises(UsageError, match="--overwrite"):
        main(config(scan, "--stride", "10"))
    assert contents(scan / "out") == before
    main(config(scan, "--stride", "10", "--overwrite"))
    assert len(contents(scan / "out")) > len(before)


def test_a_volume_in_the_folder_that_would_be_replaced_is_safe(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("")
    tifffile.imwrite(tmp_path / "out" / "dry.tif", VOLUME, photometric="minisblack")
    with pytest.raises(UsageError, match="lies inside --output_dir"):
        main(config(tmp_path, "--overwrite", volumes=["dry=out/dry.tif"]))
    assert (tmp_path / "out" / "dry.tif").exists()


def test_planes_larger_than_memory_are_refused_by_their_declared_size() -> None:
    settings = SliceConfig(volumes=("dry=dry.tif",), output_dir=Path("out"))
    info = VolumeInfo(path=Path("dry.tif"), shape=(3, 90000, 90000), dtype="uint8", storage="", num_bytes=1000)
    with pytest.raises(UsageError, match=r"--memory_gb .*: dry.tif with planes of 90000x90000 needs at least"):
        buffer_budget(info, settings)


def test_a_plane_that_turns_out_corrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "dry.tif"
    planes = np.concatenate([VOLUME] * 8)  # more than the planes sampled for the window
    tifffile.imwrite(path, planes, photometric="minisblack", compression="deflate")
    with tifffile.TiffFile(path) as file:
        offset = file.pages[1].dataoffsets[0]
    with path.open("r+b") as raw:
        raw.seek(offset + 8)
        raw.write(b"\xff" * 64)
    settings = config(tmp_path)
    make_plans(settings, DEFAULT)  # the damage is not among the sampled planes
    with pytest.raises(InputError, match="plane 1 cannot be decoded"):
        main(settings)
    assert [one.name for one in tmp_path.iterdir()] == ["dry.tif"]


def test_the_command_ends_with_the_next_command_or_one_line_and_its_code(scan: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (5, 20, 24, 3), dtype=np.uint8)
    tifffile.imwrite(scan / "rgb.tif", colours, photometric="rgb")
    command = [sys.executable, "-m", "data_prep.slice", "--output_dir", str(scan / "out"), "--split", "none"]
    bad = subprocess.run([*command, "--volumes", f"dry={scan}/rgb.tif"], capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stdout) == (3, "")
    assert bad.stderr.count("\n") == 1
    assert "colour pictures" in bad.stderr
    assert not (scan / "out").exists()
    good = subprocess.run([*command, "--volumes", f"dry={scan}/dry.tif"], capture_output=True, text=True, check=True)
    assert "accelerate launch finetune/lora.py" in good.stdout.splitlines()[-1]
    assert f"--train_data_dir {scan}/out/train" in good.stdout.splitlines()[-1]
    assert good.stderr == ""
    assert verify(scan / "out").problems == ()


def test_the_same_file_is_taken_once(scan: Path) -> None:
    (scan / "other.tif").symlink_to(scan / "dry.tif")
    for second in ("injected=dry.tif", "injected=other.tif"):
        with pytest.raises(UsageError, match=r"--volumes \S+\.tif: the same file is given twice"):
            main(config(scan, volumes=["dry=dry.tif", second]))


def test_a_link_to_itself_is_no_volume(tmp_path: Path) -> None:
    (tmp_path / "dry.tif").symlink_to(tmp_path / "dry.tif")
    with pytest.raises(InputError, match=r"dry\.tif: cannot be read \(Too many levels"):
        main(config(tmp_path))


def test_a_folder_is_no_vocabulary(scan: Path) -> None:
    with pytest.raises(UsageError, match=r"^--vocabulary \S+: Is a directory"):
        main(config(scan, "--vocabulary", str(scan)))


def test_a_place_that_cannot_hold_the_output_is_refused_before_the_disk_is_asked(scan: Path) -> None:
    with pytest.raises(UsageError, match=r"^--output_dir \S+/dry\.tif/out: cannot be written there"):
        main(config(scan, "--output_dir", str(scan / "dry.tif" / "out")))


def test_two_files_of_one_state_and_name_are_told_apart_by_nobody(scan: Path) -> None:
    (scan / "b").mkdir()
    tifffile.imwrite(scan / "b" / "dry.tif", VOLUME, photometric="minisblack")
    with pytest.raises(UsageError, match="would both be called 'dry-dry'"):
        main(config(scan, volumes=["dry=dry.tif", "dry=b/dry.tif"]))
