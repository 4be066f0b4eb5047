"""How a slice becomes pictures: as it is, in tiles of one size, padded to a multiple, or at another scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A rectangle of a slice, and the size of the picture made of it.

    Attributes:
        rows: (first, end) of the rectangle, half-open, in px of the slice.
        columns: likewise.
        height: rows of the picture; more than the rectangle has where it is padded by reflection.
        width: columns of the picture, likewise.
        is_resized: the rectangle is resampled to the size of the picture instead of padded.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    height: int
    width: int
    is_resized: bool = False

    @property
    def voxels_per_px(self) -> tuple[float, float]:
        """The (row, column) size of a pixel, in px of the slice."""
        if not self.is_resized:
            return 1.0, 1.0
        return (self.rows[1] - self.rows[0]) / self.height, (self.columns[1] - self.columns[0]) / self.width

    @property
    def is_padded(self) -> bool:
        """Whether the picture is larger than its rectangle, at the same scale."""
        if self.is_resized:
            return False
        return self.height > self.rows[1] - self.rows[0] or self.width > self.columns[1] - self.columns[0]

    def apply(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Cut the rectangle out of a slice (rows, columns); pad it evenly on both sides by reflection, or resample."""
        part = picture[slice(*self.rows), slice(*self.columns)]
        if self.is_resized:
            # Pillow's filters widen with the scale, so that what a coarse pixel covers is averaged, not picked.
            whole = Image.fromarray(np.ascontiguousarray(part))
            return np.asarray(whole.resize((self.width, self.height), Image.Resampling.BICUBIC))
        missing = (self.height - part.shape[0], self.width - part.shape[1])
        if not any(missing):
            return part
        return np.pad(part, [(count // 2, count - count // 2) for count in missing], mode="reflect")


def native(rows: tuple[int, int], columns: tuple[int, int]) -> list[Cut]:
    """Return the rectangle as one picture."""
    return [Cut(rows=rows, columns=columns, height=rows[1] - rows[0], width=columns[1] - columns[0])]


def padded(rows: tuple[int, int], columns: tuple[int, int], *, multiple: int) -> list[Cut]:
    """Return the rectangle as one picture whose edges are multiples of a number of px."""
    height, width = (-(-(end - first) // multiple) * multiple for first, end in (rows, columns))
    return [Cut(rows=rows, columns=columns, height=height, width=width)]


def resized(rows: tuple[int, int], columns: tuple[int, int], *, voxels_per_px: tuple[float, float]) -> list[Cut]:
    """Return the rectangle as one picture with pixels of about that size; ``Cut.voxels_per_px`` is the exact one."""
    height, width = (
        max(1, round((end - first) / size)) for (first, end), size in zip((rows, columns), voxels_per_px, strict=True)
    )
    return [Cut(rows=rows, columns=columns, height=height, width=width, is_resized=True)]


def tiles(rows: tuple[int, int], columns: tuple[int, int], *, size: int, overlap: float) -> list[Cut]:
    """Cover the rectangle with square tiles; where a side is shorter than a tile, the tile is padded.

    Args:
        rows: (first, end) of the rectangle, half-open, in px of the slice.
        columns: likewise.
        size: edge of a tile, in px.
        overlap: share of a tile that it has in common with the next, in [0, 1).
    """
    return [
        Cut(rows=row, columns=column, height=size, width=size)
        for row in _spans(*rows, size=size, overlap=overlap)
        for column in _spans(*columns, size=size, overlap=overlap)
    ]


def _spans(first: int, end: int, *, size: int, overlap: float) -> list[tuple[int, int]]:
    """Cover [first, end) with spans of one size; the last one is shifted inward to end where the range ends."""
    if end - first <= size:
        return [(first, end)]
    step = max(1, round(size * (1 - overlap)))
    starts = list(range(first, end - size + 1, step))
    if starts[-1] + size < end:
        starts.append(end - size)
    return [(start, start + size) for start in starts]
