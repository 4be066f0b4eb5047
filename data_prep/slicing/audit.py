"""How alike neighbouring slices are, and how many independent ones there are: measured while a volume is cut.

Neighbours of a fine scan are near copies. N slices then tell no more than N / (1 + 2 sum of their correlations), which
is the number to compare dataset sizes by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.folders.window import Window
from data_prep.slicing.intensity import sampled_planes
from data_prep.slicing.split import autocorrelation, length_of

# How much of the volume is kept to measure on: positions per plane, planes, lines per plane, voxels per plane.
_POSITIONS, _PLANES, _LINES, _VALUES = 2048, 16, 128, 8192
_BINS = 128


@dataclass(frozen=True, kw_only=True)
class AxisAudit:
    """What the slices perpendicular to one axis hold.

    Attributes:
        num_slices: how many are taken.
        correlation_length: voxels over which neighbours lose their likeness (``split.correlation_length``).
        effective_number: how many independent slices tell as much.
    """

    num_slices: int
    correlation_length: int
    effective_number: float


@dataclass(kw_only=True)
class Samples:
    """What is kept of the planes that pass by, by z; the same whatever order or process they pass in."""

    depth: int
    points: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    planes: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = field(default_factory=dict)
    values: dict[int, NDArray[Any]] = field(default_factory=dict)
    num_non_finite: dict[int, int] = field(default_factory=dict)

    def keep(self, z: int, plane: NDArray[Any], grey: NDArray[np.uint8]) -> None:
        """Keep some of plane z: stored values and grey levels, both (Y, X)."""
        if z in self.points:
            return
        if plane.dtype.kind == "f":
            self.num_non_finite[z] = plane.size - int(np.count_nonzero(np.isfinite(plane)))
        self.points[z] = grey.ravel()[:: max(1, grey.size // _POSITIONS)].copy()
        numbers = sampled_planes(self.depth)
        if z in numbers:
            self.values[z] = plane.ravel()[:: max(1, plane.size // _VALUES)].copy()
        if z in numbers[:: -(-len(numbers) // _PLANES)]:
            along_x = grey[:: max(1, grey.shape[0] // _LINES)].copy()
            along_y = grey.T[:: max(1, grey.shape[1] // _LINES)].copy()
            self.planes[z] = (along_y, along_x)

    def add(self, other: Samples) -> None:
        """Take in what another process has kept."""
        for name in ("points", "planes", "values", "num_non_finite"):
            getattr(self, name).update(getattr(other, name))


def audit(samples: Samples, wanted: Mapping[int, Sequence[int]]) -> dict[int, AxisAudit]:
    """Measure each stored axis.

    Args:
        samples: of the planes that were read.
        wanted: stored axis -> the slices that are taken, rising.
    """
    found = {}
    for axis, numbers in wanted.items():
        correlation, spacing = _correlation(samples, axis)
        strides = np.diff(numbers)
        stride = int(np.median(strides)) if strides.size else 1
        found[axis] = AxisAudit(
            num_slices=len(numbers),
            correlation_length=length_of(correlation) * spacing,
            effective_number=effective_number(correlation, len(numbers), max(1, stride // spacing)),
        )
    return found


def effective_number(correlation: NDArray[np.float64], count: int, stride: int) -> float:
    """Return how many independent slices tell as much as ``count`` correlated ones.

    Args:
        correlation: between slices by lag, from 1 at lag 0.
        count: slices taken.
        stride: lag between one and the next.

    N / (1 + 2 sum_k (1 - k/N) rho_k), summed until the correlation first vanishes: what a weave has in common with
    itself a period later is no copy.
    """
    lags = correlation[stride::stride][: max(0, count - 1)]
    gone = np.flatnonzero(lags <= 0)
    lags = lags[: int(gone[0])] if gone.size else lags
    weights = 1 - np.arange(1, lags.size + 1) / max(1, count)
    return float(count / (1 + 2 * float((weights * lags).sum())))


def histogram(samples: Samples, window: Window) -> dict[str, object]:
    """Return counts of the sampled finite values in equal bins, which reach half a window beyond both of its ends."""
    values = np.concatenate([np.asarray(one, np.float64) for _, one in sorted(samples.values.items())] or [np.zeros(0)])
    values = values[np.isfinite(values)]
    low, high = sorted((window.low, window.high))
    if values.size:
        margin = (high - low) / 2
        low, high = max(float(values.min()), low - margin), min(float(values.max()), high + margin)
    if not low < high:
        high = low + 1.0
    counts, _ = np.histogram(values, bins=_BINS, range=(low, high))
    return {"low": low, "high": high, "counts": counts.tolist(), "num_values": int(values.size)}


def _correlation(samples: Samples, axis: int) -> tuple[NDArray[np.float64], int]:
    """Return the correlation by lag along a stored axis, and how many voxels a lag is."""
    if axis:
        lines = [planes[axis - 1] for _, planes in sorted(samples.planes.items())]
        return (autocorrelation(lines), 1) if lines else (np.ones(1), 1)
    numbers = sorted(samples.points)
    strides = np.diff(numbers)
    spacing = int(np.median(strides)) if strides.size else 1
    if len(numbers) < 3:
        return np.ones(1), spacing
    return autocorrelation([np.stack([samples.points[z] for z in numbers], axis=1)]), spacing
