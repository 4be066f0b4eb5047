"""Slices of every storage kind, within every budget, against direct indexing of the same array."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from data_prep.folders.window import Window
from data_prep.readers.info import VolumeInfo
from data_prep.readers.open import open_volume
from data_prep.slicing.planes import plan_passes, scan

SHAPE = (7, 20, 33)
WINDOW = Window(low=100.0, high=60000.0)
SLICE = SHAPE[0] * SHAPE[2]
EVERYTHING = SLICE * SHAPE[1] + SHAPE[0] * SHAPE[1] * SHAPE[2]


def pages(path: Path, volume: NDArray[Any], **options: Any) -> None:
    with tifffile.TiffWriter(path) as file:
        for plane in volume:
            file.write(plane, contiguous=False, photometric="minisblack", **options)


def whole(**options: Any) -> Callable[[Path, NDArray[Any]], None]:
    return lambda path, volume: tifffile.imwrite(path, volume, photometric="minisblack", **options)


def one_directory(path: Path, volume: NDArray[Any]) -> None:
    """A single directory before one block, as ImageJ writes beyond 4 GB."""
    tifffile.imwrite(path, volume, photometric="minisblack", metadata={"axes": "ZYX"}, truncate=True)


KINDS: dict[str, tuple[str, Callable[[Path, NDArray[Any]], None]]] = {
    "one block": ("u2", whole()),
    "one block, uint8": ("u1", whole()),
    "one block, float32": ("f4", whole()),
    "one block, int16": ("i2", whole()),
    "one block, float16": ("f2", whole()),
    "one block, uint32": ("u4", whole()),
    "big-endian": (">u2", whole(byteorder=">")),
    "big-endian float32": (">f4", whole(byteorder=">")),
    "BigTIFF": ("u2", whole(bigtiff=True)),
    "BigTIFF, pages, big-endian": (">u2", lambda path, volume: _big_pages(path, volume)),
    "ImageJ": ("u2", whole(imagej=True)),
    "one directory": ("u2", one_directory),
    "pages": ("u2", lambda path, volume: pages(path, volume, metadata=None)),
    "pages that each claim to be a series": ("u2", pages),
    "pages, float32": ("f4", lambda path, volume: pages(path, volume, metadata=None)),
    "deflate": ("u2", whole(compression="deflate", predictor=True)),
    "lzw": ("u2", whole(compression="lzw")),
    "zstd": ("f4", whole(compression="zstd")),
    "tiles": ("u2", whole(tile=(16, 16))),
    "three-dimensional tiles": ("u2", whole(tile=(16, 16, 16))),
    "LZW with predictor": ("u2", whole(compression="lzw", predictor=True)),
    "big-endian deflate with predictor": (">u2", whole(byteorder=">", compression="deflate", predictor=True)),
    "float predictor": ("f4", whole(compression="zstd", predictor=3)),
    "OME": ("u2", whole(ome=True, metadata={"axes": "ZYX"})),
    "pyramid": ("u2", lambda path, volume: pyramid(path, volume)),
    "MinIsWhite": ("u2", lambda path, volume: tifffile.imwrite(path, volume, photometric="miniswhite")),
    "strips of seven rows": ("u2", whole(rowsperstrip=7)),
}


def pyramid(path: Path, volume: NDArray[Any]) -> None:
    """Full planes, each with one smaller copy below it."""
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(volume, subifds=1, photometric="minisblack", tile=(16, 16), metadata={"axes": "ZYX"})
        file.write(volume[:, ::2, ::2], subfiletype=1, photometric="minisblack", tile=(16, 16))


def _big_pages(path: Path, volume: NDArray[Any]) -> None:
    with tifffile.TiffWriter(path, bigtiff=True, byteorder=">") as file:
        for plane in volume:
            file.write(plane, contiguous=False, photometric="minisblack", metadata=None)


def noise(dtype: str) -> NDArray[Any]:
    rng = np.random.default_rng(5)
    low, high = {"u1": (0, 256), "i2": (-30000, 30000)}.get(dtype[-2:], (0, 65000))
    return rng.integers(low, high, SHAPE).astype(dtype)


class Counting:
    """A volume in memory that counts how often each plane is read."""

    def __init__(self, volume: NDArray[Any]) -> None:
        z, y, x = volume.shape
        self.volume, self.reads = volume, Counter[int]()
        self.info = VolumeInfo(
            path=Path("memory"), shape=(z, y, x), dtype=volume.dtype.name, storage="memory", num_bytes=volume.nbytes
        )

    def planes(self, indices: Sequence[int]) -> Iterator[tuple[int, NDArray[Any]]]:
        for z in indices:
            self.reads[z] += 1
            yield z, self.volume[z]


@pytest.mark.parametrize("budget", [1, 3 * SLICE, EVERYTHING])
@pytest.mark.parametrize("kind", KINDS)
def test_slices_equal_direct_indexing(tmp_path: Path, kind: str, budget: int) -> None:
    dtype, write = KINDS[kind]
    volume = noise(dtype)
    write(tmp_path / "a.tif", volume)
    source = open_volume(tmp_path / "a.tif")
    assert source.info.shape == SHAPE
    wanted = {axis: range(SHAPE[axis]) for axis in range(3)}
    grey = WINDOW.to_uint8(volume.astype(volume.dtype.newbyteorder("=")))
    seen = set()
    for axis, index, found in scan(source, lambda _, plane: WINDOW.to_uint8(plane), wanted, budget):
        assert np.array_equal(found, grey.take(index, axis))
        seen.add((axis, index))
    assert len(seen) == sum(SHAPE)


@pytest.mark.parametrize(
    ("wanted", "budget", "num_passes"),
    [
        ({0: range(7), 1: range(20), 2: range(33)}, EVERYTHING, 1),
        ({0: range(7), 1: range(20)}, 3 * SLICE, 7),
        ({1: range(0, 20, 2), 2: range(0, 33, 11)}, 10**6, 1),
        ({0: range(7)}, 1, 1),
        ({1: range(4)}, 1, 4),
    ],
)
def test_every_plane_is_read_once_per_pass(wanted: dict[int, range], budget: int, num_passes: int) -> None:
    source = Counting(noise("u2"))
    slices = list(scan(source, lambda _, plane: WINDOW.to_uint8(plane), wanted, budget))
    assert len(slices) == sum(map(len, wanted.values()))
    assert len(plan_passes(SHAPE, wanted, budget)) == num_passes
    assert set(source.reads.values()) == {num_passes}
    assert len(source.reads) == SHAPE[0]


def test_planes_that_nobody_wants_are_not_read() -> None:
    source = Counting(noise("u2"))
    found = list(scan(source, lambda _, plane: WINDOW.to_uint8(plane), {0: [1, 4]}, 1))
    assert [index for _, index, _ in found] == [1, 4]
    assert source.reads == {1: 1, 4: 1}


@pytest.mark.parametrize("budget", [1, 1000, 4000, 10**6])
def test_no_pass_gathers_more_than_the_budget_unless_for_one_slice(budget: int) -> None:
    for blocks in plan_passes(SHAPE, {1: range(20), 2: range(33)}, budget):
        gathered = sum(len(block.indices) * SHAPE[0] * SHAPE[3 - block.axis] for block in blocks)
        assert gathered <= budget or sum(len(block.indices) for block in blocks) == 1


def test_unevenly_spaced_slices_are_found_too() -> None:
    volume = noise("u1")
    wanted = {1: [0, 1, 7, 19], 2: [2, 30, 31]}
    for axis, index, found in scan(Counting(volume), lambda _, plane: plane, wanted, 10**6):
        assert np.array_equal(found, volume.take(index, axis))


def test_slices_stay_valid_after_later_passes() -> None:
    volume = noise("u1")
    kept = list(scan(Counting(volume), lambda _, plane: plane, {2: range(33)}, 5 * SHAPE[0] * SHAPE[1]))
    assert all(np.array_equal(found, volume[:, :, index]) for _, index, found in kept)
