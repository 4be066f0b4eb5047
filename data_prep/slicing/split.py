"""A leak-free validation region: one cut through the volume that all three slice directions respect.

Neighbouring slices are near copies, and slices of two directions cross. Held-out data that training has not seen
therefore needs a part of the volume of its own, with a guard slab between, from which nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UsageError
from data_prep.folders.manifest import TRAIN, VALIDATION

# The guard is the larger of the two, in correlation lengths and as a share of the cut axis.
GUARD_CORRELATION_LENGTHS = 3
GUARD_SHARE = 0.02
# What the held-out region is wider than one tile, as a share of the tile, so that tiles can differ in position.
MARGIN = 0.25
# Correlation between neighbours below which what is left is noise without a length.
_NOISE = 0.05


@dataclass(frozen=True, kw_only=True)
class Region:
    """The parts of one stored axis, half-open, in voxels: ``train``, ``guard``, ``validation``, in this order.

    Attributes:
        axis: the stored axis that is cut (0 Z, 1 Y, 2 X).
        train: (first, end) of what training may see.
        guard: (first, end) of what nobody sees.
        validation: (first, end) of what is held out.
        correlation_length: measured along the axis, in voxels; None if the guard was given by hand.
    """

    axis: int
    train: tuple[int, int]
    guard: tuple[int, int]
    validation: tuple[int, int]
    correlation_length: int | None

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """The ranges that pictures are cut from, by split."""
        return {TRAIN: self.train, VALIDATION: self.validation}

    def as_dict(self, origin: int) -> dict[str, object]:
        """Return plain values for a manifest, in stored voxels: ``origin`` is where the cut part begins."""
        ranges = {"train": self.train, "guard": self.guard, "validation": self.validation}
        shifted = {name: [first + origin, end + origin] for name, (first, end) in ranges.items()}
        return {"axis": "zyx"[self.axis], **shifted, "correlation_length": self.correlation_length}


def correlation_length(planes: Sequence[NDArray[Any]]) -> int:
    """Return the lag at which fluctuations along the last axis have lost their correlation, in voxels.

    It is the first lag at which the autocorrelation has fallen to 1/e of its value at lag one; measured from lag one,
    because white noise of the scan lowers all lags alike. What is constant along a line (layers) and what is common to
    all lines (shading, cupping) is taken out first: no guard could separate it. A weave correlates with itself again
    after its period, at any distance.

    Args:
        planes: sampled planes (lines, positions), the cut axis last, finite.

    Returns:
        At least 1, at most half the axis.
    """
    return length_of(autocorrelation(planes))


def autocorrelation(planes: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """Return the correlation of fluctuations along the last axis by lag, as ``correlation_length`` measures it.

    Args:
        planes: sampled planes (lines, positions), finite.

    Returns:
        1 at lags 0 and 1, up to half the axis; nothing beyond lag 0 where there is noise alone.
    """
    length = planes[0].shape[1]
    total = np.zeros(length)
    for plane in planes:
        lines = plane.astype(np.float64)
        lines -= lines.mean(axis=1, keepdims=True)
        lines -= lines.mean(axis=0, keepdims=True)
        spectrum = np.fft.rfft(lines, n=2 * length, axis=1)
        total += np.fft.irfft((np.abs(spectrum) ** 2).sum(axis=0))[:length]
    correlation = total[: length // 2 + 1] / (length - np.arange(length // 2 + 1))
    if correlation[0] <= 0 or len(correlation) < 2 or correlation[1] <= _NOISE * correlation[0]:
        return np.array([1.0] + [0.0] * (length // 2))
    correlation[0] = correlation[1]
    return correlation / correlation[1]


def length_of(correlation: NDArray[np.float64]) -> int:
    """Return the lag at which a correlation has fallen to 1/e, at least 1; the last one if it never does."""
    below = np.flatnonzero(correlation < 1 / math.e)
    return max(1, int(below[0]) if below.size else len(correlation) - 1)


def cut_region(
    axis: int,
    length: int,
    *,
    tile: int,
    fraction: float,
    correlation: int,
    guard_voxels: int | None,
    who: str,
) -> Region:
    """Divide an axis into training, guard and held-out part.

    Args:
        axis: the stored axis that is cut.
        length: its voxels.
        tile: edge of the tiles that must fit into both parts, 0 if slices are not tiled.
        fraction: least share of the axis that is held out.
        correlation: correlation length along the axis, in voxels.
        guard_voxels: width of the guard; None for the larger of 3 correlation lengths and 2 %.
        who: how a message begins: the setting as typed and the volume.

    Raises:
        UsageError: less would be left to train on than is held out, or less than a tile.
    """
    by_rule = max(GUARD_CORRELATION_LENGTHS * correlation, math.ceil(GUARD_SHARE * length))
    guard = by_rule if guard_voxels is None else guard_voxels
    held_out = max(math.ceil(fraction * length), tile + math.ceil(MARGIN * tile), 1)
    left = length - guard - held_out
    if left < max(held_out, tile, 1):
        why = "given by hand" if guard_voxels is not None else f"3 correlation lengths of {correlation}"
        tiles = f" (one tile of {tile} and a margin, at least {fraction:.0%})" if tile else f" ({fraction:.0%})"
        raise UsageError(
            f"{who} is {length} voxels long; {held_out} held out{tiles} and a guard of "
            f"{guard} ({why}) leave {max(left, 0)} to train on, fewer than are held out; "
            "choose a smaller --tile_size or --guard_voxels, or --split none"
        )
    return Region(
        axis=axis,
        train=(0, left),
        guard=(left, left + guard),
        validation=(left + guard, length),
        correlation_length=correlation if guard_voxels is None else None,
    )
