"""Look into a volume before slicing it: what the file is, three planes of each direction, its grey levels, the cost.

    python -m data_prep.inspect_volume scan.tif --output scan.png

The picture shows each direction's slices at a quarter, the middle and three quarters, and the histogram with the
window. Nothing is changed, and no more than a few hundred planes are read.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import UsageError
from configs.load import Positional, as_dict, command
from data_prep.folders import png
from data_prep.folders.publish import check_writable
from data_prep.readers.info import ReadConfig, VolumeInfo
from data_prep.readers.open import open_volume
from data_prep.readers.places import place_of
from data_prep.slicing.card import notices
from data_prep.slicing.config import AXES, SliceConfig
from data_prep.slicing.intensity import WindowConfig, WindowEstimate
from data_prep.slicing.plan import Plan, make_plans
from data_prep.slicing.planes import num_workers
from prompts.vocabulary import DEFAULT

# Planes that the pictures across them are made of, and slices shown of each direction.
_MOST_PLANES, _SHOWN = 384, (0.25, 0.5, 0.75)
_BINS = 256
# Seconds a core takes to cut and encode a million pixels (benchmarks/slicing.py).
_SECONDS_PER_MEGAPIXEL = 0.018


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What to look at, and the settings of the slicer that change what would come out."""

    volume: Positional[str]
    """File, folder of slices, or URL."""
    output: Path | None = None
    """Picture to write, a PNG; inspect.png if not given."""
    overwrite: bool = False
    """Replace the picture if it is there."""
    thickness_axis: Literal["z", "y", "x"] = "z"
    """Stored axis that runs through the thickness of the material."""
    warp_axis: Literal["z", "y", "x"] = "y"
    """Stored axis along the warp."""
    weft_axis: Literal["z", "y", "x"] = "x"
    """Stored axis along the weft."""
    voxel_size_um: tuple[float, ...] | None = None
    """Edge of a voxel in micrometres, one number or three for z y x; what the file says if not given."""
    read: ReadConfig = ReadConfig()
    grey: WindowConfig = WindowConfig()
    stride: int = 1
    """Take every n-th slice of each direction."""
    max_per_axis: int | None = None
    """Widen the stride until at most this many slices are taken per direction."""
    memory_gb: float | None = None
    """Memory the process may use, in 10^9 bytes; by default 4 or a quarter of the machine's, if that is less."""
    dry_run: bool = False
    """Say what the file is, from its headers alone, and stop."""

    def __post_init__(self) -> None:
        _ = self.slicing  # refuses what the slicer would
        if self.output is not None and self.output.suffix.lower() != ".png":
            raise ValueError(f"--output {self.output}: name a file that ends with .png")

    @property
    def slicing(self) -> SliceConfig:
        """The slicer's settings; the state stands for any."""
        return SliceConfig(
            volumes=(f"{next(iter(DEFAULT.states))}={self.volume}",),
            output_dir=Path("out"),
            thickness_axis=self.thickness_axis,
            warp_axis=self.warp_axis,
            weft_axis=self.weft_axis,
            voxel_size_um=self.voxel_size_um,
            read=self.read,
            grey=self.grey,
            split="none",
            stride=self.stride,
            max_per_axis=self.max_per_axis,
            memory_gb=self.memory_gb,
        )


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


def main(config: InspectConfig) -> None:
    """Print what a volume is, draw it, and say what slicing it would give."""
    output = config.output or Path("inspect.png")
    if not config.dry_run:
        if output.exists() and not config.overwrite:
            raise UsageError(f"--output {output}: exists; name another file or pass --overwrite")
        check_writable(output, "--output")
    if config.dry_run:
        info = open_volume(place_of(config.volume), config.read).info
        _warn(info.warnings)
        print(_of_file(info))
        print("dry run: no voxel was read and nothing was written")
        return
    (plan,) = make_plans(config.slicing, DEFAULT)
    info, window = plan.volume.info, plan.volume.window
    _warn(notices(plan, config.slicing))
    look = look_at(plan, config.slicing.roles)
    print(_of_file(info))
    print(_of_values(window))
    print(_of_slicing(plan, look, config.slicing))
    draw(plan, look, config.slicing.roles, output)
    print(f"{output}: slices of the three directions, and the histogram with the window. Next:\n")
    print("  " + next_command(config, plan.volume.name))


def next_command(config: InspectConfig, name: str) -> str:
    """Return the command that slices what was looked at, as it was looked at; the state is left to be named."""
    slicing = config.slicing
    plain, default = as_dict(slicing), as_dict(SliceConfig(volumes=slicing.volumes, output_dir=slicing.output_dir))
    words = ["python -m data_prep.slice --volumes", f"STATE={shlex.quote(config.volume)}"]
    for flag, value in plain.items():
        if flag == "split" or value == default[flag]:
            continue
        several = [f"{key}={one}" for key, one in value.items()] if isinstance(value, dict) else value
        if several is True:
            words.append(f"--{flag}")
        else:
            words += [
                f"--{flag}",
                *(shlex.quote(str(one)) for one in (several if isinstance(several, list) else [several])),
            ]
    return " ".join([*words, f"--output_dir data/{name}"])


def _warn(warnings: Sequence[str]) -> None:
    """Print what is doubtful, a line each."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


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


def _of_file(info: VolumeInfo) -> str:
    """Say what the file is."""
    voxel = "unknown; give --voxel_size_um" if info.voxel_um is None else " x ".join(f"{e:g}" for e in info.voxel_um)
    lines = [
        f"{info.path}: {'x'.join(map(str, info.shape))} {info.dtype} (z y x), {info.num_bytes / 1e6:.1f} MB, "
        f"{info.storage}",
        f"  voxel (z y x, um): {voxel}",
    ]
    return "\n".join([*lines, *(f"  {note}" for note in info.notes)])


def _of_values(window: WindowEstimate) -> str:
    """Say what the voxels hold."""
    padding = "none" if window.padding is None else f"{window.padding:g} ({window.padding_share:.1%})"
    ends = f"{window.window.low:g} to {window.window.high:g} ({window.method})"
    return (
        f"  values: {window.minimum:g} to {window.maximum:g} in {window.num_planes} planes; padding {padding}; "
        f"not finite {window.non_finite:.1%}\n"
        f"  window: {ends}; {window.clipped_low:.2%} below and {window.clipped_high:.2%} above are clipped"
    )


def _of_slicing(plan: Plan, look: Inspection, config: SliceConfig) -> str:
    """Say what slicing would give: counts, time, disk."""
    parts, pixels = [], 0
    for name, axis in zip(AXES, config.roles, strict=True):
        several = [picture.row for (of, _), some in plan.pictures.items() if of == axis for picture in some]
        pixels += sum(row.width * row.height for row in several)
        if several:
            parts.append(f"{len(several)} {name} of {several[0].height}x{several[0].width}")
    depth, workers = plan.volume.info.shape[0], num_workers(config)
    seconds = plan.num_passes * depth * look.seconds_per_plane + pixels / 1e6 * _SECONDS_PER_MEGAPIXEL / workers
    return (
        f"  slicing gives {len(plan.all_pictures)} pictures ({', '.join(parts)}), about "
        f"{pixels * look.bytes_per_pixel / 1e6:.0f} MB, in about {max(seconds, 1):.0f} s with {workers} threads; "
        f"passes {plan.num_passes}"
    )


def draw(plan: Plan, look: Inspection, roles: tuple[int, int, int], output: Path) -> None:
    """Write the picture: a row of slices for each direction, and the histogram."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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


if __name__ == "__main__":
    command(InspectConfig, main)
