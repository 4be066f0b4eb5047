"""How a slice becomes pictures: as it is, or in tiles of one size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A rectangle of a slice, and the size of the picture made of it.

    Attributes:
        rows: (first, end) of the rectangle, half-open, in px of the slice.
        columns: likewise.
        height: rows of the picture; more than the rectangle has where it is padded by reflection.
        width: columns of the picture, likewise.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    height: int
    width: int

    @property
    def is_padded(self) -> bool:
        """Whether the picture is larger than its rectangle."""
        return self.height > self.rows[1] - self.rows[0] or self.width > self.columns[1] - self.columns[0]

    def apply(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Cut the rectangle out of a slice (rows, columns) and pad it evenly on both sides by reflection."""
        part = picture[slice(*self.rows), slice(*self.columns)]
        missing = (self.height - part.shape[0], self.width - part.shape[1])
        if not any(missing):
            return part
        return np.pad(part, [(count // 2, count - count // 2) for count in missing], mode="reflect")


def native(rows: tuple[int, int], columns: tuple[int, int]) -> list[Cut]:
    """Return the rectangle as one picture."""
    return [Cut(rows=rows, columns=columns, height=rows[1] - rows[0], width=columns[1] - columns[0])]


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
