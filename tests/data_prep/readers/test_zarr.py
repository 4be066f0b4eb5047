"""Zarr and OME-Zarr: the array asked for, at the level asked for, with its voxel size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import InputError
from data_prep.readers.info import ReadConfig
from data_prep.readers.open import open_volume

zarr = pytest.importorskip("zarr")

VOLUME = np.random.default_rng(3).integers(0, 60000, (12, 20, 24), dtype=np.uint16)


def write(path: Path, zarr_format: int = 3, chunks: tuple[int, ...] = (5, 8, 8), volume: np.ndarray = VOLUME) -> Path:
    array = zarr.create_array(str(path), shape=volume.shape, dtype=volume.dtype, chunks=chunks, zarr_format=zarr_format)
    array[...] = volume
    return path


def write_ome(path: Path, version: str) -> Path:
    """Two levels of a (c, z, y, x) image, as NGFF describes them."""
    group = zarr.open_group(str(path), mode="w", zarr_format=2 if version == "0.4" else 3)
    levels = []
    for level, step in enumerate((1, 2)):
        volume = np.stack([VOLUME, VOLUME + 1])[:, :, ::step, ::step]
        group.create_array(f"s{level}", data=volume, chunks=(1, 4, 8, 8))
        scale = {"type": "scale", "scale": [1, 3, 4 * step, 2 * step]}
        levels.append({"path": f"s{level}", "coordinateTransformations": [scale]})
    axes = [{"name": "c", "type": "channel"}, *({"name": name, "unit": "micrometer"} for name in "zyx")]
    image = [{"axes": axes, "datasets": levels, "version": version}]
    group.attrs.update({"multiscales": image} if version == "0.4" else {"ome": {"multiscales": image}})
    return path


def planes_of(path: Path, **settings: Any) -> np.ndarray:
    source = open_volume(path, ReadConfig(**settings))
    return np.array([plane for _, plane in source.planes(range(source.info.shape[0]))])


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("chunks", [(5, 8, 8), (1, 20, 24), (12, 4, 4)])
def test_planes_are_those_of_the_array(tmp_path: Path, zarr_format: int, chunks: tuple[int, ...]) -> None:
    assert np.array_equal(planes_of(write(tmp_path / "scan.zarr", zarr_format, chunks)), VOLUME)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_gives_channel_level_and_voxel_size(tmp_path: Path, version: str) -> None:
    path = write_ome(tmp_path / "scan.ome.zarr", version)
    assert np.array_equal(planes_of(path, select={"c": 1}), VOLUME + 1)
    assert open_volume(path, ReadConfig(select={"c": 0})).info.voxel_um == (3, 4, 2)
    small = ReadConfig(select={"c": 0}, level=1)
    assert np.array_equal(planes_of(path, select={"c": 0}, level=1), VOLUME[:, ::2, ::2])
    assert open_volume(path, small).info.voxel_um == (3, 8, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--select c=0"),
        ({"select": {"c": 2}}, "--select c=2: the array has 2"),
        ({"select": {"c": 0, "t": 0}}, "--select t"),
        ({"select": {"c": 0}, "level": 2}, "--level 2: the store has 2 levels"),
        ({"dataset_path": "s9"}, "no whole Zarr store"),
    ],
)
def test_a_choice_that_is_missing_or_wrong_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_volume(write_ome(tmp_path / "scan.zarr", "0.5"), ReadConfig(**settings))


def test_chunks_that_are_not_there_are_counted_aloud(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.zarr")
    assert open_volume(path).info.warnings == ()
    next((path / "c").rglob("2")).unlink() if next((path / "c").rglob("2")).is_file() else (path / "c/0/0/0").unlink()
    assert "1 of 27 chunks are not in the store and read as 0" in open_volume(path).info.warnings[0]


def test_a_damaged_chunk_is_named_when_it_is_met(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.zarr")
    (path / "c/1/1/1").write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match="planes 5 to 10 cannot be read"):
        list(open_volume(path).planes(range(12)))


def test_a_store_without_a_volume_is_refused(tmp_path: Path) -> None:
    zarr.open_group(str(tmp_path / "scan.zarr"), mode="w").create_array("flat", data=VOLUME[0])
    with pytest.raises(InputError, match="no array of three axes"):
        open_volume(tmp_path / "scan.zarr")
