"""One grey-level window per volume, or per campaign of volumes: counts of the scanner <-> [0, 255]."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError, UsageError
from data_prep.folders.manifest import MANIFEST_NAME, read_manifest
from data_prep.folders.window import Window, window_from

# Planes and voxels that the statistics look at. With 64 planes of a real volume the percentiles are within a fraction
# of a grey level of those of all voxels.
MAX_PLANES = 64
_SAMPLES_PER_PLANE = 131072
# Share of the voxels that one value must have to be the padding around a scan.
_PADDING_SHARE = 0.005


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Which stored values become black and white; the same for all slices of a volume."""

    window: Literal["percentile", "minmax", "range", "manifest"] = "percentile"
    """How the window is found: percentiles of the voxels, their extremes (reads every plane), a range of stored values,
    or the window of an earlier dataset."""
    window_percentile: tuple[float, float] = (0.1, 99.9)
    """--window percentile: shares of the voxels, in percent, that become black and white."""
    window_range: tuple[float, float] | None = None
    """--window range: stored values of black and white; swapped where grey levels are turned round (--invert)."""
    window_manifest: Path | None = None
    """--window manifest: dataset folder, or its manifest.json, whose window is taken."""
    window_scope: Literal["volume", "campaign"] = "volume"
    """volume: each volume has its own window; campaign: one for all volumes, so that their greys compare."""
    padding: str = "auto"
    """Value around a scan that is kept out of the window's statistics: a number, none, or auto for the value that all
    corners hold."""
    invert: Literal["auto", "yes", "no"] = "auto"
    """Make low values bright; auto does what the file says."""
    fill: int = 0
    """Grey level, 0 to 255, of voxels that are not finite."""

    def __post_init__(self) -> None:
        low, high = self.window_percentile
        if not 0 <= low < high <= 100:
            raise ValueError(f"--window_percentile {low} {high}: give two rising numbers within 0 and 100")
        if (self.window == "range") != (self.window_range is not None):
            raise ValueError(f"--window {self.window}: --window_range goes with --window range, which needs it")
        if (self.window == "manifest") != (self.window_manifest is not None):
            raise ValueError(f"--window {self.window}: --window_manifest goes with --window manifest, which needs it")
        if self.window == "manifest" and self.invert != "auto":
            raise ValueError(f"--invert {self.invert}: --window manifest takes a window as it is, with its direction")
        if self.window == "manifest" and self.fill:
            raise ValueError(f"--fill {self.fill}: --window manifest takes a window as it is, with its fill")
        if self.window_range is not None:
            low, high = self.window_range
            if not (math.isfinite(low) and math.isfinite(high)) or low == high:
                raise ValueError(f"--window_range {low} {high}: give two different finite numbers")
        if self.window in ("range", "manifest") and self.window_scope == "campaign":
            raise ValueError(f"--window_scope campaign: --window {self.window} is the same for all volumes already")
        if self.padding not in ("auto", "none"):
            try:
                is_number = math.isfinite(float(self.padding))
            except ValueError:
                is_number = False
            if not is_number:
                raise ValueError(f"--padding {self.padding}: give auto, none or a number")
        if not 0 <= self.fill <= 255:
            raise ValueError(f"--fill {self.fill}: must be a grey level from 0 to 255")


@dataclass(frozen=True, kw_only=True)
class WindowEstimate:
    """A window and what it was estimated from; goes into the manifest.

    Attributes:
        window: the window.
        percentiles: the (low, high) percentiles asked for.
        num_planes: how many planes were looked at.
        clipped_low: share of the finite sampled voxels, without padding, below the darker end of the window.
        clipped_high: share above the other.
        non_finite: share of the sampled voxels that are NaN or infinite.
        minimum: smallest finite value seen, without padding.
        maximum: largest one.
        method: how the window was found.
        padding: value that was kept out of the statistics; None if there is none.
        padding_share: its share of the sampled voxels.
    """

    window: Window
    percentiles: tuple[float, float]
    num_planes: int
    clipped_low: float
    clipped_high: float
    non_finite: float
    minimum: float
    maximum: float
    method: str = "percentile"
    padding: float | None = None
    padding_share: float = 0.0

    def as_dict(self) -> dict[str, object]:
        """Return plain values, with the window's ends first."""
        fields = dataclasses.asdict(self)
        return fields.pop("window") | fields


def window_of_dataset(path: Path, name: str, state: str) -> Window:
    """Return the window that a dataset's volumes share, or that of its volume of the same name, or else state.

    Args:
        path: dataset folder, or its manifest.json.
        name: the volume that is to get the window.
        state: its state.

    Raises:
        InputError: the manifest cannot be read, or an entry has no window.
        UsageError: its volumes have several windows and none or several fit.
    """
    folder = path.parent if path.name == MANIFEST_NAME else path
    entries: Any = read_manifest(folder)["volumes"]
    try:
        windows = [window_from(entry["window"]) for entry in entries]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{folder / MANIFEST_NAME}: a volume has no window; slice the volumes again") from None
    for fits in (
        windows,
        [window for window, entry in zip(windows, entries, strict=True) if entry.get("name") == name],
        [window for window, entry in zip(windows, entries, strict=True) if entry.get("state") == state],
    ):
        if len(set(fits)) == 1:
            return fits[0]
    raise UsageError(
        f"--window_manifest {path}: its {len(entries)} volumes have several windows, and none of them fits "
        f"'{name}' ({state}) alone; give --window range"
    )


def sampled_planes(num_planes: int, config: WindowConfig | None = None) -> list[int]:
    """Return at most ``MAX_PLANES`` evenly spaced plane numbers, away from both ends, where scans are often air.

    All of them where the extremes are asked for.
    """
    if config is not None and config.window == "minmax":
        return list(range(num_planes))
    count = min(num_planes, MAX_PLANES)
    return [int((i + 0.5) * num_planes / count) for i in range(count)]


def estimate(
    planes: Iterable[NDArray[Any]],
    *,
    config: WindowConfig = WindowConfig(),
    is_inverted: bool = False,
    window: Window | None = None,
    path: object,
) -> WindowEstimate:
    """Estimate the window of a volume from some of its planes.

    Args:
        planes: sampled planes, (Y, X), stored values. Large ones are thinned on a grid that meets all columns; extremes
            are those of all their voxels.
        config: how.
        is_inverted: what the file says; swaps the ends, so that low values are bright.
        window: a window to take as it is, and only to measure.
        path: the volume, for messages.

    Raises:
        InputError: no voxel is finite, or all have the same value.
    """
    samples, extremes, corners = [], _Extremes(config), set[float]()
    for plane in planes:
        samples.append(_thinned(plane))
        in_corners = {float(plane[row, column]) for row in (0, -1) for column in (0, -1)}
        extremes.add(plane if config.window == "minmax" else samples[-1], in_corners)
        corners |= in_corners
    values = np.concatenate(samples)
    num_all = values.size
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    if not values.size:
        raise InputError(f"{path}: none of the sampled voxels is a finite number")
    non_finite = 1.0 - values.size / num_all
    padding = _padding(values, corners, config)
    if padding is not None:
        inside = values[values != padding]
        padding_share, values = 1 - inside.size / values.size, inside
    else:
        padding_share = 0.0
    minimum, maximum = extremes.without(padding)
    method: str = config.window
    if window is None:
        low, high = _ends(values, minimum, maximum, config)
        if low == high:
            raise InputError(f"{path}: every sampled voxel has the value {low:g}; there is nothing to see")
        inverted = is_inverted if config.invert == "auto" else config.invert == "yes"
        window = Window(low=high if inverted else low, high=low if inverted else high, fill=config.fill)
    else:
        method = "manifest" if config.window == "manifest" else "campaign"
    return WindowEstimate(
        window=window,
        percentiles=config.window_percentile,
        num_planes=len(samples),
        clipped_low=float(np.mean(values < min(window.low, window.high))),
        clipped_high=float(np.mean(values > max(window.low, window.high))),
        non_finite=non_finite,
        minimum=minimum,
        maximum=maximum,
        method=method,
        padding=padding,
        padding_share=padding_share,
    )


def _ends(values: NDArray[Any], minimum: float, maximum: float, config: WindowConfig) -> tuple[float, float]:
    """Return the stored values of black and white."""
    if config.window_range is not None:
        return config.window_range
    if config.window == "minmax":
        return minimum, maximum
    low, high = (float(end) for end in np.percentile(values, config.window_percentile))
    # A few bright voxels in a constant volume lie beyond the percentiles.
    return (low, high) if low != high else (float(values.min()), float(values.max()))


def _padding(values: NDArray[Any], corners: set[float], config: WindowConfig) -> float | None:
    """Return the value to keep out: the one given, or the one in all corners if it is frequent and not all there is."""
    if config.padding == "none":
        return None
    if config.padding != "auto":
        return float(config.padding) if bool((values == float(config.padding)).any()) else None
    if len(corners) != 1 or not all(map(math.isfinite, corners)):
        return None
    (value,) = corners
    share = float(np.mean(values == value))
    rest = values[values != value]
    return value if share > _PADDING_SHARE and rest.size and rest.min() != rest.max() else None


class _Extremes:
    """Smallest and largest finite value of all planes, with and without what may be padding."""

    def __init__(self, config: WindowConfig) -> None:
        self._given = {float(config.padding)} if config.padding not in ("auto", "none") else set[float]()
        self._seen: dict[float | None, tuple[float, float]] = {}

    def add(self, values: NDArray[Any], corners: set[float]) -> None:
        """Look at values of one plane, whose corners hold ``corners``."""
        finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values.reshape(-1)
        self._join(None, finite)
        for value in self._given or (corners if len(corners) == 1 else ()):
            self._join(value, finite[finite != value])

    def _join(self, left_out: float | None, values: NDArray[Any]) -> None:
        if values.size:
            low, high = self._seen.get(left_out, (math.inf, -math.inf))
            self._seen[left_out] = min(low, float(values.min())), max(high, float(values.max()))

    def without(self, padding: float | None) -> tuple[float, float]:
        """Return the extremes of what is not padding."""
        return self._seen[padding]


def _thinned(plane: NDArray[Any]) -> NDArray[Any]:
    """Return every n-th voxel of a plane, with n coprime to its width."""
    step = max(1, -(-plane.size // _SAMPLES_PER_PLANE))
    while math.gcd(step, plane.shape[1]) > 1:
        step += 1
    # Half precision and one bit cannot hold a percentile between two of their values.
    sample = plane.ravel()[::step]
    return sample.astype(np.float32) if sample.dtype.kind == "b" or sample.dtype == np.float16 else sample.copy()
