"""A folder of slices: in the order of its numbers, whole, and of one kind, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from configs.errors import InputError
from data_prep.readers.info import ReadConfig
from data_prep.readers.open import open_volume
from data_prep.readers.places import sha256_of

VOLUME = np.random.default_rng(3).integers(0, 60000, (12, 20, 24), dtype=np.uint16)


def write(folder: Path, name: str = "recon_{}.tif", first: int = 0, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for z, plane in enumerate(VOLUME, start=first):
        tifffile.imwrite(folder / name.format(z), plane, photometric="minisblack", **options)
    return folder


def planes_of(folder: Path, **settings: Any) -> np.ndarray:
    source = open_volume(folder, ReadConfig(**settings))
    return np.array([plane for _, plane in source.planes(range(source.info.shape[0]))])


@pytest.mark.parametrize("name", ["recon_{}.tif", "recon_{:05d}.tif", "{}.TIFF", "scan_2024-01-31_16bit_z{}.tif"])
@pytest.mark.parametrize("first", [0, 1, 995])
def test_slices_come_in_the_order_of_their_numbers(tmp_path: Path, name: str, first: int) -> None:
    assert np.array_equal(planes_of(write(tmp_path / "scan", name, first)), VOLUME)


@pytest.mark.parametrize(
    "options", [{"compression": "lzw"}, {"compression": "deflate", "predictor": True}, {"tile": (16, 16)},
                {"byteorder": ">"}, {"bigtiff": True}, {"rowsperstrip": 3}]
)  # fmt: skip
def test_each_file_may_be_stored_in_any_way(tmp_path: Path, options: dict[str, Any]) -> None:
    assert np.array_equal(planes_of(write(tmp_path / "scan", **options)), VOLUME)


def test_other_files_beside_the_slices_do_not_matter(tmp_path: Path) -> None:
    folder = write(tmp_path / "scan")
    for name in ("scan.log", "settings.json", ".hidden_3.tif"):
        (folder / name).write_text("x")
    (folder / "thumbs").mkdir()
    assert np.array_equal(planes_of(folder), VOLUME)


def test_the_hash_is_that_of_the_listing(tmp_path: Path) -> None:
    import subprocess

    folder = write(tmp_path / "scan", "recon_{:03d}.tif")
    info = open_volume(folder).info
    listing = subprocess.run(
        "sha256sum * | sha256sum", shell=True, cwd=folder, capture_output=True, text=True, check=True
    )
    assert sha256_of(info.path, info.files) == listing.stdout.split()[0]


def remove(folder: Path) -> None:
    (folder / "recon_7.tif").unlink()


def remove_two(folder: Path) -> None:
    (folder / "recon_7.tif").unlink()
    (folder / "recon_8.tif").unlink()


def twice(folder: Path) -> None:
    (folder / "recon_07.tif").write_bytes((folder / "recon_7.tif").read_bytes())


def other_size(folder: Path) -> None:
    tifffile.imwrite(folder / "recon_7.tif", VOLUME[7, :10], photometric="minisblack")


def other_type(folder: Path) -> None:
    tifffile.imwrite(folder / "recon_7.tif", VOLUME[7].astype(np.float32), photometric="minisblack")


def other_prefix(folder: Path) -> None:
    tifffile.imwrite(folder / "thumb_1.tif", VOLUME[7, :10], photometric="minisblack")


def cut(folder: Path) -> None:
    path = folder / "recon_7.tif"
    path.write_bytes(path.read_bytes()[:-5])


def two_pages(folder: Path) -> None:
    tifffile.imwrite(folder / "recon_7.tif", VOLUME[:2], photometric="minisblack")


def coloured(folder: Path) -> None:
    for path in folder.iterdir():
        tifffile.imwrite(path, np.zeros((20, 24, 3), np.uint8), photometric="rgb")


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def pictures(folder: Path) -> None:
    empty(folder)
    (folder / "a.png").write_bytes(b"")


def two_numbers(folder: Path) -> None:
    for z in range(12):
        (folder / f"recon_{z}.tif").rename(folder / f"t{z % 2}_z{z // 2}.tif")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "slices 7 are missing before recon_8.tif"),
        (remove_two, "slices 7 to 8 are missing before recon_9.tif"),
        (twice, "two files have the number 7"),
        (other_size, r"recon_7.tif is 10x24 uint16.*recon_0.tif is 20x24|recon_0.tif is 20x24.*recon_7.tif is 10x24"),
        (other_type, "recon_7.tif is 20x24 float32"),
        (other_prefix, "several names .*like recon_.*1 like thumb_1.tif"),
        (cut, r"recon_7.tif: is truncated.*slice 8 of 12"),
        (two_pages, "recon_7.tif: holds 2 pages"),
        (coloured, "colour"),
        (empty, "no TIFF files"),
        (pictures, "data_prep.images"),
        (two_numbers, "2 numbers change"),
    ],
)
def test_what_is_no_whole_volume_is_refused_by_name(tmp_path: Path, damage: Any, message: str) -> None:
    folder = write(tmp_path / "scan")
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        open_volume(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pattern_chooses_among_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "scan")
    other_prefix(folder)
    assert np.array_equal(planes_of(folder, pattern="recon_*.tif"), VOLUME)
    with pytest.raises(InputError, match="--pattern slice"):
        open_volume(folder, ReadConfig(pattern="slice*"))


@pytest.mark.parametrize("options", [{}, {"compression": "deflate"}])
def test_bad_files_are_named_and_handed_out_as_zeros_on_request(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = write(tmp_path / "scan", **options)
    cut(folder)
    source = open_volume(folder, ReadConfig(skip_bad_planes=True))
    assert source.info.bad_planes == (7,)
    assert "1 planes cannot be decoded (7)" in source.info.warnings[0]
    planes = dict(source.planes(range(12)))
    assert not planes[7].any()
    assert all(np.array_equal(planes[z], VOLUME[z]) for z in range(12) if z != 7)
