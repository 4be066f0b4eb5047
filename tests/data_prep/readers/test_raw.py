"""Raw voxels: what a header or the command line says must fit the bytes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import InputError
from data_prep.readers.info import ReadConfig
from data_prep.readers.open import open_volume

VOLUME = np.random.default_rng(3).integers(0, 60000, (6, 20, 24), dtype=np.uint16)
META = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "ElementSpacing": "0.002 0.004 0.003",
    "DimSize": "24 20 6",
    "ElementType": "MET_USHORT",
    "ElementDataFile": "scan.raw",
}
VGI = """{volume1}
[representation]
size = 24 20 6
datatype = unsigned integer
bitsperelement = 16
[file1]
FileFormat = raw
Size = 24 20 6
Name = scan.vol
Datatype = unsigned integer
bitsperelement = 16
SkipHeader = 0
{volumeprimitive12}
[geometry]
resolution = 0.002 0.004 0.003
unit = mm
"""
NIKON = """[XTekCT]
Name=scan
VoxelsX=24
VoxelsY=20
VoxelsZ=6
VoxelSizeX=0.002
VoxelSizeY=0.004
VoxelSizeZ=0.003
"""
ASKED = {"raw_shape": (6, 20, 24), "raw_dtype": "uint16"}


def meta(folder: Path, data: bytes = VOLUME.tobytes(), **changes: str | None) -> Path:
    said = {key: value for key, value in (META | changes).items() if value is not None}
    said |= {"ElementDataFile": said.pop("ElementDataFile")}  # always the last line
    header = "".join(f"{key} = {value}\n" for key, value in said.items()).encode()
    if said["ElementDataFile"] == "LOCAL":
        (folder / "scan.mha").write_bytes(header + data)
        return folder / "scan.mha"
    (folder / "scan.raw").write_bytes(data)
    (folder / "scan.mhd").write_bytes(header)
    return folder / "scan.mhd"


def planes_of(path: Path, **settings: Any) -> np.ndarray:
    source = open_volume(path, ReadConfig(**settings))
    return np.array([plane for _, plane in source.planes(range(source.info.shape[0]))])


def test_a_raw_file_is_what_the_command_line_says(tmp_path: Path) -> None:
    path = tmp_path / "scan.raw"
    path.write_bytes(VOLUME.tobytes())
    assert np.array_equal(planes_of(path, **ASKED), VOLUME)
    path.write_bytes(b"x" * 100 + VOLUME.astype(">u2").tobytes())
    assert np.array_equal(planes_of(path, **ASKED, raw_offset=100, raw_byteorder="big"), VOLUME)


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint32", "float16", "float32", "float64"])
def test_every_type_comes_back(tmp_path: Path, dtype: str) -> None:
    (tmp_path / "scan.raw").write_bytes((VOLUME // 500).astype(dtype).tobytes())
    found = planes_of(tmp_path / "scan.raw", raw_shape=(6, 20, 24), raw_dtype=dtype)
    assert found.dtype == dtype
    assert np.array_equal(found, (VOLUME // 500).astype(dtype))


def test_a_raw_file_alone_is_refused_with_what_its_name_suggests(tmp_path: Path) -> None:
    (tmp_path / "scan_24x20x6_16bit.raw").write_bytes(VOLUME.tobytes())
    with pytest.raises(InputError, match=r"would fit --raw_shape 6 20 24 --raw_dtype uint16"):
        open_volume(tmp_path / "scan_24x20x6_16bit.raw")
    (tmp_path / "scan.raw").write_bytes(VOLUME.tobytes())
    with pytest.raises(InputError, match=r"give --raw_shape \(z y x\) and --raw_dtype"):
        open_volume(tmp_path / "scan.raw")


@pytest.mark.parametrize("size", [-1, 1, -960])
def test_a_raw_file_of_another_size_is_refused_with_the_numbers(tmp_path: Path, size: int) -> None:
    data = VOLUME.tobytes()
    (tmp_path / "scan.raw").write_bytes(data[:size] if size < 0 else data + b"x")
    with pytest.raises(InputError, match=rf"6x20x24 uint16 voxels after byte 0, 5760 bytes, .* has {5760 + size}"):
        open_volume(tmp_path / "scan.raw", ReadConfig(**ASKED))  # type: ignore[arg-type]  # literals


def test_whole_planes_of_a_cut_file_are_taken_on_request(tmp_path: Path) -> None:
    (tmp_path / "scan.raw").write_bytes(VOLUME.tobytes()[:-100])
    source = open_volume(tmp_path / "scan.raw", ReadConfig(**ASKED, allow_truncated=True))  # type: ignore[arg-type]
    assert source.info.shape == (5, 20, 24)
    assert "5 whole planes" in source.info.warnings[0]
    assert np.array_equal([plane for _, plane in source.planes(range(5))], VOLUME[:5])


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (VOLUME.tobytes(), {}),
        (VOLUME.tobytes(), {"ElementDataFile": "LOCAL"}),
        (VOLUME.astype(">u2").tobytes(), {"BinaryDataByteOrderMSB": None, "ElementByteOrderMSB": "True"}),
        (VOLUME.astype("f4").tobytes(), {"ElementType": "MET_FLOAT"}),
        (b"x" * 50 + VOLUME.tobytes(), {"HeaderSize": "50"}),
        (b"x" * 50 + VOLUME.tobytes(), {"HeaderSize": "-1"}),
    ],
)
def test_a_metaimage_is_read(tmp_path: Path, data: bytes, changes: dict[str, str | None]) -> None:
    path = meta(tmp_path, data, **changes)
    assert np.array_equal(planes_of(path), VOLUME)
    assert open_volume(path).info.voxel_um == pytest.approx((3, 4, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"DimSize": "24 20 7"}, "is truncated: the header asks for 7x20x24"),
        ({"DimSize": "24 20 5"}, "the header asks for 5x20x24"),
        ({"DimSize": "24 20"}, "gives 2 numbers for 3"),
        ({"DimSize": "24 20 -6"}, "is empty"),
        ({"DimSize": None}, "lacks 'DimSize'"),
        ({"ElementType": "MET_SHOE"}, "ElementType = MET_SHOE"),
        ({"ElementDataFile": "other.raw"}, "other.raw: there is no such file"),
        ({"ElementDataFile": "../scan.raw"}, "outside its folder"),
        ({"ElementDataFile": "scan%03d.raw 1 6"}, "a list of files"),
        ({"CompressedData": "True"}, "uncompressed"),
        ({"CompressedData": "Falsd"}, "True or False"),
        ({"ElementNumberOfChannels": "3"}, "no grey volume"),
        ({"BinaryDataByteOrderMSB": "True", "ElementByteOrderMSB": "False"}, "two byte orders"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, str | None], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_volume(meta(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_lines_that_other_readers_leave_out_are_refused(tmp_path: Path) -> None:
    path = meta(tmp_path)
    path.write_text(path.read_text() + "BinaryDataByteOrderMSB = True\n")
    with pytest.raises(InputError, match="lines after ElementDataFile"):
        open_volume(path)


def test_a_header_without_its_last_line_is_refused(tmp_path: Path) -> None:
    path = meta(tmp_path)
    path.write_text(path.read_text().partition("ElementDataFile")[0])
    with pytest.raises(InputError, match="lacks 'ElementDataFile'"):
        open_volume(path)


@pytest.mark.parametrize(("name", "text"), [("scan.vgi", VGI), ("scan.xtekct", NIKON)])
def test_headers_of_scanners_are_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / "scan.vol").write_bytes(VOLUME.tobytes())
    assert np.array_equal(planes_of(tmp_path / name), VOLUME)
    assert open_volume(tmp_path / name).info.voxel_um == pytest.approx((3, 4, 2))
    (tmp_path / "scan.vol").write_bytes(VOLUME.tobytes()[:-1])
    with pytest.raises(InputError, match=r"is truncated|holds neither"):
        open_volume(tmp_path / name)
