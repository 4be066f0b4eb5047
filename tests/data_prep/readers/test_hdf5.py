"""HDF5: the one array of three axes, all of it, in whatever chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import InputError
from data_prep.readers.info import ReadConfig
from data_prep.readers.open import open_volume

h5py = pytest.importorskip("h5py")

VOLUME = np.random.default_rng(3).integers(0, 60000, (12, 20, 24), dtype=np.uint16)


def write(path: Path, name: str = "entry/data/data", volume: np.ndarray = VOLUME, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=volume, **options)
    return path


def planes_of(path: Path, **settings: Any) -> np.ndarray:
    source = open_volume(path, ReadConfig(**settings))
    return np.array([plane for _, plane in source.planes(range(source.info.shape[0]))])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": ">f4"},
        {"chunks": (1, 20, 24)},
        {"chunks": (5, 8, 8)},
        {"chunks": (12, 4, 4), "compression": "gzip"},
        {"chunks": (4, 20, 24), "compression": "lzf", "shuffle": True, "fletcher32": True},
    ],
)
def test_planes_are_those_of_the_array(tmp_path: Path, options: dict[str, Any]) -> None:
    assert np.array_equal(planes_of(write(tmp_path / "scan.h5", **options)), VOLUME)


def test_some_planes_come_in_the_order_asked_for(tmp_path: Path) -> None:
    source = open_volume(write(tmp_path / "scan.h5", chunks=(5, 8, 8)))
    assert [(z, plane[0, 0]) for z, plane in source.planes([1, 3, 11])] == [(z, VOLUME[z, 0, 0]) for z in (1, 3, 11)]


def test_deep_chunks_are_decoded_in_parts_that_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.readers.slabs.SLAB_BYTES", 5 * 20 * 24 * 2)
    path = write(tmp_path / "scan.h5", chunks=(12, 4, 4))
    assert np.array_equal(planes_of(path), VOLUME)
    info = open_volume(path).info
    assert info.slab_bytes == 5 * 20 * 24 * 2
    assert "decoded 3 times" in info.warnings[0]


def test_the_largest_array_is_taken_and_another_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.h5")
    with h5py.File(path, "a") as file:
        file["small"] = VOLUME[:3] + 1
        file["flat"] = VOLUME[0]
    assert np.array_equal(planes_of(path), VOLUME)
    assert np.array_equal(planes_of(path, dataset_path="/small"), VOLUME[:3] + 1)
    with pytest.raises(
        InputError, match=r"--dataset_path wrong: no such array; the file has /entry/data/data 12x20x24"
    ):
        open_volume(path, ReadConfig(dataset_path="wrong"))


def test_a_choice_among_channels_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.h5", volume=np.stack([VOLUME, VOLUME + 1]))
    with pytest.raises(InputError, match="--select c=0"):
        open_volume(path)
    assert np.array_equal(planes_of(path, select={"c": 1}), VOLUME + 1)


def two_of_a_size(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["a"], file["b"] = VOLUME, VOLUME


def never_written(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("a", VOLUME.shape, "u2", chunks=(4, 20, 24))[:8] = VOLUME[:8]


def never_allocated(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("a", VOLUME.shape, "u2")


def of_other_files(path: Path) -> None:
    layout = h5py.VirtualLayout(VOLUME.shape, "u2")
    layout[:] = h5py.VirtualSource(path.with_name("gone.h5"), "a", VOLUME.shape)
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("a", layout)


def cut(path: Path) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (two_of_a_size, "choose one by --dataset_path"),
        (never_written, "1 of 3 chunks of /a were never written"),
        (never_allocated, "/a has 0 of 11520 bytes"),
        (of_other_files, "gone.h5"),
        (cut, "no whole HDF5 file"),
        (lambda path: write(path, volume=VOLUME[0]), "no array of three axes"),
        (lambda path: write(path, volume=VOLUME.astype("c8")), "no array of three axes"),
    ],
)
def test_what_is_not_all_there_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "scan.h5")
    with pytest.raises(InputError, match=message) as caught:
        open_volume(tmp_path / "scan.h5")
    assert "\n" not in str(caught.value)


def test_a_damaged_chunk_is_named_when_it_is_met(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.h5", chunks=(4, 20, 24), compression="gzip")
    with h5py.File(path) as file:
        where = file["entry/data/data"].id.get_chunk_info(1).byte_offset
    with path.open("r+b") as raw:
        raw.seek(where + 10)
        raw.write(b"\xff" * 50)
    source = open_volume(path)
    with pytest.raises(InputError, match="planes 4 to 8 cannot be read"):
        list(source.planes(range(12)))


def test_the_voxel_size_comes_from_the_axes_beside_the_array(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nxs")
    assert open_volume(path).info.voxel_um is None
    with h5py.File(path, "a") as file:
        group = file["entry/data"]
        group.attrs["axes"] = ["z", "y", "x"]
        for name, size, edge in (("z", 12, 0.003), ("y", 20, 0.004), ("x", 24, 0.002)):
            group[name] = np.arange(size) * edge
            group[name].attrs["units"] = "mm"
    assert open_volume(path).info.voxel_um == pytest.approx((3, 4, 2))
    with h5py.File(path, "a") as file:
        file["entry/data/data"].attrs["element_size_um"] = (5.0, 6.0, 7.0)
    assert open_volume(path).info.voxel_um == (5, 6, 7)
