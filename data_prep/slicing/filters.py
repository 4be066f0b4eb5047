"""Blank pictures and near copies of a neighbouring slice: found, counted, and dropped if asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A picture whose grey levels spread less than this shows nothing.
BLANK_BELOW_STD = 4.0
# Correlation of two thumbnails above which one slice tells nothing that the other does not.
SAME_ABOVE = 0.995
_EDGE = 32


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Which pictures are left out. What a filter would find is counted and printed in any case."""

    drop_blank: bool = False
    """Leave out pictures that show nothing."""
    blank_below: float = BLANK_BELOW_STD
    """Standard deviation in grey levels below which a picture shows nothing."""
    least_content: float = 0.5
    """Share of a picture that must be other than the padding around the scan, where there is any; less is blank."""
    dedupe: bool = False
    """Leave out slices that are near copies of the last one kept of their direction and split."""
    dedupe_above: float = SAME_ABOVE
    """Correlation of two slices, 32x32, above which one is a near copy."""

    def __post_init__(self) -> None:
        if not 0 < self.blank_below < 128:
            raise ValueError(f"--blank_below {self.blank_below}: must lie between 0 and 128 grey levels")
        if not 0 <= self.least_content <= 1:
            raise ValueError(f"--least_content {self.least_content}: must be a share, from 0 to 1")
        if not 0 < self.dedupe_above <= 1:
            raise ValueError(f"--dedupe_above {self.dedupe_above}: must be a correlation, above 0 and at most 1")


def is_blank(
    picture: NDArray[np.uint8], filters: FilterConfig = FilterConfig(), padding_levels: Sequence[int] = ()
) -> bool:
    """Return whether a picture shows nearly one grey level, or mostly padding.

    Args:
        picture: (rows, columns); every fourth row and column is looked at.
        filters: the limits.
        padding_levels: grey levels that padding and voxels that are not finite have become.
    """
    sparse = picture[::4, ::4]
    if sparse.std() < filters.blank_below:
        return True
    if not padding_levels:
        return False
    return bool(np.isin(sparse, padding_levels).mean() > 1 - filters.least_content)


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


def near_duplicates(thumbnails: Sequence[NDArray[np.float32]], above: float = SAME_ABOVE) -> list[int]:
    """Return the positions of slices, in order, that correlate with the last one kept by more than ``above``."""
    found, kept = [], None
    for position, one in enumerate(thumbnails):
        if kept is not None and float(kept @ one) > above:
            found.append(position)
        else:
            kept = one
    return found
