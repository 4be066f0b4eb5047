"""One grey-level window per volume: counts of the scanner <-> [0, 255]."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError

# Planes and voxels that the statistics look at. With 64 planes of a real volume the percentiles are within a fraction
# of a grey level of those of all voxels.
MAX_PLANES = 64
_SAMPLES_PER_PLANE = 131072


@dataclass(frozen=True, kw_only=True)
class Window:
    """A linear map of stored values to grey levels: ``low`` becomes 0, ``high`` 255, what lies beyond is clipped.

    ``low`` above ``high`` turns the picture round. The same window for every slice of a volume keeps brightness
    comparable between slices.

    Attributes:
        low: stored value of grey level 0.
        high: stored value of grey level 255.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high)) or self.low == self.high:
            raise ValueError(f"a window needs two different finite ends, got {self.low} and {self.high}")

    def to_uint8(self, plane: NDArray[Any]) -> NDArray[np.uint8]:
        """Return grey levels, rounded to nearest, same shape; values that are not finite become 0.

        Args:
            plane: stored values, any shape, real.
        """
        if plane.dtype.kind in "ui" and plane.dtype.itemsize <= 2:
            unsigned = plane.view(f"u{plane.dtype.itemsize}")
            return _table(self, plane.dtype.str)[unsigned]
        # Double precision, because attenuation values differ far behind the point and counts far before it.
        grey = plane.astype(np.float64)
        grey -= self.low
        grey *= 255.0 / (self.high - self.low)
        np.rint(grey, out=grey)
        np.clip(grey, 0.0, 255.0, out=grey)
        if plane.dtype.kind == "f":
            grey[~np.isfinite(plane)] = 0.0
        return grey.astype(np.uint8)

    def to_counts(self, grey: NDArray[Any]) -> NDArray[np.float64]:
        """Return the stored values that grey levels stand for; the inverse of ``to_uint8`` up to half a grey level.

        Args:
            grey: grey levels in [0, 255], any shape; fractions are kept.
        """
        return self.low + np.asarray(grey, np.float64) * ((self.high - self.low) / 255.0)


@functools.lru_cache(maxsize=8)
def _table(window: Window, dtype: str) -> NDArray[np.uint8]:
    """Return the grey level of every value an 8 or 16 bit integer can have, indexed by its bits as unsigned."""
    bits = np.arange(256 ** np.dtype(dtype).itemsize, dtype=f"u{np.dtype(dtype).itemsize}")
    return window.to_uint8(bits.view(dtype).astype(np.float64))


@dataclass(frozen=True, kw_only=True)
class WindowEstimate:
    """A window and what it was estimated from; goes into the manifest.

    Attributes:
        window: the window.
        percentiles: the (low, high) percentiles asked for.
        num_planes: how many planes were looked at.
        clipped_low: share of the finite sampled voxels below the window.
        clipped_high: share above it.
        non_finite: share of the sampled voxels that are NaN or infinite.
        minimum: smallest finite sampled value.
        maximum: largest finite sampled value.
    """

    window: Window
    percentiles: tuple[float, float]
    num_planes: int
    clipped_low: float
    clipped_high: float
    non_finite: float
    minimum: float
    maximum: float

    def as_dict(self) -> dict[str, object]:
        """Return plain values, with the window's ends first."""
        fields = dataclasses.asdict(self)
        return fields.pop("window") | fields


def window_from(record: Mapping[str, Any]) -> Window:
    """Return the window of a manifest's entry; the inverse of ``WindowEstimate.as_dict``."""
    return Window(low=float(record["low"]), high=float(record["high"]))


def sampled_planes(num_planes: int) -> list[int]:
    """Return at most ``MAX_PLANES`` evenly spaced plane numbers, away from both ends, where scans are often air."""
    count = min(num_planes, MAX_PLANES)
    return [int((i + 0.5) * num_planes / count) for i in range(count)]


def estimate(
    planes: Iterable[NDArray[Any]], *, percentiles: tuple[float, float], is_inverted: bool = False, path: Path
) -> WindowEstimate:
    """Estimate the window of a volume from some of its planes.

    Args:
        planes: sampled planes, (Y, X), stored values. Large ones are thinned on a grid that meets all columns.
        percentiles: shares of the finite voxels, in percent, that lie below the low and the high end.
        is_inverted: swap the ends, so that low values are bright.
        path: the volume, for messages.

    Raises:
        InputError: no voxel is finite, or all have the same value.
    """
    samples = [_thinned(plane) for plane in planes]
    values = np.concatenate(samples)
    num_all = values.size
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    if not values.size:
        raise InputError(f"{path}: none of the sampled voxels is a finite number")
    low, high = (float(end) for end in np.percentile(values, percentiles))
    minimum, maximum = float(values.min()), float(values.max())
    if low == high:
        # A few bright voxels in a constant volume lie beyond the percentiles.
        low, high = minimum, maximum
    if low == high:
        raise InputError(f"{path}: every sampled voxel has the value {low:g}; there is nothing to see")
    return WindowEstimate(
        window=Window(low=high, high=low) if is_inverted else Window(low=low, high=high),
        percentiles=percentiles,
        num_planes=len(samples),
        clipped_low=float(np.mean(values < low)),
        clipped_high=float(np.mean(values > high)),
        non_finite=1.0 - values.size / num_all,
        minimum=minimum,
        maximum=maximum,
    )


def _thinned(plane: NDArray[Any]) -> NDArray[Any]:
    """Return every n-th voxel of a plane, with n coprime to its width."""
    step = max(1, -(-plane.size // _SAMPLES_PER_PLANE))
    while math.gcd(step, plane.shape[1]) > 1:
        step += 1
    # Half precision and one bit cannot hold a percentile between two of their values.
    sample = plane.ravel()[::step]
    return sample.astype(np.float32) if sample.dtype.kind == "b" or sample.dtype == np.float16 else sample.copy()
