"""Damaged and unsuitable files: a reader hands out the whole volume or refuses in one line, never a shorter one."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from configs.errors import InputError
from data_prep.readers.open import open_volume

VOLUME = np.random.default_rng(3).integers(0, 60000, (6, 20, 24), dtype=np.uint16)


def write_pages(path: Path, planes: list[Any]) -> None:
    with tifffile.TiffWriter(path) as file:
        for plane in planes:
            file.write(plane, contiguous=False, photometric="minisblack", metadata=None)


WRITERS: dict[str, Callable[[Path], None]] = {
    "one block": lambda path: tifffile.imwrite(path, VOLUME, photometric="minisblack"),
    "one directory": lambda path: tifffile.imwrite(path, VOLUME, photometric="minisblack", truncate=True),
    "pages": lambda path: write_pages(path, list(VOLUME)),
    "deflate": lambda path: tifffile.imwrite(path, VOLUME, photometric="minisblack", compression="deflate"),
    "ome": lambda path: tifffile.imwrite(path, VOLUME, ome=True, photometric="minisblack", metadata={"axes": "ZYX"}),
    "imagej": lambda path: tifffile.imwrite(path, VOLUME, imagej=True, metadata={"axes": "ZYX"}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_cut_file_gives_the_whole_volume_or_a_refusal(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / "whole.tif")
    data, cut = (tmp_path / "whole.tif").read_bytes(), tmp_path / "cut.tif"
    refused = 0
    for size in [*range(0, len(data), 211), len(data) - 1]:
        cut.write_bytes(data[:size])
        try:
            source = open_volume(cut)
            planes = [plane for _, plane in source.planes(range(source.info.shape[0]))]
        except InputError:
            refused += 1
        else:
            assert np.array_equal(planes, VOLUME)
    assert refused > 0.8 * len(data) / 211


@pytest.mark.parametrize("kind", ["one block", "pages", "deflate"])
def test_a_truncated_file_is_called_truncated(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="truncated"):
        open_volume(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["one directory", "pages", "deflate"])
def test_the_last_bytes_are_missed_before_anything_is_read(tmp_path: Path, kind: str) -> None:
    # Nothing in the structure of such a file is damaged: only the sizes tell.
    WRITERS[kind](tmp_path / "a.tif")
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:-10])
    with pytest.raises(InputError, match=r"is truncated: (plane 5 ends at byte|.* bytes are declared)"):
        open_volume(tmp_path / "a.tif")


def test_a_corrupt_plane_is_named(tmp_path: Path) -> None:
    WRITERS["deflate"](tmp_path / "a.tif")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        offset = file.pages[2].dataoffsets[0]
    with (tmp_path / "a.tif").open("r+b") as raw:
        raw.seek(offset + 8)
        raw.write(b"\xff" * 64)
    source = open_volume(tmp_path / "a.tif")
    with pytest.raises(InputError, match="plane 2 cannot be decoded"):
        list(source.planes(range(6)))


def test_a_plane_that_lost_its_bytes_while_read_is_named(tmp_path: Path) -> None:
    WRITERS["one block"](tmp_path / "a.tif")
    source = open_volume(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[:3000])
    with pytest.raises(InputError, match="plane 3 ends early"):
        list(source.planes([0, 3]))


UNSUITABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "RGB pages": (
        lambda path: tifffile.imwrite(path, VOLUME[:5, ..., None].astype(np.uint8) + np.arange(3, dtype=np.uint8)),
        "colour pictures .*plane 0 is coloured",
    ),
    "three planes taken for one RGB page": (
        lambda path: tifffile.imwrite(path, np.zeros((3, 20, 24), np.uint8), photometric="rgb"),
        "colour pictures",
    ),
    "palette": (
        lambda path: tifffile.imwrite(
            path, np.zeros((4, 20, 24), np.uint8), photometric="palette", colormap=np.zeros((3, 256), np.uint16)
        ),
        "palette",
    ),
    "one page": (lambda path: tifffile.imwrite(path, VOLUME[0]), "one picture of 20x24"),
    "last axis of one voxel": (
        lambda path: tifffile.imwrite(path, np.zeros((20, 70, 1), np.uint16)),
        r"the last axis has one voxel \(20x70x1\)",
    ),
    "two sizes": (lambda path: write_pages(path, [*VOLUME[:3], *VOLUME[:2, :10]]), "differ in size or type"),
    "two types": (lambda path: write_pages(path, [*VOLUME[:3], VOLUME[3].astype(np.uint8)]), "differ in size or type"),
    "time series": (
        lambda path: tifffile.imwrite(
            path, VOLUME.reshape(2, 3, 20, 24), photometric="minisblack", metadata={"axes": "TZYX"}
        ),
        "more than one volume",
    ),
    "complex": (
        lambda path: tifffile.imwrite(path, VOLUME.astype(np.complex64), photometric="minisblack"),
        "not grey levels",
    ),
    "not a TIFF": (lambda path: path.write_bytes(b"hello, world"), "is not a TIFF file"),
    "PNG": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "PNG picture, not a TIFF"),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "HDF5"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "garbage after the magic": (lambda path: path.write_bytes(b"II*\0" + b"\x07" * 40), "directory 0 would lie at"),
    "missing": (lambda path: None, "no such file"),
    "folder": (lambda path: path.mkdir(), "holds no TIFF files"),
}


@pytest.mark.parametrize("case", UNSUITABLE)
def test_an_unsuitable_file_is_refused_in_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    write, message = UNSUITABLE[case]
    path = tmp_path / "scan.tif"
    write(path)
    with pytest.raises(InputError, match=message) as caught:
        open_volume(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_volume_spread_over_files_is_refused(tmp_path: Path) -> None:
    names = [f"urn:uuid:{number:08d}-0000-0000-0000-000000000000" for number in range(2)]
    parts = [f'<TiffData FirstZ="{z}"><UUID FileName="{z}.ome.tif">{names[z]}</UUID></TiffData>' for z in (0, 1)]
    pixels = '<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" '
    pixels += 'SizeX="24" SizeY="20" SizeZ="2" SizeC="1" SizeT="1">'
    for z, name in enumerate(names):
        ome = f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{name}"><Image ID="Image:0">'
        text = f"{ome}{pixels}{''.join(parts)}</Pixels></Image></OME>"
        path = tmp_path / f"{z}.ome.tif"
        tifffile.imwrite(path, VOLUME[z], photometric="minisblack", metadata=None, description=text)
    with pytest.raises(InputError, match="one of several files"):
        open_volume(tmp_path / "0.ome.tif")


def test_a_claimed_size_costs_no_memory(tmp_path: Path) -> None:
    WRITERS["one block"](tmp_path / "a.tif")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        tag = file.pages.first.tags["ImageLength"]
        where, size = tag.valueoffset, struct.calcsize(file.byteorder + "H")
    with (tmp_path / "a.tif").open("r+b") as raw:
        raw.seek(where)
        raw.write(b"\xff" * size)
    with pytest.raises(InputError):
        open_volume(tmp_path / "a.tif")


def test_tifffile_writes_nothing_to_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    WRITERS["pages"](tmp_path / "a.tif")
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:4000])
    with pytest.raises(InputError):
        open_volume(tmp_path / "a.tif")
    assert capfd.readouterr() == ("", "")


def imagej(spacing: float, unit: str, resolution: tuple[float, float]) -> dict[str, Any]:
    metadata = {"axes": "ZYX", "spacing": spacing, "unit": unit}
    return {"imagej": True, "metadata": metadata, "resolution": resolution}


OME = {"axes": "ZYX", "PhysicalSizeZ": 3.0, "PhysicalSizeY": 4.0, "PhysicalSizeX": 2.0}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (imagej(3.0, "um", (0.5, 0.25)), (3, 4, 2)),
        (imagej(0.02, "mm", (50, 50)), (20, 20, 20)),
        (imagej(3.0, "pixel", (1, 1)), None),
        ({"metadata": {"axes": "ZYX", "spacing": 5.0, "unit": "um"}, "resolution": (0.2, 0.2)}, (5, 5, 5)),
        (
            {"metadata": {"axes": "ZYX", "spacing": 20.0, "unit": "um"}, "resolution": (500, 500), "resolutionunit": 3},
            (20, 20, 20),
        ),
        ({"ome": True, "metadata": OME}, (3, 4, 2)),
        ({"resolution": (72, 72), "resolutionunit": "inch"}, None),
        ({}, None),
    ],
)
def test_the_voxel_size_is_read_or_unknown(
    tmp_path: Path, options: dict[str, Any], expected: tuple[float, ...] | None
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", VOLUME, **({} if "imagej" in options else {"photometric": 1}), **options)
    # Resolutions are stored as fractions of 32 bit integers.
    assert open_volume(tmp_path / "a.tif").info.voxel_um == (expected and pytest.approx(expected, rel=1e-6))


def test_low_values_declared_white_are_reported(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", VOLUME, photometric="miniswhite")
    info = open_volume(tmp_path / "a.tif").info
    assert info.is_inverted
    assert any("low values are white" in note for note in info.notes)


def test_imagej_beyond_four_gigabytes_is_read_to_its_last_plane(tmp_path: Path) -> None:
    """One directory, and voxels far beyond what its 32 bit offsets reach, as Fiji writes; the file is sparse."""
    path, (planes, rows, columns) = tmp_path / "scan.tif", (2300, 1000, 1000)
    text = f"ImageJ=1.53t\nimages={planes}\nslices={planes}\nunit=um\nspacing=5.0\nloop=false\n".encode() + b"\0"
    size = rows * columns * 2
    entries = [(256, 4, 1, columns), (257, 4, 1, rows), (258, 3, 1, 16 << 16), (262, 3, 1, 1 << 16)]
    entries += [(270, 2, len(text), 200), (273, 4, 1, 400), (277, 3, 1, 1 << 16), (278, 4, 1, rows), (279, 4, 1, size)]
    head = struct.pack(">2sHIH", b"MM", 42, 8, len(entries))
    head += b"".join(struct.pack(">HHII", *entry) for entry in entries) + bytes(4)
    last = np.arange(rows * columns, dtype=">u2").reshape(rows, columns)
    with path.open("wb") as file:
        file.write(head.ljust(200, b"\0") + text)
        file.seek(400 + (planes - 1) * size)
        file.write(last.tobytes())
    assert path.stat().st_size > 2**32
    source = open_volume(path)
    assert source.info.shape == (planes, rows, columns)
    ((_, first), (_, end)) = source.planes([0, planes - 1])
    assert not first.any()
    assert np.array_equal(end, last)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(InputError, match=r"is truncated"):
        open_volume(path)
