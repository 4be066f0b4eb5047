"""Which part of a volume is cut: a region of interest, without the padding around a scan.

Reconstructions of a turning sample are cylinders in a box of one value. Slices of the padding teach nothing, and a
rectangle inside the cylinder has none of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError, UsageError
from data_prep.readers.info import VolumeInfo, VolumeSource

# (first, end) along stored Z, Y, X, half-open.
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

# Edge of the mask that the inscribed rectangle is searched in.
_MASK_EDGE = 700


@dataclass(frozen=True, kw_only=True)
class ExtentConfig:
    """Which part of every volume is cut."""

    roi_z: tuple[int, int] | None = None
    """First and end of what is cut along stored z, in voxels, half-open; all of it if not given."""
    roi_y: tuple[int, int] | None = None
    """The same along y."""
    roi_x: tuple[int, int] | None = None
    """The same along x."""
    trim: Literal["none", "content", "inscribed"] = "none"
    """content cuts away planes, rows and columns of padding; inscribed keeps the largest rectangle of y and x within a
    cylinder along z."""

    def __post_init__(self) -> None:
        for name in ("roi_z", "roi_y", "roi_x"):
            roi = getattr(self, name)
            if roi is not None and not 0 <= roi[0] < roi[1]:
                raise ValueError(f"--{name} {roi[0]} {roi[1]}: give two rising numbers, from 0")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A box of a volume, read as if it were a volume of its own."""

    whole: VolumeSource
    info: VolumeInfo
    box: Box

    def planes(self, indices: Sequence[int]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield (z within the box, plane of the box), in the order asked for, each read once."""
        (first, _), rows, columns = self.box
        for z, plane in self.whole.planes([first + index for index in indices]):
            yield z - first, plane[slice(*rows), slice(*columns)]


def part_of(source: VolumeSource, box: Box) -> VolumeSource:
    """Return the volume itself if the box is all of it, else the part."""
    if box == whole_box(source.info):
        return source
    shape = (box[0][1] - box[0][0], box[1][1] - box[1][0], box[2][1] - box[2][0])
    first, end = box[0]
    bad_planes = tuple(z - first for z in source.info.bad_planes if first <= z < end)
    return Part(whole=source, info=dataclasses.replace(source.info, shape=shape, bad_planes=bad_planes), box=box)


def whole_box(info: VolumeInfo) -> Box:
    """Return the box of the whole volume."""
    z, y, x = info.shape
    return (0, z), (0, y), (0, x)


def extent_of(source: VolumeSource, config: ExtentConfig, name: str) -> Box:
    """Return the box that is cut; ``--trim`` reads every plane of the region of interest once.

    Args:
        source: the volume.
        config: what was asked for.
        name: the volume, for messages.

    Raises:
        UsageError: the region of interest does not lie within the volume.
        InputError: nothing but padding, or no padding around a cylinder that was announced.
    """
    box = list(whole_box(source.info))
    for axis, roi in enumerate((config.roi_z, config.roi_y, config.roi_x)):
        length = source.info.shape[axis]
        if roi is None:
            continue
        if roi[1] > length:
            letter = "zyx"[axis]
            raise UsageError(f"--roi_{letter} {roi[0]} {roi[1]}: volume '{name}' has {length} voxels along {letter}")
        box[axis] = roi
    roi_box: Box = (box[0], box[1], box[2])
    if config.trim == "none":
        return roi_box
    return _trimmed(part_of(source, roi_box), roi_box, config.trim, name)


def _trimmed(part: VolumeSource, box: Box, how: Literal["content", "inscribed"], name: str) -> Box:
    """Shrink the box to what is not padding."""
    padding = padding_value(part)
    if padding is None:
        if how == "inscribed":
            raise InputError(
                f"{part.info.path}: --trim inscribed: the corners of '{name}' do not hold one value, so there is no "
                "padding around a cylinder; give --roi_y and --roi_x"
            )
        return box
    seen = np.zeros(part.info.shape[0], bool)
    columns = np.zeros(part.info.shape[1:], bool)
    for z, plane in part.planes(range(part.info.shape[0])):
        content = np.isfinite(plane) if math.isnan(padding) else np.isfinite(plane) & (plane != padding)
        seen[z] = content.any()
        columns |= content
    if not seen.any():
        raise InputError(f"{part.info.path}: nothing but padding ({padding:g}) in what would be cut from '{name}'")
    first, end = _bounds(seen)
    if how == "inscribed":
        rows, row_columns = inscribed_rectangle(columns)
    else:
        rows, row_columns = (_bounds(np.asarray(columns.any(axis=axis))) for axis in (1, 0))
    (z0, _), (y0, _), (x0, _) = box
    return (
        (z0 + first, z0 + end),
        (y0 + rows[0], y0 + rows[1]),
        (x0 + row_columns[0], x0 + row_columns[1]),
    )


def padding_value(source: VolumeSource, num_planes: int = 9) -> float | None:
    """Return the value that all corners of some planes hold, NaN if none of them is finite, None if they differ."""
    depth = source.info.shape[0]
    numbers = sorted({int((i + 0.5) * depth / num_planes) for i in range(num_planes)})
    corners = np.array([plane[:: max(1, plane.shape[0] - 1), :: max(1, plane.shape[1] - 1)].ravel()[[0, 1, -2, -1]]
                        for _, plane in source.planes(numbers)], np.float64)  # fmt: skip
    if not np.isfinite(corners).any():
        return math.nan
    return float(corners[0, 0]) if bool((corners == corners[0, 0]).all()) else None


def inscribed_rectangle(mask: NDArray[np.bool_]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (rows, columns) of the largest rectangle of content in a mask (rows, columns), up to a voxel or two.

    Holes are taken for content: pores of the material, not the padding around it. A large mask is looked at in blocks,
    each of which counts only if all of it is content.
    """
    from scipy.ndimage import binary_fill_holes

    filled = binary_fill_holes(mask)
    step = max(1, -(-max(mask.shape) // _MASK_EDGE))
    height, width = (size // step for size in mask.shape)
    small = filled[: height * step, : width * step].reshape(height, step, width, step).all(axis=(1, 3))
    best, found = 0, ((0, 0), (0, 0))
    heights = np.zeros(width + 1, int)  # rows of content above, by column; the last column closes what is open
    for row in range(height):
        heights[:-1] = np.where(small[row], heights[:-1] + 1, 0)
        open_spans: list[tuple[int, int]] = []  # (first column, height), heights rising
        for column, now in enumerate(heights.tolist()):
            first = column
            while open_spans and open_spans[-1][1] >= now:
                first, tall = open_spans.pop()
                if (column - first) * tall > best:
                    best = (column - first) * tall
                    found = ((row + 1 - tall, row + 1), (first, column))
            open_spans.append((first, now))
    (row0, row1), (column0, column1) = found
    return (row0 * step, row1 * step), (column0 * step, column1 * step)


def _bounds(content: NDArray[np.bool_]) -> tuple[int, int]:
    """Return (first, end) of what is not empty along an axis."""
    places = np.flatnonzero(content)
    return int(places[0]), int(places[-1]) + 1
