"""One grey window per volume: counts <-> [0, 255]."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Window:
    """A linear map of stored values to grey levels: ``low`` becomes 0, ``high`` 255, what lies beyond is clipped.

    ``low`` above ``high`` turns the picture round. The same window for every slice of a volume keeps brightness
    comparable between slices.

    Attributes:
        low: stored value of grey level 0.
        high: stored value of grey level 255.
        fill: grey level of what is not finite.
    """

    low: float
    high: float
    fill: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high)) or self.low == self.high:
            raise ValueError(f"a window needs two different finite ends, got {self.low} and {self.high}")

    def to_uint8(self, plane: NDArray[Any]) -> NDArray[np.uint8]:
        """Return grey levels, rounded to nearest, same shape; values that are not finite become ``fill``.

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
            grey[~np.isfinite(plane)] = self.fill
        return grey.astype(np.uint8)

    def to_counts(self, grey: NDArray[Any]) -> NDArray[np.float64]:
        """Return the stored values that grey levels stand for; the inverse of ``to_uint8`` up to half a grey level.

        Args:
            grey: grey levels in [0, 255], any shape; fractions are kept.
        """
        return self.low + np.asarray(grey, np.float64) * ((self.high - self.low) / 255.0)

    def to_stored(self, grey: NDArray[Any], dtype: str) -> NDArray[Any]:
        """Return ``to_counts`` in the type of a volume; whole numbers are rounded and kept within its range.

        Args:
            grey: grey levels in [0, 255], any shape.
            dtype: NumPy name of the type, such as ``uint16``.
        """
        counts = self.to_counts(grey)
        if np.dtype(dtype).kind in "ui":
            limits = np.iinfo(dtype)
            counts = np.clip(np.rint(counts), limits.min, limits.max)
        return counts.astype(dtype)


@functools.lru_cache(maxsize=8)
def _table(window: Window, dtype: str) -> NDArray[np.uint8]:
    """Return the grey level of every value an 8 or 16 bit integer can have, indexed by its bits as unsigned."""
    bits = np.arange(256 ** np.dtype(dtype).itemsize, dtype=f"u{np.dtype(dtype).itemsize}")
    return window.to_uint8(bits.view(dtype).astype(np.float64))


def window_from(record: Mapping[str, Any]) -> Window:
    """Return the window of a manifest's entry; the inverse of ``WindowEstimate.as_dict``."""
    return Window(low=float(record["low"]), high=float(record["high"]), fill=int(record.get("fill", 0)))
