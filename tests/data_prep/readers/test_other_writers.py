"""Files that other programs wrote (libtiff's tiffcp, ImageMagick, SimpleITK, OpenCV, Pillow): the same slices of all.

Pillow is always there. The others are used where they are installed: ``tiffcp`` and ImageMagick on the path, SimpleITK
and cv2 as packages.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from data_prep.folders.window import Window
from data_prep.readers.open import open_volume
from data_prep.slicing.planes import scan

SHAPE = (6, 40, 56)
VOLUME = np.random.default_rng(3).integers(0, 65535, SHAPE, dtype=np.uint16)
WINDOW = Window(low=0, high=65535)


def check(path: Path, volume: NDArray[Any] = VOLUME) -> None:
    """Hold the slices of all three directions to direct indexing."""
    source = open_volume(path)
    assert (source.info.shape, source.info.dtype) == (volume.shape, volume.dtype.name)
    wanted = {axis: range(size) for axis, size in enumerate(SHAPE)}
    grey = WINDOW.to_uint8(volume)
    seen = 0
    for axis, index, picture in scan(source, lambda _, plane: WINDOW.to_uint8(plane), wanted, 10_000_000):
        assert np.array_equal(picture, grey.take(index, axis))
        seen += 1
    assert seen == sum(SHAPE)


def program(*names: str, says: str) -> str:
    """Return the first of some programs that is there and is what its name promises, or skip."""
    for name in names:
        if path := shutil.which(name):
            said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
            if says in said.stdout + said.stderr:
                return path
    package = "libtiff-tools" if "tiffcp" in names else "imagemagick"
    pytest.skip(f"{' or '.join(names)} is not installed; it is no Python package (apt install {package})")


def package(name: str) -> Any:
    """Return a package, or skip."""
    return pytest.importorskip(name)


def source_of(folder: Path, volume: NDArray[Any] = VOLUME) -> Path:
    path = folder / "source.tif"
    with tifffile.TiffWriter(path) as file:
        for plane in volume:
            file.write(plane, contiguous=False, photometric="minisblack", metadata=None)
    return path


@pytest.mark.parametrize(
    "options",
    [
        ["-t", "-w", "16", "-l", "16"],
        ["-t", "-w", "32", "-l", "16", "-c", "zip:2"],
        ["-c", "lzw"],
        ["-c", "lzw:2", "-s", "-r", "7"],
        ["-c", "zip"],
        ["-c", "packbits"],
        ["-c", "none", "-s", "-r", "3"],
        ["-8"],
        ["-B"],
        ["-B", "-8", "-c", "lzw:2", "-t", "-w", "16", "-l", "16"],
    ],
    ids=" ".join,
)
def test_tiffcp(tmp_path: Path, options: list[str]) -> None:
    tiffcp = program("tiffcp", says="LIBTIFF")
    subprocess.run([tiffcp, *options, source_of(tmp_path), tmp_path / "out.tif"], check=True, capture_output=True)
    check(tmp_path / "out.tif")


def test_tiffcp_of_floats(tmp_path: Path) -> None:
    tiffcp = program("tiffcp", says="LIBTIFF")
    volume = VOLUME.astype(np.float32)
    source = source_of(tmp_path, volume)
    subprocess.run([tiffcp, "-c", "zip:3", source, tmp_path / "out.tif"], check=True, capture_output=True)
    check(tmp_path / "out.tif", volume)


@pytest.mark.parametrize(
    "options",
    [
        ["-compress", "None"],
        ["-compress", "LZW"],
        ["-compress", "Zip"],
        ["-compress", "None", "-endian", "MSB"],
        ["-compress", "Zip", "-define", "tiff:tile-geometry=32x32"],
    ],
    ids=" ".join,
)
def test_imagemagick(tmp_path: Path, options: list[str]) -> None:
    convert = program("magick", "convert-im6.q16", "convert", says="Version: ImageMagick")
    subprocess.run([convert, source_of(tmp_path), *options, tmp_path / "out.tif"], check=True, capture_output=True)
    check(tmp_path / "out.tif")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize(("name", "is_packed"), [("a.tif", False), ("a.tif", True), ("a.mhd", False), ("a.mha", False)])
def test_simpleitk(tmp_path: Path, dtype: str, name: str, is_packed: bool) -> None:
    sitk = package("SimpleITK")
    volume = (VOLUME // (256 if dtype == "uint8" else 2)).astype(dtype)
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing((0.002, 0.004, 0.003))
    sitk.WriteImage(image, str(tmp_path / name), useCompression=is_packed)
    check(tmp_path / name, volume)
    if name != "a.tif":
        assert open_volume(tmp_path / name).info.voxel_um == pytest.approx((3, 4, 2))


@pytest.mark.parametrize("compression", [1, 5, 8, 32773])
def test_opencv(tmp_path: Path, compression: int) -> None:
    cv2 = package("cv2")
    flags = [cv2.IMWRITE_TIFF_COMPRESSION, compression]
    assert cv2.imwritemulti(str(tmp_path / "out.tif"), list(VOLUME), flags)
    check(tmp_path / "out.tif")


def test_opencv_in_a_folder(tmp_path: Path) -> None:
    cv2 = package("cv2")
    for z, plane in enumerate(VOLUME):
        cv2.imwrite(str(tmp_path / f"slice{z + 1}.tiff"), plane)
    check(tmp_path)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_pillow(tmp_path: Path, compression: str | None, dtype: str) -> None:
    volume = (VOLUME // (256 if dtype == "uint8" else 1)).astype(dtype)
    first, *others = [Image.fromarray(plane) for plane in volume]
    first.save(tmp_path / "out.tif", save_all=True, append_images=others, compression=compression)
    check(tmp_path / "out.tif", volume)
