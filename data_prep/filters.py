"""Blank slices and near copies of their neighbour: how many there are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# A picture whose grey levels spread less than this shows nothing.
BLANK_BELOW_STD = 4.0
# Correlation of two thumbnails above which one slice tells nothing that the other does not.
SAME_ABOVE = 0.995
_EDGE = 32


def is_blank(picture: NDArray[np.uint8]) -> bool:
    """Return whether a picture (rows, columns) is nearly of one grey level, judged from every fourth row and column."""
    return bool(picture[::4, ::4].std() < BLANK_BELOW_STD)


def thumbnail(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the picture in at most 32x32 block means, flat, with mean 0 and length 1 (all 0 if it is flat)."""
    rows, columns = (min(_EDGE, side) for side in picture.shape)
    # A few pixels of each block are enough of a mean to compare neighbours by, at a tenth of the time.
    sparse = picture[:: max(1, picture.shape[0] // rows // 4), :: max(1, picture.shape[1] // columns // 4)]
    height, width = sparse.shape[0] // rows, sparse.shape[1] // columns
    blocks = sparse[: rows * height, : columns * width].reshape(rows, height, columns, width)
    means = blocks.mean(axis=(1, 3), dtype=np.float32).ravel()
    means -= means.mean()
    length = float(np.linalg.norm(means))
    return means / length if length > 0 else means


def count_near_duplicates(thumbnails: Sequence[NDArray[np.float32]]) -> int:
    """Return how many slices, in order, correlate with the last one kept by more than 0.995."""
    dropped, kept = 0, None
    for one in thumbnails:
        if kept is not None and float(kept @ one) > SAME_ABOVE:
            dropped += 1
        else:
            kept = one
    return dropped
