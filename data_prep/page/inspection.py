"""A volume before it is sliced: some planes, slices of the three directions and grey levels, as one picture."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from data_prep.folders import png
from data_prep.slicing.config import AXES
from data_prep.slicing.intensity import WindowEstimate
from data_prep.slicing.plan import Plan

# Planes that the pictures across them are made of, and slices shown of each direction.
_MOST_PLANES, _SHOWN = 384, (0.25, 0.5, 0.75)
_BINS = 256


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was seen.

    Attributes:
        slices: stored axis -> the shown slices as grey levels (rows, columns), by their number.
        edges: ends of the histogram's bins, stored values.
        counts: sampled voxels in each bin.
        seconds_per_plane: time to read one.
        bytes_per_pixel: of the shown planes, as PNG.
    """

    slices: dict[int, dict[int, NDArray[np.uint8]]]
    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    seconds_per_plane: float
    bytes_per_pixel: float


def look_at(plan: Plan, roles: tuple[int, int, int]) -> Inspection:
    """Read some planes and make slices of all directions of them.

    Args:
        plan: of one volume.
        roles: stored axes along thickness, warp and weft.
    """
    source, window = plan.volume.source, plan.volume.window
    shape = source.info.shape
    shown = {axis: sorted({int(share * shape[axis]) for share in _SHOWN}) for axis in range(3)}
    step = -(-shape[0] // _MOST_PLANES)
    numbers = sorted({*range(0, shape[0], step), *shown[0]} - set(source.info.bad_planes))
    rows: dict[int, dict[int, list[NDArray[np.uint8]]]] = {axis: {n: [] for n in shown[axis]} for axis in (1, 2)}
    planes: dict[int, NDArray[np.uint8]] = {}
    low, high = min(window.minimum, window.window.low, window.window.high), max(window.maximum, window.window.high)
    edges = np.linspace(low, max(high, window.window.low), _BINS + 1)
    counts = np.zeros(_BINS, np.int64)
    reading = 0.0
    start = time.perf_counter()
    for z, plane in source.planes(numbers):
        reading += time.perf_counter() - start
        grey = window.window.to_uint8(plane)
        if z in shown[0]:
            planes[z] = grey
        if z % step == 0:
            for number, lines in rows[1].items():
                lines.append(grey[number].copy())
            for number, lines in rows[2].items():
                lines.append(grey[:, number].copy())
            sample = plane.ravel()[:: max(1, plane.size // 65536)].astype(np.float64)
            sample = sample[np.isfinite(sample)]
            if window.padding is not None:
                sample = sample[sample != window.padding]
            counts += np.histogram(sample, edges)[0]
        start = time.perf_counter()
    slices = {0: planes} | {axis: {n: np.stack(some) for n, some in found.items()} for axis, found in rows.items()}
    some = [picture for found in slices.values() for picture in found.values()]
    return Inspection(
        slices=slices,
        edges=edges,
        counts=counts,
        seconds_per_plane=reading / len(numbers),
        bytes_per_pixel=sum(len(png.encode(picture)) for picture in some) / sum(picture.size for picture in some),
    )


def draw(plan: Plan, look: Inspection, roles: tuple[int, int, int], output: Path) -> None:
    """Write the picture: a row of slices for each direction, and the histogram."""
    info, window = plan.volume.info, plan.volume.window
    figure = Figure(figsize=(12, 13), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(4, len(_SHOWN), height_ratios=[3, 2, 2, 2])
    unit = "um" if plan.volume.voxel_um else "voxels"
    title = f"{info.path.name}: {'x'.join(map(str, info.shape))} {info.dtype} (z y x)"
    figure.suptitle(_plain(title), parse_math=False, fontsize=13)
    for row, (name, axis) in enumerate(zip(AXES, roles, strict=True)):
        rows_axis, columns_axis = (other for other in roles if other != axis)
        for column, (number, picture) in enumerate(sorted(look.slices[axis].items())):
            turned = picture if rows_axis < columns_axis else picture.T
            plot = figure.add_subplot(grid[row, column])
            size = _size(plan, rows_axis), _size(plan, columns_axis)
            plot.imshow(turned, cmap="gray", vmin=0, vmax=255, extent=(0, size[1], size[0], 0), interpolation="nearest")
            plot.set_title(f"{name} ({'zyx'[axis]} = {number})", fontsize=10)
            plot.set_xlabel(f"{'zyx'[columns_axis]} ({unit})", fontsize=8)
            plot.set_ylabel(f"{'zyx'[rows_axis]} ({unit})", fontsize=8)
            plot.tick_params(labelsize=7)
    _draw_histogram(figure.add_subplot(grid[3, :]), look, window)
    figure.savefig(output)


def _size(plan: Plan, axis: int) -> float:
    """Return the length of an axis: in micrometres where known, so that pictures are not stretched, else in voxels."""
    edges = plan.volume.voxel_um
    return plan.volume.info.shape[axis] * (edges[axis] if edges else 1.0)


def _draw_histogram(plot: Any, look: Inspection, window: WindowEstimate) -> None:
    """Draw how often stored values occur, and where black and white lie."""
    plot.fill_between(look.edges[:-1], look.counts, step="post", color="0.6")
    plot.set_yscale("symlog", linthresh=10)
    plot.set_xlim(look.edges[0], look.edges[-1])
    plot.set_ylim(bottom=0)
    for name, value, colour in (("black", window.window.low, "tab:blue"), ("white", window.window.high, "tab:orange")):
        plot.axvline(value, color=colour, label=f"{name} at {value:g}")
    padding = "" if window.padding is None else f"; padding {window.padding:g} ({window.padding_share:.1%}) left out"
    clipped = window.clipped_low + window.clipped_high
    plot.set_title(f"stored values of sampled voxels; {clipped:.2%} lie outside the window{padding}", fontsize=10)
    plot.set_xlabel("stored value", fontsize=8)
    plot.set_ylabel("voxels", fontsize=8)
    plot.tick_params(labelsize=7)
    plot.legend(fontsize=9, loc="upper right")


def _plain(text: str) -> str:
    """Return text that any font can draw."""
    return text.encode("ascii", "replace").decode()
