"""Thirty ways in which tools lose tomography data in silence, and what happens here: a fixture and a test for each.

The numbers are those of ``docs/volumes.md``. Handled means that every picture equals its voxels; a warning is one line;
a refusal is one line, exit code 3, and nothing written.
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from configs.errors import InputError, UsageError
from configs.load import load
from data_prep.folders.checks import verify
from data_prep.folders.manifest import read_manifest, read_rows
from data_prep.folders.window import Window, window_from
from data_prep.readers.info import ReadConfig
from data_prep.readers.open import open_volume
from data_prep.slice import main
from data_prep.slicing.config import SliceConfig
from data_prep.slicing.planes import plan_passes, scan

ROOT = Path(__file__).parents[2]
SHAPE = (6, 20, 24)
VOLUME = np.random.default_rng(3).integers(1000, 60000, SHAPE, dtype=np.uint16)


def config(path: Path, *arguments: str) -> SliceConfig:
    split = [] if "--split" in arguments else ["--split", "none"]
    return load(SliceConfig, ["--volumes", f"dry={path}", "--output_dir", str(path.parent / "out"), *split, *arguments])


def sliced(path: Path, *arguments: str, voxels: NDArray[Any] = VOLUME) -> dict[str, Any]:
    """Slice a volume, hold every picture to its voxels, and return the manifest's entry."""
    settings = config(path, *arguments)
    main(settings)
    out = path.parent / "out"
    entries: Any = read_manifest(out)["volumes"]
    (entry,) = entries
    grey = window_from(entry["window"]).to_uint8(voxels)
    rows = read_rows(out / "train")
    assert rows
    for row in rows:
        z0, z1, y0, y1, x0, x1 = row.box
        axis = settings.roles[("thickness", "warp", "weft").index(row.axis)]
        rows_axis, columns_axis = (role for role in settings.roles if role != axis)
        expected = grey[z0:z1, y0:y1, x0:x1].squeeze(axis)
        with Image.open(out / "train" / row.file_name) as picture:
            assert picture.mode == "L"
            assert np.array_equal(np.asarray(picture), expected if rows_axis < columns_axis else expected.T)
    return entry


def refused(path: Path, message: str, *arguments: str) -> None:
    """Check that slicing stops with one line and exit code 3, and changes nothing."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(InputError, match=message) as caught:
        main(config(path, *arguments))
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert sorted(path.parent.rglob("*")) == before


def warnings_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


def write(path: Path, volume: NDArray[Any] = VOLUME, **options: Any) -> Path:
    tifffile.imwrite(path, volume, **({} if options.get("imagej") else {"photometric": "minisblack"}) | options)
    return path


def pages(path: Path, planes: Any = VOLUME, **options: Any) -> Path:
    """One directory a page, as vendors' programs write."""
    with tifffile.TiffWriter(path) as file:
        for plane in planes:
            file.write(plane, contiguous=False, photometric="minisblack", metadata=None, **options)
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: write(path, compression="deflate", predictor=True), "deflate"),
        (lambda path: write(path, compression="lzw"), "lzw"),
        (lambda path: write(path, tile=(16, 16)), "tiles"),
        (pages, "page by page"),
    ],
)
def test_p01_compressed_tiled_and_paged_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path], words: str
) -> None:
    assert words in sliced(make(tmp_path / "dry.tif"))["storage"]
    assert re.search(rf"{words}.*passes 1", capsys.readouterr().out)


@pytest.mark.parametrize("options", [{}, {"compression": "lzw"}])
def test_p02_weft_slices_of_a_large_file_read_it_once_a_pass(tmp_path: Path, options: dict[str, Any]) -> None:
    shape = (40, 256, 320)
    volume = np.random.default_rng(0).integers(0, 60000, shape, dtype=np.uint16)
    source = open_volume(write(tmp_path / "dry.tif", volume, **options))
    wanted = {axis: range(size) for axis, size in enumerate(shape)}
    budget = 2_500_000  # of 6.6 million bytes of slices
    passes = len(plan_passes(shape, wanted, budget))
    window = Window(low=0, high=60000)

    def read_bytes() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]  # always

    before = read_bytes()
    assert sum(1 for _ in scan(source, lambda _, plane: window.to_uint8(plane), wanted, budget)) == sum(shape)
    assert passes == 3
    assert (read_bytes() - before) / passes < 1.1 * (tmp_path / "dry.tif").stat().st_size


@pytest.mark.parametrize(
    ("axes", "warned"), [("ZYX", None), ("QYX", None), ("IYX", None), ("TYX", "time steps"), ("CYX", "channels")]
)
def test_p03_planes_labelled_as_time_or_channels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], axes: str, warned: str | None
) -> None:
    sliced(write(tmp_path / "dry.tif", metadata={"axes": axes}))
    found = [line for line in warnings_of(capsys) if "taken as z" in line]
    assert len(found) == (warned is not None)
    assert warned is None or warned in found[0]


@pytest.mark.parametrize("options", [{}, {"imagej": True}, {"ome": True}])
def test_p03_two_stacks_are_chosen_from(tmp_path: Path, options: dict[str, Any]) -> None:
    both = np.stack([VOLUME, VOLUME[::-1]], axis=1)
    path = write(tmp_path / "dry.tif", both, metadata={"axes": "ZCYX"}, **options)
    refused(path, r"\(z 6, c 2\); choose with --select c=0")
    refused(path, "--select c=2: the file has", "--select", "c=2")
    sliced(path, "--select", "c=1", voxels=VOLUME[::-1])


@pytest.mark.parametrize("volume", [VOLUME[:3].astype(np.uint8), VOLUME[:, :, :3].astype(np.uint8)])
def test_p04_three_planes_stored_as_one_rgb_picture(tmp_path: Path, volume: NDArray[Any]) -> None:
    path = tmp_path / "dry.tif"
    tifffile.imwrite(path, volume, photometric="rgb")
    refused(path, r"one RGB picture .*, not 3 slices.*photometric='minisblack'.*--force_axes ZYX")
    sliced(path, "--force_axes", "ZYX", voxels=volume)


def test_p05_the_rotation_axis_is_not_the_thickness(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "dry.tif", np.ascontiguousarray(np.moveaxis(VOLUME, 0, 1)))
    sliced(path, voxels=np.moveaxis(VOLUME, 0, 1))
    assert any("--thickness_axis z is 20 voxels long and not the shortest" in line for line in warnings_of(capsys))
    sliced(path, "--thickness_axis", "y", "--warp_axis", "z", "--overwrite", voxels=np.moveaxis(VOLUME, 0, 1))
    assert not any("not the shortest" in line for line in warnings_of(capsys))


def test_p06_nan_outside_the_cylinder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volume = VOLUME.astype(np.float32)
    volume[:, :5] = np.nan
    volume[2, 10, 10] = np.inf
    entry = sliced(write(tmp_path / "dry.tif", volume), voxels=volume)
    window = entry["window"]
    assert [window["low"], window["high"]] == pytest.approx(np.percentile(volume[np.isfinite(volume)], [0.1, 99.9]))
    assert entry["num_non_finite_voxels"] == np.count_nonzero(~np.isfinite(volume))
    assert any("25.0% of the voxels are not finite and become black" in line for line in warnings_of(capsys))
    filled = sliced(tmp_path / "dry.tif", "--fill", "128", "--overwrite", voxels=volume)
    assert filled["window"]["fill"] == 128


@pytest.mark.parametrize(("value", "dtype"), [(0, "u2"), (-1000, "f4")])
def test_p07_constant_padding_outside_the_cylinder(tmp_path: Path, value: float, dtype: str) -> None:
    y, x = np.ogrid[-10:10, -12:12]
    outside = np.broadcast_to(y * y + x * x > 100, SHAPE)
    volume = np.where(outside, np.array(value, dtype), VOLUME.astype(dtype))
    entry = sliced(write(tmp_path / "dry.tif", volume), voxels=volume)
    window = entry["window"]
    assert [window["low"], window["high"]] == pytest.approx(np.percentile(volume[~outside], [0.1, 99.9]))
    assert (window["padding"], window["padding_share"]) == (value, pytest.approx(outside.mean()))


def test_p08_one_window_for_all_slices_and_if_asked_for_all_volumes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "dry.tif"), write(tmp_path / "wet.tif", VOLUME // 2)
    arguments = ["--volumes", f"dry={first}", f"injected={second}", "--split", "none"]
    windows: dict[str, list[Window]] = {}
    for name, flags in {
        "apart": [],
        "together": ["--window_scope", "campaign"],
        "again": ["--window", "manifest", "--window_manifest", str(tmp_path / "together")],
        "range": ["--window", "range", "--window_range", "0", "50000"],
    }.items():
        main(load(SliceConfig, [*arguments, "--output_dir", str(tmp_path / name), *flags]))
        windows[name] = [window_from(one["window"]) for one in read_manifest(tmp_path / name)["volumes"]]  # type: ignore[attr-defined]
    assert windows["apart"][0] != windows["apart"][1]
    assert windows["together"] == windows["again"]
    assert len(set(windows["together"])) == 1
    assert windows["range"] == [Window(low=0, high=50000)] * 2
    assert "slice" not in " ".join(load(SliceConfig, [*arguments, "--output_dir", "x"]).grey.__dataclass_fields__)


def test_p09_attenuation_of_thousandths(tmp_path: Path) -> None:
    volume = (VOLUME / 1.2e7).astype(np.float32)
    sliced(write(tmp_path / "dry.tif", volume), voxels=volume)
    with Image.open(next((tmp_path / "out" / "train").glob("*thickness*"))) as picture:
        assert np.asarray(picture).std() > 50


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4"])
def test_p10_signed_values(tmp_path: Path, dtype: str) -> None:
    volume = (VOLUME.astype(np.int64) % 250 - 125).astype(dtype)
    sliced(write(tmp_path / "dry.tif", volume), voxels=volume)


def test_p10_signed_16_bit_of_imagej_is_in_stored_values(tmp_path: Path) -> None:
    text = "ImageJ=1.53k\nimages=6\nslices=6\nc0=-32768.0\nc1=1.0\ncf=0\nvunit=gray value\n"
    path = pages(tmp_path / "dry.tif", [])
    with tifffile.TiffWriter(path) as file:
        for z, plane in enumerate(VOLUME):
            file.write(plane, photometric="minisblack", metadata=None, description=text if z == 0 else None)
    assert any("value = -32768.0 + 1.0 x stored" in note for note in sliced(path)["notes"])


@pytest.mark.parametrize("dtype", ["u1", "u4", "u8", "f2", "f4", "f8"])
def test_p11_types_of_real_numbers(tmp_path: Path, dtype: str) -> None:
    volume = (VOLUME // 256).astype(dtype)
    sliced(write(tmp_path / "dry.tif", volume), voxels=volume)


def test_p11_one_bit_looks_like_a_mask_and_complex_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = VOLUME > 30000
    sliced(write(tmp_path / "dry.tif", mask), voxels=mask)
    assert any("looks like a mask" in line for line in warnings_of(capsys))
    refused(
        write(tmp_path / "complex.tif", VOLUME.astype(np.complex64)), "complex64 are not grey levels", "--overwrite"
    )


@pytest.mark.parametrize("dtype", [">u2", ">i4", ">f4"])
@pytest.mark.parametrize("options", [{}, {"compression": "lzw"}])
def test_p12_big_endian(tmp_path: Path, dtype: str, options: dict[str, Any]) -> None:
    volume = VOLUME.astype(dtype)
    entry = sliced(write(tmp_path / "dry.tif", volume, byteorder=">", **options), voxels=VOLUME.astype(dtype[1:]))
    assert "big-endian" in entry["notes"]


def test_p13_low_values_are_white(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "dry.tif", photometric="miniswhite")
    window = sliced(path)["window"]
    assert window["low"] > window["high"]
    assert sum("low values are white; grey levels are turned round" in line for line in warnings_of(capsys)) == 1
    kept = sliced(path, "--invert", "no", "--overwrite")
    assert kept["window"]["low"] == window["high"]
    assert any("low values are white; they stay black (--invert no)" in line for line in warnings_of(capsys))
    assert len(kept["warnings"]) == 1


def test_p13_a_window_of_the_other_direction_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("black", "white"):
        (tmp_path / name).mkdir()
        sliced(write(tmp_path / name / "dry.tif", photometric=f"minis{name}"))
        (tmp_path / name / "out").rename(tmp_path / name / "earlier")
    capsys.readouterr()
    earlier = ["--window", "manifest", "--window_manifest"]
    sliced(tmp_path / "black" / "dry.tif", *earlier, str(tmp_path / "white" / "earlier"))
    assert any("--window_manifest turns grey levels round" in line for line in warnings_of(capsys))
    sliced(tmp_path / "white" / "dry.tif", *earlier, str(tmp_path / "black" / "earlier"))
    assert any("they stay black (--window manifest)" in line for line in warnings_of(capsys))


def test_p14_colour_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grey = (VOLUME // 256).astype(np.uint8)
    same = np.stack([grey] * 3, axis=-1)
    for name, volume, options in (
        ("rgb.tif", same, {}),
        ("rgba.tif", np.concatenate([same, same[..., :1] // 2], axis=-1), {"extrasamples": ["unassalpha"]}),
        ("planes.tif", np.moveaxis(same, -1, 1), {"planarconfig": "separate"}),
    ):
        sliced(write(tmp_path / name, volume, photometric="rgb", **options), "--overwrite", voxels=grey)
        assert any("taken as grey" in line for line in warnings_of(capsys))
    same[1, 5, 5, 2] ^= 1
    refused(write(tmp_path / "one.tif", same, photometric="rgb"), "plane 1 is coloured", "--overwrite")
    colours = {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}
    refused(write(tmp_path / "palette.tif", grey, **colours), "palette", "--overwrite")


def test_p14_a_colour_met_after_the_samples_is_refused_too(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 255, (60, 16, 16), dtype=np.uint8)
    volume = np.stack([grey] * 3, axis=-1)
    volume[8, 3, 3, 1] ^= 8
    path = write(tmp_path / "dry.tif", volume, photometric="rgb")
    open_volume(path)  # plane 8 is not among those compared
    refused(path, "plane 8 is coloured")


def test_p15_a_single_page(tmp_path: Path) -> None:
    refused(write(tmp_path / "dry.tif", VOLUME[0]), "one picture of 20x24, not a volume; python -m data_prep.images")


@pytest.mark.parametrize("options", [{}, {"imagej": True}, {"truncate": True}, {"bigtiff": True}])
@pytest.mark.parametrize("lost", [20, 500, 3000])
def test_p16_truncated_in_one_block(tmp_path: Path, options: dict[str, Any], lost: int) -> None:
    path = write(tmp_path / "dry.tif", metadata={"axes": "ZYX"}, **options)
    path.write_bytes(path.read_bytes()[:-lost])
    refused(path, "truncated")


def test_p17_truncated_between_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pages(tmp_path / "dry.tif")
    with tifffile.TiffFile(path) as file:
        fourth = file.pages[4].offset
    path.write_bytes(path.read_bytes()[: fourth + 10])
    refused(path, "truncated or damaged: directory 4 ends at byte")
    sliced(path, "--allow_truncated", voxels=VOLUME[:4])
    assert any("is cut off" in line and "4 whole planes" in line for line in warnings_of(capsys))


@pytest.mark.parametrize("options", [{"ome": True}, {"imagej": True}, {}])
def test_p17_fewer_pages_than_the_metadata_say(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write(tmp_path / "dry.tif", compression="deflate" if "imagej" not in options else None,
                 metadata={"axes": "ZYX"}, **options)  # fmt: skip
    with tifffile.TiffFile(path) as file:
        page = file.pages[3]
        next_at = page.offset + 2 + 12 * len(page.tags)
    with path.open("r+b") as raw:
        raw.seek(next_at)
        raw.write(struct.pack(f"{file.byteorder}I", 0))
    refused(path, "truncated|damaged")


def corrupt(path: Path, plane: int) -> None:
    with tifffile.TiffFile(path) as file:
        offset = file.pages[plane].dataoffsets[0]
    with path.open("r+b") as raw:
        raw.seek(offset + 8)
        raw.write(b"\xff" * 64)


def test_p18_a_strip_that_cannot_be_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "dry.tif", compression="deflate")
    corrupt(path, 2)
    refused(path, "plane 2 cannot be decoded .*--skip_bad_planes")
    entry = sliced(path, "--skip_bad_planes")
    assert entry["bad_planes"] == [2]
    rows = read_rows(tmp_path / "out" / "train")
    assert [row.index for row in rows] == [0, 1, 3, 4, 5]
    assert {row.axis for row in rows} == {"thickness"}
    assert any("1 planes cannot be decoded (2)" in line for line in warnings_of(capsys))


def test_p18_tiles_that_miss_the_bad_plane_are_kept(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).integers(0, 60000, (40, 20, 24), dtype=np.uint16)
    path = write(tmp_path / "dry.tif", volume, compression="deflate")
    corrupt(path, 38)
    flags = ["--skip_bad_planes", "--fit", "tile", "--tile_size", "16", "--tile_overlap", "0"]
    sliced(path, *flags, voxels=volume)
    rows = read_rows(tmp_path / "out" / "train")
    assert {row.axis for row in rows} == {"thickness", "warp", "weft"}
    assert not any(row.box[0] <= 38 < row.box[1] for row in rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, world", "is not a TIFF file.*--raw_shape"),
        (b"II*\0" + b"\x07" * 40, "damaged"),
        (b"\x89PNG\r\n\x1a\n", "PNG picture.*data_prep.images"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "HDF5"),
        (b"\0" * 128 + b"DICM" + b"\0" * 300, "DICOM.*TIFF"),
        (b"\0" * 344 + b"n+1\0", "NIfTI"),
        (b"PK\x03\x04", "zip archive.*unpack"),
        (b"\x1f\x8b\x08", "gzip archive.*unpack"),
    ],
)
def test_p19_not_a_tiff_at_all(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "dry.tif").write_bytes(content)
    refused(tmp_path / "dry.tif", message)


def test_p20_pages_of_several_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pages(tmp_path / "two.tif", [*VOLUME, *(VOLUME[:, :18] // 2)])
    refused(path, "differ in size or type .*6 of 20x24 uint16, 6 of 18x24 uint16.*--series")
    sliced(path, "--series", "1", voxels=VOLUME[:, :18] // 2)
    assert any("6 of 20x24 uint16 in the file are left out" in line for line in warnings_of(capsys))
    sliced(pages(tmp_path / "thumbnail.tif", [VOLUME[0, :10, :12], *VOLUME]), "--overwrite")
    assert any("1 of 10x12 uint16 in the file are left out" in line for line in warnings_of(capsys))


def test_p20_two_series(tmp_path: Path) -> None:
    path = tmp_path / "dry.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(VOLUME, photometric="minisblack")
        file.write(VOLUME[::-1], photometric="minisblack")
    refused(path, r"more than one volume \(6 of 20x24 uint16, 6 of 20x24 uint16\).*--series")
    sliced(path, "--series", "1", voxels=VOLUME[::-1])


@pytest.mark.parametrize("is_below", [True, False])
def test_p21_pyramids(tmp_path: Path, is_below: bool) -> None:
    path = tmp_path / "dry.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(VOLUME, subifds=1 if is_below else 0, photometric="minisblack", metadata={"axes": "ZYX"})
        file.write(VOLUME[:, ::2, ::2], subfiletype=1, photometric="minisblack", metadata={"axes": "ZYX"})
    sliced(path)
    sliced(path, "--level", "1", "--overwrite", voxels=VOLUME[:, ::2, ::2])
    refused_again = pytest.raises(InputError, match="--level 2: the file has 1 smaller copies")
    with refused_again:
        open_volume(path, ReadConfig(level=2))


def folder(path: Path, planes: Any = VOLUME) -> Path:
    path.mkdir()
    for z, plane in enumerate(planes):
        write(path / f"slice_{z + 7}.tif", plane)
    return path


def test_p22_a_folder_in_natural_order_and_complete(tmp_path: Path) -> None:
    path = folder(tmp_path / "dry")
    sliced(path)
    (path / "slice_9.tif").rename(tmp_path / "kept.tif")
    refused(path, r"slices 9 are missing before slice_10.tif", "--overwrite")
    write(path / "slice_9.tif", VOLUME[0, :7])
    refused(path, "slice_9.tif is 7x24", "--overwrite")
    (tmp_path / "kept.tif").rename(path / "slice_9.tif")
    write(path / "thumb_1.tif", VOLUME[0])
    refused(path, "several names .*6 like slice_.*1 like thumb_1.tif.*--pattern", "--overwrite")
    sliced(path, "--pattern", "slice_*", "--overwrite")


def test_p23_a_folder_whose_files_run_along_the_weft(tmp_path: Path) -> None:
    turned = np.moveaxis(VOLUME, 2, 0)  # each file shows thickness and warp
    path = folder(tmp_path / "dry", turned)
    sliced(path, "--thickness_axis", "y", "--warp_axis", "x", "--weft_axis", "z", voxels=turned)
    sizes = {row.axis: (row.height, row.width) for row in read_rows(tmp_path / "out" / "train")}
    assert sizes == {"thickness": (20, 24), "warp": (6, 24), "weft": (6, 20)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"imagej": True, "resolution": (5 / 2, 5 / 2), "metadata": {"spacing": 0.4, "unit": "um"}}, (0.4, 0.4, 0.4)),
        ({"imagej": True, "resolution": (2, 2), "metadata": {"spacing": 0.5, "unit": "micron"}}, (0.5, 0.5, 0.5)),
        ({"imagej": True, "resolution": (2, 2), "metadata": {"spacing": 0.5, "unit": "\\u00B5m"}}, (0.5, 0.5, 0.5)),
        ({"imagej": True, "resolution": (1000, 1000), "metadata": {"spacing": 0.001, "unit": "inch"}}, (25.4,) * 3),
        ({"imagej": True, "resolution": (1, 1), "metadata": {"spacing": 1, "unit": "pixel"}}, None),
        ({"resolution": (1, 1)}, None),
    ],
)
def test_p24_voxel_size(tmp_path: Path, options: dict[str, Any], expected: tuple[float, ...] | None) -> None:
    options["metadata"] = {"axes": "ZYX"} | options.get("metadata", {})
    path = write(tmp_path / "dry.tif", **options)
    assert sliced(path)["voxel_um"] == (None if expected is None else pytest.approx(expected, rel=1e-4))
    assert sliced(path, "--voxel_size_um", "7", "--overwrite")["voxel_um"] == [7, 7, 7]
    assert {row.um_per_px for row in read_rows(tmp_path / "out" / "train")} == {(7, 7)}


def test_p24_voxels_that_are_not_cubes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = {"axes": "ZYX", "spacing": 2.0, "unit": "um"}
    path = write(tmp_path / "dry.tif", imagej=True, resolution=(1, 1), metadata=metadata)
    sliced(path)
    assert any("voxels are not cubes, 2 x 1 x 1 um (z y x)" in line for line in warnings_of(capsys))
    main(config(path, "--fit", "resize", "--resize_um_per_px", "1", "--overwrite"))
    rows = read_rows(tmp_path / "out" / "train")
    assert {row.um_per_px for row in rows} == {(1, 1)}
    assert {(row.height, row.width) for row in rows if row.axis == "warp"} == {(12, 24)}


@pytest.mark.parametrize("said_by", ["header", "flag"])
def test_p24_voxels_that_are_not_cubes_whoever_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], said_by: str
) -> None:
    (tmp_path / "dry.raw").write_bytes(VOLUME.tobytes())
    spacing = "ElementSpacing = 0.001 0.001 0.002\n" if said_by == "header" else ""
    header = f"DimSize = 24 20 6\nElementType = MET_USHORT\n{spacing}ElementDataFile = dry.raw\n"
    (tmp_path / "dry.mhd").write_text(header, encoding="utf-8")
    typed = [] if said_by == "header" else ["--voxel_size_um", "2", "1", "1"]
    entry = sliced(tmp_path / "dry.mhd", *typed)
    assert any("voxels are not cubes, 2 x 1 x 1 um (z y x)" in line for line in warnings_of(capsys))
    assert "not cubes" in entry["warnings"][0]
    sliced(tmp_path / "dry.mhd", "--voxel_size_um", "1", "--overwrite")
    assert not warnings_of(capsys)


def test_p25_rings_are_left_in_and_documented(tmp_path: Path) -> None:
    y, x = np.ogrid[-10:10, -12:12]
    volume = (VOLUME // 2 + (np.hypot(y, x).astype(int) % 3 * 9000)).astype(np.uint16)
    sliced(write(tmp_path / "dry.tif", volume), voxels=volume)
    assert "| P25 | Ring artefacts" in (ROOT / "docs" / "volumes.md").read_text(encoding="utf-8")


def test_p26_16_bit_pictures(tmp_path: Path) -> None:
    sliced(write(tmp_path / "dry.tif"))
    assert verify(tmp_path / "out").problems == ()
    name = tmp_path / "out" / "train" / read_rows(tmp_path / "out" / "train")[0].file_name
    Image.fromarray(VOLUME[0]).save(name)
    assert any("16" in problem for problem in verify(tmp_path / "out").problems)


def test_p27_pictures_too_large_for_loaders(tmp_path: Path) -> None:
    path = tmp_path / "dry.tif"
    tifffile.imwrite(path, shape=(2, 9500, 9500), dtype=np.uint8, photometric="minisblack")
    with path.open("r+b") as raw:
        raw.seek(-1000, 2)
        raw.write(bytes(range(250)))
    with pytest.raises(UsageError, match=r"of 9500x9500 are too large for loaders; use --fit tile"):
        main(config(path, "--window", "range", "--window_range", "0", "255"))
    sources = (source for package in ("data_prep", "eval", "finetune") for source in (ROOT / package).rglob("*.py"))
    assert not [source for source in sources if "MAX_IMAGE_PIXELS" in source.read_text(encoding="utf-8")]


def test_p28_a_crash_leaves_nothing_and_a_full_folder_is_kept(tmp_path: Path) -> None:
    planes = np.concatenate([VOLUME] * 30)  # more than the planes sampled for the window
    path = write(tmp_path / "dry.tif", planes, compression="deflate")
    corrupt(path, 3)
    refused(path, "plane 3 cannot be decoded")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="already holds files"):
        main(config(write(tmp_path / "dry.tif")))
    assert (tmp_path / "out" / "mine.txt").read_text() == "x"


def test_p29_flips_are_off_unless_asked_for() -> None:
    help_page = subprocess.run(
        [sys.executable, "finetune/lora.py", "--pretrained_model_name_or_path", "a", "--train_data_dir", "b",
         "--output_dir", "c", "--print_config"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "random_flip: false" in help_page.stdout
    presets = [*(ROOT / "configs").glob("*.yaml")]
    assert presets
    assert not [preset for preset in presets if re.search(r"random_flip: *(true|yes|on)", preset.read_text())]


def test_p30_two_volumes_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    paths = [write(tmp_path / "scan.tif"), write(tmp_path / "b" / "scan.tif", VOLUME // 2)]
    out = ["--output_dir", str(tmp_path / "out"), "--split", "none"]
    with pytest.raises(UsageError, match="would both be called 'dry-scan'"):
        main(load(SliceConfig, ["--volumes", *(f"dry={path}" for path in paths), *out]))
    main(load(SliceConfig, ["--volumes", f"dry={paths[0]}", f"injected={paths[1]}", *out]))
    names = [row.file_name for row in read_rows(tmp_path / "out" / "train")]
    assert len(names) == len(set(names)) == 2 * sum(SHAPE)


def test_every_row_of_the_page_has_a_test() -> None:
    rows = set(re.findall(r"^\| P(\d+) \|", (ROOT / "docs" / "volumes.md").read_text(encoding="utf-8"), re.MULTILINE))
    tests = set(re.findall(r"^def test_p(\d\d)_", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE))
    assert {int(row) for row in rows} == {int(test) for test in tests} == set(range(1, 31))
