"""Which part of a volume is cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from configs.errors import InputError, UsageError
from data_prep.readers.info import VolumeInfo
from data_prep.slicing.extent import ExtentConfig, extent_of, inscribed_rectangle, padding_value, part_of

SHAPE = (8, 60, 80)
Z, Y, X = np.ogrid[:8, :60, :80]


class Memory:
    """A volume in memory that counts how often each plane is read."""

    def __init__(self, volume: NDArray[Any]) -> None:
        self.volume = volume
        self.num_reads = np.zeros(len(volume), int)
        z, y, x = volume.shape
        self.info = VolumeInfo(
            path=Path("a.tif"), shape=(z, y, x), dtype=volume.dtype.name, storage="memory", num_bytes=volume.nbytes
        )

    def planes(self, indices: Sequence[int]) -> Iterator[tuple[int, NDArray[Any]]]:
        for z in indices:
            self.num_reads[z] += 1
            yield z, self.volume[z]


def filled(padding: float, where: NDArray[np.bool_], dtype: str = "float32") -> Memory:
    noise = np.random.default_rng(0).normal(1000, 100, SHAPE)
    return Memory(np.where(where, noise, padding).astype(dtype))


ELLIPSE = ((Y - 30) / 28) ** 2 + ((X - 40) / 36) ** 2 + 0 * Z <= 1
BLOCK = (Z >= 1) & (Z < 7) & (Y >= 5) & (Y < 50) & (X >= 9) & (X < 71)


def test_a_part_is_read_as_the_box_it_is() -> None:
    source = Memory(np.arange(math.prod(SHAPE)).reshape(SHAPE))
    part = part_of(source, ((2, 6), (10, 50), (0, 33)))
    assert part.info.shape == (4, 40, 33)
    for z, plane in part.planes([0, 3]):
        assert np.array_equal(plane, source.volume[2 + z, 10:50, :33])
    assert part_of(source, ((0, 8), (0, 60), (0, 80))) is source


def test_a_region_of_interest_is_the_box() -> None:
    config = ExtentConfig(roi_z=(1, 5), roi_x=(10, 80))
    assert extent_of(Memory(np.zeros(SHAPE)), config, "a") == ((1, 5), (0, 60), (10, 80))


def test_a_region_beyond_the_volume_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--roi_y 0 61: volume 'a' has 60 voxels along y"):
        extent_of(Memory(np.zeros(SHAPE)), ExtentConfig(roi_y=(0, 61)), "a")


@pytest.mark.parametrize("padding", [0.0, -1000.0, math.nan])
def test_padding_is_cut_away(padding: float) -> None:
    source = filled(padding, BLOCK)
    assert extent_of(source, ExtentConfig(trim="content"), "a") == ((1, 7), (5, 50), (9, 71))


def test_trimming_reads_each_plane_once_beside_the_sampled_ones() -> None:
    source = filled(0, BLOCK)
    extent_of(source, ExtentConfig(trim="content"), "a")
    assert source.num_reads.max() <= 2


@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_an_inscribed_box_holds_no_padding_and_is_nearly_the_largest(padding: float) -> None:
    source = filled(padding, ELLIPSE)
    z, rows, columns = extent_of(source, ExtentConfig(trim="inscribed"), "a")
    assert z == (0, 8)
    part = source.volume[:, slice(*rows), slice(*columns)]
    assert np.isfinite(part).all()
    assert (part != 0).all()
    # The largest rectangle in an ellipse with half-axes a, b has the area 2 a b.
    area = (rows[1] - rows[0]) * (columns[1] - columns[0])
    assert area == pytest.approx(2 * 28 * 36, rel=0.05)


def test_pores_do_not_break_an_inscribed_box() -> None:
    mask = np.ones((50, 60), bool)
    mask[20:23, 30:33] = False
    assert inscribed_rectangle(mask) == ((0, 50), (0, 60))


def test_a_large_mask_is_looked_at_in_blocks_and_stays_inside() -> None:
    y, x = np.ogrid[:1500, :1600]
    mask = ((y - 750) / 740) ** 2 + ((x - 800) / 790) ** 2 <= 1
    rows, columns = inscribed_rectangle(mask)
    assert mask[slice(*rows), slice(*columns)].all()
    assert (rows[1] - rows[0]) * (columns[1] - columns[0]) == pytest.approx(2 * 740 * 790, rel=0.02)


def test_corners_that_differ_are_no_padding() -> None:
    source = Memory(np.random.default_rng(1).normal(size=SHAPE))
    assert padding_value(source) is None
    assert extent_of(source, ExtentConfig(trim="content"), "a") == ((0, 8), (0, 60), (0, 80))
    with pytest.raises(InputError, match="no padding around a cylinder"):
        extent_of(source, ExtentConfig(trim="inscribed"), "a")


def test_a_volume_of_padding_alone_is_refused() -> None:
    with pytest.raises(InputError, match="nothing but padding"):
        extent_of(Memory(np.zeros(SHAPE)), ExtentConfig(trim="content"), "a")


@pytest.mark.parametrize("roi", [(5, 5), (7, 2), (-1, 4)])
def test_a_region_that_does_not_rise_is_refused(roi: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="--roi_z"):
        ExtentConfig(roi_z=roi)
